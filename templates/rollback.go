package templates

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"holdfast/blockdev"
)

// Rollback makes an older READY revision the newest one again: a new revision,
// with the next number, whose image shares all of its bytes with the old one's
// where the pool can share. When the newest one holds the same
// already it is the answer, and nothing is made. ErrNotFound for a version that is not
// there or not READY, ErrDamaged for a damaged one.
func (l *Library) Rollback(ctx context.Context, workspace, name, version, actor string) (Revision, error) {
	v, err := l.rollback(ctx, workspace, name, version, actor)
	if err == nil {
		l.retainSoon(ctx, keyOf(workspace, name))
	}
	return v, err
}

func (l *Library) rollback(ctx context.Context, workspace, name, version, actor string) (Revision, error) {
	key := keyOf(workspace, name)
	r := l.lookup(key)
	if r == nil {
		return Revision{}, notFound(name)
	}
	to, err := r.need(version)
	if err != nil {
		return Revision{}, err
	}
	old, err := l.pinGood(ctx, to.ID)
	if err != nil {
		return Revision{}, err
	}
	defer l.unpin(old.ID)
	if newest := r.Template.Latest(); newest != nil && newest.sameAs(old) {
		return *newest, nil
	}
	id := newID(blockdev.PrefixRevision, l.now())
	if err := l.copyRevision(ctx, id, old); err != nil {
		return Revision{}, errors.Join(l.poolError(err), l.abandon(ctx, id))
	}
	return l.rolledBack(context.WithoutCancel(ctx), key, id, old, actor)
}

// sameAs tells whether two revisions hold the same: their images are equal.
func (v Revision) sameAs(o Revision) bool {
	if v.ID == o.ID {
		return true
	}
	return v.ImageDigest != "" && v.ImageDigest == o.ImageDigest && (v.Remote == nil) == (o.Remote == nil) && (v.Remote == nil || *v.Remote == *o.Remote)
}

// copyRevision makes a draft that holds a revision's image.
func (l *Library) copyRevision(ctx context.Context, id blockdev.ID, of Revision) error {
	if of.Remote != nil {
		cloner, ok := l.o.Pool.(blockdev.Cloner)
		if !ok {
			return errNoRemotePool
		}
		defer l.openings.lock(string(of.ID)).Unlock() // it is not verified meanwhile
		return cloner.Clone(ctx, id, of.ID, of.ImageBytes)
	}
	if err := l.cloneFlat(ctx, id, of.ID, of.ImageBytes); !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	release, err := l.reserve(of.ImageBytes, "template image "+string(id))
	if err != nil {
		return err
	}
	defer release()
	return l.copyData(ctx, id, of.ID, of.ImageBytes)
}

// rolledBack publishes the copy under the next number and records it.
func (l *Library) rolledBack(ctx context.Context, key string, id blockdev.ID, old Revision, actor string) (Revision, error) {
	lock := l.locks.lock(key)
	defer lock.Unlock()
	r := l.lookup(key)
	if r == nil {
		return Revision{}, errors.Join(fmt.Errorf("%w: it was deleted meanwhile", ErrNotFound), l.abandon(ctx, id))
	}
	if newest := r.Template.Latest(); newest != nil && newest.sameAs(old) { // by another request
		return *newest, l.abandon(ctx, id)
	}
	v := old
	v.ID, v.Family = id, old.family()
	if v.Remote != nil { // what it shares is files, which are counted by their names
		v.Family = ""
	}
	v.Number, v.RollbackOf, v.Pinned = r.Template.NextNumber, old.Number, nil
	v.Name = strconv.Itoa(v.Number)
	v.CreatedAt, v.CreatedBy = l.now(), actor
	v.ReadyAt = v.CreatedAt
	if err := l.publish(ctx, id, describe(r, v)); err != nil {
		return Revision{}, errors.Join(err, l.abandon(ctx, id))
	}
	return v, l.record(ctx, key, v)
}

// record puts a revision whose image was just published into its template, and
// applies retention. The template's lock is held.
func (l *Library) record(ctx context.Context, key string, v Revision) error {
	var gone []blockdev.ID
	var events []Event
	next, err := l.changeLocked(ctx, key, func(r *record) (*record, error) {
		if old := r.revision(v.ID); old != nil {
			*old = v
		} else {
			r.insert(v)
		}
		delete(r.Pending, v.ID)
		l.dropUnfinished(r, v)
		gone, events = l.outdated(r, v.ID)
		return r, nil
	})
	if err != nil {
		return err // Open adopts the image
	}
	l.retired(ctx, next, gone, events)
	return nil
}
