package engine

import (
	"context"
	"errors"
	"maps"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/templates"
)

// ChangeVolume merges a change. Growth that can happen now has happened on
// return; what is pending shows in Sizes.
func (e *Engine) ChangeVolume(ctx context.Context, workspace, name string, c ChangeVolume) (Volume, error) {
	return do(ctx, e, func(ctx context.Context) (Volume, error) {
		v, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Volume{}, err
		}
		defer release()
		if v.Phase != Ready || v.Failure != "" {
			return Volume{}, notReady(v)
		}
		if err := v.mayChange(c); err != nil {
			return Volume{}, err
		}
		if err := e.checkFixed(ctx, v, c); err != nil {
			return Volume{}, err
		}
		changed := v.clone()
		if err := mergeMetadata(&changed, c); err != nil {
			return Volume{}, err
		}
		grown, err := e.mergeSize(&changed, c)
		if err != nil {
			return Volume{}, err
		}
		if !grown && sameUserFields(v, changed) {
			return v, nil
		}
		changed.UpdatedAt, changed.UpdatedBy = e.now(), c.Actor
		if err := e.save(ctx, &changed); err != nil {
			if grown && !lostWrite(err) {
				e.ledger(v.Pool).record(v.Workspace, v.ID, v.bytes())
			}
			return Volume{}, userError(err)
		}
		if !grown {
			return changed, nil
		}
		return e.grow(ctx, changed)
	})
}

// grow reconciles device and filesystem with the wanted size, which is durable.
// What cannot be done now is pending and tried again; it is no error.
func (e *Engine) grow(ctx context.Context, v Volume) (Volume, error) {
	err := e.settle(ctx, &v)
	if lostWrite(err) {
		return Volume{}, err
	}
	if errors.Is(err, blockdev.ErrLayered) {
		e.setPending(v.ID, pendingFlat)
		return v, nil
	}
	if err != nil {
		e.setPending(v.ID, pendingFailed)
		e.o.Log.Warn("growth is pending", "volume", v.ID, "workspace", v.Workspace, "err", err)
		e.watch(v.ID)
		return v, nil
	}
	if why := e.pendingReason(v.ID); why != "" {
		e.watch(v.ID)
	}
	return v, nil
}

// pendingFailed is what a user is told: the reason may show paths of the host, and
// is in the log.
const pendingFailed = "growing failed and is tried again: the operator's log has the reason"

// pendingFlat is why the filesystem of a layered image has not grown.
const pendingFlat = "the filesystem grows when the volume is hydrated, which goes on by itself"

func (e *Engine) pendingReason(id blockdev.ID) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.pending[id]
}

// checkFixed refuses to change what is fixed at creation. The clients echo these
// fields, so equal values are fine.
func (e *Engine) checkFixed(ctx context.Context, v Volume, c ChangeVolume) error {
	if c.Region != nil && *c.Region != "" && *c.Region != v.Region {
		return problem(ErrInvalid, "spec.region", "cannot be changed: the volume is in %q", v.Region)
	}
	if c.Filesystem != nil && *c.Filesystem != "" && *c.Filesystem != string(v.Filesystem) {
		return problem(ErrInvalid, "spec.filesystem", "cannot be changed: the volume has %s", v.Filesystem)
	}
	if c.Snapshot != nil && *c.Snapshot != "" && *c.Snapshot != v.ForkOf && *c.Snapshot != string(v.Snapshot) {
		return problem(ErrInvalid, "spec.snapshot", "cannot be changed: the volume was made from %q", v.ForkOf)
	}
	if c.Template == nil || *c.Template == "" || *c.Template == v.Template {
		return nil
	}
	// "name" and "name:latest" are what a manifest says again and again, also when
	// a newer revision has come since: the volume keeps the revision it was made of.
	given, err := templates.ParseReference(*c.Template)
	if err == nil && v.Template != "" {
		made, madeErr := templates.ParseReference(v.Template)
		if madeErr == nil && given.Name == made.Name && (given.Version == "" || given.Version == templates.LatestVersion) {
			return nil
		}
	}
	return problem(ErrInvalid, "spec.template", "cannot be changed: the volume was made from %q", v.Template)
}

func mergeMetadata(v *Volume, c ChangeVolume) error {
	if c.DisplayName != nil {
		v.DisplayName = *c.DisplayName
	}
	if c.Labels != nil {
		v.Labels = c.Labels
	}
	if c.ExternalID != nil {
		v.ExternalID = *c.ExternalID
	}
	return firstProblem(errors.Join(checkDisplayName(v.DisplayName), checkLabels(v.Labels), checkExternalID(v.ExternalID)))
}

// mergeSize takes a larger size into the record and the ledger.
func (e *Engine) mergeSize(v *Volume, c ChangeVolume) (grown bool, err error) {
	if c.SizeMiB == nil || *c.SizeMiB == v.SizeMiB {
		return false, nil
	}
	if *c.SizeMiB < v.SizeMiB {
		return false, problem(ErrInvalid, "spec.size", "a volume cannot shrink: its current size is %d MB and %d MB was asked", v.SizeMiB, *c.SizeMiB)
	}
	if err := e.checkSize(*c.SizeMiB, v.Filesystem); err != nil {
		return false, err
	}
	if err := e.poolOpen(v.Pool); err != nil {
		return false, err
	}
	before := v.SizeMiB
	v.SizeMiB = *c.SizeMiB
	if err := e.ledger(v.Pool).promise(v.Workspace, v.ID, v.bytes(), e.Quota(v.Workspace)); err != nil {
		return false, err
	}
	// An offline growth of ext4 that is cut short needs the checker: said in the
	// same write as the wish.
	if v.Filesystem == filesystem.Ext4 && len(v.Attachments) == 0 && !v.Tainted {
		v.CheckFirst = true
	}
	e.happened(v, "resize", "Size changed from %d MB to %d MB", before, v.SizeMiB)
	return true, nil
}

func sameUserFields(a, b Volume) bool {
	return a.DisplayName == b.DisplayName && a.ExternalID == b.ExternalID && maps.Equal(a.Labels, b.Labels)
}

// Sizes asks the pool and the filesystem for a volume's sizes.
func (e *Engine) Sizes(ctx context.Context, v Volume) (Sizes, error) {
	s := Sizes{Wanted: v.bytes(), Pending: e.pendingReason(v.ID)}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if errors.Is(err, blockdev.ErrNotFound) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	s.Device, s.Allocated, s.Shared = info.Size, info.Allocated, info.Shared
	s.Hydration = e.hydrationOf(ctx, info)
	if s.Pending == "" {
		s.Pending = v.guestGrows()
	}
	if v.Filesystem == filesystem.None || v.Phase != Ready || v.Failure != "" || v.Tainted && !v.growsTainted() || e.rawOnly(v) {
		return s, nil
	}
	release, free := e.locks.try(v.ID)
	if !free { // something is being done to it: its size would be a guess
		return s, nil
	}
	defer release()
	f, err := e.ask(ctx, v)
	s.Filesystem = f.filesystem
	if s.Pending == "" && outgrown(f) {
		s.Pending = "the filesystem is about to grow"
	}
	return s, err
}
