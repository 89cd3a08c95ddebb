package nbd

import (
	"cmp"
	"slices"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/meter"
)

// change is closed when the limits are others.
type change chan struct{}

// Throttle makes exactly these limits hold from now on, for requests that wait already
// as well; the zero Limits lift all. See throttle.Limiter.
func (e *Export) Throttle(limits blockdev.Limits, burst time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.limiter.Set(limits, burst)
	next := make(change)
	close(*e.changed.Swap(&next))
	for l := range e.loops {
		l.relimited.Store(true)
		l.rouse()
	}
}

// relimit takes the delayed requests from limits that were changed, those first that
// were due first.
func (l *loop) relimit() {
	if !l.relimited.Load() || !l.relimited.Swap(false) || len(l.delayed) == 0 {
		return
	}
	waiting := slices.Clone(l.delayed)
	slices.SortFunc(waiting, func(a, b int) int { return cmp.Compare(l.slots[a].due, l.slots[b].due) })
	l.delayed = l.delayed[:0]
	now := meter.Now()
	for _, n := range waiting {
		s := &l.slots[n]
		s.due = now + l.throttle(&s.request)
		l.delayed.push(&l.slots, n)
	}
}

// late rouses a loop for a delayed request when all of its timers ring after that is
// due, as after limits that were raised again and again.
type late struct {
	timer *time.Timer
	at    int64 // when it rings, or rang
}

func (t *late) arm(due, now int64, rouse func()) {
	if t.at > now && t.at <= due {
		return
	}
	t.stop()
	t.at, t.timer = due, time.AfterFunc(time.Duration(max(1, due-now)), rouse)
}

func (t *late) stop() {
	if t.timer != nil {
		t.timer.Stop()
	}
}
