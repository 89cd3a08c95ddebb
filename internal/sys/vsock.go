package sys

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// VsockHost is the address of the host, seen from a guest (vsock(7)).
const VsockHost = unix.VMADDR_CID_HOST

// ListenVsock listens on a vsock port (vsock(7)) for whoever reaches this machine.
func ListenVsock(port uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket(AF_VSOCK)", err)
	}
	f := os.NewFile(uintptr(fd), "vsock:"+strconv.FormatUint(uint64(port), 10))
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
	if err == nil {
		err = unix.Listen(fd, 16)
	}
	if err != nil {
		f.Close()
		return nil, wrap("listen", f.Name(), err)
	}
	return f, nil
}

// AcceptVsock takes the next connection and tells whose it is.
func AcceptVsock(listener *os.File) (conn *os.File, from uint32, err error) {
	raw, err := listener.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	var fd int
	var failed error
	var address unix.Sockaddr
	err = raw.Read(func(at uintptr) bool {
		failed = retry(func() (err error) {
			fd, address, err = unix.Accept4(int(at), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return err
		})
		return !errors.Is(failed, unix.EAGAIN)
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return nil, 0, wrap("accept", listener.Name(), err)
	}
	if vm, ok := address.(*unix.SockaddrVM); ok {
		from = vm.CID
	}
	return os.NewFile(uintptr(fd), "connection of "+listener.Name()), from, nil
}
