package worker

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"holdfast/blockdev/serve/control/wire"
	"holdfast/internal/sys"
)

const (
	mostData  = 2 << 30 // bytes of its own; clients' requests in flight are bounded far below
	mostFiles = 8192
)

// confine gives up what is not needed to serve. The order is that in which each step
// still may be done.
//
// An io_uring goes around the filter of system calls, and a ring can be made anew
// without any restriction that an earlier one had. What a ring could do that the
// filter forbids is to open files and sockets: that comes to nothing because the root
// is an empty directory, the user owns nothing, and the network namespace has no way
// out (the daemon started us in it), but for a base that is far away.
func confine(root *os.File, v *wire.Volume, parent int) error {
	defer root.Close()
	if err := sys.LimitSelf(mostData, mostFiles); err != nil {
		return err
	}
	raw, err := root.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) {
		inner = errors.Join(syscall.Fchdir(int(fd)), syscall.Chroot("."), syscall.Chdir("/"))
	})
	if err = errors.Join(err, inner); err != nil {
		return fmt.Errorf("enter an empty root: %w", err)
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(v.Group)); err != nil {
		return fmt.Errorf("become group %d: %w", v.Group, err)
	}
	if err := syscall.Setuid(v.User); err != nil {
		return fmt.Errorf("become user %d: %w", v.User, err)
	}
	if v.DieWithParent { // which the kernel forgets with the change of user
		if err := sys.DieWithParent(parent); err != nil {
			return err
		}
	}
	return sys.ServeOnly(v.Remote)
}
