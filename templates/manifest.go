package templates

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/tree"
)

// A manifest is the tree of a revision's image, its runs saying where in the image
// contents lie: a line of JSON, then the tree's own encoding with its checksum. It
// is derived from the image and made again when it is lost, damaged or of another
// image. Revisions with the same image have one together, so it is named by the
// image's digest; by the image where a revision has none.
type manifestHead struct {
	Format int    `json:"format"` // 1
	Image  string `json:"image"`  // the name, as of manifestName
}

const manifestFormat = 1

func manifestName(v Revision) string {
	if hex, ok := strings.CutPrefix(v.ImageDigest, "sha256:"); ok {
		return hex
	}
	return string(v.ID)
}

func (l *Library) manifestPath(v Revision) string {
	return filepath.Join(l.o.Manifests, manifestName(v))
}

// Manifest is the tree of a READY revision, by a reference as Resolve takes it;
// runs say where in its image contents lie. It is read from disk, or made again
// from the image when what is there does not do. It is the caller's.
func (l *Library) Manifest(ctx context.Context, workspace, ref string) (tree.Tree, error) {
	_, v, err := l.Resolve(ctx, workspace, ref)
	if err != nil {
		return tree.Tree{}, err
	}
	if v, err = l.pin(v.ID); err != nil {
		return tree.Tree{}, err
	}
	defer l.unpin(v.ID)
	if v.Remote != nil {
		return tree.Tree{}, v.remoteError()
	}
	return l.manifest(ctx, v)
}

// manifest is Manifest of a revision that is pinned.
func (l *Library) manifest(ctx context.Context, v Revision) (tree.Tree, error) {
	t, err := l.readManifest(v)
	if err == nil {
		return t, nil
	}
	l.o.Log.Info("a manifest is made again from its image", "image", v.ID, "cause", err)
	if t, err = l.treeOf(ctx, v); err != nil {
		return tree.Tree{}, fmt.Errorf("read the tree of version %s:%s: %w", v.Template, v.Name, l.poolError(err))
	}
	if err := l.writeManifest(v, t); err != nil {
		l.o.Log.Warn("a manifest could not be kept", "image", v.ID, "cause", err)
	}
	return t, nil
}

func (l *Library) readManifest(v Revision) (t tree.Tree, err error) {
	f, err := os.Open(l.manifestPath(v))
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	source, err := manifestSource(f, v)
	if err != nil {
		return t, err
	}
	for n, err := range source() {
		if err != nil {
			return tree.Tree{}, err
		}
		t.Nodes = append(t.Nodes, *n)
	}
	return t, nil
}

// manifestSource reads the nodes of a manifest, from the first each time.
func manifestSource(f *os.File, v Revision) (tree.Source, error) {
	in := bufio.NewReader(io.NewSectionReader(f, 0, maxManifestHead))
	line, err := in.ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("%w: %w", tree.ErrDamaged, err)
	}
	var head manifestHead
	if err := json.Unmarshal(line, &head); err != nil {
		return nil, fmt.Errorf("%w: %w", tree.ErrDamaged, err)
	}
	if head != (manifestHead{manifestFormat, manifestName(v)}) {
		return nil, fmt.Errorf("%w: it is of %.80q, format %d", tree.ErrDamaged, head.Image, head.Format)
	}
	at := int64(len(line))
	return func() iter.Seq2[*tree.Node, error] {
		return tree.Scan(io.NewSectionReader(f, at, math.MaxInt64-at), tree.Limits{Bytes: v.ContentBytes})
	}, nil
}

// maxManifestHead bounds the first line, in bytes.
const maxManifestHead = 4096

// writeManifest puts a manifest in its place. Nothing is flushed: what a power cut
// leaves of it has no valid checksum.
func (l *Library) writeManifest(v Revision, t tree.Tree) (err error) {
	if err := l.at("manifest.write"); err != nil {
		return err
	}
	if err := os.MkdirAll(l.o.Manifests, 0o700); err != nil {
		return spaceError(err)
	}
	f, err := os.CreateTemp(l.o.Manifests, "new-")
	if err != nil {
		return spaceError(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	head, err := json.Marshal(manifestHead{manifestFormat, manifestName(v)})
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(f, 1<<16)
	_, _ = out.Write(append(head, '\n')) // its error comes with Flush
	if err = errors.Join(tree.Encode(out, t), out.Flush(), l.at("manifest.rename")); err != nil {
		return spaceError(err)
	}
	if err = os.Rename(f.Name(), l.manifestPath(v)); err != nil {
		return err
	}
	return f.Close()
}

// treeOf reads a revision's image through a read-only mount: all that we made
// ourselves can be mounted.
func (l *Library) treeOf(ctx context.Context, v Revision) (t tree.Tree, err error) {
	defer l.openings.lock(string(v.ID)).Unlock()
	err = l.withMountAs(ctx, v.ID, filesystem.Ext4, true, func(root *os.File) error {
		t, _, err = tree.ReadDirectory(ctx, root, tree.Limits{Bytes: math.MaxInt64, Entries: math.MaxInt64, Text: math.MaxInt64}, tree.Mapped{})
		return err
	})
	return t, err
}

// dropManifest removes the manifest of an image that is gone, unless a READY
// revision has the same one; mu is held.
func (l *Library) dropManifest(name string) error {
	if name == "" || l.manifestNames()[name] {
		return nil
	}
	return ignoreMissing(os.Remove(filepath.Join(l.o.Manifests, name)))
}

// manifestNames are those of all READY revisions; mu is held.
func (l *Library) manifestNames() map[string]bool {
	names := map[string]bool{}
	for _, r := range l.records {
		for _, v := range r.Template.Revisions {
			if v.Status == Ready {
				names[manifestName(v)] = true
			}
		}
	}
	return names
}

// sweepManifests removes what no revision needs.
func (l *Library) sweepManifests() error {
	if err := os.MkdirAll(l.o.Manifests, 0o700); err != nil {
		return spaceError(err)
	}
	entries, err := os.ReadDir(l.o.Manifests)
	if err != nil {
		return err
	}
	needed := l.manifestNames()
	for _, e := range entries {
		if !needed[e.Name()] {
			if err := ignoreMissing(os.Remove(filepath.Join(l.o.Manifests, e.Name()))); err != nil {
				return err
			}
		}
	}
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// OpenImage lends fn the image of a READY revision for reading. It stays as long
// as fn runs, whoever deletes the revision.
func (l *Library) OpenImage(ctx context.Context, id blockdev.ID, fn func(image *os.File) error) error {
	if _, err := l.pin(id); err != nil {
		return err
	}
	defer l.unpin(id)
	image, release, err := l.lend(ctx, id)
	if err != nil {
		return l.poolError(err)
	}
	defer release()
	return fn(image)
}

// lend opens the image of a pinned revision. A file stays readable without the
// pool's opening; a device is open for as long, for others who only read as well.
func (l *Library) lend(ctx context.Context, id blockdev.ID) (*os.File, func(), error) {
	defer l.openings.lock(string(id)).Unlock()
	e, err := l.o.Pool.Open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}, ReadOnly: true})
	if errors.Is(err, blockdev.ErrLayered) && isRevision(id) {
		err = ErrRemote
	}
	if err != nil {
		return nil, nil, err
	}
	f, err := os.Open(e.Path)
	if err != nil || e.Kind == blockdev.File {
		err = errors.Join(err, l.closeEndpoint(context.WithoutCancel(ctx), id, e.Lease))
	}
	if err != nil {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
		return nil, nil, err
	}
	if e.Kind == blockdev.File {
		return f, func() { _ = f.Close() }, nil // it was only read
	}
	l.lent.add(id, 1)
	return f, func() {
		defer l.openings.lock(string(id)).Unlock()
		err := f.Close()
		l.lent.add(id, -1)
		if err := errors.Join(err, l.closeEndpoint(context.WithoutCancel(ctx), id, e.Lease)); err != nil {
			l.o.Log.Error("an image stays open", "image", id, "error", err)
		}
	}, nil
}

// lent counts who reads the devices of images without having their openings' lock.
type lent struct {
	mu    sync.Mutex
	users map[blockdev.ID]int
}

func (l *lent) add(id blockdev.ID, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.users == nil {
		l.users = map[blockdev.ID]int{}
	}
	if l.users[id] += n; l.users[id] == 0 {
		delete(l.users, id)
	}
}

func (l *lent) has(id blockdev.ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.users[id] > 0
}
