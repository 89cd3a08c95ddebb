package overlay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"holdfast/blockdev"
)

// hydrateAtOnce is what is read from the base and copied in one go, in bytes: a
// writer of the same range waits for the copy, not for the base.
const hydrateAtOnce = 1 << 20

// hydrateWorkers is how many of these are under way at once where the base is far away:
// one is fetched while another is verified and a third one written. As many MiB are
// held meanwhile.
const hydrateWorkers = 4

// Pace bounds hydration: it returns when n more bytes may be fetched, and an error
// when it is over. It is called by one goroutine at a time.
type Pace func(ctx context.Context, n int64) error

// Hydrator copies a volume's base into its top layer, so that in the end the base
// is not needed. Ranges that were read from the base come first, then those that
// First names, then all that is left, in order.
type Hydrator struct {
	v      *Overlay
	pace   Pace
	first  []int64    // chunks, by number
	wanted chan int64 // chunks
	copied atomic.Int64
	share  *sharing // of one goroutine, Run's

	mu    sync.Mutex
	trace []int64 // chunks in the order in which they were missed first
	seen  map[int64]bool
}

// NewHydrator prepares the hydration of a volume; pace nil is as fast as it goes.
// first is a trace, as another volume of the same base gave it, of what is wanted
// early.
func NewHydrator(v *Overlay, pace Pace, first []int64) *Hydrator {
	if pace == nil {
		pace = func(ctx context.Context, _ int64) error { return ctx.Err() }
	}
	h := &Hydrator{v: v, pace: pace, first: first, wanted: make(chan int64, 256), share: shareFrom(v.base), seen: map[int64]bool{}}
	v.OnMiss(h.missed)
	return h
}

// Copied is how many bytes were copied from the base so far, zeroes not counted.
func (h *Hydrator) Copied() int64 { return h.copied.Load() }

// Trace gives the chunks of 1 MiB that readers missed, in the order of the first
// miss of each: a later volume of this base wants them first.
func (h *Hydrator) Trace() []int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]int64(nil), h.trace...)
}

func (h *Hydrator) missed(off, n int64) {
	for c := off / hydrateAtOnce; c <= (off+n-1)/hydrateAtOnce; c++ {
		h.mu.Lock()
		known := h.seen[c]
		if !known {
			h.seen[c] = true
			h.trace = append(h.trace, c)
		}
		h.mu.Unlock()
		if known {
			continue
		}
		select {
		case h.wanted <- c:
		default: // its turn comes
		}
	}
}

// Run copies until the top layer holds the whole volume and that is durable, or
// ctx ends. It needs a stack of one layer: what sealed layers hold is brought up
// by Absorb first. After nil the top layer's data is the volume.
func (h *Hydrator) Run(ctx context.Context) error {
	return blockdev.Op("overlay.Hydrate", "", h.run(ctx))
}

func (h *Hydrator) run(ctx context.Context) error {
	c := h.newCopiers(ctx)
	if err := c.finish(h.plan(c)); err != nil {
		return err
	}
	if err := h.v.Sync(); err != nil {
		return err
	}
	if held, of := h.v.Held(); held != of {
		return fmt.Errorf("%w: %d of %d blocks: the volume has grown or has sealed layers", blockdev.ErrBusy, held, of)
	}
	return nil
}

// plan goes through the whole volume once.
func (h *Hydrator) plan(c *copiers) error {
	for _, chunk := range h.first {
		if err := h.urgent(c); err != nil {
			return err
		}
		if chunk < 0 || chunk > (h.v.Size()-1)/hydrateAtOnce { // a trace is only a hint
			continue
		}
		if err := h.chunk(c, chunk); err != nil {
			return err
		}
	}
	for off := int64(0); off < h.v.Size(); {
		if err := h.urgent(c); err != nil {
			return err
		}
		next, err := h.step(c, off)
		if err != nil {
			return err
		}
		off = next
	}
	return nil
}

// urgent copies what readers wait for or have just read.
func (h *Hydrator) urgent(c *copiers) error {
	for {
		select {
		case chunk := <-h.wanted:
			if err := h.chunk(c, chunk); err != nil {
				return err
			}
		default:
			return c.ctx.Err()
		}
	}
}

// step brings the next part at or behind off into the top layer and tells where it
// ends: a chunk with data, or all up to the next data at once.
func (h *Hydrator) step(c *copiers, off int64) (next int64, err error) {
	from, to := h.v.Size(), h.v.Size()
	if h.v.base != nil {
		from, to, err = h.v.base.Next(off)
		if errors.Is(err, io.EOF) {
			from, to, err = h.v.Size(), h.v.Size(), nil
		}
		if err != nil {
			return 0, err
		}
	}
	from -= from % BlockSize
	if from > off {
		return from, h.v.fillZero(c.ctx, off, from)
	}
	atOnce := h.share.most(hydrateAtOnce)
	end := min((off/atOnce+1)*atOnce, (to+BlockSize-1)/BlockSize*BlockSize, h.v.Size())
	return end, h.copy(c, span{off, end})
}

func (h *Hydrator) chunk(c *copiers, chunk int64) error {
	return h.copy(c, span{chunk * hydrateAtOnce, min((chunk+1)*hydrateAtOnce, h.v.Size())})
}

// copy has a range brought up from the base, if the top lacks any of it.
func (h *Hydrator) copy(c *copiers, s span) error {
	if h.v.topHolds(run{s.from / BlockSize, s.to / BlockSize}) {
		return nil
	}
	off, err := h.shared(c.ctx, s.from, s.to)
	for off < s.to && err == nil {
		part := min(s.to, off+hydrateAtOnce)
		err = h.copyOnce(c, span{off, part})
		off = part
	}
	return err
}

// shared has the top share what it can of a range, and tells from where on it has to be
// copied.
func (h *Hydrator) shared(ctx context.Context, off, end int64) (rest int64, err error) {
	if h.share.from == nil {
		return off, nil
	}
	end = min(end, h.v.base.Size()/BlockSize*BlockSize)
	if off >= end {
		return off, nil
	}
	if err := errors.Join(h.pace(ctx, ShareCost), h.v.Failed()); err != nil {
		return off, err
	}
	all := true
	err = h.v.fillTop(run{off / BlockSize, end / BlockSize}, func(top *layer, missing run) error {
		done, err := h.share.into(top.Data, missing)
		if done {
			top.mark(missing.first, missing.end)
		}
		all = all && done
		return err
	})
	if !all {
		end = off // what is held by now is passed over
	}
	return end, err
}

func (h *Hydrator) copyOnce(c *copiers, s span) error {
	if h.v.topHolds(run{s.from / BlockSize, s.to / BlockSize}) {
		return nil
	}
	if n := h.inBase(s); n > 0 {
		if err := h.pace(c.ctx, n); err != nil {
			return err
		}
	}
	return c.submit(s)
}

// inBase is how many bytes of a range the base reaches.
func (h *Hydrator) inBase(s span) int64 {
	if h.v.base == nil {
		return 0
	}
	return max(0, min(s.to, h.v.base.Size())-s.from)
}

// bring brings a range up. The base is asked before anybody is kept waiting.
func (h *Hydrator) bring(ctx context.Context, s span, buf []byte) error {
	v, p, n := h.v, buf[:s.to-s.from], h.inBase(s)
	clear(p[n:])
	if n > 0 {
		if err := h.fetch(ctx, p[:n], s.from); err != nil {
			return fmt.Errorf("base: %w", err)
		}
		h.copied.Add(n)
	}
	return v.bringIn(run{s.from / BlockSize, s.to / BlockSize}, p)
}

func (h *Hydrator) fetch(ctx context.Context, p []byte, off int64) error {
	if far, ok := h.v.base.(filler); ok {
		return far.Fill(ctx, p, off)
	}
	return readWhole(h.v.base, p, off)
}

func (v *Overlay) topHolds(r run) bool {
	v.gate.RLock()
	defer v.gate.RUnlock()
	return v.stack[0].holds(r.first, r.end)
}

// bringIn puts bytes of the base where no layer has any.
func (v *Overlay) bringIn(r run, p []byte) error {
	if err := v.Failed(); err != nil {
		return err
	}
	return v.fillTop(r, func(top *layer, missing run) error {
		return top.copyIn(missing, p[(missing.first-r.first)*BlockSize:(missing.end-r.first)*BlockSize])
	})
}

// fillTop calls fill for each part of r that the only layer does not hold.
// blockdev.ErrBusy when there are more: what they hold is not the base's to give.
func (v *Overlay) fillTop(r run, fill func(top *layer, missing run) error) error {
	v.gate.RLock()
	defer v.gate.RUnlock()
	if len(v.stack) > 1 {
		return fmt.Errorf("%w: there are sealed layers between the top and the base", blockdev.ErrBusy)
	}
	defer v.chunks.lock(r, true)()
	top := v.stack[0]
	return top.fill(r, func(missing run) error { return fill(top, missing) })
}

// fillZero takes a range that the base has nothing in as zeroes.
func (v *Overlay) fillZero(ctx context.Context, off, end int64) error {
	for off < end {
		to := min(end, off+zeroAtOnce)
		if err := errors.Join(ctx.Err(), v.zeroMissing(run{off / BlockSize, to / BlockSize})); err != nil {
			return err
		}
		off = to
	}
	return nil
}

func (v *Overlay) zeroMissing(r run) error {
	return v.fillTop(r, func(top *layer, missing run) error {
		if err := top.Data.Punch(missing.first*BlockSize, (missing.end-missing.first)*BlockSize); err != nil {
			return err
		}
		top.markHoles(missing.first, missing.end)
		return nil
	})
}
