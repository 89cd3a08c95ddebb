package templates

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// makeSource makes and publishes the image for a spec.
func (l *Library) makeSource(ctx context.Context, s SourceSpec) (id blockdev.ID, err error) {
	id = newID(blockdev.PrefixSource, l.now())
	var v Revision
	if s.Revision != "" {
		if v, err = l.pinGood(ctx, s.Revision); err != nil {
			return "", err
		}
		defer l.unpin(s.Revision)
	}
	need := sourceNeed(s, l.images.of(s.Revision))
	if s.converts(v) {
		need *= 2 // of the scratch image as well
	}
	release, err := l.reserve(need, "source "+string(id))
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
		return 0, l.makeBlank(ctx, id, s, 0)
	case s.converts(v):
		return 0, l.convertInOrder(ctx, id, s, v)
	default:
		return l.growRevision(ctx, id, s)
	}
}

// converts tells whether the files of a revision have to be copied into another
// filesystem than its own.
func (s SourceSpec) converts(v Revision) bool {
	return s.Revision != "" && (s.Filesystem != filesystem.Ext4 || !v.growsWell(s.Size))
}

// convertInOrder converts by way of a scratch image. Files that are written one by
// one leave an image in a thousand pieces, and a clone costs with the pieces; a
// copy of the image from front to end has few.
func (l *Library) convertInOrder(ctx context.Context, id blockdev.ID, s SourceSpec, v Revision) (err error) {
	scratch := newID(blockdev.PrefixSource, l.now())
	defer func() { err = errors.Join(err, l.abandon(ctx, scratch)) }()
	if err := l.convertRevision(ctx, scratch, s, v); err != nil {
		return err
	}
	if err := l.o.Pool.Create(ctx, id, s.Size); err != nil {
		return err
	}
	return l.withFile(ctx, scratch, func(from string) error {
		return l.withFile(ctx, id, func(to string) error { return copyImage(ctx, to, from, extent.Rewrite) })
	})
}

func (l *Library) makeBlank(ctx context.Context, id blockdev.ID, s SourceSpec, inodes int64) error {
	if err := l.o.Pool.Create(ctx, id, s.Size); err != nil {
		return err
	}
	return l.withFile(ctx, id, func(path string) error {
		return l.o.Filesystems.Make(ctx, path, s.Filesystem, filesystem.MakeOptions{Inodes: inodes})
	})
}

// growRevision clones a revision's image to a size and grows the filesystem in it.
func (l *Library) growRevision(ctx context.Context, id blockdev.ID, s SourceSpec) (shared int64, err error) {
	err = errors.ErrUnsupported
	if cloner, ok := l.o.Pool.(blockdev.Cloner); ok {
		err = cloner.Clone(ctx, id, s.Revision, s.Size)
		shared = l.images.of(s.Revision)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		shared, err = 0, l.copyData(ctx, id, s.Revision, s.Size)
	}
	if err != nil {
		return 0, err
	}
	err = l.withFile(ctx, id, func(path string) error { return l.o.Filesystems.Grow(ctx, path, filesystem.Ext4) })
	return shared, err
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

// convertRevision copies the tree of a revision (ext4) into a fresh filesystem:
// of another type, or of another class than the revision's.
func (l *Library) convertRevision(ctx context.Context, id blockdev.ID, s SourceSpec, v Revision) error {
	fresh := s
	if s.Filesystem == filesystem.Ext4 && s.Size < v.ImageBytes {
		// Only the small class holds it in so few bytes, so it is made in that
		// class and grown.
		fresh.Size = min(s.Size, smallExt4-filesystem.MiB)
	}
	if err := l.makeBlank(ctx, id, fresh, v.Entries+16); err != nil {
		return err
	}
	if err := l.copyFiles(ctx, id, s); err != nil || fresh.Size == s.Size {
		return err
	}
	if err := l.o.Pool.Grow(ctx, id, s.Size); err != nil {
		return err
	}
	return l.withFile(ctx, id, func(path string) error { return l.o.Filesystems.Grow(ctx, path, s.Filesystem) })
}

func (l *Library) copyFiles(ctx context.Context, id blockdev.ID, s SourceSpec) error {
	defer l.openings.lock(string(s.Revision)).Unlock()
	return l.withMountAs(ctx, s.Revision, filesystem.Ext4, true, func(from *os.File) error {
		return l.withMount(ctx, id, s.Filesystem, func(to *os.File) error {
			if err := copyTree(ctx, from, to); err != nil {
				return err
			}
			if err := settleRoot(from, to, s.Filesystem != filesystem.Ext4); err != nil {
				return err
			}
			return sys.SyncFilesystem(to)
		})
	})
}

// copyTimeout bounds the copying of one tree.
const copyTimeout = 2 * time.Hour

// classifyCopy reads the error of cp.
func classifyCopy(err error) error {
	var e *run.Error
	if errors.As(err, &e) && strings.Contains(e.Stderr, "No space left on device") {
		return fmt.Errorf("%w: a larger size is needed: %w", ErrTooSmall, err)
	}
	return err
}

// copyTree copies all below one mount to another. Both are descriptors of
// ours, and what is copied into was empty: nothing in the tree can lead the
// tool elsewhere, it follows no links.
func copyTree(ctx context.Context, from, to *os.File) error {
	_, err := run.Run(ctx, run.Cmd{
		Args:       []string{"cp", "-dR", "--preserve=mode,ownership,timestamps,links,xattr", "--sparse=auto", "--reflink=never", "/proc/self/fd/3/.", "/proc/self/fd/4/."},
		ExtraFiles: []*os.File{from, to},
		Timeout:    copyTimeout,
	})
	return classifyCopy(err)
}

// settleRoot gives the root of a copy the time that it had. ext4's own directory
// for lost files is removed elsewhere, unless an archive put something into it.
func settleRoot(from, to *os.File, drop bool) (err error) {
	info, err := from.Stat()
	if err != nil {
		return err
	}
	root, err := sys.TreeRoot(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	if drop {
		_ = root.RemoveDir("lost+found")
	}
	return root.Self().SetTimes(info.ModTime())
}
