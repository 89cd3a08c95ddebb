package blockdev

import (
	"context"
	"time"
)

// Counters are what went through the device of an image since it was opened.
type Counters struct {
	Since        time.Time // when it was opened
	Reads        int64     // requests
	ReadBytes    int64
	Writes       int64
	WriteBytes   int64
	Discards     int64
	DiscardBytes int64
	Flushes      int64
	// Inside are requests that have begun and not ended, now; 0 where nobody tells. It is
	// no count: Add and Less leave the receiver's.
	Inside int64
}

// Add gives the sum; Since is the receiver's.
func (c Counters) Add(o Counters) Counters { return c.combine(o, 1) }

// Less gives what came since o was read; Since is the receiver's.
func (c Counters) Less(o Counters) Counters { return c.combine(o, -1) }

func (c Counters) combine(o Counters, sign int64) Counters {
	c.Reads += sign * o.Reads
	c.ReadBytes += sign * o.ReadBytes
	c.Writes += sign * o.Writes
	c.WriteBytes += sign * o.WriteBytes
	c.Discards += sign * o.Discards
	c.DiscardBytes += sign * o.DiscardBytes
	c.Flushes += sign * o.Flushes
	return c
}

// Meter is a backend that counts what goes through its devices.
type Meter interface {
	// Counters tells what went through the image's device since Open made it, also
	// after a restart of the process. ErrNotFound while no device is open.
	Counters(ctx context.Context, id ID) (Counters, error)
}

// Accountant is a backend that can tell which space is one image's alone.
type Accountant interface {
	// Exclusive counts the bytes that only this image occupies: what its removal
	// would give back. It looks at every extent.
	Exclusive(ctx context.Context, id ID) (int64, error)
}
