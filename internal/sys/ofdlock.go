package sys

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLocked means that somebody else holds the lock.
var ErrLocked = errors.New("locked by another process")

// LockFile takes an exclusive OFD lock on the whole of f without waiting. The
// lock goes with the last descriptor of this opening, however the process ends.
// ErrLocked when another opening has it.
func LockFile(f *os.File) error {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	err := control(f, func(fd uintptr) error { return unix.FcntlFlock(fd, unix.F_OFD_SETLK, &lock) })
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return ErrLocked
	}
	if err != nil {
		return os.NewSyscallError("fcntl(F_OFD_SETLK)", err)
	}
	return nil
}

// UnlockFile gives the lock of this opening up at once. Closing f alone does so
// only when no other descriptor of it is left, and a process that is just being
// started holds one until its exec.
func UnlockFile(f *os.File) error {
	lock := unix.Flock_t{Type: unix.F_UNLCK, Whence: unix.SEEK_SET}
	err := control(f, func(fd uintptr) error { return unix.FcntlFlock(fd, unix.F_OFD_SETLK, &lock) })
	return os.NewSyscallError("fcntl(F_OFD_SETLK)", err)
}

// control runs fn on f's descriptor without switching it to blocking mode.
func control(f *os.File, fn func(fd uintptr) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = fn(fd) }); err != nil {
		return err
	}
	return inner
}
