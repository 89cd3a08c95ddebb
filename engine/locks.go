package engine

import (
	"context"
	"sync"
	"time"

	"holdfast/blockdev"
)

// locks are one lock per volume, made when wanted and dropped when free. A lock
// whose holder has given up on a step that hangs stays taken until that step ends;
// who wants it meanwhile is told so instead of waiting.
type locks struct {
	mu   sync.Mutex
	held map[blockdev.ID]*lock
}

type lock struct {
	sem   chan struct{}
	users int
	hung  *hanging      // the step that hangs
	turn  chan struct{} // closed when hung changes
	owed  bool          // its holder has released it: it is free when the step ends
}

func newLocks() *locks { return &locks{held: map[blockdev.ID]*lock{}} }

// acquire waits for the volume's lock until ctx ends; *hanging at once when a step
// of it hangs.
func (l *locks) acquire(ctx context.Context, id blockdev.ID) (release func(), err error) {
	k := l.enter(id)
	for {
		hung, turn := l.state(k)
		if hung != nil {
			l.leave(id)
			return nil, hung
		}
		select {
		case k.sem <- struct{}{}:
			return func() { l.release(id, k) }, nil
		case <-turn:
		case <-ctx.Done():
			l.leave(id)
			return nil, ctx.Err()
		}
	}
}

// try takes the lock if it is free now.
func (l *locks) try(id blockdev.ID) (release func(), ok bool) {
	k := l.enter(id)
	select {
	case k.sem <- struct{}{}:
		return func() { l.release(id, k) }, true
	default:
		l.leave(id)
		return nil, false
	}
}

// wanted reports whether somebody waits for the lock that the caller holds.
func (l *locks) wanted(id blockdev.ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.held[id]
	return k != nil && k.users > 1
}

func (l *locks) release(id blockdev.ID, k *lock) {
	l.mu.Lock()
	k.owed = k.hung != nil
	owed := k.owed
	l.mu.Unlock()
	if !owed {
		<-k.sem
		l.leave(id)
	}
}

func (l *locks) state(k *lock) (*hanging, chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return k.hung, k.turn
}

// hung tells the step of a volume that hangs, nil for none.
func (l *locks) hung(id blockdev.ID) *hanging {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := l.held[id]; k != nil {
		return k.hung
	}
	return nil
}

// allHung counts the volumes of which a step hangs.
func (l *locks) allHung() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range l.held {
		if k.hung != nil {
			n++
		}
	}
	return n
}

// hang lends the lock, which the caller holds, to a step that hangs. The lock is
// free again when both the step has ended and its holder has released it.
func (l *locks) hang(id blockdev.ID, h *hanging, ended <-chan struct{}) {
	l.mu.Lock()
	k := l.held[id]
	if k == nil { // of a caller that holds no lock: nothing to lend
		l.mu.Unlock()
		return
	}
	k.hung = h
	close(k.turn)
	k.turn = make(chan struct{})
	l.mu.Unlock()
	go func() {
		<-ended
		l.mu.Lock()
		k.hung = nil
		close(k.turn)
		k.turn = make(chan struct{})
		owed := k.owed
		k.owed = false
		l.mu.Unlock()
		if owed {
			<-k.sem
			l.leave(id)
		}
	}()
}

// calm waits until no step of the volume hangs, and reports whether that came
// before ctx ended.
func (l *locks) calm(ctx context.Context, id blockdev.ID) bool {
	k := l.enter(id)
	defer l.leave(id)
	for {
		hung, turn := l.state(k)
		if hung == nil {
			return true
		}
		select {
		case <-turn:
		case <-ctx.Done():
			return false
		}
	}
}

func (l *locks) enter(id blockdev.ID) *lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.held[id]
	if k == nil {
		k = &lock{sem: make(chan struct{}, 1), turn: make(chan struct{})}
		l.held[id] = k
	}
	k.users++
	return k
}

func (l *locks) leave(id blockdev.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.held[id]
	if k.users--; k.users == 0 {
		delete(l.held, id)
	}
}

// hanging is a step that has not ended in its time and cannot be made to: a call
// that hangs in the kernel, as a rule.
type hanging struct {
	what  string
	since time.Time
}

func (h *hanging) Error() string {
	return h.what + " has not ended since " + h.since.Format(time.RFC3339)
}

// Is matches ErrHanging.
func (h *hanging) Is(target error) bool { return target == ErrHanging }
