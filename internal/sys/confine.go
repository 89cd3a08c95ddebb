package sys

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// GainNothing keeps this process, all of its threads and what it starts from
// gaining privileges by running a program (PR_SET_NO_NEW_PRIVS, prctl(2)).
// An error in a program that is linked with C.
func GainNothing() error {
	return onAllThreads("prctl(PR_SET_NO_NEW_PRIVS)", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1)
}

// onAllThreads makes a system call in all threads of this process. Go cannot where C has
// threads of its own, and says of it no more than that it is not supported.
func onAllThreads(name string, call, first, second uintptr) error {
	_, _, errno := syscall.AllThreadsSyscall6(call, first, second, 0, 0, 0, 0)
	switch errno {
	case 0:
		return nil
	case syscall.ENOTSUP:
		return fmt.Errorf("%s in all threads: this program is linked with C, and has to be built without it (CGO_ENABLED=0)", name)
	}
	return os.NewSyscallError(name, errno)
}

// DieWithParent has the kernel kill this process when the thread that started it ends
// (PR_SET_PDEATHSIG, prctl(2)), which it forgets with every change of user. parent is the
// process that it was started by: an error when that has ended already, and in a program
// that is linked with C.
func DieWithParent(parent int) error {
	if err := onAllThreads("prctl(PR_SET_PDEATHSIG)", unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL)); err != nil {
		return err
	}
	if os.Getppid() != parent {
		return errors.New("the process that started this one has ended")
	}
	return nil
}
