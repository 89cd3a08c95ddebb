package engine

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// fromSnapshot takes from a snapshot what a volume that is made from it begins with.
func (e *Engine) fromSnapshot(v *Volume, r CreateVolume) error {
	s, err := e.ResolveSnapshot(v.Workspace, r.Snapshot)
	if err != nil {
		return &Problem{Kind: ErrInvalid, Field: "spec.snapshot", Message: fmt.Sprintf("snapshot %.120q not found", r.Snapshot), Err: err}
	}
	switch {
	case r.Template != "":
		return problem(ErrInvalid, "spec.snapshot", "a volume is made from a template or from a snapshot, not from both")
	case r.Filesystem != "" && v.Filesystem != s.Filesystem:
		return problem(ErrInvalid, "spec.filesystem", "snapshot %s holds %s: leave it out", s.Ref(), s.Filesystem)
	case r.Pool != "" && v.Pool != s.Pool:
		return problem(ErrInvalid, "spec.pool", "snapshot %s is in pool %q, and so are volumes made from it: leave it out, and move the volume then", s.Ref(), e.poolName(s.Pool))
	case s.Phase != SnapshotReady || s.Failure != "":
		return snapshotNotReady(s)
	case r.SizeMiB != nil && *r.SizeMiB < s.SizeMiB:
		return problem(ErrInvalid, "spec.size", "snapshot %s has %d MB: a volume made from it cannot be smaller", s.Ref(), s.SizeMiB)
	}
	if err := e.poolOpen(s.Pool); err != nil {
		return err
	}
	v.Snapshot, v.ForkOf = s.ID, s.Ref()
	v.SizeMiB, v.Filesystem, v.Pool = s.SizeMiB, s.Filesystem, s.Pool
	v.Template, v.Revision = s.Template, s.Revision
	v.Tainted, v.GuestMiB, v.CheckFirst = s.Tainted, s.GuestMiB, s.CheckFirst
	return nil
}

func snapshotNotReady(s Snapshot) error {
	if s.Failure != "" {
		return problem(ErrConflict, "spec.snapshot", "snapshot %s has failed: %s", s.Ref(), s.Failure)
	}
	return problem(ErrConflict, "spec.snapshot", "snapshot %s is not ready yet: try again", s.Ref())
}

// fork makes the draft of a volume with the bytes of a snapshot. The snapshot stays
// for as long: its lock is held.
func (e *Engine) fork(ctx context.Context, v *Volume) error {
	s, release, err := e.lockSnapshot(ctx, v.Workspace, v.Snapshot)
	if err != nil {
		return err
	}
	defer release()
	if s.Phase != SnapshotReady || s.Failure != "" {
		return snapshotNotReady(s)
	}
	if cloner, ok := e.o.Pool.(blockdev.Cloner); ok {
		err = cloner.Clone(ctx, v.ID, s.ID, v.bytes())
	} else {
		err = errors.ErrUnsupported
	}
	if errors.Is(err, errors.ErrUnsupported) {
		err = e.o.Library.Copy(ctx, v.ID, s.ID, v.bytes())
	}
	if err != nil {
		return err
	}
	return e.identifyFork(ctx, v, s)
}

// identifyFork gives a fork's filesystem a UUID of its own. One that must be recovered
// is recovered first, by a mount. What this host may not mount, or cannot yet, keeps the
// snapshot's UUID: it can be told from its original by its device.
func (e *Engine) identifyFork(ctx context.Context, v *Volume, s Snapshot) error {
	if v.Filesystem == filesystem.None {
		return nil
	}
	if v.Tainted {
		v.UUID = s.UUID
		return nil
	}
	err := e.identify(ctx, v.ID, v.Filesystem, v.UUID)
	if errors.Is(err, filesystem.ErrDirty) {
		info, err := e.o.Pool.Stat(ctx, v.ID)
		if err != nil || info.Layers > 0 { // a mount would wait until all of it is in one place
			v.UUID = s.UUID
			return err
		}
		_, err = e.activate(ctx, *v, false)
		if err = errors.Join(err, e.deactivate(ctx, *v)); err == nil {
			err = e.identify(ctx, v.ID, v.Filesystem, v.UUID)
		}
		return err
	}
	return err
}
