package vhost

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// Device is what a server serves: bytes at offsets. All methods may be called from
// any goroutine. Offsets and lengths are multiples of BlockSize and within the size,
// and so buffers are aligned in memory. They may be a guest's, which it writes at any
// time.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Size() int64 // bytes; may grow
	// BlockSize is the unit of all offsets and lengths in bytes, a power of two up to
	// 4096.
	BlockSize() int
	// Sync makes all writes, discards and zeroes that returned durable, with the
	// metadata that finds them. After one that failed nothing is written any more.
	Sync() error
	// Discard gives back the space of a range, as far as it can. What the range
	// reads as afterwards is not defined.
	Discard(off, length int64) error
	// Zero makes a range read as zero, without its space if hole is asked for.
	// errors.ErrUnsupported where it would have to write the zeroes.
	Zero(off, length int64, hole bool) error
}

// Lender is a Device whose files a server may use directly.
type Lender interface {
	Device
	// Begin gives the file in which a range may be read at the device's own offsets,
	// until End is called; false where ReadAt is the way. It never waits.
	Begin(off, length int64) (data overlay.File, ok bool)
	// End ends what Begin has begun.
	End()
	// BeginWrite is Begin for a write, until EndWrite is called with what it gave, and
	// whether all was written.
	BeginWrite(off, length int64) (data overlay.File, first, ok bool)
	EndWrite(off, length int64, first, wrote bool)
}

// Fetcher is a Device that has some of its bytes far away.
type Fetcher interface {
	Device
	// Absent tells whether some of a range would have to be fetched to be read. It
	// never waits.
	Absent(off, length int64) bool
}

// File is a Device in a file or block device, which the server reads and writes
// without it.
type File struct {
	file         *os.File
	fd           int
	block, align int
}

// NewFile makes a device of f, which stays the caller's and must stay open; it is
// best opened with O_DIRECT.
func NewFile(f *os.File) (*File, error) {
	d, err := newFile(f)
	return d, blockdev.Op("vhost.NewFile", "", err)
}

func newFile(f *os.File) (*File, error) {
	direct, err := sys.DirectAlignment(f)
	if err != nil {
		return nil, err
	}
	d := &File{file: f, block: max(sector, direct), align: max(1, direct)}
	d.fd, err = numberOf(f)
	return d, err
}

// numberOf gives the number of a file that stays open.
func numberOf(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	return fd, raw.Control(func(n uintptr) { fd = int(n) })
}

// Size asks the file; 0 if it does not answer.
func (d *File) Size() int64 {
	size, err := sys.BlockDeviceSize(d.file) // also a file's
	if err != nil {
		return 0
	}
	return size
}

// BlockSize is that of sectors, or what direct I/O asks for.
func (d *File) BlockSize() int { return d.block }

// ReadAt implements Device.
func (d *File) ReadAt(b []byte, off int64) (int, error) { return d.file.ReadAt(b, off) }

// WriteAt implements Device.
func (d *File) WriteAt(b []byte, off int64) (int, error) { return d.file.WriteAt(b, off) }

// Sync is fdatasync(2).
func (d *File) Sync() error { return sys.SyncData(d.file) }

// Discard punches a hole.
func (d *File) Discard(off, length int64) error {
	return unsupported(sys.PunchHole(d.file, off, length))
}

// Zero punches a hole, or zeroes the range and keeps its space.
func (d *File) Zero(off, length int64, hole bool) error {
	if hole {
		return unsupported(sys.PunchHole(d.file, off, length))
	}
	return unsupported(sys.ZeroRange(d.file, off, length))
}

// unsupported names what a filesystem or device answers when it cannot.
func unsupported(err error) error {
	if errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENOSYS) {
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return err // EOPNOTSUPP is errors.ErrUnsupported as it is
}

// served is a device as the loops use it.
type served struct {
	device Device
	file   *File   // nil: it is none
	lender Lender  // nil: it is none
	far    Fetcher // nil: all is near
	block  int     // bytes
	align  int     // of memory
}

func newServed(d Device) *served {
	s := &served{device: d, block: max(sector, d.BlockSize())}
	s.align = s.block
	if s.file, _ = d.(*File); s.file != nil {
		s.align = s.file.align
	}
	s.lender, _ = d.(Lender)
	s.far, _ = d.(Fetcher)
	return s
}
