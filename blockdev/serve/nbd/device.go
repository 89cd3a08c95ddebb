package nbd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// Device is what an export serves: bytes at offsets. All methods may be called from
// any goroutine. Offsets and lengths are multiples of BlockSize and within the
// export's size; buffers are aligned to 4096 bytes in memory.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Sync makes all writes, discards and zeroes that returned durable, with the
	// metadata that finds them.
	Sync() error
	// Discard gives back the space of a range, as far as it can. What the range
	// reads as afterwards is not defined; errors.ErrUnsupported is not a failure.
	Discard(off, length int64) error
	// Zero makes a range read as zero, without its space if hole is asked for.
	// errors.ErrUnsupported where it would have to write the zeroes.
	Zero(off, length int64, hole bool) error
	// Extent tells whether the bytes at off are a hole, which reads as zero, and how
	// far that goes: 1 to limit bytes.
	Extent(off, limit int64) (length int64, hole bool, err error)
	// BlockSize is the unit of all offsets and lengths in bytes, a power of two from
	// 1 to 4096.
	BlockSize() int
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

// filer is a device whose reads and writes may be done on a file, by whoever has a
// better way than ReadAt and WriteAt.
type filer interface{ File() *os.File }

// served is a device as the loops use it.
type served struct {
	device Device
	fd     int     // of its file; -1: it is none
	lender Lender  // nil: it is none
	far    Fetcher // nil: all is near
}

func newServed(d Device) (*served, error) {
	s := &served{device: d, fd: -1}
	s.lender, _ = d.(Lender)
	s.far, _ = d.(Fetcher)
	if f, ok := d.(filer); ok {
		var err error
		s.fd, err = numberOf(f.File())
		return s, err
	}
	return s, nil
}

// numberOf gives the number of a file that stays open.
func numberOf(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	return fd, raw.Control(func(n uintptr) { fd = int(n) })
}

// File is a Device in a file or block device. Opened with O_DIRECT, its blocks are
// what direct I/O asks for.
type File struct {
	file  *os.File
	block int
	node  bool // a block device
}

// NewFile serves f, which stays the caller's and must stay open while it is served.
func NewFile(f *os.File) (*File, error) {
	place, err := sys.PlaceOf(f)
	if err != nil {
		return nil, blockdev.Op("nbd.NewFile", "", err)
	}
	block, err := sys.DirectAlignment(f)
	if err != nil {
		return nil, blockdev.Op("nbd.NewFile", "", err)
	}
	if block > 4096 {
		return nil, blockdev.Op("nbd.NewFile", "", fmt.Errorf("direct I/O on %s needs blocks of %d bytes: %w", f.Name(), block, errors.ErrUnsupported))
	}
	return &File{file: f, block: max(1, block), node: place.IsBlock()}, nil
}

// File is the opening below, for whoever can do I/O on it in another way.
func (d *File) File() *os.File { return d.file }

// BlockSize is 1, or what direct I/O asks for.
func (d *File) BlockSize() int { return d.block }

func (d *File) ReadAt(b []byte, off int64) (int, error)  { return d.file.ReadAt(b, off) }
func (d *File) WriteAt(b []byte, off int64) (int, error) { return d.file.WriteAt(b, off) }

// Sync is fdatasync.
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
	if d.node {
		return errors.ErrUnsupported // the kernel would write them, slowly and uninterruptibly
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

// Extent asks the filesystem. A range that it keeps as unwritten space counts as a
// hole: it reads as zero.
func (d *File) Extent(off, limit int64) (length int64, hole bool, err error) {
	return extent.At(d.file, off, limit)
}

// readFull reads all of b; the end of the file is an error, since it is within the
// export.
func readFull(d Device, b []byte, off int64) error {
	n, err := d.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("read %d of %d bytes: %w", n, len(b), io.ErrUnexpectedEOF)
	}
	return err
}

func writeFull(d Device, b []byte, off int64) error {
	n, err := d.WriteAt(b, off)
	if err == nil && n != len(b) {
		return fmt.Errorf("wrote %d of %d bytes: %w", n, len(b), io.ErrShortWrite)
	}
	return err
}
