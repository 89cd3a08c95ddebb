package overlay

import (
	"context"
	"time"
)

// maxYield bounds for how long a fetch of Fill lets readers go first.
const maxYield = 100 * time.Millisecond

// Fill is ReadAt for hydration: what it fetches is verified where it is to be and not
// kept, and before each fetch readers that wait are let go first. A reader that waits
// for some of it has it as soon as it is here, if its own fetch is not quicker. It
// waits for the store as long as the source is open and ctx has not ended.
func (r *Remote) Fill(ctx context.Context, p []byte, off int64) error {
	end := off + int64(len(p))
	if off%r.c.Chunk != 0 || end%r.c.Chunk != 0 && end != r.c.Size { // chunks are larger than what is asked for
		return readWhole(r, p, off)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	for i := off / r.c.Chunk; len(p) > 0; {
		next := i + 1
		for next*r.c.Chunk < end && r.c.zero(next) == r.c.zero(i) {
			next++
		}
		part := p[:r.c.lengthOf(i, next)]
		if r.c.zero(i) {
			clear(part)
		} else if err := r.fill(ctx, part, i); err != nil {
			return err
		}
		i, p = next, p[len(part):]
	}
	return nil
}

// fill fetches neighbours that are not zero.
func (r *Remote) fill(ctx context.Context, p []byte, first int64) error {
	r.yieldToReaders(ctx)
	// All that are under way share what the store sends.
	try := func(ctx context.Context) error { return r.try(ctx, hydrateWorkers*r.o.Try, r.o.Bulk, p, first) }
	if err := r.retry(ctx, int64(len(p)), try); err != nil {
		if r.ctx.Err() != nil {
			return ErrClosed
		}
		return err
	}
	r.deliver(p, first)
	return nil
}

// deliver gives chunks that are right to those who wait for them.
func (r *Remote) deliver(p []byte, first int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := first; len(r.pending) > 0 && len(p) > 0; i++ {
		n := r.c.length(i)
		if e := r.pending[i]; e != nil {
			e.p = r.buffer(n)
			copy(e.p, p)
			r.finish(e)
		}
		p = p[n:]
	}
}

// yieldToReaders waits until no reader waits for a fetch, or it is enough.
func (r *Remote) yieldToReaders(ctx context.Context) {
	late := time.NewTimer(maxYield)
	defer late.Stop()
	for e := r.anyPending(); e != nil; e = r.anyPending() {
		select {
		case <-e.done:
		case <-late.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (r *Remote) anyPending() *entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.pending {
		return e
	}
	return nil
}
