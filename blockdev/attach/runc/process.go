package runc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// process is a container's first process, held so that its pid keeps its meaning.
type process struct {
	pid       int
	startTime uint64
	pidfd     *os.File
}

// open opens the process of a resolved target. blockdev.ErrGone when it has
// ended, or another one has its pid, or the machine has booted since.
func (a *Attacher) open(t attach.Target) (*process, error) {
	if t.Pid <= 0 || t.StartTime == 0 || t.Boot == "" {
		return nil, invalid("the target was never resolved")
	}
	if t.Boot != a.boot {
		return nil, processGone(t.Pid, "was of another boot")
	}
	p, err := openProcess(t.Pid)
	if err != nil {
		return nil, err
	}
	if p.startTime != t.StartTime {
		p.close()
		return nil, processGone(t.Pid, "is another one now")
	}
	return p, nil
}

// openProcess opens the process that has a pid now.
func openProcess(pid int) (*process, error) {
	pidfd, err := sys.OpenPidfd(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, processGone(pid, "has ended")
	}
	if err != nil {
		return nil, err
	}
	p := &process{pid: pid, pidfd: pidfd}
	// The start time is read by number: it is of this process if the process
	// lives after the reading.
	p.startTime, err = sys.StartTime(pid)
	if gone := p.alive(); gone != nil {
		err = gone
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// alive is nil, or blockdev.ErrGone, or an error that leaves it unknown.
func (p *process) alive() error {
	alive, err := sys.PidfdAlive(p.pidfd)
	if err == nil && !alive {
		return processGone(p.pid, "has ended")
	}
	return err
}

// namespace opens a namespace of the process with open, and tells whether it is
// this daemon's as well.
func (p *process) namespace(open func(pid int) (*os.File, error)) (ns *os.File, shared bool, err error) {
	own, err := open(os.Getpid())
	if err != nil {
		return nil, false, err
	}
	defer own.Close()
	ns, err = open(p.pid)
	if gone := p.alive(); gone != nil {
		if err == nil {
			ns.Close()
		}
		return nil, false, gone
	}
	if err != nil {
		return nil, false, err
	}
	if shared, err = sys.SameNamespace(ns, own); err != nil {
		ns.Close()
		return nil, false, err
	}
	return ns, shared, nil
}

// mountNamespace opens the process's mount namespace, which must be its own.
func (p *process) mountNamespace() (*os.File, error) {
	ns, shared, err := p.namespace(sys.MountNamespace)
	if err == nil && shared {
		ns.Close()
		return nil, invalid("the container has no mount namespace of its own")
	}
	return ns, err
}

// inside runs fn in the process's mount namespace.
func (p *process) inside(fn func(in sys.Inside) error) error {
	ns, err := p.mountNamespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	return sys.InMountNamespace(ns, fn)
}

// rootIs checks that root, a process's, is the root of its namespace. A first
// process that has changed its root, or a container that was started without
// pivot_root on a host that is a chroot itself, has more in its namespace than it
// sees, perhaps the host's tree: a mount path would be looked for, and made, there.
func rootIs(in sys.Inside, root *os.File) error {
	seen, err1 := sys.PlaceOf(root)
	whole, err2 := sys.PlaceOf(in.Root)
	seenMount, err3 := in.MountID(root)
	wholeMount, err4 := in.MountID(in.Root)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	if seen.Device != whole.Device || seen.Inode != whole.Inode || seenMount != wholeMount {
		return invalid("the root of the container's first process is not the root of its mount namespace: it has changed its root, or was started without pivot_root in a chroot")
	}
	return nil
}

// mapOwners makes the files of a mount belong, inside a container with a user
// namespace, to whom they belong on the volume.
func (p *process) mapOwners(mount *os.File) error {
	ns, shared, err := p.namespace(sys.UserNamespace)
	if err != nil {
		return err
	}
	defer ns.Close()
	if shared {
		return nil
	}
	return sys.MapOwners(mount, ns)
}

func (p *process) close() { p.pidfd.Close() }

func isGone(err error) bool { return errors.Is(err, blockdev.ErrGone) }

// explain says why the mount path cannot be walked to inside the container.
func explain(mountPath string, err error) error {
	switch {
	case errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.EAGAIN): // it was moved from under the walk
		return fmt.Errorf("%w: the container changes names above %s: %w", blockdev.ErrBusy, mountPath, err)
	case errors.Is(err, syscall.ELOOP):
		return invalid("mountPath %s leads through a symbolic link, and none is followed: %w", mountPath, err)
	case errors.Is(err, syscall.ENOTDIR):
		return invalid("mountPath %s is, or leads through, something that is not a directory: %w", mountPath, err)
	case errors.Is(err, syscall.EROFS):
		return invalid("mountPath %s does not exist and the filesystem it would be made on is read-only: %w", mountPath, err)
	case errors.Is(err, syscall.ENAMETOOLONG):
		return invalid("mountPath %s has a name that is too long: %w", mountPath, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return invalid("mountPath %s does not exist and the container has no space to make it: %w", mountPath, err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: mountPath %s is being changed by the container: %w", blockdev.ErrBusy, mountPath, err)
	}
	return err
}
