package engine

import (
	"context"
	"sync"

	"holdfast/blockdev"
)

// locks are one lock per volume, made when wanted and dropped when free.
type locks struct {
	mu   sync.Mutex
	held map[blockdev.ID]*lock
}

type lock struct {
	sem   chan struct{}
	users int
}

func newLocks() *locks { return &locks{held: map[blockdev.ID]*lock{}} }

// acquire waits for the volume's lock until ctx ends.
func (l *locks) acquire(ctx context.Context, id blockdev.ID) (release func(), err error) {
	k := l.enter(id)
	select {
	case k.sem <- struct{}{}:
		return func() { <-k.sem; l.leave(id) }, nil
	case <-ctx.Done():
		l.leave(id)
		return nil, ctx.Err()
	}
}

// try takes the lock if it is free now.
func (l *locks) try(id blockdev.ID) (release func(), ok bool) {
	k := l.enter(id)
	select {
	case k.sem <- struct{}{}:
		return func() { <-k.sem; l.leave(id) }, true
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

func (l *locks) enter(id blockdev.ID) *lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.held[id]
	if k == nil {
		k = &lock{sem: make(chan struct{}, 1)}
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
