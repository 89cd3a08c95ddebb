package sparse

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"holdfast/blockdev"
)

// turns let one at a time work on an image. Callers are serialised by the engine;
// what the pool does by itself, and a Flatten, gives way to whoever comes.
type turns struct {
	mu sync.Mutex
	at map[blockdev.ID]*turn
}

type turn struct {
	taken chan struct{} // full while somebody has it
	users int           // who have it or wait for it
	yield context.CancelCauseFunc
}

// errYield is why work ends that gave way.
var errYield = errors.New("somebody else needs the image")

// enter counts the caller in; who gives way is told to.
func (t *turns) enter(id blockdev.ID, onlyFree bool) (*turn, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.at == nil {
		t.at = map[blockdev.ID]*turn{}
	}
	one := t.at[id]
	if one != nil && onlyFree {
		return nil, false
	}
	if one == nil {
		one = &turn{taken: make(chan struct{}, 1)}
		t.at[id] = one
	}
	one.users++
	if one.yield != nil {
		one.yield(errYield)
	}
	return one, true
}

func (t *turns) leave(id blockdev.ID, one *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drop(id, one)
}

// drop is leave for who has t.mu.
func (t *turns) drop(id blockdev.ID, one *turn) {
	if one.users--; one.users == 0 {
		delete(t.at, id)
	}
}

// take waits for the image's turn; done ends it.
func (t *turns) take(ctx context.Context, id blockdev.ID) (done func(), err error) {
	one, _ := t.enter(id, false)
	select {
	case one.taken <- struct{}{}:
	case <-ctx.Done():
		t.leave(id, one)
		return nil, ctx.Err()
	}
	return func() { t.give(id, one) }, nil
}

// give ends a turn. Who has it next finds the caller counted out, and does not take it
// for somebody to give way to.
func (t *turns) give(id blockdev.ID, one *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	<-one.taken // full: the caller has filled it
	t.drop(id, one)
}

// takeYielding is take for long work: the context that it gives ends when somebody
// else comes, with the cause errYield.
func (t *turns) takeYielding(ctx context.Context, id blockdev.ID) (work context.Context, done func(), err error) {
	release, err := t.take(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	work, done = t.yielding(ctx, id, release)
	return work, done, nil
}

// takeFree is takeYielding for what nobody waits for: ok is false where somebody has
// the turn.
func (t *turns) takeFree(ctx context.Context, id blockdev.ID) (work context.Context, done func(), ok bool) {
	one, ok := t.enter(id, true)
	if !ok {
		return nil, nil, false
	}
	select {
	case one.taken <- struct{}{}:
	default: // somebody came since
		t.leave(id, one)
		return nil, nil, false
	}
	work, done = t.yielding(ctx, id, func() { t.give(id, one) })
	return work, done, true
}

func (t *turns) yielding(ctx context.Context, id blockdev.ID, release func()) (work context.Context, done func()) {
	work, cancel := context.WithCancelCause(ctx)
	t.mu.Lock()
	one := t.at[id]
	one.yield = cancel
	if one.users > 1 {
		cancel(errYield)
	}
	t.mu.Unlock()
	return work, func() {
		t.mu.Lock()
		one.yield = nil
		t.mu.Unlock()
		cancel(nil)
		release()
	}
}

// yielded makes of work's end for somebody else's sake what its caller is told.
func yielded(work context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(work), errYield) {
		return fmt.Errorf("%w: %w", blockdev.ErrBusy, errYield)
	}
	return err
}
