package templates

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
	"holdfast/templates/archive"
)

// buildAttempts is how often an image is made anew, larger each time, when the
// archive did not fit into the size that was computed for it.
const buildAttempts = 5

// buildTime stands for now in what mkfs writes, so that images of one archive
// differ in less.
var buildTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// built tells what build made; sizes in bytes.
type built struct {
	image   int64  // size of the revision's image
	minimum int64  // size of the smallest volume that holds it
	digest  string // of the image
}

// build makes a draft with the archive's contents in an ext4 filesystem that is
// hardly larger than they are. The image is of the class that grows well; what
// fits into a filesystem of the small class is built as one too, once, to know
// that it does.
func (l *Library) build(ctx context.Context, id blockdev.ID, s *spooled) (b built, err error) {
	if b.image, err = l.buildFitting(ctx, id, s, regularSize(s.counts)); err != nil {
		return b, l.poolError(err)
	}
	l.images.set(id, b.image) // until it is published and measured
	b.minimum = b.image
	small := smallSize(s.counts)
	if small == 0 {
		return b, nil
	}
	trial := newID(blockdev.PrefixSource, l.now())
	small, err = l.buildFitting(ctx, trial, s, small)
	if err == nil {
		b.minimum = small
	}
	if errors.Is(err, errFilesystemFull) {
		err = nil
	}
	if err = errors.Join(err, l.abandon(ctx, trial)); err != nil {
		err = errors.Join(err, l.abandon(ctx, id))
	}
	return b, l.poolError(err)
}

// abandon removes a draft of ours.
func (l *Library) abandon(ctx context.Context, id blockdev.ID) error {
	l.images.remove(id)
	return l.o.Pool.Remove(context.WithoutCancel(ctx), id)
}

// buildFitting makes the image anew, larger each time, until all fits.
func (l *Library) buildFitting(ctx context.Context, id blockdev.ID, s *spooled, size int64) (int64, error) {
	class := classOf(size)
	var err error
	for range buildAttempts {
		err = l.buildSize(ctx, id, s, size)
		if err == nil {
			return size, nil
		}
		err = errors.Join(err, l.abandon(ctx, id))
		if !errors.Is(err, errFilesystemFull) {
			return 0, err
		}
		l.o.Log.Info("template image was too small", "image", id, "bytes", size, "counts", s.counts.String())
		size = roundUp(size+size/8+filesystem.MiB, filesystem.MiB)
		if classOf(size) != class {
			break
		}
	}
	return 0, err
}

// errFilesystemFull: the image is too small, not the pool.
var errFilesystemFull = errors.New("does not fit into the image")

func (l *Library) buildSize(ctx context.Context, id blockdev.ID, s *spooled, size int64) error {
	release, err := l.reserve(size, "template image "+string(id))
	if err != nil {
		return err
	}
	defer release()
	if err := l.o.Pool.Create(ctx, id, size); err != nil {
		return err
	}
	err = l.withFile(ctx, id, func(path string) error {
		// In one piece, so that clones of it are made in an instant: their cost
		// grows with the number of extents. It also shows now that the pool has room.
		if err := allocate(path, size); err != nil {
			return err
		}
		return l.o.Filesystems.Make(ctx, path, filesystem.Ext4, filesystem.MakeOptions{
			UUID: uuidFrom(s.digest), Time: buildTime, Inodes: s.counts.Entries + s.counts.Replaced,
		})
	})
	if err != nil {
		return err
	}
	err = l.withMount(ctx, id, filesystem.Ext4, func(root *os.File) error { return extract(ctx, s, root) })
	if err != nil {
		return err
	}
	return l.withFile(ctx, id, func(path string) error {
		if err := l.o.Filesystems.Check(ctx, path, filesystem.Ext4, false); err != nil {
			return fmt.Errorf("the image just made: %w", err)
		}
		return settleSpace(ctx, path)
	})
}

func extract(ctx context.Context, s *spooled, root *os.File) error {
	if _, err := s.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	err := archive.Extract(ctx, s.file, root)
	if err == nil {
		err = sys.SyncFilesystem(root)
	}
	if sys.IsNoSpace(err) {
		return fmt.Errorf("%w: %w", errFilesystemFull, err)
	}
	return err
}

// withFile lends the path of an image to fn. The image must not be open.
func (l *Library) withFile(ctx context.Context, id blockdev.ID, fn func(path string) error) error {
	return l.withEndpoint(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}}, fn)
}

func (l *Library) withEndpoint(ctx context.Context, id blockdev.ID, w blockdev.Want, fn func(path string) error) error {
	e, err := l.o.Pool.Open(ctx, id, w)
	if err != nil {
		return err
	}
	return errors.Join(fn(e.Path), l.closeEndpoint(context.WithoutCancel(ctx), id, e.Lease))
}

// A mount or device that we let go of can be in use a moment longer: a process
// that is just being started has our descriptors until its exec.
const (
	letGoDeadline = 10 * time.Second
	letGoInterval = time.Millisecond
)

func (l *Library) closeEndpoint(ctx context.Context, id blockdev.ID, lease string) error {
	ctx, cancel := context.WithTimeout(ctx, letGoDeadline)
	defer cancel()
	for {
		err := l.o.Pool.Close(ctx, id, lease)
		if !errors.Is(err, blockdev.ErrBusy) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(letGoInterval):
		}
	}
}

// withMount mounts an image where nobody else can see it and lends its root to
// fn. The mount is nowhere in the file system: it lives as long as descriptors
// of it, so a crash leaves none behind.
func (l *Library) withMount(ctx context.Context, id blockdev.ID, t filesystem.Type, fn func(root *os.File) error) error {
	return l.withMountAs(ctx, id, t, false, fn)
}

func (l *Library) withMountAs(ctx context.Context, id blockdev.ID, t filesystem.Type, readOnly bool, fn func(root *os.File) error) error {
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}, ReadOnly: readOnly}
	return l.withEndpoint(ctx, id, want, func(device string) error {
		fs := sys.Filesystem{Device: device, Type: string(t), ReadOnly: readOnly, Options: mountOptions[t]}
		mount, err := sys.NewMount(fs, sys.MountAttr{ReadOnly: readOnly, NoSuid: true, NoDev: true})
		if err != nil {
			return err
		}
		root, err := sys.OpenMount(mount)
		if err != nil {
			return errors.Join(err, mount.Close())
		}
		return errors.Join(fn(root), root.Close(), mount.Close())
	})
}

// mountOptions keep the kernel from writing what no file needs: unused inode
// tables stay holes, and a draft is flushed once, when it is published.
var mountOptions = map[filesystem.Type][]string{
	filesystem.Ext4:  {"noinit_itable", "nobarrier"},
	filesystem.XFS:   {"nouuid"},
	filesystem.Btrfs: nil,
}

// uuidFrom makes a UUID (version 8, RFC 9562) of a digest.
func uuidFrom(digest string) string {
	hex := digest[len("sha256:"):]
	return fmt.Sprintf("%s-%s-8%s-a%s-%s", hex[:8], hex[8:12], hex[13:16], hex[17:20], hex[20:32])
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
