package vhost

import "holdfast/blockdev/serve/meter"

// Requests of these are held back independently of each other.
const (
	reads = iota
	writes
)

// delays are requests that the volume's limits hold back, in the order in which they
// came, which is that in which they are due.
type delays struct {
	first, last *request
}

// delay takes a request from the limits; true when it has to wait.
func (l *loop) delay(r *request) bool {
	wait, ok := l.price(r, r.began)
	q := l.delaysOf(r)
	if !ok || wait <= 0 && q.first == nil {
		return false
	}
	r.due = r.began + wait
	if q.first == nil {
		q.first = r
	} else {
		q.last.next = r
		r.due = max(r.due, q.last.due)
	}
	q.last = r
	l.meter.Wait(meter.Throttle)
	return true
}

func (l *loop) delaysOf(r *request) *delays {
	if r.kind == kindIn {
		return &l.delayed[reads]
	}
	return &l.delayed[writes]
}

// price gives for how many nanoseconds a request is held back; false for one that no
// limit is about.
func (l *loop) price(r *request, now int64) (wait int64, ok bool) {
	switch r.kind {
	case kindIn:
		return l.server.o.Limiter.TakeRead(now, r.length), true
	case kindOut:
		return l.server.o.Limiter.TakeWrite(now, r.length), true
	case kindDiscard, kindWriteZeroes:
		return l.server.o.Limiter.TakeWrite(now, 0), true
	}
	return 0, false
}

// delays tells whether requests are held back.
func (l *loop) delays() bool { return l.delayed[reads].first != nil || l.delayed[writes].first != nil }

// nextDue is when the first of the delayed requests is due; false when none waits,
// or for something else.
func (l *loop) nextDue() (due int64, ok bool) {
	if l.held {
		return 0, false
	}
	for n := range l.delayed {
		if r := l.delayed[n].first; r != nil && (!ok || r.due < due) {
			due, ok = r.due, true
		}
	}
	return due, ok
}

// resume goes on with the delayed requests that are due: all, when the loop is to
// stop. What they owe is remembered by the limits.
func (l *loop) resume() {
	if l.held || !l.delays() {
		return
	}
	now := meter.Now()
	for n := range l.delayed {
		q := &l.delayed[n]
		for r := q.first; r != nil && (r.due <= now || l.stopping); r = q.first {
			q.first, r.next = r.next, nil
			l.meter.Waited(meter.Throttle, r.began)
			l.perform(r, now)
		}
	}
}

// relimit takes the delayed requests from new limits.
func (l *loop) relimit() {
	now := meter.Now()
	for n := range l.delayed {
		due := int64(0)
		for r := l.delayed[n].first; r != nil; r = r.next {
			wait, _ := l.price(r, now)
			due = max(due, now+wait)
			r.due = due
		}
	}
}
