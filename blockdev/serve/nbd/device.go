package nbd

import (
	"io"
	"os"

	"holdfast/blockdev/serve/device"
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

// filer is a device whose reads and writes may be done on a file, by whoever has a
// better way than ReadAt and WriteAt.
type filer interface{ File() *os.File }

// served is a device as the loops use it.
type served struct {
	device Device
	fd     int            // of its file; -1: it is none
	lender device.Lender  // nil: it is none
	far    device.Fetcher // nil: all is near
}

func newServed(d Device) (*served, error) {
	s := &served{device: d, fd: -1}
	s.lender, _ = d.(device.Lender)
	s.far, _ = d.(device.Fetcher)
	if f, ok := d.(filer); ok {
		var err error
		s.fd, err = device.Number(f.File())
		return s, err
	}
	return s, nil
}
