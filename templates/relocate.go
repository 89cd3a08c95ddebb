package templates

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"holdfast/blockdev"
	"holdfast/templates/remote"
)

// Relocation says where the files of a registered revision are by now.
type Relocation struct {
	Template string
	Version  string // name, number or "latest"; empty: latest
	Manifest string // URL; the operator's word, never a tenant's
	Actor    string
}

// Relocate has all that is not here of a remote revision, in volumes and snapshots that
// were made of it too, be fetched from where its files are by now: that it is the same
// manifest, and that the store answers ranges, is verified first. Revisions of the
// template that hold the same bytes at the same address move with it. Durable when it
// returns; again is success. After an error it may be so or not, and the next start, or
// the same again, makes it so.
//
// ErrNotFound, ErrInvalid for a revision that is not remote, and the errors of Register.
func (l *Library) Relocate(ctx context.Context, workspace string, r Relocation) (Revision, error) {
	if l.o.Stores == nil {
		return Revision{}, fmt.Errorf("%w: none is", remote.ErrNotAllowed)
	}
	creator, ok := l.o.Pool.(blockdev.RemoteCreator)
	if !ok {
		return Revision{}, errNoRemotePool
	}
	v, err := l.remoteVersion(workspace, r)
	if err != nil {
		return Revision{}, err
	}
	p, err := l.o.Stores.Find(ctx, r.Manifest, v.Digest)
	if err != nil {
		return Revision{}, err
	}
	if err := l.tryStore(ctx, v.ID, p); err != nil {
		return Revision{}, err
	}
	key := keyOf(workspace, r.Template)
	defer l.locks.lock(key).Unlock()
	ctx = context.WithoutCancel(ctx) // both or none
	moved, err := l.recordRelocation(ctx, key, v, p, r.Actor)
	if err != nil {
		return Revision{}, err
	}
	for _, m := range moved {
		if err := l.setAddress(ctx, creator, m); err != nil {
			return Revision{}, l.poolError(err)
		}
		if m.ID == v.ID {
			v = m
		}
	}
	return v, nil
}

func (l *Library) remoteVersion(workspace string, r Relocation) (Revision, error) {
	t := l.lookup(keyOf(workspace, r.Template))
	if t == nil {
		return Revision{}, notFound(r.Template)
	}
	v, err := t.need(r.Version)
	switch {
	case err != nil:
		return Revision{}, err
	case v.Remote == nil || !t.hasImage(v.ID):
		return Revision{}, invalid("version: %s of %q is not remote: only the files of a registered version can be elsewhere", v.Name, r.Template)
	}
	return *v, nil
}

// RelocateImage is Relocate for all images that were made of the same remote revision as
// this one, a volume's, when that revision was deleted: no record says where they ask,
// and what they want is known by its digest alone. A pool that is shut meanwhile is not
// told; the same again tells it.
//
// ErrInvalid for an image that lacks nothing from far away, and for one whose revision is
// here: Relocate is for that. Else the errors of Register.
func (l *Library) RelocateImage(ctx context.Context, id blockdev.ID, manifest string) error {
	if l.o.Stores == nil {
		return fmt.Errorf("%w: none is", remote.ErrNotAllowed)
	}
	creator, ok := l.o.Pool.(blockdev.RemoteCreator)
	if !ok {
		return errNoRemotePool
	}
	base, err := addressNow(ctx, creator, id)
	switch {
	case errors.Is(err, blockdev.ErrInvalid), errors.Is(err, blockdev.ErrNotFound), errors.Is(err, errors.ErrUnsupported):
		return invalid("volume: nothing of it is fetched from a store")
	case err != nil:
		return l.poolError(err)
	}
	version, err := l.versionAsking(ctx, creator, base.AddressOf)
	if err != nil {
		return l.poolError(err)
	}
	if version != "" {
		return invalid("volume: it is made of version %s, which is here: relocate that, and its volumes follow", version)
	}
	p, err := l.o.Stores.FindBytes(ctx, manifest, base.Digest)
	if err != nil {
		return err
	}
	if err := l.tryStore(ctx, id, p); err != nil {
		return err
	}
	base.URL, base.Chunks = p.ImageURL, nil
	return l.poolError(creator.SetAddress(context.WithoutCancel(ctx), base.AddressOf, base))
}

// versionAsking names a version whose address is that of an image; "" for none.
func (l *Library) versionAsking(ctx context.Context, creator blockdev.RemoteCreator, of blockdev.ID) (string, error) {
	l.mu.RLock()
	records := slices.Collect(maps.Values(l.records))
	l.mu.RUnlock()
	for _, r := range records {
		for _, v := range r.Template.Revisions {
			if v.Remote == nil || v.Status != Ready {
				continue
			}
			base, err := addressNow(ctx, creator, v.ID)
			if err == nil && base.AddressOf == of {
				return r.Template.Name + ":" + v.Name, nil
			}
			if err != nil && !errors.Is(err, blockdev.ErrNotFound) && !v.Damaged {
				return "", err
			}
		}
	}
	return "", nil
}

// tryStore makes sure that a store has the bytes of an image, by a few of them.
func (l *Library) tryStore(ctx context.Context, id blockdev.ID, p remote.Published) (err error) {
	release, err := l.reserve(remote.MaxChunks, "relocation of "+string(id))
	if err != nil {
		return err
	}
	defer release()
	chunks, err := os.CreateTemp(l.o.Staging, string(id)+".*.chunks")
	if err != nil {
		return stagingError(err)
	}
	defer func() { err = errors.Join(err, chunks.Close(), os.Remove(filepath.Clean(chunks.Name()))) }()
	if err := l.o.Stores.FetchChunks(ctx, p, chunks); err != nil {
		return stagingError(err)
	}
	image, err := l.o.Stores.Open(ctx, p, chunks)
	if err != nil {
		return err
	}
	_, err = l.wantedFirst(ctx, image, p.Filesystem, p.Size)
	return err
}

// recordRelocation durably changes where a revision, and those that are at the same
// place, are, and tells which are there now. Each one's description comes first: it is
// known without any record. The template's lock is held.
func (l *Library) recordRelocation(ctx context.Context, key string, like Revision, p remote.Published, actor string) (moved []Revision, err error) {
	r := l.lookup(key)
	if r == nil || r.revision(like.ID) == nil {
		return nil, fmt.Errorf("%w: the version was deleted", ErrNotFound)
	}
	from := *r.revision(like.ID).Remote // it may have moved meanwhile
	to := from
	to.Manifest, to.Image = p.ManifestURL, p.ImageURL
	for _, v := range r.Template.Revisions {
		if v.Remote == nil || *v.Remote != from || v.Digest != like.Digest || !r.hasImage(v.ID) {
			continue
		}
		v.Remote = &to
		moved = append(moved, v)
	}
	if from == to {
		return moved, nil
	}
	for _, v := range moved {
		if err := l.at("relocate.describe"); err != nil {
			return nil, err
		}
		err := l.o.Pool.Describe(ctx, v.ID, describe(r, v).encode())
		if err != nil && !(v.Damaged && errors.Is(err, blockdev.ErrNotFound)) {
			return nil, l.poolError(err)
		}
	}
	if err := l.at("relocate.record"); err != nil {
		return nil, err
	}
	_, err = l.changeLocked(ctx, key, func(r *record) (*record, error) {
		for _, v := range moved {
			r.revision(v.ID).Remote = &to
		}
		r.Template.UpdatedBy = actor
		return r, nil
	})
	if err != nil {
		return nil, err
	}
	return moved, l.at("relocate.tell")
}

// setAddress makes the pools fetch what images of a revision lack from where it is.
func (l *Library) setAddress(ctx context.Context, creator blockdev.RemoteCreator, v Revision) error {
	base, chunks, err := creator.RemoteBaseOf(ctx, v.ID)
	if err != nil {
		if v.Damaged { // it is told elsewhere, and no volume begins with it
			return nil
		}
		return err
	}
	if err := chunks.Close(); err != nil {
		return err
	}
	base.URL, base.Chunks = v.Remote.Image, nil
	return creator.SetAddress(ctx, base.AddressOf, base)
}

// settleAddresses ends relocations that were cut short: what the records say is where
// the pools fetch from. All are told of what has ever moved: a pool that was shut at that
// time, or failed, knows nothing of it, whatever the first one knows.
func (l *Library) settleAddresses(ctx context.Context) {
	creator, ok := l.o.Pool.(blockdev.RemoteCreator)
	if !ok {
		return
	}
	for _, r := range l.records {
		for _, v := range r.Template.Revisions {
			if v.Remote == nil || v.Status != Ready {
				continue
			}
			now, err := addressNow(ctx, creator, v.ID)
			if err == nil && (now.Moved || now.URL != v.Remote.Image) {
				err = l.setAddress(ctx, creator, v)
			}
			if err != nil { // its volumes go on asking where they did
				l.o.Log.Error("where the bytes of a remote version are by now could not be told to the pools", "template", r.key(), "version", v.Name, "error", err)
			}
		}
	}
}

func addressNow(ctx context.Context, creator blockdev.RemoteCreator, id blockdev.ID) (blockdev.RemoteBase, error) {
	base, chunks, err := creator.RemoteBaseOf(ctx, id)
	if err != nil {
		return base, err
	}
	return base, chunks.Close()
}

// copyRemote makes a draft of the bytes of a remote revision in another pool than its
// own. It needs no store: the blocks that a volume begins with are here.
func (l *Library) copyRemote(ctx context.Context, id blockdev.ID, v Revision) (err error) {
	creator, ok := l.o.Pool.(blockdev.RemoteCreator)
	if !ok {
		return errNoRemotePool
	}
	blocks, err := l.blocksOf(ctx, v)
	if err != nil {
		return err
	}
	base, chunks, err := creator.RemoteBaseOf(ctx, v.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, chunks.Close()) }()
	if err := creator.CreateRemote(ctx, id, base); err != nil {
		return err
	}
	return l.putBlocks(ctx, id, blocks)
}

// blocksOf gives the blocks of a remote revision that volumes begin with.
func (l *Library) blocksOf(ctx context.Context, v Revision) (blocks map[int64][]byte, err error) {
	accessor, ok := l.o.Pool.(blockdev.Accessor)
	if !ok {
		return nil, errNoRemotePool
	}
	defer l.openings.lock(string(v.ID)).Unlock()
	b, err := accessor.Access(ctx, v.ID, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	return l.wantedFirst(ctx, io.NewSectionReader(b, 0, v.ImageBytes), v.Remote.Filesystem, v.ImageBytes)
}
