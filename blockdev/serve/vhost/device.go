package vhost

import (
	"io"

	"holdfast/blockdev/serve/device"
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

// served is a device as the loops use it.
type served struct {
	device Device
	file   *device.File   // nil: it is none
	lender device.Lender  // nil: it is none
	far    device.Fetcher // nil: all is near
	block  int            // bytes
	align  int            // of memory
}

func newServed(d Device) *served {
	s := &served{device: d, block: max(sector, d.BlockSize())}
	s.align = s.block
	if s.file, _ = d.(*device.File); s.file != nil {
		s.align = s.file.BlockSize()
	}
	s.lender, _ = d.(device.Lender)
	s.far, _ = d.(device.Fetcher)
	return s
}
