package sys

import (
	"errors"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The numbers, from the kernel's fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h and
// include/uapi/linux/{btrfs,fs}.h, are those of amd64 and arm64.
const (
	ext4IocResize   = 0x40086610
	xfsIocGeometry  = 0x80705864
	xfsIocGrowData  = 0x4010586E
	xfsIocFreeEOF   = 0x8080583A
	btrfsIocResize  = 0x50009403
	btrfsIocDevInfo = 0xD000941E
	iocFreeze       = 0xC0045877
	iocThaw         = 0xC0045878
	iocShutdown     = 0x8004587D // of ext4 and XFS alike
	iocTrim         = 0xC0185879
)

// The magic numbers that FilesystemMagic tells.
const (
	MagicExt4  = unix.EXT4_SUPER_MAGIC
	MagicXFS   = unix.XFS_SUPER_MAGIC
	MagicBtrfs = unix.BTRFS_SUPER_MAGIC
)

// XFSGeometry is what we use of a mounted XFS's geometry.
type XFSGeometry struct {
	BlockSize int64  // bytes
	Blocks    int64  // of the data section
	MaxInodes uint32 // percent of the space that inodes may take (imaxpct)
}

// FilesystemMagic tells the type of the mounted filesystem that f is on.
func FilesystemMagic(f *os.File) (int64, error) {
	var st unix.Statfs_t
	err := control(f, func(fd uintptr) error {
		return retry(func() error { return unix.Fstatfs(int(fd), &st) })
	})
	return st.Type, os.NewSyscallError("fstatfs", err)
}

// FilesystemBlock tells the block, in bytes, of the mounted filesystem that f is on.
func FilesystemBlock(f *os.File) (int64, error) {
	var st unix.Statfs_t
	err := control(f, func(fd uintptr) error {
		return retry(func() error { return unix.Fstatfs(int(fd), &st) })
	})
	return st.Bsize, os.NewSyscallError("fstatfs", err)
}

// FilesystemUsage is what statfs(2) tells of a mounted filesystem.
type FilesystemUsage struct {
	Total, Free, Available int64 // bytes; Available leaves out what is reserved
	Inodes, FreeInodes     int64 // 0 where the filesystem has no such number (btrfs)
}

// UsageOf asks the mounted filesystem that f is on. It never waits for a freeze.
func UsageOf(f *os.File) (FilesystemUsage, error) {
	var st unix.Statfs_t
	err := control(f, func(fd uintptr) error {
		return retry(func() error { return unix.Fstatfs(int(fd), &st) })
	})
	if err != nil {
		return FilesystemUsage{}, os.NewSyscallError("fstatfs", err)
	}
	block := st.Frsize
	return FilesystemUsage{
		Total: int64(st.Blocks) * block, Free: int64(st.Bfree) * block, Available: int64(st.Bavail) * block,
		Inodes: int64(st.Files), FreeInodes: int64(st.Ffree),
	}, nil
}

// Trim tells the device of the mounted filesystem that f is on which of its
// blocks in a range of bytes are free (FITRIM), and how many bytes it discarded.
// errors.ErrUnsupported where the filesystem or its device cannot.
func Trim(f *os.File, from, length uint64) (discarded int64, err error) {
	in := struct{ start, length, least uint64 }{from, length, 0}
	err = pointerIoctl(f, "ioctl(FITRIM)", iocTrim, unsafe.Pointer(&in))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) {
		return 0, errors.Join(errors.ErrUnsupported, err)
	}
	return int64(in.length), err
}

// GrowExt4 grows the mounted ext4 that f is on to a number of its blocks. EPERM
// without CAP_SYS_RESOURCE, and when the filesystem has errors.
func GrowExt4(f *os.File, blocks uint64) error {
	return pointerIoctl(f, "ioctl(EXT4_IOC_RESIZE_FS)", ext4IocResize, unsafe.Pointer(&blocks))
}

// XFSGeometryOf asks the mounted XFS that f is on.
func XFSGeometryOf(f *os.File) (XFSGeometry, error) {
	var g struct {
		blockSize, _, _, _, _, _, _, maxInodes uint32
		blocks, _, _, _                        uint64
		_                                      [48]byte
	}
	if err := pointerIoctl(f, "ioctl(XFS_IOC_FSGEOMETRY_V1)", xfsIocGeometry, unsafe.Pointer(&g)); err != nil {
		return XFSGeometry{}, err
	}
	return XFSGeometry{BlockSize: int64(g.blockSize), Blocks: int64(g.blocks), MaxInodes: g.maxInodes}, nil
}

// GrowXFS grows the data section of the mounted XFS that f is on.
func GrowXFS(f *os.File, blocks uint64, maxInodes uint32) error {
	in := struct {
		blocks    uint64
		maxInodes uint32
		_         uint32
	}{blocks: blocks, maxInodes: maxInodes}
	return pointerIoctl(f, "ioctl(XFS_IOC_FSGROWFSDATA)", xfsIocGrowData, unsafe.Pointer(&in))
}

// ReclaimXFS waits until the mounted XFS that f is on has freed the blocks of
// removed files, which it does in the background, and of what it had set aside
// behind files (XFS_IOC_FREE_EOFBLOCKS, xfs_fs.h).
func ReclaimXFS(f *os.File) error {
	in := struct {
		version, flags uint32
		_              [120]byte
	}{version: 1, flags: 1} // XFS_EOF_FLAGS_SYNC
	return pointerIoctl(f, "ioctl(XFS_IOC_FREE_EOFBLOCKS)", xfsIocFreeEOF, unsafe.Pointer(&in))
}

// GrowBtrfs grows the mounted btrfs of one device that f is on to that device.
func GrowBtrfs(f *os.File) error {
	var in struct {
		_    int64
		name [4088]byte
	}
	copy(in.name[:], "1:max")
	return pointerIoctl(f, "ioctl(BTRFS_IOC_RESIZE)", btrfsIocResize, unsafe.Pointer(&in))
}

// BtrfsSize tells how many bytes of its one device the mounted btrfs uses.
func BtrfsSize(f *os.File) (int64, error) {
	var info struct {
		device uint64
		_      [16]byte
		_      uint64 // bytes in chunks
		total  uint64
		_      [4056]byte
	}
	info.device = 1
	err := pointerIoctl(f, "ioctl(BTRFS_IOC_DEV_INFO)", btrfsIocDevInfo, unsafe.Pointer(&info))
	return int64(info.total), err
}

// ErrFrozen means that the filesystem is frozen already.
var ErrFrozen = errors.New("filesystem is frozen")

// Freeze flushes the filesystem that f is on and stops its writes until Thaw.
func Freeze(f *os.File) error {
	err := pointerIoctl(f, "ioctl(FIFREEZE)", iocFreeze, nil)
	if errors.Is(err, unix.EBUSY) {
		return ErrFrozen
	}
	return err
}

// Thaw ends a Freeze; a filesystem that is not frozen is success.
func Thaw(f *os.File) error {
	err := pointerIoctl(f, "ioctl(FITHAW)", iocThaw, nil)
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// The ways to shut a filesystem down; the numbers are XFS's and ext4's.
const (
	ShutdownFlushed = uint32(0) // all that is dirty is written first
	ShutdownNow     = uint32(2) // what is not written is lost, as in a power cut
)

// Shutdown makes the mounted filesystem that f is on refuse everything from now
// on (EIO), for whoever has it open. errors.ErrUnsupported when its type cannot.
// Shut down already is success, or EIO.
func Shutdown(f *os.File, how uint32) error {
	err := pointerIoctl(f, "ioctl(SHUTDOWN)", iocShutdown, unsafe.Pointer(&how))
	if errors.Is(err, unix.ENOTTY) {
		return errors.ErrUnsupported
	}
	return err
}

func pointerIoctl(f *os.File, name string, request uintptr, arg unsafe.Pointer) error {
	defer runtime.KeepAlive(arg)
	return ioctl(f, name, func(fd int) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		if errno != 0 {
			return errno
		}
		return nil
	})
}
