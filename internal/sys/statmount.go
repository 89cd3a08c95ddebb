package sys

import (
	"encoding/binary"
	"errors"
	"os"
	"path"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What statmount(2) is asked for, and where it answers: struct statmount of the
// kernel's include/uapi/linux/mount.h. Offsets are bytes; a text is told by its
// offset in what follows the fixed part.
const (
	statmountSB     = 0x1
	statmountMount  = 0x2
	statmountPoint  = 0x10
	statmountType   = 0x20
	statmountSource = 0x200 // since Linux 6.13
	statmountAll    = statmountSB | statmountMount | statmountPoint | statmountType | statmountSource

	atMask       = 8
	atMajor      = 16
	atMinor      = 20
	atSBFlags    = 32
	atType       = 36
	atIDOld      = 56
	atParentOld  = 60
	atAttr       = 64
	atGroup      = 80
	atMaster     = 88
	atPoint      = 108
	atSource     = 124
	statmountLen = 512

	longestMountText = 3*4096 + 256
)

// MountInfo is what the kernel tells of one mount.
type MountInfo struct {
	ID         uint64 // as proc_pid_mountinfo(5) shows it
	Parent     uint64
	Device     uint64 // of the superblock
	Path       string
	Type       string
	Source     string
	ReadOnly   bool   // this mount
	ReadOnlyFS bool   // the filesystem itself
	Group      uint64 // peer group, 0 for none
	Master     uint64 // group that it is a slave of, 0 for none
}

// MountAt tells of the topmost mount at a path whose last component is not
// followed; root is whether the path is that mount's root. It costs the same
// however many mounts there are. errors.ErrUnsupported on kernels that cannot
// (before Linux 6.13): read mountinfo there. A filesystem that has shut down may
// refuse to answer.
func MountAt(name string) (m MountInfo, root bool, err error) {
	place, id, err := placeAndMount(unix.AT_FDCWD, name, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return m, false, wrap("statx", name, err)
	}
	if !place.MountRoot {
		return m, false, nil
	}
	m, err = statmount(id)
	return m, true, wrap("statmount", name, err)
}

// MountOf tells of the mount that an opened file is on; see MountAt.
func MountOf(f *os.File) (m MountInfo, err error) {
	err = control(f, func(fd uintptr) error {
		_, id, err := placeAndMount(int(fd), "", unix.AT_EMPTY_PATH)
		if err == nil {
			m, err = statmount(id)
		}
		return err
	})
	return m, wrap("statmount", f.Name(), err)
}

func placeAndMount(fd int, name string, flags int) (Place, uint64, error) {
	var st unix.Statx_t
	err := retry(func() error {
		return unix.Statx(fd, name, flags|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE|unix.STATX_INO|unix.STATX_MNT_ID_UNIQUE, &st)
	})
	if err != nil {
		return Place{}, 0, err
	}
	if st.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		return Place{}, 0, errors.ErrUnsupported
	}
	return placeOf(&st), st.Mnt_id, nil
}

// statmount asks for a mount of this thread's namespace by its unique number.
func statmount(id uint64) (MountInfo, error) {
	request := struct {
		size, _   uint32
		id, param uint64
	}{24, 0, id, statmountAll}
	buf := make([]byte, statmountLen+longestMountText)
	err := retry(func() error {
		_, _, errno := unix.Syscall6(unix.SYS_STATMOUNT, uintptr(unsafe.Pointer(&request)),
			uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	})
	if errors.Is(err, unix.ENOSYS) {
		return MountInfo{}, errors.ErrUnsupported
	}
	if err != nil {
		return MountInfo{}, err
	}
	return parseStatmount(buf)
}

func parseStatmount(buf []byte) (MountInfo, error) {
	u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(buf[at:]) }
	u64 := func(at int) uint64 { return binary.NativeEndian.Uint64(buf[at:]) }
	text := func(at int) string { return unix.ByteSliceToString(buf[min(statmountLen+int(u32(at)), len(buf)):]) }
	if u64(atMask)&statmountAll != statmountAll {
		return MountInfo{}, errors.ErrUnsupported
	}
	return MountInfo{
		ID: uint64(u32(atIDOld)), Parent: uint64(u32(atParentOld)),
		Device: unix.Mkdev(u32(atMajor), u32(atMinor)),
		Path:   path.Clean(text(atPoint)), Type: text(atType), Source: text(atSource),
		ReadOnly:   u64(atAttr)&unix.MOUNT_ATTR_RDONLY != 0,
		ReadOnlyFS: u32(atSBFlags)&unix.MS_RDONLY != 0,
		Group:      u64(atGroup), Master: u64(atMaster),
	}, nil
}
