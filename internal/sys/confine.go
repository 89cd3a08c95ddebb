package sys

import (
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
