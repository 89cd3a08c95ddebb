package templates

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/tree"
	"holdfast/templates/archive"
	"holdfast/templates/format"
)

// maxPending bounds the revisions of a template that have no image: clients ask
// for a new URL at each retry. The oldest goes first.
const maxPending = 32

// BeginUpload records a CREATED revision and gives the path and query of its
// upload URL ("/uploads/ID?expires=...&signature=..."), to be put behind the
// server's own base; it is good for an hour and for one archive. version names
// the revision; empty: its number, which is given out here, so numbers of
// uploads that never came are missing later.
func (l *Library) BeginUpload(ctx context.Context, workspace, name, version, actor string) (pathAndQuery string, err error) {
	id, expires, err := l.begin(ctx, workspace, name, version, actor)
	if err != nil {
		return "", err
	}
	return l.uploadURL(id, expires), nil
}

// begin records a CREATED revision.
func (l *Library) begin(ctx context.Context, workspace, name, version, actor string) (id blockdev.ID, expires time.Time, err error) {
	now := l.now()
	v := Revision{ID: newID(blockdev.PrefixRevision, now), Workspace: workspace, Template: name, Status: Created, CreatedAt: now, CreatedBy: actor}
	expires = now.Add(uploadLifetime)
	_, err = l.change(ctx, keyOf(workspace, name), func(r *record) (*record, error) {
		if r == nil {
			return nil, notFound(name)
		}
		v.Number = r.Template.NextNumber
		v.Name = cmp.Or(version, strconv.Itoa(v.Number))
		if err := checkVersion(v.Name, v.Number); err != nil {
			return nil, err
		}
		if err := l.makeRoom(r, v.Name, now); err != nil {
			return nil, err
		}
		r.insert(v)
		r.setPending(v.ID, pending{Expires: expires})
		r.Template.UpdatedBy = actor
		return r, nil
	})
	return v.ID, expires, err
}

// makeRoom drops what came to nothing: expired uploads, the oldest of too many,
// and an unfinished one of the name that is wanted now.
func (l *Library) makeRoom(r *record, version string, now time.Time) error {
	for _, v := range slices.Clone(r.Template.Revisions) {
		p, isPending := r.Pending[v.ID]
		droppable := isPending && !p.Lost && !l.isActive(v.ID)
		switch {
		case droppable && (v.Name == version || v.Status == Created && !now.Before(p.Expires)):
			r.drop(v.ID)
		case v.Name == version:
			return invalid("version: %q has a version %q already", r.Template.Name, version)
		}
	}
	for _, v := range slices.Clone(r.Template.Revisions) {
		if len(r.Pending) < maxPending {
			break
		}
		if p, isPending := r.Pending[v.ID]; isPending && !p.Lost && !l.isActive(v.ID) {
			r.drop(v.ID)
		}
	}
	return nil
}

// Ingest reads an archive (a tar, or one packed as package format says) for an upload that BeginUpload gave out, builds the
// image and makes the revision READY, durably, before it returns. length is the
// Content-Length (-1: unknown, which is refused as ErrInvalid).
//
// ErrUploadGone for a forged, expired or used URL; ErrArchive, with the entry
// and the rule, for an archive that cannot become a template: the revision is
// FAILED then. After every other error (ErrInvalid for a body that is not of
// length bytes, ErrNoSpace, ErrBusy, the context's) the URL can be used again.
func (l *Library) Ingest(ctx context.Context, u Upload, length int64, body io.Reader) (Revision, error) {
	if err := l.checkURL(u.ID, u.Expires, u.Signature); err != nil {
		return Revision{}, err
	}
	packed, err := format.Parse(u.Format)
	if err != nil {
		return Revision{}, invalid("%w", err)
	}
	switch {
	case length < 0:
		return Revision{}, invalid("Content-Length is required")
	case length > l.o.MaxArchiveBytes:
		return Revision{}, invalid("an archive of %d bytes: the most is %d", length, l.o.MaxArchiveBytes)
	}
	return l.receive(ctx, blockdev.ID(u.ID), l.uploaded(packed, length, body))
}

// receive makes the revision of an archive that comes in.
func (l *Library) receive(ctx context.Context, id blockdev.ID, in incoming) (Revision, error) {
	return l.receiveBy(ctx, id, func(key string) (Revision, error) { return l.ingest(ctx, key, id, in) })
}

// receiveBy lets make use an upload URL: one at a time, and not too many at once.
func (l *Library) receiveBy(ctx context.Context, id blockdev.ID, make func(key string) (Revision, error)) (Revision, error) {
	select {
	case l.uploads <- struct{}{}:
		defer func() { <-l.uploads }()
	default:
		return Revision{}, ErrBusy
	}
	key, err := l.claim(id)
	if err != nil {
		return Revision{}, err
	}
	defer l.unclaim(id)
	v, err := make(key)
	if errors.Is(err, archive.ErrRefused) {
		err = fmt.Errorf("%w: %w", ErrArchive, err)
		err = errors.Join(err, l.recordFailure(context.WithoutCancel(ctx), key, id, err.Error()))
	}
	if err == nil {
		l.retainSoon(ctx, key)
	}
	return v, err
}

// claim begins the one upload that a URL is good for.
func (l *Library) claim(id blockdev.ID) (key string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key, known := l.revisions[id]
	switch {
	case !known:
		return "", fmt.Errorf("%w: its version was deleted or replaced", ErrUploadGone)
	case l.active[id]:
		return "", fmt.Errorf("%w: an upload to it is under way", ErrUploadGone)
	case l.records[key].revision(id).Status != Created:
		return "", fmt.Errorf("%w: it was used already", ErrUploadGone)
	}
	l.active[id] = true
	return key, nil
}

func (l *Library) unclaim(id blockdev.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.active, id)
}

func (l *Library) recordFailure(ctx context.Context, key string, id blockdev.ID, why string) error {
	if len(why) > 500 {
		why = why[:500] + "..."
	}
	_, err := l.change(ctx, key, func(r *record) (*record, error) {
		if r == nil || r.revision(id) == nil {
			return nil, ErrUploadGone
		}
		v := r.revision(id)
		v.Status, v.Failure = Failed, why
		return r, nil
	})
	return err
}

func (l *Library) ingest(ctx context.Context, key string, id blockdev.ID, in incoming) (Revision, error) {
	r, done, err := l.spool(ctx, id, in)
	if err != nil {
		return Revision{}, err
	}
	defer done()
	return l.become(ctx, key, id, r)
}

// become makes a revision READY that holds a tree: with the image of a revision
// of the same tree, or a new one.
func (l *Library) become(ctx context.Context, key string, id blockdev.ID, r *received) (Revision, error) {
	workspace, _, _ := strings.Cut(key, "/")
	v, err := l.becomeTwin(ctx, workspace, id, r)
	if errors.Is(err, errNoTwin) {
		v, err = l.becomeNew(ctx, key, id, r)
	}
	if err != nil {
		return Revision{}, errors.Join(err, l.abandon(ctx, id))
	}
	// From here on the work is worth finishing whoever waits for it.
	return l.finish(context.WithoutCancel(ctx), key, id, v)
}

var errNoTwin = errors.New("no version has the same tree")

// becomeTwin makes the draft of what the workspace has already, and tells what the
// revision will be.
func (l *Library) becomeTwin(ctx context.Context, workspace string, id blockdev.ID, r *received) (Revision, error) {
	v, ok := l.twin(ctx, workspace, r.identity)
	if !ok {
		return v, errNoTwin
	}
	defer l.unpin(v.ID)
	err := l.copyRevision(ctx, id, v)
	if errors.Is(err, blockdev.ErrNotFound) {
		return v, errNoTwin // it is gone from the pool
	}
	v.Digest, v.Family = r.digest, v.family()
	return v, l.poolError(err)
}

// becomeNew builds the draft, sharing what it can with the version before.
func (l *Library) becomeNew(ctx context.Context, key string, id blockdev.ID, r *received) (Revision, error) {
	var family blockdev.ID
	if b := l.baseFor(ctx, key); b != nil {
		defer b.release()
		family = b.family
		r.files = append(r.files, b.image)
		r.shares = sharesWith(r.tree, b.tree, len(r.files)-1)
		b.tree = tree.Tree{}
	}
	b, err := l.build(ctx, id, r)
	if err != nil {
		return Revision{}, err
	}
	v := Revision{
		Digest: r.digest, TreeDigest: r.identity, ImageDigest: b.digest,
		ContentBytes: r.counts.fileBytes, Entries: r.counts.entries, DataBytes: r.counts.dataBytes,
		LongestLink: r.counts.longestLink, MinimumBytes: b.minimum, ImageBytes: b.image, Family: family,
	}
	if err := l.writeManifest(v, b.manifest); err != nil {
		return Revision{}, l.poolError(err)
	}
	return v, nil
}

// finish publishes the image, which makes the revision exist, and records it.
func (l *Library) finish(ctx context.Context, key string, id blockdev.ID, like Revision) (Revision, error) {
	lock := l.locks.lock(key)
	defer lock.Unlock()
	r := l.lookup(key)
	if r == nil || r.revision(id) == nil { // claim and delete exclude each other
		return Revision{}, errors.Join(ErrUploadGone, l.abandon(ctx, id))
	}
	v := r.revision(id).like(like)
	v.Status, v.Failure, v.ReadyAt = Ready, "", l.now()
	if err := l.publish(ctx, id, describe(r, v)); err != nil {
		return Revision{}, errors.Join(err, l.abandon(ctx, id))
	}
	return v, l.record(ctx, key, v)
}

// like gives a revision the contents of another.
func (v Revision) like(o Revision) Revision {
	v.Digest, v.TreeDigest, v.ImageDigest = o.Digest, o.TreeDigest, o.ImageDigest
	v.ContentBytes, v.Entries, v.DataBytes, v.LongestLink = o.ContentBytes, o.Entries, o.DataBytes, o.LongestLink
	v.MinimumBytes, v.ImageBytes, v.Family = o.MinimumBytes, o.ImageBytes, o.Family
	v.Remote = o.Remote
	return v
}

// publish makes a draft an image and takes it into the account.
func (l *Library) publish(ctx context.Context, id blockdev.ID, d description) error {
	if err := l.o.Pool.Publish(ctx, id, d.encode()); err != nil {
		return l.poolError(err)
	}
	if d.Kind == kindSource {
		l.account(id, d)
		return nil
	}
	info, err := l.o.Pool.Stat(ctx, id)
	if err != nil {
		return err
	}
	l.count(ctx, *d.Revision, info.Allocated)
	return nil
}

// dropUnfinished drops, now that v is READY, uploads before it that came to
// nothing.
func (l *Library) dropUnfinished(r *record, v Revision) {
	for _, other := range slices.Clone(r.Template.Revisions) {
		if p, isPending := r.Pending[other.ID]; isPending && !p.Lost && other.Number < v.Number && !l.isActive(other.ID) {
			r.drop(other.ID)
		}
	}
}

func (l *Library) reserve(bytes int64, what string) (release func(), err error) {
	return l.reserveIn("", bytes, what)
}

// reserveIn reserves in a pool.
func (l *Library) reserveIn(pool string, bytes int64, what string) (release func(), err error) {
	space := l.spaceOf(pool)
	release, err = space.Reserve(bytes, what)
	if err != nil && l.sources.shrink() { // the cache gives way
		release, err = space.Reserve(bytes, what)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return release, nil
}

// poolError gives an error of a full pool the package's own name, and tells the
// owner of a failed flush, after which nothing may be acknowledged any more.
func (l *Library) poolError(err error) error {
	if errors.Is(err, blockdev.ErrFailed) && l.o.OnFailure != nil {
		l.o.OnFailure(err)
	}
	if errors.Is(err, blockdev.ErrNoSpace) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}
