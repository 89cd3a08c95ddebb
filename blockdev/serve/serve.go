package serve

import (
	"context"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/meter"
)

// Service is how a volume does that a worker serves.
type Service struct {
	Since   time.Time // when the worker began
	Pid     int
	Kind    blockdev.Kind // blockdev.VhostUser or blockdev.NBD
	Clients int           // virtual machines or NBD connections that have it now
	Meter   meter.Snapshot
	Limits  blockdev.Limits
	Failed  string     // why no write is acknowledged any more; "" while all is well
	Layers  *Hydration // nil for a flat image
}

// Hydration is how far a layered image is on its way to a flat one.
type Hydration struct {
	Sealed int   // layers below the top
	Held   int64 // bytes of the volume that its top layer holds
	Size   int64 // of the volume, bytes
	Copied int64 // bytes that were fetched from the base since the worker began, zeroes not counted
	// FailingSince is when the base began to fail, which readers wait out; zero while
	// it answers.
	FailingSince time.Time
	Tries        int64  // that failed since then
	Reason       string // of the last failure, in an operator's words
}

// Observer is a backend whose images workers serve.
type Observer interface {
	// Observe asks the worker of an image. blockdev.ErrNotFound while it has none.
	Observe(ctx context.Context, id blockdev.ID) (Service, error)
}

// Sentry is a backend that can tell of a worker's end when it happens.
type Sentry interface {
	// AwaitEnd returns nil when the worker that serves an image at the time of the call
	// has ended, at once where none does, and an error when ctx has or it cannot tell.
	AwaitEnd(ctx context.Context, id blockdev.ID) error
}

// Throttler is a backend whose workers bound what is done to an image.
type Throttler interface {
	// Throttle makes exactly these limits hold for an image that is open as VhostUser or
	// NBD, until it is closed; the zero Limits lift all. blockdev.ErrNotFound while no
	// worker serves it.
	Throttle(ctx context.Context, id blockdev.ID, limits blockdev.Limits) error
}
