package sys

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The requests of the kernel's NBD client (include/uapi/linux/nbd.h: _IO(0xab, n)),
// which x/sys does not have.
const (
	nbdSetSock       = 0xab00
	nbdSetBlockSize  = 0xab01
	nbdDoIt          = 0xab03
	nbdClearSock     = 0xab04
	nbdSetSizeBlocks = 0xab07
	nbdDisconnect    = 0xab08
	nbdSetFlags      = 0xab0a

	nbdBlock = 4096 // bytes of the device's logical block
)

// NBDConnect makes dev, a device of the kernel's NBD client that nobody uses, one of
// size bytes (whole blocks of 4 KiB) that asks conn, a connection to a server past the
// handshake, in which the server gave flags. The kernel has conn's socket from then on.
// Nothing is served before NBDServe.
func NBDConnect(dev, conn *os.File, size int64, flags uint16) error {
	runtime.LockOSThread() // the kernel wants all of it from one thread
	defer runtime.UnlockOSThread()
	var socket int
	if err := control(conn, func(fd uintptr) error { socket = int(fd); return nil }); err != nil {
		return err
	}
	for _, step := range []struct {
		name    string
		request uint
		value   int
	}{
		{"ioctl(NBD_SET_SOCK)", nbdSetSock, socket},
		{"ioctl(NBD_SET_BLKSIZE)", nbdSetBlockSize, nbdBlock},
		{"ioctl(NBD_SET_SIZE_BLOCKS)", nbdSetSizeBlocks, int(size / nbdBlock)},
		{"ioctl(NBD_SET_FLAGS)", nbdSetFlags, int(flags)},
	} {
		if err := nbdControl(dev, step.name, step.request, step.value); err != nil {
			return err
		}
	}
	runtime.KeepAlive(conn)
	return nil
}

// NBDServe has the device do requests, and returns when NBDDisconnect or the server
// has ended that.
func NBDServe(dev *os.File) error {
	return nbdControl(dev, "ioctl(NBD_DO_IT)", nbdDoIt, 0)
}

// NBDDisconnect ends NBDServe. Requests that nobody has answered fail.
func NBDDisconnect(dev *os.File) error {
	return nbdControl(dev, "ioctl(NBD_DISCONNECT)", nbdDisconnect, 0)
}

// NBDClear takes the connections from a device whose NBDServe has returned.
func NBDClear(dev *os.File) error {
	return nbdControl(dev, "ioctl(NBD_CLEAR_SOCK)", nbdClearSock, 0)
}

func nbdControl(dev *os.File, name string, request uint, value int) error {
	return ioctl(dev, name, func(fd int) error { return unix.IoctlSetInt(fd, request, value) })
}
