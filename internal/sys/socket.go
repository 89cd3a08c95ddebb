package sys

import (
	"bytes"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// TakeSocket gives another descriptor of a socket, in blocking mode and unknown to
// Go's network poller: whoever waits for it in another way (io_uring) does not wake
// the poller with every message as well. The caller closes conn, which no longer is
// of use, and later the file.
func TakeSocket(conn syscall.Conn) (*os.File, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if controlErr := raw.Control(func(of uintptr) {
		if fd, err = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			err = unix.SetNonblock(fd, false)
		}
	}); controlErr != nil {
		return nil, controlErr
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, os.NewSyscallError("dup", err)
	}
	return os.NewFile(uintptr(fd), "socket"), nil
}

// ShutdownSocket ends one or both directions of a socket (unix.SHUT_RD and so on).
func ShutdownSocket(socket *os.File, how int) error {
	return os.NewSyscallError("shutdown", control(socket, func(fd uintptr) error { return unix.Shutdown(int(fd), how) }))
}

// UnixSocketExists reports whether a unix socket of this network namespace is held by
// anybody, a process or the kernel, by its inode: what fstat(2) tells of it.
func UnixSocketExists(inode uint64) (bool, error) {
	table, err := os.ReadFile("/proc/net/unix") // Num RefCount Protocol Flags Type St Inode Path
	if err != nil {
		return false, err
	}
	const column = 6
	wanted := strconv.FormatUint(inode, 10)
	for line := range bytes.Lines(table) {
		if fields := bytes.Fields(line); len(fields) > column && string(fields[column]) == wanted {
			return true, nil
		}
	}
	return false, nil
}
