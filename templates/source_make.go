package templates

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/blockdev/filecopy"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/internal/sys"
)

// makeSource makes and publishes the image for a spec.
func (l *Library) makeSource(ctx context.Context, s SourceSpec) (id blockdev.ID, err error) {
	id = newID(blockdev.PrefixSource, l.now())
	if err := l.placeSource(id, s.Pool); err != nil {
		return "", err
	}
	var v Revision
	if s.Revision != "" {
		if v, err = l.pinGood(ctx, s.Revision); err != nil {
			return "", err
		}
		defer l.unpin(s.Revision)
	}
	need := sourceNeed(s, l.images.allocated(s.Revision))
	switch {
	case v.Remote != nil:
		need = 8*filesystem.MiB + s.Size/leastChunk*sha256.Size // of its chunks
	case s.converts(v):
		need *= 2 // of the scratch image as well
	}
	release, err := l.reserveIn(s.Pool, need, "source "+string(id))
	if err != nil {
		return "", err
	}
	defer release()
	defer func() {
		if err != nil {
			err = errors.Join(err, l.abandon(ctx, id))
			id = ""
		}
	}()
	shared, err := l.fillSource(ctx, id, s, v)
	if err != nil {
		return id, err
	}
	info, err := l.o.Pool.Stat(ctx, id)
	if err != nil {
		return id, err
	}
	own := max(info.Allocated-shared, 1<<20)
	return id, l.publish(ctx, id, description{Kind: kindSource, Source: &s, Recipe: sourceRecipe, Bytes: own})
}

// leastChunk is the smallest chunk that a remote revision can be digested in, in bytes.
const leastChunk = 4096

// sourceNeed is about what a source will occupy at most while it is made.
func sourceNeed(s SourceSpec, revision int64) int64 {
	need := 8*filesystem.MiB + s.Size/1024
	switch s.Filesystem {
	case filesystem.XFS:
		need += max(64*filesystem.MiB, s.Size/2048) + revision
	case filesystem.Btrfs:
		need += 16*filesystem.MiB + 2*revision
	default:
		need += min(128*filesystem.MiB, s.Size/64)
	}
	return min(need, s.Size)
}

// fillSource makes the draft and tells how many of its bytes are shared with
// the revision's image.
func (l *Library) fillSource(ctx context.Context, id blockdev.ID, s SourceSpec, v Revision) (shared int64, err error) {
	switch {
	case s.Revision == "":
		return 0, l.makeBlank(ctx, id, s)
	case v.Remote != nil:
		return 0, l.copyRemote(ctx, id, v)
	case s.converts(v):
		return 0, l.convert(ctx, id, s, v)
	default:
		return l.growRevision(ctx, id, s, v)
	}
}

// converts tells whether the files of a revision have to be copied into another
// filesystem than its own.
func (s SourceSpec) converts(v Revision) bool {
	return s.Revision != "" && (s.Filesystem != filesystem.Ext4 || !v.growsWell(s.Size))
}

// convert makes a source in another filesystem than the revision's own: of
// another type, or of another class.
func (l *Library) convert(ctx context.Context, id blockdev.ID, s SourceSpec, v Revision) error {
	if s.Filesystem == filesystem.Ext4 {
		return l.refill(ctx, id, s, v)
	}
	return l.convertInOrder(ctx, id, s)
}

// refill writes the tree of a revision into an ext4 of another class.
func (l *Library) refill(ctx context.Context, id blockdev.ID, s SourceSpec, v Revision) error {
	size := s.Size
	if size < v.ImageBytes {
		// Only the small class holds it in so few bytes, so it is made in that
		// class and grown.
		size = min(size, smallExt4-filesystem.MiB)
	}
	t, err := l.manifest(ctx, v)
	if err != nil {
		return err
	}
	from, release, err := l.lend(ctx, v.ID)
	if err != nil {
		return err
	}
	defer release()
	err = l.fillImage(ctx, id, size, filesystem.MakeOptions{Inodes: v.Entries + 16}, func(image *os.File) error {
		contents := placing{}
		if _, err := ext4fill.Fill(ctx, image, t, &contents); err != nil {
			return err
		}
		contents.chooseUsual()
		return contents.move(ctx, image, []*os.File{from}, false)
	})
	if errors.Is(err, ext4fill.ErrFull) {
		return fmt.Errorf("%w: a larger size is needed: %w", ErrTooSmall, err)
	}
	if err != nil || size == s.Size {
		return err
	}
	return l.growFilesystem(ctx, id, s)
}

func (l *Library) growFilesystem(ctx context.Context, id blockdev.ID, s SourceSpec) error {
	if err := l.o.Pool.Grow(ctx, id, s.Size); err != nil {
		return err
	}
	return l.withFile(ctx, id, func(path string) error { return l.o.Filesystems.Grow(ctx, path, s.Filesystem) })
}

// convertInOrder copies the files of a revision into XFS or btrfs by way of a
// scratch image. Files that are written one by one leave an image in a thousand
// pieces, and a clone costs with the pieces; a copy of the image from front to end
// has few.
func (l *Library) convertInOrder(ctx context.Context, id blockdev.ID, s SourceSpec) (err error) {
	scratch := newID(blockdev.PrefixSource, l.now()) // with the revisions: that is where files are made
	defer func() { err = errors.Join(err, l.abandon(ctx, scratch)) }()
	if err := l.makeBlank(ctx, scratch, s); err != nil {
		return err
	}
	if err := l.copyFiles(ctx, scratch, s); err != nil {
		return err
	}
	if err := l.o.Pool.Create(ctx, id, s.Size); err != nil {
		return err
	}
	return l.withFile(ctx, scratch, func(from string) error {
		return l.withFile(ctx, id, func(to string) error { return copyImage(ctx, to, from, extent.Rewrite) })
	})
}

func (l *Library) makeBlank(ctx context.Context, id blockdev.ID, s SourceSpec) error {
	if err := l.o.Pool.Create(ctx, id, s.Size); err != nil {
		return err
	}
	return l.withFile(ctx, id, func(path string) error {
		return l.o.Filesystems.Make(ctx, path, s.Filesystem, filesystem.MakeOptions{})
	})
}

const (
	// A clone of an image in more pieces takes longer than the rest of a create.
	mostPieces = 64
	// mostRewritten is the largest image, in bytes of data, that is laid out anew
	// for its clones: that takes a second for each GiB.
	mostRewritten = 8 << 30
)

// scattered tells whether a revision shares blocks with others in so many pieces
// that clones are better made of a copy that lies in order.
func (l *Library) scattered(ctx context.Context, v Revision) (bool, error) {
	if v.family() == v.ID || l.images.allocated(v.ID) > mostRewritten {
		return false, nil
	}
	image, release, err := l.lend(ctx, v.ID)
	if err != nil {
		return false, err
	}
	defer release()
	mapped, err := sys.MapFile(image, mostPieces+1)
	if errors.Is(err, errors.ErrUnsupported) {
		return false, nil
	}
	return mapped.Extents > mostPieces, err
}

// growRevision clones a revision's image to a size and grows the filesystem in
// it. Of a scattered one the source of the image's own size is a copy in order,
// and sources of other sizes are clones of that.
func (l *Library) growRevision(ctx context.Context, id blockdev.ID, s SourceSpec, v Revision) (shared int64, err error) {
	scattered, err := l.scattered(ctx, v)
	if err != nil {
		return 0, err
	}
	from := s.Revision
	switch {
	case scattered && s.Size == v.ImageBytes:
		return 0, l.rewriteRevision(ctx, id, v)
	case scattered:
		var release func()
		if from, release, err = l.sources.get(ctx, SourceSpec{Filesystem: s.Filesystem, Size: v.ImageBytes, Revision: v.ID, Pool: s.Pool}); err != nil {
			return 0, err
		}
		defer release()
	}
	shared = l.images.allocated(from)
	err = l.cloneFlat(ctx, id, from, s.Size)
	if errors.Is(err, errors.ErrUnsupported) {
		shared, err = 0, l.copyData(ctx, id, from, s.Size)
	}
	if err != nil {
		return 0, err
	}
	err = l.withFile(ctx, id, func(path string) error { return l.o.Filesystems.Grow(ctx, path, filesystem.Ext4) })
	return shared, err
}

func (l *Library) rewriteRevision(ctx context.Context, id blockdev.ID, v Revision) error {
	release, err := l.reserve(l.images.allocated(v.ID), "source "+string(id))
	if err != nil {
		return err
	}
	defer release()
	if err := l.o.Pool.Create(ctx, id, v.ImageBytes); err != nil {
		return err
	}
	image, done, err := l.lend(ctx, v.ID)
	if err != nil {
		return err
	}
	defer done()
	return l.withFile(ctx, id, func(to string) (err error) {
		dst, err := os.OpenFile(to, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = extent.Rewrite(ctx, dst, image)
		return errors.Join(err, dst.Close())
	})
}

// copyImage copies the data of one image to another, with extent.Copy or Rewrite.
func copyImage(ctx context.Context, to, from string, by func(ctx context.Context, dst, src *os.File) (int64, error)) (err error) {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	dst, err := os.OpenFile(to, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	_, err = by(ctx, dst, src)
	return err
}

func (l *Library) copyFiles(ctx context.Context, id blockdev.ID, s SourceSpec) error {
	defer l.openings.lock(string(s.Revision)).Unlock()
	return l.withMountAs(ctx, s.Revision, filesystem.Ext4, true, func(from *os.File) error {
		return l.withMount(ctx, id, s.Filesystem, func(to *os.File) error {
			if err := copyTree(ctx, from, to); err != nil {
				return err
			}
			if err := settleRoot(from, to); err != nil {
				return err
			}
			return sys.SyncFilesystem(to)
		})
	})
}

// copyTree copies all below one mount, of a revision, to another that is empty.
// Both are descriptors of ours.
func copyTree(ctx context.Context, from, to *os.File) error {
	err := filecopy.Tree(ctx, from, to)
	if errors.Is(err, blockdev.ErrNoSpace) {
		return fmt.Errorf("%w: a larger size is needed: %w", ErrTooSmall, err)
	}
	return err
}

// settleRoot gives the root of a copy the time that it had. ext4's own directory
// for lost files is removed, unless an archive put something into it.
func settleRoot(from, to *os.File) (err error) {
	info, err := from.Stat()
	if err != nil {
		return err
	}
	root, err := sys.TreeRoot(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	_ = root.RemoveDir("lost+found")
	return root.Self().SetTimes(info.ModTime())
}
