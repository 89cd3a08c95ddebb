package sys

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// OnlyOpening reports whether f is provably the only opening of its file on this
// host, openings by the kernel (a loop device's) included: a write lease is given
// for no other file (fcntl(2), F_SETLEASE). It is given back at once. false is no
// proof of the contrary.
func OnlyOpening(f *os.File) (bool, error) {
	var only bool
	err := control(f, func(fd uintptr) error {
		_, err := unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_WRLCK)
		if err != nil {
			return nil //nolint:nilerr // no lease, for whatever reason: no proof
		}
		only = true
		_, err = unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_UNLCK)
		if errors.Is(err, unix.EAGAIN) { // broken meanwhile by another opening
			only = false
			return nil
		}
		return err
	})
	return only, wrap("fcntl(F_SETLEASE)", f.Name(), err)
}
