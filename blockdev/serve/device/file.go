package device

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/internal/sys"
)

// mostBlock is the largest unit of direct I/O that is served, in bytes.
const mostBlock = 4096

// File is bytes at offsets in a file or block device. Its methods may be called from
// any goroutine. Opened with O_DIRECT, its blocks are what direct I/O asks for, and so
// are the memory that is given to ReadAt and WriteAt.
type File struct {
	file  *os.File
	fd    int
	block int
	node  bool // a block device
}

// NewFile makes a device of f, which stays the caller's and must stay open; it is best
// opened with O_DIRECT. errors.ErrUnsupported where direct I/O asks for blocks of more
// than 4 KiB.
func NewFile(f *os.File) (*File, error) {
	d, err := newFile(f)
	return d, blockdev.Op("device.NewFile", "", err)
}

func newFile(f *os.File) (*File, error) {
	place, err := sys.PlaceOf(f)
	if err != nil {
		return nil, err
	}
	direct, err := sys.DirectAlignment(f)
	if err != nil {
		return nil, err
	}
	if direct > mostBlock {
		return nil, fmt.Errorf("direct I/O on %s needs blocks of %d bytes: %w", f.Name(), direct, errors.ErrUnsupported)
	}
	fd, err := Number(f)
	return &File{file: f, fd: fd, block: max(1, direct), node: place.IsBlock()}, err
}

// Number gives the number of a file that stays open.
func Number(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	err = raw.Control(func(n uintptr) { fd = int(n) })
	return fd, err
}

// File is the opening below, for whoever can do I/O on it in another way.
func (d *File) File() *os.File { return d.file }

// Number is that of the opening.
func (d *File) Number() int { return d.fd }

// Size asks the file, in bytes; 0 if it does not answer.
func (d *File) Size() int64 {
	size, err := sys.BlockDeviceSize(d.file) // also a file's
	if err != nil {
		return 0
	}
	return size
}

// BlockSize is the unit of offsets, lengths and memory: 1, or what direct I/O asks for.
func (d *File) BlockSize() int { return d.block }

// ReadAt implements io.ReaderAt.
func (d *File) ReadAt(b []byte, off int64) (int, error) { return d.file.ReadAt(b, off) }

// WriteAt implements io.WriterAt.
func (d *File) WriteAt(b []byte, off int64) (int, error) { return d.file.WriteAt(b, off) }

// Sync is fdatasync(2).
func (d *File) Sync() error { return sys.SyncData(d.file) }

// Discard punches a hole. errors.ErrUnsupported where there are none.
func (d *File) Discard(off, length int64) error {
	return Unsupported(sys.PunchHole(d.file, off, length))
}

// Zero punches a hole, or zeroes the range and keeps its space. errors.ErrUnsupported
// where zeroes have to be written.
func (d *File) Zero(off, length int64, hole bool) error {
	if hole {
		return Unsupported(sys.PunchHole(d.file, off, length))
	}
	if d.node {
		return errors.ErrUnsupported // the kernel would write them, slowly and uninterruptibly
	}
	return Unsupported(sys.ZeroRange(d.file, off, length))
}

// Extent asks the filesystem. A range that it keeps as unwritten space counts as a
// hole: it reads as zero.
func (d *File) Extent(off, limit int64) (length int64, hole bool, err error) {
	return extent.At(d.file, off, limit)
}

// Unsupported names what a filesystem or device answers when it cannot punch or zero:
// errors.ErrUnsupported.
func Unsupported(err error) error {
	if errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENOSYS) {
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return err // EOPNOTSUPP is errors.ErrUnsupported as it is
}

// ReadWhole reads all of b from what is known to have it: the end is an error.
func ReadWhole(d io.ReaderAt, b []byte, off int64) error {
	n, err := d.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("read %d of %d bytes: %w", n, len(b), io.ErrUnexpectedEOF)
	}
	return err
}

// WriteWhole writes all of b; part of it is an error.
func WriteWhole(d io.WriterAt, b []byte, off int64) error {
	n, err := d.WriteAt(b, off)
	if err == nil && n != len(b) {
		return fmt.Errorf("wrote %d of %d bytes: %w", n, len(b), io.ErrShortWrite)
	}
	return err
}
