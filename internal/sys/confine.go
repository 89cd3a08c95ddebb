package sys

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// GainNothing keeps this process, all of its threads and what it starts from
// gaining privileges by running a program (PR_SET_NO_NEW_PRIVS, prctl(2)).
// ENOTSUP in a program that is linked with C.
func GainNothing() error {
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("prctl(PR_SET_NO_NEW_PRIVS)", errno)
	}
	return nil
}

// DieWithParent has the kernel kill this process when the thread that started it ends
// (PR_SET_PDEATHSIG, prctl(2)), which it forgets with every change of user. parent is the
// process that it was started by: an error when that has ended already. ENOTSUP in a program
// that is linked with C.
func DieWithParent(parent int) error {
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("prctl(PR_SET_PDEATHSIG)", errno)
	}
	if os.Getppid() != parent {
		return errors.New("the process that started this one has ended")
	}
	return nil
}
