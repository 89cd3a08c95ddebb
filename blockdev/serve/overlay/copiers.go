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

// copiers bring up several ranges at once where the base is far away, and one after the
// other where it is not: then there is little to wait for.
type copiers struct {
	h    *Hydrator
	ctx  context.Context //nolint:containedctx // of one Run: it ends with the first failure
	fail context.CancelCauseFunc
	buf  []byte    // where one comes after the other
	jobs chan span // nil: one comes after the other
	wg   sync.WaitGroup

	mu      sync.Mutex
	pending map[span]bool
}

func (h *Hydrator) newCopiers(ctx context.Context) *copiers {
	c := &copiers{h: h, pending: map[span]bool{}}
	c.ctx, c.fail = context.WithCancelCause(ctx)
	if _, ok := h.v.base.(filler); !ok {
		c.buf = aligned(hydrateAtOnce)
		return c
	}
	c.jobs = make(chan span)
	for range hydrateWorkers {
		c.wg.Go(c.work)
	}
	return c
}

// submit has a range brought up, or waits until somebody is free to do it.
func (c *copiers) submit(s span) error {
	if c.jobs == nil {
		return c.h.bring(c.ctx, s, c.buf)
	}
	c.mu.Lock()
	known := c.pending[s]
	c.pending[s] = true
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

func (c *copiers) work() {
	buf := aligned(hydrateAtOnce)
	for s := range c.jobs {
		if err := c.h.bring(c.ctx, s, buf); err != nil {
			c.fail(err)
		}
		c.mu.Lock()
		delete(c.pending, s)
		c.mu.Unlock()
	}
}

// finish waits for all, and gives the first failure: err, that of who handed out, is not
// the first if it is that the context ended.
func (c *copiers) finish(err error) error {
	if err != nil {
		c.fail(err)
	}
	if c.jobs != nil {
		close(c.jobs)
	}
	c.wg.Wait()
	err = context.Cause(c.ctx)
	c.fail(nil)
	return err
}
