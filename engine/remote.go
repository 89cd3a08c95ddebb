package engine

import (
	"context"
	"errors"
	"time"

	"holdfast/blockdev"
)

// A volume of a remote template version is used like any other, while its blocks come
// from a store far away. What is told of that in its events: that it begins, that the
// store does not answer for long, that it does again, and that all blocks are here.

const (
	// remoteLook is how often Run looks how far a volume is that nobody has attached.
	remoteLook = 10 * time.Second
	// awaitedLong is how long a store has to fail until that is an event: readers of
	// what is absent have waited for as long.
	awaitedLong = 30 * time.Second
)

// rest says that nothing is left to do for a volume that nobody has; whether its blocks
// are here is looked at from time to time.
func (e *Engine) rest(v Volume) {
	e.unwatch(v.ID)
	if v.Remote {
		e.watchFrom(v.ID, e.now().Add(remoteLook))
	}
}

// growsWhenFlat is blockdev.ErrLayered, as a Problem, for a volume whose bytes do not
// lie in one file yet: Run brings them there, and goes on then.
func (e *Engine) growsWhenFlat(ctx context.Context, v Volume) error {
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if err != nil || info.Layers == 0 {
		return err
	}
	e.setUnflat(v.ID, true)
	e.watch(v.ID)
	return e.hydrating(ctx, e.o.Pool, v.ID, nil)
}

// tendRemote notes what became of a volume whose blocks come from far away. The
// volume's lock is held.
func (e *Engine) tendRemote(ctx context.Context, v *Volume) error {
	if !v.Remote || v.Phase != Ready || v.moving() {
		return nil
	}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Layers == 0 || info.Absent == 0 {
		v.Remote, v.Awaiting = false, nil
		e.happened(v, "hydration", "All its blocks are on this host")
		return e.save(ctx, v)
	}
	if !info.Open { // nobody waits for a store
		return e.noteAwaited(ctx, v, time.Time{})
	}
	return e.noteAwaited(ctx, v, e.hydrationOf(ctx, info).FailingSince)
}

// noteAwaited makes an event of a store that fails for long, and of its coming back.
func (e *Engine) noteAwaited(ctx context.Context, v *Volume, since time.Time) error {
	switch {
	case since.IsZero() && v.Awaiting != nil:
		e.happened(v, "hydration", "The store of its blocks answers again, or nobody waits for it: it did not since %s", v.Awaiting.UTC().Format(time.RFC3339))
		v.Awaiting = nil
	case !since.IsZero() && v.Awaiting == nil && e.now().Sub(since) >= awaitedLong:
		since = since.UTC().Round(0)
		e.happened(v, "hydration", "The store of its blocks does not answer since %s: who reads what is not here waits, and nothing is lost", since.Format(time.RFC3339))
		v.Awaiting = &since
	default:
		return nil
	}
	return e.save(ctx, v)
}
