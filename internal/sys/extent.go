package sys

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CloneFile makes dst share all bytes of src, copy-on-write (FICLONE). It is not
// durable before an fsync of dst. See IsNoReflink for filesystems that cannot.
func CloneFile(dst, src *os.File) error {
	return control(src, func(from uintptr) error {
		return ioctl(dst, "ioctl(FICLONE)", func(fd int) error { return unix.IoctlFileClone(fd, int(from)) })
	})
}

// CloneRange makes length bytes of dst at dstOff share those of src at srcOff
// (FICLONERANGE). Offsets and, except at the end of src, length are multiples of
// the filesystem's block; length 0 means to the end of src.
func CloneRange(dst *os.File, dstOff int64, src *os.File, srcOff, length int64) error {
	return control(src, func(from uintptr) error {
		arg := unix.FileCloneRange{Src_fd: int64(from), Src_offset: uint64(srcOff), Src_length: uint64(length), Dest_offset: uint64(dstOff)}
		return ioctl(dst, "ioctl(FICLONERANGE)", func(fd int) error { return unix.IoctlFileCloneRange(fd, &arg) })
	})
}

// IsNoReflink reports whether a clone failed because these files cannot share
// bytes: no such feature, or two filesystems.
func IsNoReflink(err error) bool {
	for _, errno := range []unix.Errno{unix.EOPNOTSUPP, unix.ENOTTY, unix.EXDEV, unix.EINVAL, unix.ENOSYS} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// NextData gives the first offset ≥ off that holds data; ok is false when there
// is none up to the end of the file. f's file position is changed.
func NextData(f *os.File, off int64) (at int64, ok bool, err error) {
	at, err = seek(f, off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, false, nil
	}
	return at, err == nil, err
}

// NextHole gives the first offset ≥ off that is in a hole; the end of the file
// counts as one. f's file position is changed.
func NextHole(f *os.File, off int64) (int64, error) { return seek(f, off, unix.SEEK_HOLE) }

func seek(f *os.File, off int64, whence int) (at int64, err error) {
	err = control(f, func(fd uintptr) (err error) {
		at, err = unix.Seek(int(fd), off, whence)
		return err
	})
	return at, os.NewSyscallError("lseek", err)
}

// DropCache lets the kernel forget what its page cache has of a range of f, so
// that the next read asks the device (posix_fadvise, POSIX_FADV_DONTNEED). What is
// not written yet stays. It is an advice: nothing depends on it.
func DropCache(f *os.File, off, length int64) {
	_ = control(f, func(fd uintptr) error { return unix.Fadvise(int(fd), off, length, unix.FADV_DONTNEED) })
}

// CopyRange copies up to length bytes inside the kernel (copy_file_range) and
// tells how many; 0 means the end of src. errors.ErrUnsupported for files
// between which the kernel cannot.
func CopyRange(dst *os.File, dstOff int64, src *os.File, srcOff, length int64) (n int64, err error) {
	const most = 1 << 30 // one call may not exceed what fits an int
	err = control(src, func(from uintptr) error {
		return control(dst, func(to uintptr) error {
			return retry(func() error {
				done, err := unix.CopyFileRange(int(from), &srcOff, int(to), &dstOff, int(min(length, most)), 0)
				n = int64(done)
				return err
			})
		})
	})
	for _, errno := range []unix.Errno{unix.ENOSYS, unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL} {
		if errors.Is(err, errno) {
			return 0, errors.Join(errors.ErrUnsupported, os.NewSyscallError("copy_file_range", err))
		}
	}
	return n, os.NewSyscallError("copy_file_range", err)
}

// Allocate occupies space for length bytes at off, and makes the file as large
// as that; what was not written reads as zero.
func Allocate(f *os.File, off, length int64) error { return fallocate(f, 0, off, length) }

// PunchHole gives back the space of whole blocks in a range and zeroes the rest
// of it; the file keeps its size.
func PunchHole(f *os.File, off, length int64) error {
	return fallocate(f, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}

// ZeroRange makes a range read as zero and keeps its space.
func ZeroRange(f *os.File, off, length int64) error {
	return fallocate(f, unix.FALLOC_FL_ZERO_RANGE, off, length)
}

func fallocate(f *os.File, mode uint32, off, length int64) error {
	err := control(f, func(fd uintptr) error {
		return retry(func() error { return unix.Fallocate(int(fd), mode, off, length) })
	})
	return os.NewSyscallError("fallocate", err)
}

// Mapped is what FIEMAP tells of a file.
type Mapped struct {
	Allocated int64 // bytes with space behind them
	Shared    int64 // of these, shared with other files
	Extents   int   // counted
	Complete  bool  // false: the file has more extents than were asked for
}

// fiemapBatch is how many extents one FIEMAP call gives.
const fiemapBatch = 128

// The layout of struct fiemap and its extents, linux/fiemap.h; the constants are
// missing in x/sys.
type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

type fiemapRequest struct {
	start, length        uint64
	flags, mapped, count uint32
	_                    uint32
	extents              [fiemapBatch]fiemapExtent
}

const (
	fsIocFiemap  = 0xc020660b // _IOWR('f', 11, struct fiemap)
	fiemapSync   = 0x1        // flush the file first
	extentLast   = 0x1
	extentShared = 0x2000
	// Allocated and never written.
	extentUnwritten = 0x800
	// Not allocated yet, encoded, not aligned or inside of metadata.
	extentNowhere = 0x2 | 0x4 | 0x8 | 0x100 | 0x200
)

// MapFile counts the space of the first maxExtents extents of f. Data that is
// still only in memory is not counted. errors.ErrUnsupported where the
// filesystem has no FIEMAP: st_blocks is then all there is to know.
func MapFile(f *os.File, maxExtents int) (Mapped, error) {
	var m Mapped
	request := &fiemapRequest{}
	for start := uint64(0); m.Extents < maxExtents; {
		*request = fiemapRequest{start: start, length: ^uint64(0) - start, count: uint32(min(fiemapBatch, maxExtents-m.Extents))}
		if err := fiemap(f, request); err != nil {
			return Mapped{}, err
		}
		if request.mapped == 0 {
			m.Complete = true
			return m, nil
		}
		for _, extent := range request.extents[:request.mapped] {
			m.Extents++
			m.Allocated += int64(extent.length)
			if extent.flags&extentShared != 0 {
				m.Shared += int64(extent.length)
			}
			if extent.flags&extentLast != 0 {
				m.Complete = true
				return m, nil
			}
			start = extent.logical + extent.length
		}
	}
	return m, nil
}

// MappedExtent is where a range of a file lies on its filesystem's device.
type MappedExtent struct {
	Offset, Physical, Length int64 // bytes
	Shared                   bool
}

// EachMapped calls fn with the extents of f, in order, until fn returns an error,
// which it returns. f is flushed first. errors.ErrUnsupported where the filesystem
// has no FIEMAP, or cannot tell where an extent is.
func EachMapped(f *os.File, fn func(MappedExtent) error) error {
	request := &fiemapRequest{}
	for start := uint64(0); ; {
		*request = fiemapRequest{start: start, length: ^uint64(0) - start, flags: fiemapSync, count: fiemapBatch}
		if err := fiemap(f, request); err != nil || request.mapped == 0 {
			return err
		}
		for _, extent := range request.extents[:request.mapped] {
			if extent.flags&extentNowhere != 0 {
				return fmt.Errorf("%w: an extent without a place", errors.ErrUnsupported)
			}
			m := MappedExtent{int64(extent.logical), int64(extent.physical), int64(extent.length), extent.flags&extentShared != 0}
			if err := fn(m); err != nil || extent.flags&extentLast != 0 {
				return err
			}
			start = extent.logical + extent.length
		}
	}
}

// EachWritten calls fn with the ranges between off and end of f that were written, in
// order; space that is only allocated is none of them. f is flushed first.
// errors.ErrUnsupported where the filesystem has no FIEMAP.
func EachWritten(f *os.File, off, end int64, fn func(from, to int64)) error {
	request := &fiemapRequest{}
	for off < end {
		*request = fiemapRequest{start: uint64(off), length: uint64(end - off), flags: fiemapSync, count: fiemapBatch}
		if err := fiemap(f, request); err != nil || request.mapped == 0 {
			return err
		}
		for _, extent := range request.extents[:request.mapped] {
			from, to := max(off, int64(extent.logical)), min(end, int64(extent.logical+extent.length))
			if extent.flags&extentUnwritten == 0 && from < to {
				fn(from, to)
			}
			if extent.flags&extentLast != 0 {
				return nil
			}
			off = to
		}
	}
	return nil
}

func fiemap(f *os.File, request *fiemapRequest) error {
	err := ioctl(f, "ioctl(FS_IOC_FIEMAP)", func(fd int) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFiemap, uintptr(unsafe.Pointer(request)))
		if errno != 0 {
			return errno
		}
		return nil
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EBADR) {
		return errors.Join(errors.ErrUnsupported, err)
	}
	return err
}

// IsNoSpace reports whether a call failed because the filesystem, or a quota on
// it, is full.
func IsNoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// IsTooManyLinks reports whether a file can have no further name.
func IsTooManyLinks(err error) bool { return errors.Is(err, unix.EMLINK) }
