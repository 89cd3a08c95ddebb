package worker

import (
	"context"
	"errors"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

const (
	// hydrateRate is the default in bytes a second while clients are active.
	hydrateRate = 32 << 20
	// idleAfter is how long no request must have come for the copy to take all there
	// is.
	idleAfter = time.Second
	// A base of this host that cannot be read is tried again after a while, at most:
	retryBase, mostRetryBase = time.Second, time.Minute
)

// hydration copies the base in the background.
type hydration struct {
	w    *volume
	wake chan struct{} // the stack or the size has changed

	mu       sync.Mutex
	hydrator *overlay.Hydrator // nil: flat
	why      error             // of the last failure in a row
	since    time.Time
	tries    int64

	// Of pace, which one goroutine calls.
	requests uint64
	lastSeen time.Time // when their number had changed
	paid     time.Time // until when the rate is used up
}

func newHydration(w *volume) *hydration {
	h := &hydration{w: w, wake: make(chan struct{}, 1)}
	if w.layers != nil {
		h.hydrator = overlay.NewHydrator(w.layers, h.pace, w.words.Trace)
	}
	return h
}

func (h *hydration) copied() int64 {
	if h.hydrator == nil {
		return 0
	}
	return h.hydrator.Copied()
}

func (h *hydration) trace() []int64 {
	if h.hydrator == nil {
		return nil
	}
	return h.hydrator.Trace()
}

// look has it look again whether there is something to do.
func (h *hydration) look() {
	select {
	case h.wake <- struct{}{}:
	default: // it will
	}
}

// run copies until all is here, and again when the volume has grown or a sealed layer
// has gone. It costs nothing while there is nothing to do.
func (h *hydration) run(ctx context.Context) {
	if h.hydrator == nil || !h.w.words.Hydrate {
		return
	}
	wait := retryBase
	for {
		err := h.hydrator.Run(ctx)
		retry := h.note(err)
		if ctx.Err() != nil || errors.Is(err, blockdev.ErrFailed) {
			return
		}
		if err == nil {
			h.rest(ctx)
		}
		var again <-chan time.Time
		if retry {
			again = time.After(wait)
			wait = min(2*wait, mostRetryBase)
		} else {
			wait = retryBase
		}
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		case <-again:
		}
	}
}

// rest gives back the memory that fetching took, since the base is not needed any more,
// once clients are quiet, unless there is something to copy before.
func (h *hydration) rest(ctx context.Context) {
	if h.w.remote != nil {
		h.w.remote.Forget()
	}
	for !h.quiet(time.Now()) {
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
			h.look()
			return
		case <-time.After(idleAfter):
		}
	}
	h.w.giveBack()
}

// note remembers how a run ended; true when it is to be tried again. ErrBusy is none
// of its failures: there are sealed layers, or the volume has grown.
func (h *hydration) note(err error) (retry bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil || errors.Is(err, blockdev.ErrBusy) || errors.Is(err, context.Canceled) {
		h.why, h.tries = nil, 0
		return false
	}
	if h.why == nil {
		h.since = time.Now()
	}
	h.why = err
	h.tries++
	return true
}

func (h *hydration) failing() (since time.Time, tries int64, why error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.since, h.tries, h.why
}

// pace is overlay.Pace: the rate holds while clients do something, and not when they
// have been quiet for a while.
func (h *hydration) pace(ctx context.Context, n int64) error {
	rate := h.w.words.HydrateRate
	if rate == 0 {
		rate = hydrateRate
	}
	now := time.Now()
	if h.quiet(now) {
		h.paid = now
		return ctx.Err()
	}
	if h.paid.Before(now) {
		h.paid = now
	}
	due := h.paid
	h.paid = h.paid.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(due.Sub(now)):
		return nil
	}
}

// quiet tells whether no request has come for a while.
func (h *hydration) quiet(now time.Time) bool {
	s := h.w.meter.Snapshot()
	requests := uint64(s.Inside)
	for k := range s.Kinds {
		requests += s.Kinds[k].Requests
	}
	if requests != h.requests || s.Inside > 0 {
		h.requests, h.lastSeen = requests, now
	}
	return now.Sub(h.lastSeen) >= idleAfter
}
