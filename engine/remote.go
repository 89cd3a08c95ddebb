package engine

import (
	"context"
	"errors"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
)

// A volume of a remote template version is used like any other, while its blocks come
// from a store far away. What is told of that in its events: that it begins, that the
// store does not answer for long, that it does again, and that all blocks are here.

const (
	// remoteLook is how often Run looks how far a volume is that nobody has attached, in a
	// pool that does not tell when that has come.
	remoteLook = 10 * time.Second
	// awaitedLong is how long a store has to fail until that is an event: readers of
	// what is absent have waited for as long.
	awaitedLong = 30 * time.Second
)

// rest says that nothing is left to do for a volume that nobody has: the pool tells when
// its blocks are here. That may have been while the volume was in somebody's hands, who
// has looked before.
func (e *Engine) rest(ctx context.Context, v Volume) {
	e.unwatch(v.ID)
	if !v.Remote || v.Phase != Ready || v.moving() { // nothing is noted of it
		return
	}
	watcher, told := e.o.Pool.(blockdev.FlatWatcher)
	if !told {
		e.watchFrom(v.ID, e.now().Add(remoteLook))
		return
	}
	if layered, _, err := watcher.IsLayered(ctx, v.ID); err == nil && !layered {
		e.watch(v.ID)
		e.wake()
	}
}

// becameFlat is told by the pool of an image that has become one file.
func (e *Engine) becameFlat(id blockdev.ID) {
	if v, ok := e.catalog.get(id); ok && (v.Remote || v.Move != nil) {
		e.forgetRetry(id)
		e.watch(id)
		e.wake()
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
// volume's lock is held. Idle volumes cost little: what says which blocks are here is
// not read, the worker of one that is in use is asked.
func (e *Engine) tendRemote(ctx context.Context, v *Volume) error {
	if !v.Remote || v.Phase != Ready || v.moving() {
		return nil
	}
	whole, failing, err := e.lookAtRemote(ctx, v.ID)
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		return nil
	case err != nil:
		return err
	case whole:
		return e.noteWhole(ctx, v)
	}
	return e.noteAwaited(ctx, v, failing)
}

// lookAtRemote tells whether all blocks of an image are here, and since when the store
// fails that somebody waits for.
func (e *Engine) lookAtRemote(ctx context.Context, id blockdev.ID) (whole bool, failing time.Time, err error) {
	watcher, ok := e.o.Pool.(blockdev.FlatWatcher)
	observer, observes := e.o.Pool.(serve.Observer)
	if !ok || !observes {
		info, err := e.o.Pool.Stat(ctx, id)
		return err == nil && (info.Layers == 0 || info.Absent == 0), time.Time{}, err
	}
	layered, open, err := watcher.IsLayered(ctx, id)
	if err != nil || !layered || !open { // nobody waits for a store
		return err == nil && !layered, time.Time{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, statTime)
	defer cancel()
	s, err := observer.Observe(ctx, id)
	if err != nil || s.Layers == nil { // the next look finds another worker, or its answer
		return false, time.Time{}, nil //nolint:nilerr // nothing is known
	}
	return s.Layers.Sealed == 0 && s.Layers.Held >= s.Layers.Size, s.Layers.FailingSince, nil
}

// noteWhole makes an event of a volume's being an ordinary one from now on.
func (e *Engine) noteWhole(ctx context.Context, v *Volume) error {
	v.Remote, v.Awaiting = false, nil
	e.happened(v, "hydration", "All its blocks are on this host")
	return e.save(ctx, v)
}

// inheritRemote has a fork of a volume that is not whole be one that is not: what it
// lacks comes from the same store.
func (e *Engine) inheritRemote(ctx context.Context, v *Volume) error {
	if v.Remote || v.Snapshot == "" {
		return nil
	}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	v.Remote = err == nil && info.Remote
	return err
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
