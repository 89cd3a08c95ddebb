package nbd

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/throttle"
)

// ExportOptions describe an export. The zero value of each field but Size will do.
type ExportOptions struct {
	Size        int64  // bytes, a multiple of the device's blocks
	Description string // for people
	ReadOnly    bool
	Meter       *meter.Meter
	Limiter     *throttle.Limiter
}

// Export is a device under a name, and what all of its connections share.
type Export struct {
	name        string
	description string
	readOnly    bool
	block       int64 // unit of offsets and lengths, bytes
	size        atomic.Int64
	meter       *meter.Meter
	limiter     *throttle.Limiter
	changed     atomic.Pointer[change] // of the limits, the next one
	flusher     flusher

	gate   sync.RWMutex // shared by each request from when it is performed to its end, alone by Swap
	served *served      // under gate
	mu     sync.Mutex
	loops  map[*loop]struct{} // under mu
}

// NewExport names a device. ErrInvalid for a name or a size that cannot be told to
// clients.
func NewExport(name string, d Device, o ExportOptions) (*Export, error) {
	if len(name) > maxString || len(o.Description) > maxString {
		return nil, blockdev.Op("nbd.NewExport", "", fmt.Errorf("a name or description of more than %d bytes: %w", maxString, blockdev.ErrInvalid))
	}
	e := &Export{name: name, description: o.Description, readOnly: o.ReadOnly, meter: o.Meter, limiter: o.Limiter, block: int64(d.BlockSize()), loops: map[*loop]struct{}{}}
	var err error
	if e.served, err = newServed(d); err != nil {
		return nil, blockdev.Op("nbd.NewExport", "", err)
	}
	if e.meter == nil {
		e.meter = &meter.Meter{}
	}
	if e.limiter == nil {
		e.limiter = &throttle.Limiter{}
	}
	next := make(change)
	e.changed.Store(&next)
	e.flusher.sync = func() error { return e.served.device.Sync() } // its request has the gate
	e.flusher.turn.L = &e.flusher.mu
	return e, blockdev.Op("nbd.NewExport", "", e.setSize(o.Size))
}

// Resize tells the size to connections that are made from now on. ErrInvalid for
// one that is smaller, or not a multiple of the device's blocks.
func (e *Export) Resize(size int64) error { return blockdev.Op("nbd.Resize", "", e.setSize(size)) }

func (e *Export) setSize(size int64) error {
	if size < e.size.Load() || size > math.MaxInt64-maxPayload || size%e.block != 0 {
		return fmt.Errorf("size %d in blocks of %d, was %d: %w", size, e.block, e.size.Load(), blockdev.ErrInvalid)
	}
	e.size.Store(size)
	return nil
}

// Failed is why no write succeeds any more: a sync failed (ErrFailed). nil while
// all is well.
func (e *Export) Failed() error { return e.flusher.failure() }

// flags are the transmission flags, without what depends on the connection.
func (e *Export) flags() uint16 {
	flags := uint16(exportHasFlags | exportFlush | exportFUA | exportMultiConn)
	if e.readOnly {
		return flags | exportReadOnly
	}
	return flags | exportTrim | exportWriteZeroes | exportFastZero
}

// flusher runs the syncs of an export, one at a time: a failed one is reported by
// the kernel to one caller only, so nobody may sync beside it and be told that all
// is well.
type flusher struct {
	sync func() error

	mu      sync.Mutex
	turn    sync.Cond // once begun or done changed
	begun   uint64    // syncs
	done    uint64
	running bool
	failed  atomic.Pointer[error]
}

func (f *flusher) failure() error {
	if err := f.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// flush returns after a sync that began after the call did. All who wait while one
// is running share the next.
func (f *flusher) flush() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	wanted := f.begun + 1
	for f.done < wanted && f.failure() == nil {
		if f.running {
			f.turn.Wait()
			continue
		}
		f.begun++
		f.running = true
		f.mu.Unlock()
		err := f.sync()
		f.mu.Lock()
		f.running = false
		f.done = f.begun
		if err != nil {
			err = fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
			f.failed.Store(&err)
		}
		f.turn.Broadcast()
	}
	return f.failure()
}
