package metadata

import (
	"context"
	"slices"
	"sync"
)

// turn is a lock whose holder knows whether somebody waits and can hand it to
// the first who does. Waiting ends with a context.
type turn struct {
	mu      sync.Mutex
	held    bool
	waiting []chan struct{} // first come, first served
}

// take waits for the turn. When ctx ends first, it is not taken; giveUp passes
// on a turn that arrived at the same moment.
func (t *turn) take(ctx context.Context, giveUp func()) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t.mu.Lock()
	if !t.held {
		t.held = true
		t.mu.Unlock()
		return nil
	}
	mine := make(chan struct{})
	t.waiting = append(t.waiting, mine)
	t.mu.Unlock()
	select {
	case <-mine:
		return nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	i := slices.Index(t.waiting, mine)
	if i >= 0 {
		t.waiting = slices.Delete(t.waiting, i, i+1)
	}
	t.mu.Unlock()
	if i < 0 {
		giveUp()
	}
	return ctx.Err()
}

// passIfWanted hands the turn to the first who waits; false: nobody does, and
// the caller still has it.
func (t *turn) passIfWanted() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waiting) == 0 {
		return false
	}
	close(t.waiting[0])
	t.waiting = slices.Delete(t.waiting, 0, 1)
	return true
}

// pass hands the turn on or gives it back.
func (t *turn) pass() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waiting) == 0 {
		t.held = false
		return
	}
	close(t.waiting[0])
	t.waiting = slices.Delete(t.waiting, 0, 1)
}
