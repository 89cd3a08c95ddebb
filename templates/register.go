package templates

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/templates/remote"
)

// Registration asks for a revision whose bytes stay far away.
type Registration struct {
	Template string
	Version  string // empty: its number
	Manifest string // URL; the operator's word, never a tenant's
	Digest   string // SHA-256 of the manifest
	Actor    string
}

// Register makes a published revision one of a template, READY and durable when it
// returns; the template is made if it is not there. Its image has the blocks that a
// new volume needs, everything else is fetched when it is wanted. When the newest
// revision is the same one already it is the answer.
//
// ErrInvalid for what is asked for, remote.ErrInvalidURL, ErrNotAllowed, ErrManifest
// and ErrStore; errors.ErrUnsupported where the pool cannot; ErrBusy. After an error
// nothing is left of it but a gap in the numbers, and a template that was made for it.
func (l *Library) Register(ctx context.Context, workspace string, r Registration) (Revision, error) {
	if err := checkName(r.Template); err != nil {
		return Revision{}, err
	}
	if l.o.Stores == nil {
		return Revision{}, fmt.Errorf("%w: none is", remote.ErrNotAllowed)
	}
	if _, ok := l.o.Pool.(blockdev.RemoteCreator); !ok {
		return Revision{}, errNoRemotePool
	}
	p, err := l.o.Stores.Find(ctx, r.Manifest, r.Digest)
	if err != nil {
		return Revision{}, err
	}
	key := keyOf(workspace, r.Template)
	if v, ok := l.registered(key, r.Version, p); ok {
		return v, nil
	}
	if _, _, err := l.Put(ctx, workspace, r.Template, Change{Actor: r.Actor}, true); err != nil {
		return Revision{}, err
	}
	id, _, err := l.begin(ctx, workspace, r.Template, r.Version, r.Actor)
	if err != nil {
		return Revision{}, err
	}
	v, err := l.receiveBy(ctx, id, func(key string) (Revision, error) { return l.bringNear(ctx, key, id, p) })
	if err != nil {
		err = errors.Join(err, l.forget(context.WithoutCancel(ctx), key, id))
	}
	return v, err
}

var errNoRemotePool = fmt.Errorf("%w: the first pool keeps images in a volume group or has no layers; a remote version needs a pool of files there", errors.ErrUnsupported)

// registered finds the newest revision if it is the one that was published.
func (l *Library) registered(key, version string, p remote.Published) (Revision, bool) {
	r := l.lookup(key)
	if r == nil {
		return Revision{}, false
	}
	v := r.Template.Latest()
	if v == nil || v.Remote == nil || v.Remote.Manifest != p.ManifestURL || v.Digest != p.ManifestDigest || version != "" && version != v.Name {
		return Revision{}, false
	}
	return *v, true
}

// bringNear makes the image of a published revision, and the revision READY.
func (l *Library) bringNear(ctx context.Context, key string, id blockdev.ID, p remote.Published) (Revision, error) {
	err := l.makeRemote(ctx, id, p)
	if err != nil {
		return Revision{}, errors.Join(l.poolError(err), l.abandon(ctx, id))
	}
	return l.finish(context.WithoutCancel(ctx), key, id, Revision{
		Digest: p.ManifestDigest, ImageDigest: p.ChunksDigest,
		ContentBytes: p.ContentBytes, Entries: p.Entries, DataBytes: p.DataBytes, MinimumBytes: p.Size, ImageBytes: p.Size,
		Remote: &Remote{Manifest: p.ManifestURL, Image: p.ImageURL, Chunks: p.ChunksDigest, Filesystem: p.Filesystem},
	})
}

// makeRemote makes the draft.
func (l *Library) makeRemote(ctx context.Context, id blockdev.ID, p remote.Published) (err error) {
	release, err := l.reserve(remote.MaxChunks, "template image "+string(id))
	if err != nil {
		return err
	}
	defer release()
	chunks, err := os.OpenFile(filepath.Join(l.o.Staging, string(id)+".chunks"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return stagingError(err)
	}
	defer func() { err = errors.Join(err, chunks.Close(), os.Remove(chunks.Name())) }()
	if err := l.o.Stores.FetchChunks(ctx, p, chunks); err != nil {
		return stagingError(err)
	}
	image, err := l.o.Stores.Open(ctx, p, chunks)
	if err != nil {
		return err
	}
	blocks, err := l.wantedFirst(ctx, image, p.Filesystem, p.Size)
	if err != nil {
		return err
	}
	digest, err := remote.ParseDigest(p.ChunksDigest)
	if err != nil {
		return err
	}
	if _, err := chunks.Seek(0, io.SeekStart); err != nil {
		return err
	}
	creator := l.o.Pool.(blockdev.RemoteCreator) //nolint:forcetypeassert // Register has asked
	err = creator.CreateRemote(ctx, id, blockdev.RemoteBase{URL: p.ImageURL, Digest: digest, Chunks: chunks})
	if errors.Is(err, errors.ErrUnsupported) {
		return errors.Join(errNoRemotePool, err)
	}
	if err != nil {
		return err
	}
	return errors.Join(l.at("remote.made"), l.putBlocks(ctx, id, blocks))
}

// wantedFirst reads, and gives by their offset, the blocks that are looked at and
// changed when a volume is made. With these in the image that needs no store.
func (l *Library) wantedFirst(ctx context.Context, image io.ReaderAt, holds filesystem.Type, bytes int64) (map[int64][]byte, error) {
	w := &witness{from: image, read: map[int64][]byte{}, written: map[int64][]byte{}}
	size, err := l.o.Filesystems.SizeIn(ctx, w, holds)
	if err == nil && size > bytes {
		err = fmt.Errorf("its filesystem has %d bytes and the image %d", size, bytes)
	}
	if err == nil {
		err = l.o.Filesystems.IdentifyIn(ctx, w, bytes, holds, randomUUID())
	}
	if err == nil {
		_, err = l.o.Filesystems.SizeIn(ctx, w, holds)
	}
	if err != nil && !errors.Is(err, remote.ErrStore) && ctx.Err() == nil {
		err = fmt.Errorf("%w: the image is no clean %s: %w", remote.ErrManifest, holds, err)
	}
	return w.read, err
}

func randomUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])                      // never fails (crypto/rand)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // RFC 9562, version 4
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// putBlocks writes blocks into a draft that is layered.
func (l *Library) putBlocks(ctx context.Context, id blockdev.ID, blocks map[int64][]byte) (err error) {
	accessor, ok := l.o.Pool.(blockdev.Accessor)
	if !ok {
		return errNoRemotePool
	}
	b, err := accessor.Access(ctx, id, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	for at, p := range blocks {
		if _, err := b.WriteAt(p, at); err != nil {
			return err
		}
	}
	return b.Sync()
}

// witness is an image that remembers the blocks that were asked for. What is written
// is read again, and goes nowhere.
type witness struct {
	from          io.ReaderAt
	read, written map[int64][]byte // by offset
}

// witnessBlock is the unit, in bytes, in which layers hold things.
const witnessBlock = 4096

func (w *witness) block(at int64) ([]byte, error) {
	if b := w.written[at]; b != nil {
		return b, nil
	}
	if b := w.read[at]; b != nil {
		return b, nil
	}
	b := make([]byte, witnessBlock)
	if _, err := w.from.ReadAt(b, at); err != nil { // images are whole MiB
		return nil, err
	}
	w.read[at] = b
	return b, nil
}

func (w *witness) each(p []byte, off int64, do func(b, part []byte, at int64)) (n int, err error) {
	for n < len(p) {
		at := (off + int64(n)) / witnessBlock * witnessBlock
		b, err := w.block(at)
		if err != nil {
			return n, err
		}
		from := off + int64(n) - at
		part := p[n:min(len(p), n+int(witnessBlock-from))]
		do(b[from:], part, at)
		n += len(part)
	}
	return n, nil
}

func (w *witness) ReadAt(p []byte, off int64) (int, error) {
	return w.each(p, off, func(b, part []byte, _ int64) { copy(part, b) })
}

func (w *witness) WriteAt(p []byte, off int64) (int, error) {
	return w.each(p, off, func(b, part []byte, at int64) {
		if w.written[at] == nil {
			whole, _ := w.block(at) // it was read a moment ago
			w.written[at] = slices.Clone(whole)
			b = w.written[at][witnessBlock-len(b):]
		}
		copy(b, part)
	})
}

// remoteOf is a revision whose bytes are far away; nil for all others.
func (l *Library) remoteOf(id blockdev.ID) *Revision {
	l.mu.RLock()
	defer l.mu.RUnlock()
	r := l.records[l.revisions[id]]
	if r == nil {
		return nil
	}
	if v := r.revision(id); v != nil && v.Remote != nil {
		found := *v
		return &found
	}
	return nil
}

// hydrateRemote makes a draft that reads as a remote revision. Its filesystem is the
// image's, whatever the size.
func (l *Library) hydrateRemote(ctx context.Context, dst blockdev.ID, s SourceSpec, v Revision) error {
	if err := v.fitsRemote(s); err != nil {
		return err
	}
	if _, err := l.pinGood(ctx, v.ID); err != nil {
		return err
	}
	defer l.unpin(v.ID)
	cloner, ok := l.o.Pool.(blockdev.Cloner)
	if !ok {
		return errNoRemotePool
	}
	from := v.ID
	if s.Pool != "" { // nothing is shared between pools
		source := SourceSpec{Filesystem: v.Remote.Filesystem, Size: v.ImageBytes, Revision: v.ID, Pool: s.Pool}
		id, release, err := l.sources.get(ctx, source)
		if errors.Is(err, errors.ErrUnsupported) {
			return errors.Join(remotePool(s.Pool), err)
		}
		if err != nil {
			return l.poolError(err)
		}
		defer release()
		from = id
	}
	defer l.openings.lock(string(from)).Unlock() // it is not verified meanwhile
	return l.poolError(cloner.Clone(ctx, dst, from, s.Size))
}

// remotePool is why volumes of a remote revision cannot be in a pool.
func remotePool(pool string) error {
	return fmt.Errorf("%w: pool %q keeps images in a volume group or has no layers; volumes of a remote version need a pool of files", errors.ErrUnsupported, pool)
}

// fitsRemote says whether a volume can be made of a remote revision.
func (v Revision) fitsRemote(s SourceSpec) error {
	switch {
	case s.Filesystem != v.Remote.Filesystem:
		return invalid("template %s:%s is remote and holds %s: leave the filesystem out", v.Template, v.Name, v.Remote.Filesystem)
	case s.Size < v.ImageBytes:
		return tooSmall(fmt.Sprintf("template %s:%s", v.Template, v.Name), v.ImageBytes)
	}
	return nil
}

// remoteError says that something needs the bytes of a revision that are far away.
func (v Revision) remoteError() error {
	return fmt.Errorf("%w: the bytes of %s:%s are in a store: make a volume of it", ErrRemote, v.Template, v.Name)
}

// examineRemote holds what is here of a remote revision against what it should be:
// that its layers and its chunks are whole, and its filesystem's size. What is in the
// store is verified chunk by chunk whenever it is fetched.
func (l *Library) examineRemote(ctx context.Context, v Revision) (why string, err error) {
	accessor, ok := l.o.Pool.(blockdev.Accessor)
	if !ok {
		return "", errNoRemotePool
	}
	info, err := l.o.Pool.Stat(ctx, v.ID)
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		return "its image is missing", nil
	case errors.Is(err, blockdev.ErrCorrupt):
		return "its image is damaged", nil
	case err != nil:
		return "", err
	case info.Size != v.ImageBytes || info.Layers == 0:
		return "its image is not what was registered", nil
	}
	defer l.openings.lock(string(v.ID)).Unlock()
	b, err := accessor.Access(ctx, v.ID, true)
	if errors.Is(err, blockdev.ErrCorrupt) {
		return "its image is damaged", nil
	}
	if err != nil {
		return "", err
	}
	size, err := l.o.Filesystems.SizeIn(ctx, b, v.Remote.Filesystem)
	if errors.Is(err, filesystem.ErrForeign) || errors.Is(err, filesystem.ErrDamaged) || err == nil && size > v.ImageBytes {
		why, err = "its filesystem is not what was registered", nil
	}
	return why, errors.Join(err, b.Close())
}
