package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
)

// CreateSnapshot keeps what a volume holds at one moment of the call. It is durable on
// return, whether the volume is attached or not, and its cost does not grow with the
// volume. A snapshot that fails leaves nothing.
func (e *Engine) CreateSnapshot(ctx context.Context, r CreateSnapshot) (Snapshot, error) {
	return once(ctx, e, keyed[Snapshot]{
		workspace: r.Workspace, key: r.IdempotencyKey, request: r.digest(),
		make: func(ctx context.Context, key string) (Snapshot, blockdev.ID, string, error) {
			s, err := e.snapshot(ctx, r, key)
			return s, s.ID, s.Name, err
		},
		replay: func(id blockdev.ID) (Snapshot, bool) { return e.snapshots.get(id) },
	})
}

func (e *Engine) snapshot(ctx context.Context, r CreateSnapshot, key string) (Snapshot, error) {
	return do(ctx, e, func(ctx context.Context) (Snapshot, error) {
		v, release, err := e.lockNamed(ctx, r.Workspace, r.Volume)
		if err != nil {
			return Snapshot{}, err
		}
		defer release()
		if v, err = e.current(ctx, v); err != nil {
			return Snapshot{}, err
		}
		s, err := e.designSnapshot(v, r)
		if err != nil {
			return Snapshot{}, err
		}
		if s.Consistency == FilesystemConsistent {
			if v, err = e.mayFreeze(ctx, v); err != nil {
				return Snapshot{}, userError(err)
			}
		}
		done, err := e.locks.acquire(ctx, s.ID)
		if err != nil {
			return Snapshot{}, err
		}
		defer done()
		if err := e.intendSnapshot(ctx, v, s, key, r.digest()); err != nil {
			return Snapshot{}, userError(err)
		}
		if err := e.timed("snapshot", func() error { return e.makeSnapshot(ctx, v, &s) }); err != nil {
			return Snapshot{}, e.abandonSnapshot(ctx, s, key, snapshotError(v, err))
		}
		return s, nil
	})
}

// designSnapshot makes the record that a request asks for, or says what is wrong
// with it.
func (e *Engine) designSnapshot(v Volume, r CreateSnapshot) (Snapshot, error) {
	now := e.now()
	s := Snapshot{
		ID: newID(blockdev.PrefixSnapshot, now), Sequence: 1, Workspace: v.Workspace, Name: r.Name, Labels: r.Labels,
		Volume: v.Name, VolumeID: v.ID, SizeMiB: v.SizeMiB, Filesystem: v.Filesystem, UUID: v.UUID, Pool: v.Pool, Template: v.Template, Revision: v.Revision,
		Tainted: v.Tainted, GuestMiB: v.GuestMiB, CheckFirst: v.CheckFirst, Consistency: r.Consistency,
		Phase: SnapshotTaking, CreatedAt: now, UpdatedAt: now, CreatedBy: r.Actor, UpdatedBy: r.Actor,
	}
	if s.Name == "" {
		s.Name = newSnapshotName()
	}
	if s.Consistency == "" {
		s.Consistency = CrashConsistent
	}
	if err := errors.Join(checkName(s.Name), checkLabels(s.Labels)); err != nil {
		return Snapshot{}, firstProblem(err)
	}
	switch {
	case s.Consistency != CrashConsistent && s.Consistency != FilesystemConsistent:
		return Snapshot{}, problem(ErrInvalid, "spec.consistency", "must be %s or %s", CrashConsistent, FilesystemConsistent)
	case v.Phase != Ready || v.Failure != "":
		return Snapshot{}, notReady(v)
	case v.moving():
		return Snapshot{}, movedProblem(v)
	}
	if n := e.snapshots.ofVolume(v.ID); n >= maxSnapshots {
		return Snapshot{}, problem(ErrQuota, "", "volume %q has its maximum of %d snapshots: delete some", v.Name, n)
	}
	return s, nil
}

// mayFreeze makes a volume ready for a snapshot that needs no recovery, or says why
// there is none of it.
func (e *Engine) mayFreeze(ctx context.Context, v Volume) (Volume, error) {
	var err error
	switch {
	case len(v.Attachments) == 0:
		if err = v.hostMay("freeze"); err == nil {
			return e.prepare(ctx, v, true)
		}
	case v.frozenAt(e.o.Now()), v.Attachments[0].ReadOnly:
		err = e.mayWork(v, "freeze")
	default:
		_, err = e.writable(ctx, v, "freeze")
	}
	var p *Problem
	if errors.As(err, &p) {
		return v, &Problem{Kind: p.Kind, Field: "spec.consistency", Message: p.Message + fmt.Sprintf(`; or take the snapshot with consistency %q`, CrashConsistent), Err: p.Err}
	}
	return v, err
}

// intendSnapshot takes the name, the promise and the quota, and makes the wish durable.
func (e *Engine) intendSnapshot(ctx context.Context, v Volume, s Snapshot, key, request string) error {
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if err != nil {
		return err
	}
	if !e.snapshots.add(s) {
		return &Problem{Kind: ErrExists, Field: "name", Message: fmt.Sprintf("volume %q has a snapshot %q already", v.Name, s.Name)}
	}
	err = e.place(s.ID, s.Pool)
	if err == nil {
		err = e.ledger(s.Pool).promiseSnapshot(s.Workspace, s.ID, info.Allocated, e.Quota(s.Workspace))
	}
	if err == nil {
		s.Bytes = info.Allocated
		err = e.o.Store.Update(ctx, func(tx *metadata.Tx) error {
			if key != "" {
				if err := idempotencyTable.Put(tx, key, e.remember(s.ID, s.Name, request)); err != nil {
					return err
				}
			}
			return snapshotsTable.Put(tx, string(s.ID), s)
		})
	}
	if err != nil && !lostWrite(err) {
		e.snapshots.remove(s.ID)
		e.ledger(s.Pool).forget(s.ID)
	}
	return err
}

// makeSnapshot makes the image, and publishes it with the description that says
// ready. The record follows, and with it the volume's event.
func (e *Engine) makeSnapshot(ctx context.Context, v Volume, s *Snapshot) error {
	held, err := e.shoot(ctx, v, *s)
	if err != nil {
		return err
	}
	info, err := e.o.Pool.Stat(ctx, s.ID)
	if err != nil {
		return err
	}
	// What was written meanwhile counts as well: a promise that does not fit is not made.
	if err := e.ledger(s.Pool).promiseSnapshot(s.Workspace, s.ID, info.Allocated, e.Quota(s.Workspace)); err != nil {
		return err
	}
	ready := s.clone()
	ready.Phase, ready.Held, ready.Bytes = SnapshotReady, held, info.Allocated
	ready.SizeMiB = max(1, info.Size/filesystem.MiB)
	ready.Sequence++
	b, err := describeSnapshot(ready)
	if err != nil {
		return err
	}
	if err := e.o.Pool.Publish(ctx, s.ID, b); err != nil {
		return err
	}
	now, ok := e.catalog.get(v.ID) // a freeze has changed the record
	if !ok {
		return problem(ErrNotFound, "", "volume %.60q not found", v.Name)
	}
	now = now.clone()
	e.happened(&now, "snapshot", "Snapshot %s was taken (%s-consistent)", s.Name, s.Consistency)
	err = e.o.Store.Update(ctx, func(tx *metadata.Tx) error {
		return errors.Join(snapshotsTable.Put(tx, string(ready.ID), ready), volumesTable.Put(tx, string(now.ID), now))
	})
	if err != nil {
		return err
	}
	e.publish(now)
	e.snapshots.replace(ready)
	*s = ready
	return nil
}

// shoot makes the draft, with the filesystem frozen where that is asked for and
// somebody writes.
func (e *Engine) shoot(ctx context.Context, v Volume, s Snapshot) (held time.Duration, err error) {
	snapshotter, ok := e.o.Pool.(blockdev.Snapshotter)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	image := func() (err error) {
		held, err = snapshotter.Snapshot(ctx, s.ID, v.ID)
		return err
	}
	if s.Consistency == CrashConsistent || len(v.Attachments) == 0 || v.Attachments[0].ReadOnly || v.frozenAt(e.o.Now()) {
		err := image()
		return held, err
	}
	at, err := e.writable(ctx, v, "freeze")
	if err != nil {
		return 0, err
	}
	frozen, err := e.whileFrozen(ctx, v, at, "snapshot", image)
	return frozen, err
}

// abandonSnapshot takes back one that failed: the caller gets the reason, and nothing
// is left. What cannot be undone now is finished by Run.
func (e *Engine) abandonSnapshot(ctx context.Context, s Snapshot, key string, cause error) error {
	if lostWrite(cause) {
		return cause // fail-stop: records stay for the next start
	}
	if key != "" {
		if err := e.dropKeys(ctx, []string{key}); err != nil {
			return errors.Join(cause, err)
		}
	}
	s.Phase = SnapshotDeleting
	if err := e.burySnapshot(ctx, s); err != nil {
		if lostWrite(err) {
			return errors.Join(cause, err)
		}
		e.o.Log.Error("a failed snapshot could not be undone: it is tried again", "snapshot", s.ID, "workspace", s.Workspace, "err", err)
	}
	return userError(cause)
}

// snapshotError names the ways out where a pool cannot keep what a volume holds.
func snapshotError(v Volume, err error) error {
	if isProblem(err) || !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	message := fmt.Sprintf("the pool of volume %q keeps no snapshots: move the volume to another pool, or capture it as a template version", v.Name)
	if len(v.Attachments) > 0 {
		message = fmt.Sprintf("volume %q is attached to %s, and its pool shares no bytes of a file that is in use: detach it for the moment of the snapshot, attach it to something that takes vhost-user or NBD, or move it to a pool with reflink (XFS, btrfs)",
			v.Name, v.AttachedTo())
	}
	return &Problem{Kind: ErrUnsupported, Message: message, Err: err}
}

// digest identifies what was asked, whoever asked it.
func (r CreateSnapshot) digest() string {
	r.IdempotencyKey, r.Actor = "", ""
	return digestOf(r)
}
