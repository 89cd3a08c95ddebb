package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// loadSnapshots reads the records of an earlier life.
func (e *Engine) loadSnapshots(tx *metadata.Tx) error {
	return snapshotsTable.Scan(tx, "", func(_ string, s Snapshot) error {
		e.ledger(s.Pool).recordSnapshot(s.Workspace, s.ID, s.Bytes)
		if err := e.place(s.ID, s.Pool); err != nil {
			e.o.Log.Error("a snapshot's pool is not there: the snapshot cannot be used until it is", "snapshot", s.ID, "pool", s.Pool, "err", err)
		}
		if s.Phase == SnapshotDeleting {
			e.snapshots.leave(s)
			return nil
		}
		if !e.snapshots.add(s) {
			return fmt.Errorf("two records of snapshot %q of volume %s", s.Name, s.VolumeID)
		}
		return nil
	})
}

// reconcileSnapshots lets the records follow the images, as follow does for volumes,
// and finishes what a crash has cut: deletions go on, and one that was not taken to
// its end is taken back. It comes before the volumes, which may be waiting for a fork.
func (e *Engine) reconcileSnapshots(ctx context.Context, images []blockdev.Info, r *Report) error {
	for _, info := range images {
		if !strings.HasPrefix(string(info.ID), blockdev.PrefixSnapshot+"-") {
			continue
		}
		if err := e.followSnapshot(ctx, info, r); err != nil {
			return fmt.Errorf("snapshot %s: %w", info.ID, err)
		}
	}
	for _, s := range e.snapshots.list(func(Snapshot) bool { return true }) {
		if err := e.resumeSnapshot(ctx, s, r); err != nil {
			return fmt.Errorf("snapshot %s: %w", s.ID, err)
		}
	}
	for _, s := range e.snapshots.allLeaving() {
		err := e.removeSnapshot(ctx, s)
		if lostWrite(err) {
			return err
		}
		if err != nil {
			e.o.Log.Warn("a snapshot's deletion is not finished: it is tried again", "snapshot", s.ID, "err", err)
			continue
		}
		r.Finished++
	}
	return nil
}

// followSnapshot takes what an image says of itself into the records, if it is news.
func (e *Engine) followSnapshot(ctx context.Context, info blockdev.Info, r *Report) error {
	known, ok := e.snapshots.get(info.ID)
	if info.Draft {
		if ok { // taken back with its record
			return nil
		}
		r.Discarded++
		return e.o.Pool.Remove(ctx, info.ID)
	}
	said, err := parseSnapshot(info.Description)
	if err != nil || said.ID != info.ID {
		e.o.Log.Error("an image's description is not a snapshot's: it is left alone", "image", info.ID, "err", err)
		return nil
	}
	said.Pool = info.Pool // where it was found counts
	if err := e.place(said.ID, said.Pool); err != nil {
		return err
	}
	if _, leaving := e.snapshots.left(said.ID); leaving {
		return nil
	}
	switch {
	case said.Phase == SnapshotDeleting:
		e.ledger(said.Pool).recordSnapshot(said.Workspace, said.ID, said.Bytes)
		e.snapshots.leave(said)
		return nil
	case ok && known.Sequence >= said.Sequence && known.Pool == said.Pool:
		return nil
	case ok:
		r.Newer++
		said.Sequence = max(said.Sequence, known.Sequence)
		e.snapshots.remove(said.ID)
	default:
		r.Adopted++
	}
	return e.adoptSnapshot(ctx, said)
}

// adoptSnapshot lets the record follow the image. A description is never dropped: of
// two with one name the later found gets a name that tells.
func (e *Engine) adoptSnapshot(ctx context.Context, said Snapshot) error {
	e.eachLedger(func(l *Ledger) { l.forget(said.ID) })
	e.ledger(said.Pool).recordSnapshot(said.Workspace, said.ID, said.Bytes)
	if !e.snapshots.add(said) {
		said.Name = said.Name[:min(len(said.Name), 40)] + "-" + string(said.ID[len(said.ID)-8:])
		said.Sequence++
		e.o.Log.Warn("an adopted snapshot's name is taken: it is renamed", "snapshot", said.ID, "name", said.Name)
		if !e.snapshots.add(said) {
			return errors.New("no free name for it")
		}
		b, err := describeSnapshot(said)
		if err != nil {
			return err
		}
		if err := e.o.Pool.Describe(ctx, said.ID, b); err != nil {
			return err
		}
	}
	return e.o.Store.Update(ctx, func(tx *metadata.Tx) error {
		return snapshotsTable.Put(tx, string(said.ID), said)
	})
}

// resumeSnapshot takes a snapshot on from where its record says it is.
func (e *Engine) resumeSnapshot(ctx context.Context, s Snapshot, r *Report) error {
	if s.Phase == SnapshotTaking {
		r.Finished++
		e.o.Log.Warn("an interrupted snapshot is taken back: its moment has passed", "snapshot", s.ID, "workspace", s.Workspace)
		if err := e.dropKeys(ctx, e.keys.of(s.ID)); err != nil { // the same request again is a new one
			return err
		}
		return e.abandonSnapshot(ctx, s, "", nil)
	}
	_, err := e.o.Pool.Stat(ctx, s.ID)
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		r.Missing++
		s.Failure = "the image is missing from the pool"
		e.snapshots.replace(s)
	case err != nil:
		e.o.Log.Warn("a snapshot's image does not answer", "snapshot", s.ID, "err", err)
	}
	return nil
}

// tendSnapshots goes on with deletions that could not be finished.
func (e *Engine) tendSnapshots(ctx context.Context) error {
	var failures error
	for _, s := range e.snapshots.allLeaving() {
		if release, free := e.locks.try(s.ID); free {
			failures = errors.Join(failures, e.removeSnapshot(ctx, s))
			release()
		}
	}
	return failures
}
