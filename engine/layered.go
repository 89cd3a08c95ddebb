package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/serve"
)

// A layered image's bytes lie in layers and in a base, perhaps far away: see
// blockdev.Flattener. It is a volume like any other, usable at once. What only a file
// or a block device can do waits for it to become one: for FlattenWait at most, then
// the caller is told how much is left, and Run goes on with it.

// flattenSlice is how long Run works on one image before whoever waits for its volume
// has a turn.
const flattenSlice = 2 * time.Second

// openFlat opens an image in a backend, made flat first where the kinds need that.
// blockdev.ErrLayered, as a Problem, when that takes longer than it may.
func (e *Engine) openFlat(ctx context.Context, backend blockdev.Backend, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
	endpoint, err := backend.Open(ctx, id, w)
	if !errors.Is(err, blockdev.ErrLayered) {
		return endpoint, err
	}
	if err := e.flatten(ctx, backend, id, e.o.FlattenWait); err != nil {
		return endpoint, err
	}
	return backend.Open(ctx, id, w)
}

// flatten makes an image flat, within a time; the volume's lock is held. What is left
// then is Run's.
func (e *Engine) flatten(ctx context.Context, backend blockdev.Backend, id blockdev.ID, within time.Duration) error {
	flattener, ok := backend.(blockdev.Flattener)
	if !ok {
		return blockdev.ErrLayered
	}
	bounded, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	err := e.timed("flatten", func() error { return flattener.Flatten(bounded, id) })
	if err == nil {
		e.setUnflat(id, false)
		return nil
	}
	if bounded.Err() == nil || ctx.Err() != nil || lostWrite(err) {
		return err
	}
	e.setUnflat(id, true)
	e.watch(id)
	e.wake()
	return e.hydrating(ctx, backend, id, err)
}

// hydrating tells a user how far an image is.
func (e *Engine) hydrating(ctx context.Context, backend blockdev.Backend, id blockdev.ID, cause error) error {
	info, err := backend.Stat(ctx, id)
	if err != nil {
		return errors.Join(cause, err)
	}
	name := string(id)
	if v, ok := e.catalog.get(id); ok {
		name = v.Name
	}
	why := ""
	if errors.Is(cause, blockdev.ErrUnreachable) { // its address is the operator's to know
		e.o.Log.Warn("a volume waits for the store of its base", "image", id, "err", cause)
		why = ". The store that they come from does not answer: its operator finds the reason in the server's log"
	}
	return &Problem{Kind: blockdev.ErrLayered, Err: cause, Message: fmt.Sprintf(
		"volume %q is being hydrated, and this needs all of it in one place: about %d of %d MB are left%s. That goes on by itself: try again later",
		name, mibUp(info.Absent), mibUp(info.Size), why)}
}

// needsFlat reports whether an attachment cannot use a layered image.
func (e *Engine) needsFlat(ctx context.Context, v Volume, t attach.Target, readOnly bool) bool {
	if !e.isRaw(t) {
		return !e.servesLayers(ctx, v.ID)
	}
	return !slices.ContainsFunc(e.kindsFor(t, readOnly), isSocket)
}

// flattenNow makes a volume flat that nobody has open.
func (e *Engine) flattenNow(ctx context.Context, v Volume) error {
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if err != nil || info.Layers == 0 {
		return err
	}
	return e.flatten(ctx, e.o.Pool, v.ID, e.o.FlattenWait)
}

// kindAhead is the kind of endpoint that an attachment will get, "" where that is not
// known.
func (e *Engine) kindAhead(ctx context.Context, v Volume, t attach.Target, readOnly bool) blockdev.Kind {
	if len(v.Attachments) > 0 { // it shares their opening
		return v.Attachments[0].Kind
	}
	if !e.isRaw(t) {
		return ""
	}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	for _, k := range e.kindsFor(t, readOnly) {
		if err == nil && (info.Layers == 0 || isSocket(k)) {
			return k
		}
	}
	return ""
}

// endpointNow is the opening of a volume, as it is remembered.
func (e *Engine) endpointNow(id blockdev.ID) blockdev.Endpoint {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.endpoints[id]
}

// Socket is where a worker serves an attachment's volume on this host, "" for one that
// has no socket.
func (e *Engine) Socket(v Volume, a Attachment) string {
	if !isSocket(a.Kind) || a.Phase != Attached {
		return ""
	}
	return e.endpointNow(v.ID).Path
}

func mibUp(bytes int64) int64 { return (bytes + filesystem.MiB - 1) / filesystem.MiB }

// flattenOn goes on with an image that somebody waits for.
func (e *Engine) flattenOn(ctx context.Context, v Volume) error {
	if !e.isUnflat(v.ID) || len(v.Attachments) > 0 { // of one that is open its worker does it
		return nil
	}
	err := e.flatten(ctx, e.o.Pool, v.ID, min(flattenSlice, e.o.FlattenWait))
	switch {
	case errors.Is(err, blockdev.ErrLayered):
		return nil
	case errors.Is(err, blockdev.ErrNotFound):
		e.setUnflat(v.ID, false)
		return nil
	}
	return err
}

func (e *Engine) isUnflat(id blockdev.ID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.unflat[id]
}

func (e *Engine) setUnflat(id blockdev.ID, waits bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if waits {
		e.unflat[id] = true
	} else {
		delete(e.unflat, id)
	}
}

// asBytes looks at an image that nobody has open, or changes a few bytes of it,
// wherever they lie: byPath where it is a file or a device, byBytes where it is
// layered.
func (e *Engine) asBytes(ctx context.Context, id blockdev.ID, readOnly bool, byPath func(path string) error, byBytes func(b blockdev.Bytes) error) (err error) {
	accessor, ok := e.o.Pool.(blockdev.Accessor)
	if !ok {
		return e.asFile(ctx, id, readOnly, byPath)
	}
	endpoint, err := e.openFile(ctx, id, readOnly, e.o.Pool.Open)
	if errors.Is(err, blockdev.ErrLayered) {
		return e.throughLayers(ctx, accessor, id, readOnly, byBytes)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.o.Pool.Close(ctx, id, endpoint.Lease)) }()
	return byPath(endpoint.Path)
}

// throughLayers is asBytes of a layered image. What of it is far away, and does not come
// in the time that a step has, is no reason to hold the volume's lock:
// blockdev.ErrLayered, as a Problem.
func (e *Engine) throughLayers(ctx context.Context, accessor blockdev.Accessor, id blockdev.ID, readOnly bool, use func(b blockdev.Bytes) error) error {
	within, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	b, err := accessor.Access(within, id, readOnly)
	if err != nil {
		return err
	}
	err = use(impatient{b, e.o.FlattenWait, stop})
	if err == nil && !readOnly {
		err = b.Sync()
	}
	err = errors.Join(err, b.Close())
	if err != nil && errors.Is(context.Cause(within), errSlow) {
		return e.hydrating(ctx, e.o.Pool, id, err)
	}
	return err
}

// errSlow: bytes did not come in time.
var errSlow = errors.New("the store does not give its bytes in time")

// impatient are bytes whose reader waits so long for each read.
type impatient struct {
	blockdev.Bytes
	wait time.Duration
	stop context.CancelCauseFunc
}

func (i impatient) ReadAt(p []byte, off int64) (int, error) {
	defer time.AfterFunc(i.wait, func() { i.stop(errSlow) }).Stop()
	return i.Bytes.ReadAt(p, off)
}

func (i impatient) WriteAt(p []byte, off int64) (int, error) { // it may have to read what it is not all of
	defer time.AfterFunc(i.wait, func() { i.stop(errSlow) }).Stop()
	return i.Bytes.WriteAt(p, off)
}

// lookAtWorker gives the limits of an attachment to the worker that serves it, where
// that is another one by now, and logs what it complains of.
func (e *Engine) lookAtWorker(ctx context.Context, v Volume, a Attachment) error {
	observer, ok := e.o.Pool.(serve.Observer)
	if !ok {
		return nil
	}
	s, err := stepOf(ctx, e, v.ID, stepProbe, func(ctx context.Context) (serve.Service, error) { return observer.Observe(ctx, v.ID) })
	if err == nil {
		e.guardWorker(v)
	}
	switch {
	case hangs(err) != nil || errors.Is(err, blockdev.ErrNotFound): // the next look finds another one
		return nil
	case err != nil:
		return err
	}
	e.complainOf(v.ID, s)
	if s.Limits == a.Limits {
		return nil
	}
	return e.throttle(ctx, v, a.Limits)
}

// complainOf logs what a worker complains of.
func (e *Engine) complainOf(id blockdev.ID, s serve.Service) {
	switch {
	case s.Failed != "":
		e.complain(id, fmt.Errorf("its worker acknowledges no write any more: %s", s.Failed))
	case s.Layers != nil && s.Layers.Reason != "":
		e.complain(id, fmt.Errorf("what it is made of does not answer since %s: %s", s.Layers.FailingSince, s.Layers.Reason))
	}
}

// Hydration is how far a volume is whose bytes do not lie in one place yet. It is used
// like any other meanwhile.
type Hydration struct {
	Absent int64 // bytes that have yet to be brought there, at most
	Total  int64 // of the volume, bytes
	Layers int
	// FailingSince is when where they come from began to fail, which readers of what is
	// absent wait out; Reason is why, in an operator's words.
	FailingSince time.Time
	Reason       string
}

// hydrationOf tells how far an image is; nil for a flat one.
func (e *Engine) hydrationOf(ctx context.Context, info blockdev.Info) *Hydration {
	if info.Layers == 0 {
		return nil
	}
	h := &Hydration{Absent: info.Absent, Total: info.Size, Layers: info.Layers}
	observer, ok := e.o.Pool.(serve.Observer)
	if !ok || !info.Open {
		return h
	}
	ctx, cancel := context.WithTimeout(ctx, statTime)
	defer cancel()
	s, err := observer.Observe(ctx, info.ID)
	if err == nil && s.Layers != nil {
		h.FailingSince, h.Reason = s.Layers.FailingSince, s.Layers.Reason
	}
	return h
}
