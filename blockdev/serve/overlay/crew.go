package overlay

import (
	"context"
	"sync"
)

// filler is a Source that is far away, and has a way for much at once.
type filler interface {
	// Fill reads like ReadAt, for hydration: readers go first. It ends with ctx.
	Fill(ctx context.Context, p []byte, off int64) error
}

// crew brings up several ranges at once where the base is far away, and one after the
// other where it is not: then there is little to wait for.
type crew struct {
	h    *Hydrator
	ctx  context.Context //nolint:containedctx // of one Run: it ends with the first failure
	fail context.CancelCauseFunc
	buf  []byte    // where one comes after the other
	jobs chan span // nil: one comes after the other
	all  sync.WaitGroup

	mu    sync.Mutex
	under map[span]bool // way
}

func (h *Hydrator) gather(ctx context.Context) *crew {
	c := &crew{h: h, under: map[span]bool{}}
	c.ctx, c.fail = context.WithCancelCause(ctx)
	if _, ok := h.v.base.(filler); !ok {
		c.buf = aligned(hydrateAtOnce)
		return c
	}
	c.jobs = make(chan span)
	for range hydrateFlights {
		c.all.Go(c.work)
	}
	return c
}

// take has a range brought up, or waits until somebody is free to do it.
func (c *crew) take(s span) error {
	if c.jobs == nil {
		return c.h.bring(c.ctx, s, c.buf)
	}
	c.mu.Lock()
	known := c.under[s]
	c.under[s] = true
	c.mu.Unlock()
	if known {
		return nil
	}
	select {
	case c.jobs <- s:
		return nil
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
}

func (c *crew) work() {
	buf := aligned(hydrateAtOnce)
	for s := range c.jobs {
		if err := c.h.bring(c.ctx, s, buf); err != nil {
			c.fail(err)
		}
		c.mu.Lock()
		delete(c.under, s)
		c.mu.Unlock()
	}
}

// end waits for all, and gives the first failure: err, that of who handed out, is not
// the first if it is that the context ended.
func (c *crew) end(err error) error {
	if err != nil {
		c.fail(err)
	}
	if c.jobs != nil {
		close(c.jobs)
	}
	c.all.Wait()
	err = context.Cause(c.ctx)
	c.fail(nil)
	return err
}
