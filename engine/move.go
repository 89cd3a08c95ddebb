package engine

import (
	"context"
	"errors"
	"time"

	"holdfast/blockdev"
)

// MovePhase names the next step of a move.
//
//	MoveCopying ─► MoveSwitching ─► MoveLeaving ─► (no move)
type MovePhase string

// The phases of a move. Up to the description that MoveSwitching writes, the image
// in the old pool is the volume; from there on the one in the new pool is.
const (
	MoveCopying   MovePhase = "copying"   // data is copied, piece by piece, into an incoming image
	MoveSwitching MovePhase = "switching" // all is durable there: its description is about to say so, or says so
	MoveLeaving   MovePhase = "leaving"   // the old image is being removed
)

// Move is a volume's way from one pool to another, in its record. Pools are named
// as in Volume.
type Move struct {
	From      string    `json:"from"`
	To        string    `json:"to"`
	Phase     MovePhase `json:"phase"`
	Size      int64     `json:"size"`              // of the device, bytes
	Done      int64     `json:"done"`              // of it, from its beginning, durable in the new pool
	Copied    int64     `json:"copied"`            // of that, data that was written there; in all pieces since the last beginning
	Failure   string    `json:"failure,omitempty"` // why the last step did not go through; it is tried again
	StartedAt time.Time `json:"startedAt"`
}

// movePiece is about how much is copied between two checkpoints, in bytes.
const movePiece = 128 << 20

// Copy copies the data of one open image to another, both by their endpoints' paths,
// from an offset on, until it has read about most bytes or all. What it tells to be
// done is durable, and next is where to go on: the size of the source at the end.
// The target reads as zero where the source has no data.
type Copy func(ctx context.Context, dst, src string, from, most int64) (next, copied int64, err error)

// moving reports whether the volume's bytes are being copied: nothing may change them.
func (v Volume) moving() bool { return v.Move != nil && v.Move.Phase != MoveLeaving }

// movedProblem tells who wants something else of a volume that it is on its way.
func movedProblem(v Volume) error {
	return problem(ErrConflict, "", "volume %q is being moved to another pool (%d %% are there): wait for its end, or take the move back by moving it to the pool where it is",
		v.Name, v.Move.Done*100/max(v.Move.Size, 1))
}

// mayChange refuses a change that would get lost in a move, or in its way.
func (v Volume) mayChange(c ChangeVolume) error {
	grows := c.SizeMiB != nil && *c.SizeMiB > v.SizeMiB
	if v.moving() && (grows || v.Move.Phase != MoveCopying) {
		return movedProblem(v)
	}
	return nil
}

func (e *Engine) poolName(pool string) string {
	if pool == "" {
		return e.o.PoolName
	}
	return pool
}

// MoveVolume begins to move a detached volume to another pool, and returns when that
// is durable: Run does the work, over restarts. The volume cannot be attached or
// grown until its bytes are there. The same request again is the same move; a
// request for the pool where the volume is takes a move back, up to its last step.
func (e *Engine) MoveVolume(ctx context.Context, workspace, name, pool, actor string) (Volume, error) {
	return do(ctx, e, func(ctx context.Context) (Volume, error) {
		to, err := e.moveTarget(pool)
		if err != nil {
			return Volume{}, err
		}
		v, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Volume{}, err
		}
		defer release()
		if v, err = e.current(ctx, v); err != nil {
			return Volume{}, err
		}
		switch {
		case v.moving() && to == v.Move.To, !v.moving() && to == v.Pool:
			return v, nil
		case v.moving() && to == v.Pool:
			return e.stayHere(ctx, v)
		case v.moving():
			return Volume{}, movedProblem(v)
		case v.Move != nil:
			return Volume{}, problem(ErrConflict, "", "volume %q has just been moved, and its old image in pool %q is still to be removed: try again", v.Name, e.poolName(v.Move.From))
		}
		if err := e.mayMove(v); err != nil {
			return Volume{}, err
		}
		if v, err = e.prepare(ctx, v, false); err != nil {
			return Volume{}, userError(err)
		}
		v, err = e.beginMove(ctx, v, to, actor)
		return v, userError(err)
	})
}

func (e *Engine) moveTarget(pool string) (string, error) {
	if pool == "" {
		return "", problem(ErrInvalid, "pool", "the pool to move to is needed")
	}
	to, err := e.choosePool(pool)
	var p *Problem
	if errors.As(err, &p) {
		p.Field = "pool"
	}
	return to, err
}

func (e *Engine) mayMove(v Volume) error {
	switch {
	case v.Phase != Ready || v.Failure != "":
		return notReady(v)
	case len(v.Attachments) > 0:
		return problem(ErrAttached, "", "volume %q is attached to %s: detach it before it is moved", v.Name, v.AttachedTo())
	case e.o.Copy == nil:
		return problem(ErrUnsupported, "", "volumes cannot be moved on this host")
	}
	return nil
}

func (e *Engine) beginMove(ctx context.Context, v Volume, to, actor string) (Volume, error) {
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if err != nil {
		return v, err
	}
	if err := e.ledger(to).expect(v.ID, v.bytes()); err != nil {
		return v, err
	}
	v = v.clone()
	v.Move = &Move{From: v.Pool, To: to, Phase: MoveCopying, Size: info.Size, StartedAt: e.now()}
	v.UpdatedAt, v.UpdatedBy = e.now(), actor
	e.happened(&v, "move", "Moving from pool %s to %s", e.poolName(v.Pool), e.poolName(to))
	if err := e.commit(ctx, v); err != nil {
		if !lostWrite(err) {
			e.ledger(to).expectNot(v.ID)
		}
		return v, err
	}
	e.watch(v.ID)
	e.wake()
	return v, nil
}

// stayHere takes a move back: the record first, then what was copied. What cannot be
// removed now is found at the next start, by its description.
func (e *Engine) stayHere(ctx context.Context, v Volume) (Volume, error) {
	if v.Move.Phase != MoveCopying {
		return v, problem(ErrConflict, "", "the move of volume %q to pool %q cannot be taken back any more: move it again when that is done", v.Name, e.poolName(v.Move.To))
	}
	m := *v.Move
	v = v.clone()
	v.Move = nil
	e.happened(&v, "move", "The move to pool %s was taken back", e.poolName(m.To))
	if err := e.commitFreeing(ctx, v); err != nil {
		return v, err
	}
	e.ledger(m.To).expectNot(v.ID)
	if err := e.removeCopy(ctx, v.ID, m.To, incoming); err != nil {
		if lostWrite(err) {
			return v, err
		}
		e.o.Log.Warn("what a move that was taken back has copied is not removed: the next start does it", "volume", v.ID, "pool", m.To, "err", err)
	}
	return v, nil
}

// expectMove reserves, at a start, what a move of an earlier life will need.
func (e *Engine) expectMove(v Volume) {
	if v.moving() && v.Phase != Deleting {
		e.ledger(v.Move.To).expectAnyway(v.ID, v.bytes())
	}
}

// moveAlong takes a move as far as it gets before somebody else wants the volume, or
// the engine stops. The volume's lock is held.
func (e *Engine) moveAlong(ctx context.Context, v *Volume) error {
	for v.Move != nil {
		var err error
		switch v.Move.Phase {
		case MoveCopying:
			err = e.timed("move.copy", func() error { return e.copyAlong(ctx, v) })
			if err == nil && v.Move.Done >= v.Move.Size {
				v.Move.Phase = MoveSwitching
				err = e.commit(ctx, v.clone())
			}
		case MoveSwitching:
			err = e.timed("move.switch", func() error { return e.switchPools(ctx, v) })
		case MoveLeaving:
			err = e.timed("move.leave", func() error { return e.leavePool(ctx, v) })
		}
		if err != nil {
			return errors.Join(err, e.noteMoveFailure(ctx, v, err))
		}
		if v.Move != nil && e.giveWay(v.ID) {
			e.wake()
			return nil
		}
	}
	return nil
}

// giveWay reports whether a move is to pause.
func (e *Engine) giveWay(id blockdev.ID) bool { return e.locks.wanted(id) || e.Healthy() != nil }

// noteMoveFailure tells the user why a move does not get on.
func (e *Engine) noteMoveFailure(ctx context.Context, v *Volume, cause error) error {
	why := "a step failed and is tried again: the operator's log has the reason"
	switch {
	case lostWrite(cause):
		return nil
	case errors.Is(cause, blockdev.ErrUnreachable):
		why = "the store of its blocks does not answer: it is asked again and again"
	case errors.Is(cause, blockdev.ErrLayered):
		why = "its blocks are being brought together, which goes on by itself"
	case errors.Is(cause, blockdev.ErrNoSpace):
		why = "the pool is full"
	case errors.Is(cause, blockdev.ErrUnavailable):
		why = "a pool is not available"
	}
	if v.Move == nil || v.Move.Failure == why {
		return nil
	}
	v.Move.Failure = why
	return e.commitFreeing(ctx, v.clone())
}
