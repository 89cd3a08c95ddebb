package engine

import (
	"context"
	"errors"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// DeleteSnapshot durably deletes; the answer's phase is SnapshotDeleting and the name
// is free. Volumes that were made from it stay as they are.
func (e *Engine) DeleteSnapshot(ctx context.Context, workspace string, id blockdev.ID, actor string) (Snapshot, error) {
	return do(ctx, e, func(ctx context.Context) (Snapshot, error) {
		s, release, err := e.lockSnapshot(ctx, workspace, id)
		if err != nil {
			return Snapshot{}, err
		}
		defer release()
		s = s.clone()
		s.UpdatedAt, s.UpdatedBy = e.now(), actor
		if err := e.markSnapshot(ctx, &s); err != nil {
			return Snapshot{}, userError(err)
		}
		if err := e.burySnapshot(ctx, s); err != nil {
			return Snapshot{}, userError(err)
		}
		event := Event{Type: "snapshot", Status: StatusDeployed, Message: "Snapshot " + s.Name + " is deleted", Time: s.UpdatedAt}
		e.feed.add(Happening{Workspace: s.Workspace, Volume: s.Volume, Event: event})
		return s, nil
	})
}

// lockSnapshot takes a snapshot's lock; what it returns is the record as it is under
// the lock.
func (e *Engine) lockSnapshot(ctx context.Context, workspace string, id blockdev.ID) (Snapshot, func(), error) {
	if _, err := e.Snapshot(workspace, id); err != nil {
		return Snapshot{}, nil, err
	}
	release, err := e.locks.acquire(ctx, id)
	if err != nil {
		return Snapshot{}, nil, err
	}
	s, err := e.Snapshot(workspace, id)
	if err != nil {
		release()
		return Snapshot{}, nil, err
	}
	return s, release, nil
}

// markSnapshot durably says in the image's description that it is being deleted. One
// that is missing needs no mark, and a pool that is full has no room for one.
func (e *Engine) markSnapshot(ctx context.Context, s *Snapshot) error {
	s.Phase = SnapshotDeleting
	s.Sequence++
	b, err := describeSnapshot(*s)
	if err != nil {
		return err
	}
	err = e.o.Pool.Describe(ctx, s.ID, b)
	if errors.Is(err, blockdev.ErrNotFound) || errors.Is(err, blockdev.ErrNoSpace) && !lostWrite(err) {
		return nil
	}
	return err
}

// burySnapshot records the deletion and frees the name, then takes image and record
// away. What cannot be finished now waits for Run or the next start.
func (e *Engine) burySnapshot(ctx context.Context, s Snapshot) error {
	err := e.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error {
		return snapshotsTable.Put(tx, string(s.ID), s)
	})
	if err != nil {
		return err
	}
	e.snapshots.leave(s)
	err = e.removeSnapshot(ctx, s)
	if err != nil && !lostWrite(err) {
		e.o.Log.Warn("a snapshot's deletion is not finished: it is tried again", "snapshot", s.ID, "workspace", s.Workspace, "err", err)
		e.wake()
		return nil
	}
	return err
}

// removeSnapshot takes the image away, then the record and the promise.
func (e *Engine) removeSnapshot(ctx context.Context, s Snapshot) error {
	if err := e.o.Pool.Remove(ctx, s.ID); err != nil {
		return err
	}
	err := e.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error {
		return snapshotsTable.Delete(tx, string(s.ID))
	})
	if err != nil {
		return err
	}
	e.eachLedger(func(l *Ledger) { l.forget(s.ID) })
	e.snapshots.remove(s.ID)
	return nil
}
