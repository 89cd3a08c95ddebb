package templates

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/blockdev"
	"holdfast/metadata"
)

// Delete removes a template and its revisions and tells what it was; volumes
// made from it stay. ErrInUse while an archive is being uploaded to it, ErrPinned when one
// of its revisions is pinned.
func (l *Library) Delete(ctx context.Context, workspace, name, actor string) (Template, error) {
	key := keyOf(workspace, name)
	lock := l.locks.lock(key)
	defer lock.Unlock()
	var was Template
	tomb, err := l.changeLocked(ctx, key, func(r *record) (*record, error) {
		if r == nil {
			return nil, notFound(name)
		}
		was = r.Template.clone()
		for _, v := range was.Revisions {
			if l.isActive(v.ID) {
				return nil, fmt.Errorf("%w: version %s is being uploaded", ErrInUse, v.Name)
			}
			if v.Pinned != nil {
				return nil, v.pinnedError()
			}
			if r.hasImage(v.ID) {
				r.remove(v.ID)
			}
		}
		r.Removed, r.Template.Revisions, r.Pending = true, nil, nil
		r.Template.UpdatedAt, r.Template.UpdatedBy = l.now(), actor
		return r, nil
	})
	if err != nil {
		return Template{}, err
	}
	return was, l.bury(context.WithoutCancel(ctx), tomb)
}

// bury finishes the deletion of a template whose record says Removed: images
// first, so that nothing is left to find it again; then the record. What fails
// is tried again before the name is used, and at Open.
func (l *Library) bury(ctx context.Context, tomb *record) error {
	err := l.buryImages(ctx, tomb)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.tombs[tomb.key()] = tomb
		return err
	}
	delete(l.tombs, tomb.key())
	return nil
}

func (l *Library) buryImages(ctx context.Context, tomb *record) error {
	for _, id := range tomb.Removing {
		if err := l.retire(ctx, tomb, id); err != nil {
			return err
		}
	}
	if err := l.o.SideLog.Append(recordKind, tomb.key(), nil); err != nil {
		return err
	}
	return l.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error { return records.Delete(tx, tomb.key()) })
}

// DeleteRevision removes one revision, by name or number, and gives the template
// as it is then. ErrLastRevision for the only one, or the only one that is READY;
// ErrInUse while it is being uploaded, ErrPinned for one that is pinned.
func (l *Library) DeleteRevision(ctx context.Context, workspace, name, version, actor string) (Template, error) {
	key := keyOf(workspace, name)
	lock := l.locks.lock(key)
	defer lock.Unlock()
	var gone Revision
	var image bool
	r, err := l.changeLocked(ctx, key, func(r *record) (*record, error) {
		if r == nil {
			return nil, notFound(name)
		}
		v := r.find(version)
		if v == nil {
			return nil, fmt.Errorf("%w: version %.70q of %q", ErrNotFound, version, name)
		}
		gone = *v
		if err := l.mayRemove(r, gone); err != nil {
			return nil, err
		}
		if image = r.hasImage(gone.ID); image {
			r.remove(gone.ID)
		} else {
			r.drop(gone.ID)
		}
		r.Template.UpdatedAt, r.Template.UpdatedBy = l.now(), actor
		return r, nil
	})
	if err != nil {
		return Template{}, err
	}
	if image {
		if err := l.retire(context.WithoutCancel(ctx), r, gone.ID); err != nil {
			return Template{}, err
		}
	}
	return r.Template.clone(), nil
}

func (l *Library) mayRemove(r *record, v Revision) error {
	if l.isActive(v.ID) {
		return fmt.Errorf("%w: version %s is being uploaded", ErrInUse, v.Name)
	}
	if v.Pinned != nil {
		return v.pinnedError()
	}
	ready := 0
	for _, other := range r.Template.Revisions {
		if other.Status == Ready {
			ready++
		}
	}
	if len(r.Template.Revisions) == 1 || ready == 1 && v.Status == Ready {
		return ErrLastRevision
	}
	return nil
}

// retire takes the image of a revision away that its record does not name any
// more, or durably marks it as deleted when a build still reads it.
func (l *Library) retire(ctx context.Context, head *record, id blockdev.ID) error {
	l.sources.forget(id)
	l.mu.Lock()
	pinned := l.pins[id] > 0
	l.doomed[id] = true
	l.mu.Unlock()
	if !pinned {
		return l.removeDoomed(ctx, id)
	}
	d := describe(head, Revision{ID: id, Workspace: head.Template.Workspace, Template: head.Template.Name})
	d.Deleted = true
	err := l.o.Pool.Describe(ctx, id, d.encode())
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil // the last pin went meanwhile, and the image with it
	}
	return l.poolError(err)
}

func (l *Library) removeDoomed(ctx context.Context, id blockdev.ID) error {
	err := l.o.Pool.Remove(ctx, id)
	if errors.Is(err, blockdev.ErrBusy) { // left open by an Open that failed after all: nobody uses it without a pin
		lock := l.openings.lock(string(id))
		if err = l.closeLeft(ctx, id); err == nil {
			err = l.o.Pool.Remove(ctx, id)
		}
		lock.Unlock()
	}
	if err != nil {
		return fmt.Errorf("remove the image of a deleted version: %w", l.poolError(err))
	}
	l.images.remove(id)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.doomed, id)
	if err := l.dropManifest(l.leaving[id]); err != nil {
		l.o.Log.Warn("a manifest stays until the next start", "image", id, "cause", err)
	}
	delete(l.leaving, id)
	return nil
}

// forgetRemoved leaves out of a record the images that are gone by now.
func (l *Library) forgetRemoved(r *record) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	old := l.records[r.key()]
	r.Removing = slices.DeleteFunc(r.Removing, func(id blockdev.ID) bool {
		return old != nil && slices.Contains(old.Removing, id) && !l.doomed[id]
	})
}

// pin keeps a revision's image in the pool until unpin.
func (l *Library) pin(id blockdev.ID) (Revision, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.records[l.revisions[id]]
	if r == nil {
		return Revision{}, fmt.Errorf("%w: the version was deleted", ErrNotFound)
	}
	v := r.revision(id)
	if v.Damaged {
		return Revision{}, v.damagedError()
	}
	if v.Status != Ready {
		return Revision{}, fmt.Errorf("%w: version %s:%s is %s", ErrNotFound, v.Template, v.Name, v.Status)
	}
	l.pins[id]++
	return *v, nil
}

// pinAny is pin for a revision that may be damaged.
func (l *Library) pinAny(id blockdev.ID) (Revision, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.records[l.revisions[id]]
	if r == nil || !r.hasImage(id) {
		return Revision{}, fmt.Errorf("%w: the version was deleted", ErrNotFound)
	}
	l.pins[id]++
	return *r.revision(id), nil
}

func (l *Library) unpin(id blockdev.ID) {
	l.mu.Lock()
	l.pins[id]--
	last := l.pins[id] == 0
	if last {
		delete(l.pins, id)
	}
	remove := last && l.doomed[id]
	l.mu.Unlock()
	if !remove {
		return
	}
	if err := l.removeDoomed(context.Background(), id); err != nil {
		l.o.Log.Error("an image stays until the next start", "image", id, "error", err)
	}
}

func (l *Library) isActive(id blockdev.ID) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.active[id]
}
