package opened

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/meter"
)

// Workers start the processes that serve images over vhost-user and NBD, and find
// them again: a control.Starter. Other pools' images may be among them.
type Workers interface {
	Serve(ctx context.Context, spec control.Spec) (*control.Worker, error)
	Find(ctx context.Context, id blockdev.ID) (*control.Worker, error)
	Kill(ctx context.Context, id blockdev.ID) error
	KillBeside(ctx context.Context, id blockdev.ID) error
	Refuse(ctx context.Context, r control.Refusal) error
	Lead(r control.Refusal) error
	AwaitRefused(ctx context.Context, r control.Refusal) error
}

// Calls are what a backend embeds to have its workers asked and told.
type Calls struct {
	Room string // of the backend, for errors
	// Worker gives that of an image which is open at one; blockdev.ErrNotFound else.
	Worker func(ctx context.Context, id blockdev.ID) (*control.Worker, error)
}

var (
	_ serve.Observer  = Calls{}
	_ serve.Throttler = Calls{}
	_ serve.Sentry    = Calls{}
	_ serve.Exposer   = Calls{}
)

func (c Calls) call(ctx context.Context, op string, id blockdev.ID, do func(*control.Worker) error) error {
	w, err := c.Worker(ctx, id)
	if err == nil {
		err = do(w)
	}
	return blockdev.Op(c.Room+"."+op, id, err)
}

// Observe implements serve.Observer.
func (c Calls) Observe(ctx context.Context, id blockdev.ID) (s serve.Service, err error) {
	err = c.call(ctx, "Observe", id, func(w *control.Worker) (err error) { s, err = w.Status(ctx); return err })
	return s, err
}

// Throttle implements serve.Throttler.
func (c Calls) Throttle(ctx context.Context, id blockdev.ID, limits blockdev.Limits) error {
	return c.call(ctx, "Throttle", id, func(w *control.Worker) error { return w.Throttle(ctx, limits) })
}

// AwaitEnd implements serve.Sentry.
func (c Calls) AwaitEnd(ctx context.Context, id blockdev.ID) error {
	return absent(c.call(ctx, "AwaitEnd", id, func(w *control.Worker) error { return w.AwaitEnd(ctx) }))
}

// Expose implements serve.Exposer.
func (c Calls) Expose(ctx context.Context, id blockdev.ID, e serve.Exposure) error {
	return c.call(ctx, "Expose", id, func(w *control.Worker) error { return w.Expose(ctx, e) })
}

// Withdraw implements serve.Exposer.
func (c Calls) Withdraw(ctx context.Context, id blockdev.ID, name string, force bool) error {
	return absent(c.call(ctx, "Withdraw", id, func(w *control.Worker) error { return w.Withdraw(ctx, name, force) }))
}

// absent makes success of there being no worker.
func absent(err error) error {
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	return err
}

// ServedCounters are what the worker of an image has counted.
func (c Calls) ServedCounters(ctx context.Context, id blockdev.ID) (blockdev.Counters, error) {
	w, err := c.Worker(ctx, id)
	if err != nil {
		return blockdev.Counters{}, err
	}
	s, err := w.Status(ctx)
	if err != nil {
		return blockdev.Counters{}, err
	}
	of := func(k meter.Kind) (requests, bytes int64) {
		c := s.Meter.Kinds[k]
		return int64(c.Requests), int64(c.Bytes) //nolint:gosec // counts
	}
	n := blockdev.Counters{Since: s.Since}
	n.Reads, n.ReadBytes = of(meter.Read)
	n.Writes, n.WriteBytes = of(meter.Write)
	n.Discards, n.DiscardBytes = of(meter.Discard)
	zeroes, bytes := of(meter.Zero)
	n.Discards, n.DiscardBytes = n.Discards+zeroes, n.DiscardBytes+bytes
	n.Flushes, _ = of(meter.Flush)
	return n, nil
}

// leaveTime is how long a client may take to be gone that has hung up.
const leaveTime = 2 * time.Second

// Unused is nil when nobody is connected to a worker, else blockdev.ErrBusy.
func Unused(ctx context.Context, w *control.Worker) error {
	for deadline := time.Now().Add(leaveTime); ; {
		s, err := w.Status(ctx)
		if err != nil || s.Clients == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: %d clients are connected", blockdev.ErrBusy, s.Clients)
		}
		select {
		case <-time.After(leaveTime / 100):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
