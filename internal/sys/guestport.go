package sys

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// GuestPort is a virtio-serial port, inside of a guest. Its other side comes and
// goes: Read waits over that, where the device itself tells of an end.
type GuestPort struct{ *os.File }

// OpenGuestPort opens a port's node; EBUSY while another process has it.
func OpenGuestPort(path string) (GuestPort, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	return GuestPort{f}, err
}

// Read waits for data, also while nobody is on the other side. It costs nothing
// meanwhile: the kernel wakes it.
func (p GuestPort) Read(b []byte) (n int, err error) {
	raw, err := p.SyscallConn()
	if err != nil {
		return 0, err
	}
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		failed = retry(func() (err error) {
			n, err = unix.Read(int(fd), b)
			return err
		})
		// Nothing: there is none yet (EAGAIN), or nobody is there (0 bytes).
		return failed == nil && n > 0 || failed != nil && !errors.Is(failed, unix.EAGAIN)
	})
	if err == nil && failed != nil {
		err = wrap("read", p.Name(), failed)
	}
	return max(n, 0), err
}
