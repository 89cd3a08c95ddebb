package engine

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
)

// copyAlong copies until all is copied, or it is to give way. Each piece is durable
// before the record counts it. Both images are closed on return: the next phase is
// only begun after that.
func (e *Engine) copyAlong(ctx context.Context, v *Volume) (err error) {
	if err := e.receive(ctx, v); err != nil {
		return err
	}
	src, letGoOfSource, err := e.openIn(ctx, v.Move.From, v.ID, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, letGoOfSource()) }()
	if v.Remote { // it is open as one file
		if err := e.noteWhole(ctx, v); err != nil {
			return err
		}
	}
	dst, letGoOfTarget, err := e.openIn(ctx, v.Move.To, v.ID, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, letGoOfTarget()) }()
	for v.Move.Done < v.Move.Size {
		next, copied, err := e.o.Copy(ctx, dst, src, v.Move.Done, movePiece)
		if err != nil {
			return err
		}
		v.Move.Done, v.Move.Failure = next, ""
		v.Move.Copied += copied
		if err := e.commit(ctx, v.clone()); err != nil {
			return err
		}
		if e.giveWay(v.ID) {
			return nil
		}
	}
	return nil
}

// receive makes the incoming image of a move, once: it is published at once, because
// drafts are not durable, with a description that says that it is no volume. Where
// nothing is counted as copied it is made anew: what an earlier move has left there
// would show through the holes of this one.
func (e *Engine) receive(ctx context.Context, v *Volume) error {
	to, err := e.backendOf(v.Move.To)
	if err != nil {
		return err
	}
	info, err := to.Stat(ctx, v.ID)
	there := err == nil && !info.Draft
	if err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		return err
	}
	switch {
	case there && v.Move.Done > 0:
		return nil
	case v.Move.Done > 0: // somebody took it away
		v.Move.Done, v.Move.Copied = 0, 0
		if err := e.commit(ctx, v.clone()); err != nil {
			return err
		}
	}
	if err := e.removeCopy(ctx, v.ID, v.Move.To, incoming); err != nil {
		return err
	}
	if err := to.Create(ctx, v.ID, v.Move.Size); err != nil {
		return err
	}
	half := v.clone()
	half.Incoming, half.Move, half.Pool, half.Sequence = true, nil, v.Move.To, 0
	b, err := describe(half)
	if err != nil {
		return err
	}
	return to.Publish(ctx, v.ID, b)
}

// switchPools lets the copy be the volume. Its description, with a higher sequence
// than the old image's, is what decides; the record follows. Done again it does the
// same.
func (e *Engine) switchPools(ctx context.Context, v *Volume) error {
	to, err := e.backendOf(v.Move.To)
	if err != nil {
		return err
	}
	from := v.Move.From
	said, err := e.lastSaid(ctx, *v)
	if err != nil {
		return err
	}
	moved := v.clone()
	moved.Move, moved.Pool = nil, v.Move.To
	moved.Sequence = max(v.Sequence, said) + 1
	moved.UpdatedAt = e.now()
	e.happened(&moved, "move", "Moved from pool %s to %s", e.poolName(from), e.poolName(moved.Pool))
	b, err := describe(moved)
	if err != nil {
		return err
	}
	if err := to.Describe(ctx, v.ID, b); err != nil {
		return err
	}
	left := *v.Move
	left.Phase, left.Failure = MoveLeaving, ""
	moved.Move = &left
	if err := e.commit(ctx, moved); err != nil {
		return err
	}
	*v = moved.clone()
	e.arrived(moved, from)
	return e.place(v.ID, v.Pool)
}

// lastSaid is the sequence in the old image's description. It is higher than the
// record's after a write of it that failed, and was done all the same.
func (e *Engine) lastSaid(ctx context.Context, v Volume) (uint64, error) {
	backend, err := e.backendOf(v.Move.From)
	if err != nil {
		return 0, err
	}
	info, err := backend.Stat(ctx, v.ID)
	if err != nil {
		return 0, err
	}
	said, err := parseDescription(info.Description)
	return said.Sequence, err
}

// arrived settles what the process remembers of a volume that has another image now.
func (e *Engine) arrived(v Volume, from string) {
	e.ledger(from).forget(v.ID)
	e.ledger(v.Pool).expectNot(v.ID)
	e.ledger(v.Pool).record(v.Workspace, v.ID, v.bytes())
	e.forgetEndpoint(v.ID)
	e.forgetIO(v.ID)
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.filled, v.ID)
	delete(e.told, v.ID)
	delete(e.trims.written, v.ID)
}

// leavePool removes the old image and ends the move.
func (e *Engine) leavePool(ctx context.Context, v *Volume) error {
	if err := e.removeCopy(ctx, v.ID, v.Move.From, older(v.Sequence)); err != nil {
		return err
	}
	left := v.clone()
	left.Move = nil
	if err := e.commitFreeing(ctx, left); err != nil {
		return err
	}
	*v = left
	return nil
}

// removeOther takes away the image that a volume which is being deleted has in
// another pool, before its own: that one would be taken for the volume afterwards.
func (e *Engine) removeOther(ctx context.Context, v Volume) error {
	switch {
	case v.Move == nil:
		return nil
	case v.Move.Phase == MoveLeaving:
		return e.removeCopy(ctx, v.ID, v.Move.From, older(v.Sequence))
	case v.Move.Phase == MoveSwitching:
		return e.removeCopy(ctx, v.ID, v.Move.To, anyCopy)
	}
	return e.removeCopy(ctx, v.ID, v.Move.To, incoming)
}

// What an image that is to be removed says of itself proves that it is not the volume.
func incoming(said Volume) bool { return said.Incoming }

func anyCopy(Volume) bool { return true }

func older(than uint64) func(Volume) bool {
	return func(said Volume) bool { return said.Incoming || said.Sequence < than }
}

// removeCopy takes the image away that a volume has in a pool where it does not live,
// if that says what it must. Absent is success, and a draft says nothing.
func (e *Engine) removeCopy(ctx context.Context, id blockdev.ID, pool string, proof func(said Volume) bool) error {
	backend, err := e.backendOf(pool)
	if err != nil {
		return err
	}
	info, err := backend.Stat(ctx, id)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.Draft {
		said, err := parseDescription(info.Description)
		if err != nil || said.ID != id || !proof(said) {
			return errors.Join(err, fmt.Errorf("%w: the image of %s in pool %q is not what a move leaves there: it stays", blockdev.ErrCorrupt, id, e.poolName(pool)))
		}
	}
	if info.Open {
		if err := closeLeft(ctx, backend, id); err != nil {
			return err
		}
	}
	return backend.Remove(ctx, id)
}

// openIn opens a volume's image in a pool, for a copy.
func (e *Engine) openIn(ctx context.Context, pool string, id blockdev.ID, readOnly bool) (path string, letGo func() error, err error) {
	backend, err := e.backendOf(pool)
	if err != nil {
		return "", nil, err
	}
	endpoint, err := e.openFlat(ctx, backend, id, copyWant(readOnly))
	if err != nil {
		return "", nil, err
	}
	return endpoint.Path, func() error { return backend.Close(context.WithoutCancel(ctx), id, endpoint.Lease) }, nil
}

func copyWant(readOnly bool) blockdev.Want {
	return blockdev.Want{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}, ReadOnly: readOnly}
}

// closeLeft closes the opening that a copy of an earlier life has left.
func closeLeft(ctx context.Context, backend blockdev.Backend, id blockdev.ID) error {
	var failures error
	for _, readOnly := range []bool{true, false} {
		endpoint, err := backend.Open(ctx, id, copyWant(readOnly))
		if err == nil {
			return backend.Close(ctx, id, endpoint.Lease)
		}
		failures = errors.Join(failures, err)
	}
	return failures
}
