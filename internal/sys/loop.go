package sys

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNoLoop means that a loop device has no backing file.
var ErrNoLoop = errors.New("loop device has no backing file")

// LoopStatus is what the kernel tells of a loop device (LOOP_GET_STATUS64).
type LoopStatus struct {
	Device    uint64 // st_dev of the backing file's filesystem
	Inode     uint64 // of the backing file
	Offset    uint64 // bytes into the backing file
	SizeLimit uint64 // bytes; 0: to the end
	ReadOnly  bool
	DirectIO  bool
	Autoclear bool // the kernel detaches it at the last close
}

// LoopFree asks for the number of a loop device without backing file; the
// kernel makes one if needed. Somebody else may take it before LoopConfigure.
func LoopFree() (int, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer control.Close()
	var number int
	err = ioctl(control, "ioctl(LOOP_CTL_GET_FREE)", func(fd int) (err error) {
		number, err = unix.IoctlRetInt(fd, unix.LOOP_CTL_GET_FREE)
		return err
	})
	return number, err
}

// LoopConfigure backs the loop device dev by a file, with direct I/O where the
// file allows it and sectors of 512 bytes. EBUSY when dev has a file already.
func LoopConfigure(dev, backing *os.File, readOnly bool) error {
	return control(backing, func(file uintptr) error {
		config := unix.LoopConfig{Fd: uint32(file), Size: 512}
		config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
		if readOnly {
			config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
		}
		return ioctl(dev, "ioctl(LOOP_CONFIGURE)", func(fd int) error { return unix.IoctlLoopConfigure(fd, &config) })
	})
}

// LoopStatusOf asks a loop device for its backing file; ErrNoLoop if it has none.
func LoopStatusOf(dev *os.File) (LoopStatus, error) {
	info, err := loopInfo(dev)
	if err != nil {
		return LoopStatus{}, err
	}
	return LoopStatus{
		Device: info.Device, Inode: info.Inode, Offset: info.Offset, SizeLimit: info.Sizelimit,
		ReadOnly:  info.Flags&unix.LO_FLAGS_READ_ONLY != 0,
		DirectIO:  info.Flags&unix.LO_FLAGS_DIRECT_IO != 0,
		Autoclear: info.Flags&unix.LO_FLAGS_AUTOCLEAR != 0,
	}, nil
}

func loopInfo(dev *os.File) (info *unix.LoopInfo64, err error) {
	err = ioctl(dev, "ioctl(LOOP_GET_STATUS64)", func(fd int) (err error) {
		info, err = unix.IoctlLoopGetStatus64(fd)
		return err
	})
	if errors.Is(err, unix.ENXIO) {
		return nil, ErrNoLoop
	}
	return info, err
}

// LoopKeep takes back the autoclear mark that LoopClear leaves on a device that
// is in use.
func LoopKeep(dev *os.File) error {
	info, err := loopInfo(dev)
	if err != nil || info.Flags&unix.LO_FLAGS_AUTOCLEAR == 0 {
		return err
	}
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	return ioctl(dev, "ioctl(LOOP_SET_STATUS64)", func(fd int) error { return unix.IoctlLoopSetStatus64(fd, info) })
}

// LoopSetCapacity makes the device as large as its backing file is now.
func LoopSetCapacity(dev *os.File) error {
	return ioctl(dev, "ioctl(LOOP_SET_CAPACITY)", func(fd int) error {
		return unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0)
	})
}

// LoopClear takes the backing file from the device when the last opening of it,
// dev included, is closed; until then it only has the autoclear mark.
func LoopClear(dev *os.File) error {
	err := ioctl(dev, "ioctl(LOOP_CLR_FD)", func(fd int) error {
		return unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
	})
	if errors.Is(err, unix.ENXIO) {
		return ErrNoLoop
	}
	return err
}

// BlockDeviceSize tells the size of a block device in bytes.
func BlockDeviceSize(dev *os.File) (int64, error) {
	// lseek is the one call that gives 64 bits on every architecture.
	size, err := seek(dev, 0, unix.SEEK_END)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", dev.Name(), err)
	}
	return size, nil
}

// ioctl runs one ioctl on f again while it is interrupted by a signal.
func ioctl(f *os.File, name string, fn func(fd int) error) error {
	err := control(f, func(fd uintptr) error { return retry(func() error { return fn(int(fd)) }) })
	return os.NewSyscallError(name, err)
}
