package sys

import (
	"os"

	"golang.org/x/sys/unix"
)

// SetDeviceReadOnly makes a block device refuse writes, whoever has it open, or
// take them again (BLKROSET, include/uapi/linux/fs.h).
func SetDeviceReadOnly(dev *os.File, readOnly bool) error {
	value := 0
	if readOnly {
		value = 1
	}
	return ioctl(dev, "ioctl(BLKROSET)", func(fd int) error { return unix.IoctlSetPointerInt(fd, unix.BLKROSET, value) })
}

// DeviceReadOnly tells whether a block device refuses writes (BLKROGET).
func DeviceReadOnly(dev *os.File) (bool, error) {
	var value int
	err := ioctl(dev, "ioctl(BLKROGET)", func(fd int) (err error) {
		value, err = unix.IoctlGetInt(fd, unix.BLKROGET)
		return err
	})
	return value != 0, err
}
