package sys

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Device mapper's control device takes a header (struct dm_ioctl, 312 bytes) and
// data behind it (include/uapi/linux/dm-ioctl.h).
const (
	dmControl     = "/dev/mapper/control"
	dmHeader      = 312
	dmBuffer      = 16 << 10
	dmVersion     = 4 // of the interface; any minor version
	dmDevStatus   = 0xc138fd07
	dmTableState  = 0xc138fd0c
	dmTargetMsg   = 0xc138fd0e
	dmNoFlush     = 1 << 11 // DM_NOFLUSH_FLAG: tell what is known, write nothing
	dmStatusTable = 1 << 4  // DM_STATUS_TABLE_FLAG: the parameters instead of the state
	dmNameAt      = 48
	dmNameBytes   = 128
)

// MapperInfo is what device mapper says of one device.
type MapperInfo struct {
	Openers int // who has it open or mounted
	Major   uint32
	Minor   uint32
}

// MapperDevice finds a device by its name; ok is false when there is none.
func MapperDevice(name string) (info MapperInfo, ok bool, err error) {
	b, err := mapperIoctl("DM_DEV_STATUS", dmDevStatus, name, nil, 0)
	if errors.Is(err, unix.ENXIO) {
		return info, false, nil
	}
	if err != nil {
		return info, false, err
	}
	device := binary.NativeEndian.Uint64(b[40:])
	return MapperInfo{
		Openers: int(int32(binary.NativeEndian.Uint32(b[24:]))), //nolint:gosec // s32 in the kernel's structure
		Major:   unix.Major(device), Minor: unix.Minor(device),
	}, true, nil
}

// MapperStatus tells the type and the status line of a device's first target.
func MapperStatus(name string) (target, status string, err error) {
	return mapperTarget(name, dmNoFlush)
}

// MapperTable tells the type and the parameters of a device's first target.
func MapperTable(name string) (target, parameters string, err error) {
	return mapperTarget(name, dmStatusTable)
}

func mapperTarget(name string, flags uint32) (target, line string, err error) {
	b, err := mapperIoctl("DM_TABLE_STATUS", dmTableState, name, nil, flags)
	if err != nil {
		return "", "", err
	}
	// struct dm_target_spec: start, length, status, next, type[16]; the text follows.
	spec := b[binary.NativeEndian.Uint32(b[16:]):]
	return text(spec[24:40]), text(spec[40:]), nil
}

// MapperMessage sends a message to a device's target at sector 0.
func MapperMessage(name, message string) error {
	data := make([]byte, 8, 8+len(message)+1) // struct dm_target_msg: sector, then the text
	_, err := mapperIoctl("DM_TARGET_MSG", dmTargetMsg, name, append(append(data, message...), 0), 0)
	return err
}

func text(b []byte) string {
	if n := bytes.IndexByte(b, 0); n >= 0 {
		b = b[:n]
	}
	return string(b)
}

func mapperIoctl(what string, request uintptr, name string, data []byte, flags uint32) ([]byte, error) {
	if len(name) >= dmNameBytes || dmHeader+len(data) > dmBuffer {
		return nil, fmt.Errorf("%s %.40s: %w", what, name, unix.ENAMETOOLONG)
	}
	control, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	b := make([]byte, dmBuffer)
	binary.NativeEndian.PutUint32(b, dmVersion)
	binary.NativeEndian.PutUint32(b[12:], dmBuffer)
	binary.NativeEndian.PutUint32(b[16:], dmHeader)
	binary.NativeEndian.PutUint32(b[28:], flags)
	copy(b[dmNameAt:], name)
	copy(b[dmHeader:], data)
	err = pointerIoctl(control, "ioctl("+what+")", request, unsafe.Pointer(&b[0]))
	runtime.KeepAlive(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// ReadDirect reads n bytes of a device at an offset from the device itself, past
// the page cache. Both are multiples of 4096.
func ReadDirect(path string, at int64, n int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const align = 4096
	b := make([]byte, n+align)
	shift := (align - int(uintptr(unsafe.Pointer(&b[0]))%align)) % align
	b = b[shift : shift+n]
	if _, err := f.ReadAt(b, at); err != nil {
		return nil, err
	}
	return b, nil
}
