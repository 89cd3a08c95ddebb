package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
)

// A layered volume that is mounted here lies on a device whose bytes a worker gives: see
// blockdev.LayerServer. While that is away all who use the volume wait, and so would
// whoever unmounts it. So it is started again as soon as its end is noticed, and before
// each step that needs the device.

// errUnserved: the worker of a mounted volume has ended, and no other one can be had.
var errUnserved = errors.New("the worker of its device cannot be started")

// servesLayers reports whether a layered image can be mounted here.
func (e *Engine) servesLayers(ctx context.Context, id blockdev.ID) bool {
	pool, ok := e.o.Pool.(blockdev.LayerServer)
	return ok && pool.ServesLayers(ctx, id) == nil
}

// growsServed reports whether a volume that nobody uses is layered and can be mounted to
// be grown. One that has to be checked first cannot, and nobody waits for a store.
func (e *Engine) growsServed(ctx context.Context, v Volume) (bool, error) {
	if v.CheckFirst || v.Tainted || v.Remote || !e.servesLayers(ctx, v.ID) {
		return false, nil
	}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	return info.Layers > 0, err
}

// keepServed has the worker of a volume that is mounted here run, and its device be
// connected to it. Nothing is done for a device that needs no worker. errUnserved.
func (e *Engine) keepServed(ctx context.Context, v Volume) error {
	endpoint := e.endpointNow(v.ID)
	if endpoint.Lease != "" && !overWorker(endpoint) {
		return nil
	}
	return e.step(ctx, v.ID, stepOpen, func(ctx context.Context) error { return e.serveAgain(ctx, v) })
}

// overWorker reports whether it is a device over a worker.
func overWorker(e blockdev.Endpoint) bool { return e.Served && e.Kind == blockdev.Block }

// serveAgain is keepServed within a step.
func (e *Engine) serveAgain(ctx context.Context, v Volume) error {
	endpoint := e.endpointNow(v.ID)
	switch {
	case endpoint.Lease == "":
		return e.serveFound(ctx, v)
	case !overWorker(endpoint) || e.answers(ctx, v):
		return nil
	}
	return e.revive(ctx, v.ID, endpoint)
}

// revive starts the worker of a device that has none. The volume's lock need not be
// held: whoever has it may be waiting for the device.
func (e *Engine) revive(ctx context.Context, id blockdev.ID, endpoint blockdev.Endpoint) error {
	reviver, ok := e.o.Pool.(serve.Reviver)
	if !ok {
		return nil
	}
	return unserved(reviver.Revive(ctx, id, endpoint.Lease))
}

// guardDevice has the worker of a device be followed by the next one for as long as the
// volume is open by it: before it is attached, and while it is detached, too.
func (e *Engine) guardDevice(id blockdev.ID) {
	if sentry, ok := e.o.Pool.(serve.Sentry); ok {
		e.keep(id, func(ctx context.Context, _ *keeper) { e.keepDevice(ctx, sentry, id) })
	}
}

const (
	// retryWorker is how long nobody tries again to start a worker that cannot be started.
	retryWorker = time.Second
	// apartTime is how long a device and its worker may have lost each other, though that
	// lives, before anybody looks.
	apartTime = 5 * time.Second
)

// keepDevice takes no lock of the volume's: whoever has it may be waiting for the device.
func (e *Engine) keepDevice(ctx context.Context, sentry serve.Sentry, id blockdev.ID) {
	for ctx.Err() == nil {
		begin := time.Now()
		err := e.awaitParting(ctx, sentry, id)
		waitFor(ctx, e.briefly-time.Since(begin))
		if err == nil {
			err = e.revive(ctx, id, e.endpointNow(id))
		}
		for err != nil && ctx.Err() == nil {
			e.complain(id, err)
			e.watch(id)
			e.wake()
			waitFor(ctx, retryWorker)
			err = e.revive(ctx, id, e.endpointNow(id))
		}
		if ctx.Err() == nil {
			e.watch(id)
			e.wake()
		}
	}
}

// awaitParting returns when the worker of a device has ended, or lives without a client.
func (e *Engine) awaitParting(ctx context.Context, sentry serve.Sentry, id blockdev.ID) error {
	for begin := time.Now(); ; {
		together, stop := context.WithTimeout(ctx, e.apart)
		err := sentry.AwaitEnd(together, id)
		looks := together.Err() != nil && ctx.Err() == nil
		stop()
		if !looks {
			if err == nil && time.Since(begin) >= e.briefly {
				e.o.Log.Warn("the worker of a volume has ended", "volume", id)
			}
			return err
		}
		if s, err := e.observe(ctx, id); err == nil && s.Clients == 0 {
			e.o.Log.Warn("the worker of a volume has lost its device", "volume", id)
			return nil
		}
	}
}

// waitFor is false when ctx has ended first.
func waitFor(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// serveFound is serveAgain for what an earlier life of this process has opened.
func (e *Engine) serveFound(ctx context.Context, v Volume) error {
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if err != nil || !info.Open || info.Layers == 0 {
		return nil //nolint:nilerr // who needs the image finds that out
	}
	dir, err := e.o.Stage.Mounted(ctx, v.ID)
	if err != nil || dir == "" {
		return err
	}
	var failures error
	for _, readOnly := range []bool{false, true} {
		_, err := e.open(ctx, v.ID, mountWant(readOnly))
		if err == nil {
			return nil
		}
		failures = errors.Join(failures, err)
	}
	return unserved(failures)
}

// answers reports whether the worker of a mounted volume runs and has its device for a
// client; what the worker complains of is logged.
func (e *Engine) answers(ctx context.Context, v Volume) bool {
	observer, ok := e.o.Pool.(serve.Observer)
	if !ok {
		return false
	}
	s, err := observer.Observe(ctx, v.ID)
	if err != nil || s.Clients == 0 {
		return false
	}
	e.complainOf(v.ID, s)
	return true
}

func unserved(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, blockdev.ErrNotFound): // a worker that has ended meanwhile, not the image
		return fmt.Errorf("%w: %s", errUnserved, err.Error())
	}
	return fmt.Errorf("%w: %w", errUnserved, err)
}

// cutOffUnserved is cutOff for a volume whose device nobody serves, for a reason. The
// device goes first: until then whoever touches the filesystem waits for it, and then it
// fails. What had not reached the worker is lost.
func (e *Engine) cutOffUnserved(ctx context.Context, v Volume, a Attachment, reason error) error {
	e.o.Log.Warn("a volume is cut off that nobody serves", "volume", v.ID, "attachment", a.ID, "err", reason)
	if _, ok := e.o.Pool.(blockdev.Severer); !ok {
		return reason
	}
	device := e.endpointNow(v.ID).Path
	if _, err := e.sever(ctx, v, stepEndWorker); err != nil {
		return err
	}
	return e.leaveDead(ctx, v, a, device)
}

// severed reports whether a filesystem is mounted here whose image was cut off from it.
func (e *Engine) severed(ctx context.Context, v Volume) (bool, error) {
	return stepOf(ctx, e, v.ID, stepAbandon, func(ctx context.Context) (bool, error) {
		dir, err := e.o.Stage.Mounted(ctx, v.ID)
		if err != nil || dir == "" {
			return false, err
		}
		info, err := e.o.Pool.Stat(ctx, v.ID)
		return err == nil && !info.Open, err
	})
}

// leaveDead takes a filesystem away whose device, "" for one that is not known, leads
// nowhere any more. It is not unmounted as others are: that flushes it, and whoever has
// files open may keep it for ever.
func (e *Engine) leaveDead(ctx context.Context, v Volume, a Attachment, device string) error {
	err := e.step(ctx, v.ID, stepShutdown, func(ctx context.Context) error { return e.o.Stage.Shutdown(ctx, v.ID, false) })
	switch {
	case err == nil:
		e.count(countShutdown)
	case hangs(err) != nil:
		return err
	case !errors.Is(err, errors.ErrUnsupported): // without it, too, all that needs the device fails
		e.o.Log.Warn("a filesystem without a device could not be shut down", "volume", v.ID, "err", err)
	}
	if err := e.leaveSandbox(ctx, v, a, true); err != nil {
		if !errors.Is(err, blockdev.ErrBusy) {
			return err
		}
		e.o.Log.Warn("a volume without a device could not be unmounted in its sandbox", "volume", v.ID, "attachment", a.ID, "err", err)
	}
	err = e.step(ctx, v.ID, stepAbandon, func(ctx context.Context) error { return e.o.Stage.Abandon(ctx, v.ID, device) })
	if errors.Is(err, blockdev.ErrBusy) { // somebody keeps a dead filesystem
		return nil
	}
	return err
}
