package templates

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
	"holdfast/templates/archive"
)

// buildAttempts is how often an image is made anew, larger each time, when the
// tree did not fit into the size that was computed for it.
const buildAttempts = 5

// buildTime stands for now in what mkfs writes: images depend on the tree alone.
var buildTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// received is a tree that is to become a revision, and where its contents are.
type received struct {
	tree     tree.Tree
	files    []*os.File // by Run.Store
	shares   []share    // what another file than the first has too
	identity string     // of the tree
	digest   string     // of the archive; empty when there was none
	counts   counts
}

func receivedTree(t tree.Tree, files ...*os.File) *received {
	return &received{tree: t, files: files, identity: t.Identity(), counts: countTree(t)}
}

// built tells what build made; sizes are in bytes.
type built struct {
	image    int64 // of the revision's image
	minimum  int64 // of the smallest volume that holds it
	digest   string
	manifest tree.Tree
}

// build makes a draft with the tree in an ext4 filesystem that is hardly larger
// than its contents: the same bytes for the same tree. The image is of the class
// that grows well; of what fits into a filesystem of the small class an empty one
// is made, once, to know that it does.
func (l *Library) build(ctx context.Context, id blockdev.ID, r *received) (b built, err error) {
	need, err := ext4fill.Need(ctx, r.tree, tree.Block)
	if err != nil {
		return b, unfit(err)
	}
	if b.minimum, err = l.smallest(ctx, r); err != nil {
		return b, l.poolError(err)
	}
	size, err := l.fitting(ctx, id, regularSize(need), func(size int64) error { return l.fillRevision(ctx, id, r, need, size, &b) })
	if err != nil {
		return b, l.poolError(unfit(err))
	}
	b.image = size
	if b.minimum == 0 {
		b.minimum = size
	}
	l.images.set(id, size) // until it is published and measured
	return b, nil
}

// unfit tells what the tree's owner has to change.
func unfit(err error) error {
	if errors.Is(err, ext4fill.ErrTooLarge) || errors.Is(err, ext4fill.ErrInvalid) {
		return fmt.Errorf("%w: %w", archive.ErrRefused, err)
	}
	return err
}

// abandon removes a draft of ours.
func (l *Library) abandon(ctx context.Context, id blockdev.ID) error {
	l.images.remove(id)
	return l.o.Pool.Remove(context.WithoutCancel(ctx), id)
}

// fitting makes an image anew, larger each time, until all fits; within a class.
func (l *Library) fitting(ctx context.Context, id blockdev.ID, size int64, make func(size int64) error) (int64, error) {
	class := classOf(size)
	var err error
	for range buildAttempts {
		err = make(size)
		if err == nil {
			return size, nil
		}
		err = errors.Join(err, l.abandon(ctx, id))
		if !errors.Is(err, ext4fill.ErrFull) {
			return 0, err
		}
		l.o.Log.Info("template image was too small", "image", id, "bytes", size)
		size = roundUp(size+size/16+filesystem.MiB, filesystem.MiB)
		if classOf(size) != class {
			break
		}
	}
	return 0, err
}

// smallest is the size of the smallest filesystem of the small class that holds a
// tree; 0 when none does. It is found with everything but the contents.
func (l *Library) smallest(ctx context.Context, r *received) (int64, error) {
	need, err := ext4fill.Need(ctx, r.tree, smallBlock)
	if errors.Is(err, ext4fill.ErrTooLarge) {
		return 0, nil
	}
	if err != nil {
		return 0, unfit(err)
	}
	size := smallSize(need)
	if size == 0 {
		return 0, nil
	}
	trial := newID(blockdev.PrefixSource, l.now())
	size, err = l.fitting(ctx, trial, size, func(size int64) error {
		return l.fillImage(ctx, trial, size, l.madeFor(r, need), func(image *os.File) error {
			_, err := ext4fill.Fill(ctx, image, r.tree, nowhere{})
			return err
		})
	})
	if errors.Is(err, ext4fill.ErrFull) {
		return 0, nil
	}
	return size, errors.Join(err, l.abandon(ctx, trial))
}

// nowhere lets contents be where they are.
type nowhere struct{}

func (nowhere) Place(context.Context, *os.File, int64, tree.Run) error { return nil }

// madeFor are the options of a filesystem that depends on a tree alone.
func (l *Library) madeFor(r *received, need ext4fill.Layout) filesystem.MakeOptions {
	return filesystem.MakeOptions{UUID: uuidFrom(r.identity), Time: buildTime, Inodes: need.Inodes}
}

// fillImage makes a draft with an empty ext4 and lends it to fill.
func (l *Library) fillImage(ctx context.Context, id blockdev.ID, size int64, o filesystem.MakeOptions, fill func(image *os.File) error) error {
	if err := l.o.Pool.Create(ctx, id, size); err != nil {
		return err
	}
	return l.withFile(ctx, id, func(path string) (err error) {
		if err := l.o.Filesystems.Make(ctx, path, filesystem.Ext4, o); err != nil {
			return err
		}
		image, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, image.Close()) }()
		return errors.Join(l.at("fill"), fill(image))
	})
}

// fillRevision makes a revision's draft and sets what b tells of it.
func (l *Library) fillRevision(ctx context.Context, id blockdev.ID, r *received, layout ext4fill.Layout, size int64, b *built) error {
	need := size
	if l.reflinks {
		need -= min(size, expect(r.tree, r.shares))
	}
	release, err := l.reserve(need, "template image "+string(id))
	if err != nil {
		return err
	}
	defer release()
	return l.fillImage(ctx, id, size, l.madeFor(r, layout), func(image *os.File) error {
		contents := placing{shares: r.shares}
		if b.manifest, err = ext4fill.Fill(ctx, image, r.tree, &contents); err != nil {
			return err
		}
		contents.chooseUsual()
		if err := errors.Join(contents.move(ctx, image, r.files, true), l.at("placed")); err != nil {
			return err
		}
		if err := settleSpace(ctx, image); err != nil {
			return spaceError(err)
		}
		if err := l.o.Filesystems.Check(ctx, image.Name(), filesystem.Ext4, false); err != nil {
			return fmt.Errorf("the image just made: %w", err)
		}
		b.digest, err = digestMade(ctx, image, view{image: image, files: r.files, pieces: contents.pieces})
		return err
	})
}

// withFile lends the path of an image to fn. The image must not be open.
func (l *Library) withFile(ctx context.Context, id blockdev.ID, fn func(path string) error) error {
	return l.withEndpoint(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}}, fn)
}

func (l *Library) withEndpoint(ctx context.Context, id blockdev.ID, w blockdev.Want, fn func(path string) error) error {
	e, err := l.o.Pool.Open(ctx, id, w)
	if errors.Is(err, blockdev.ErrLayered) && isRevision(id) {
		return ErrRemote // it is never brought here
	}
	if errors.Is(err, blockdev.ErrLayered) { // a volume, or a clone of one
		if err = l.flatten(ctx, id); err == nil {
			e, err = l.o.Pool.Open(ctx, id, w)
		}
	}
	if err != nil {
		return err
	}
	return errors.Join(fn(e.Path), l.closeEndpoint(context.WithoutCancel(ctx), id, e.Lease))
}

func (l *Library) flatten(ctx context.Context, id blockdev.ID) error {
	if flattener, ok := l.o.Pool.(blockdev.Flattener); ok {
		return flattener.Flatten(ctx, id)
	}
	return blockdev.ErrLayered
}

// A mount or device that we let go of can be in use a moment longer: a process
// that is just being started has our descriptors until its exec.
const (
	letGoDeadline = 10 * time.Second
	letGoInterval = time.Millisecond
)

func (l *Library) closeEndpoint(ctx context.Context, id blockdev.ID, lease string) error {
	if l.lent.has(id) { // the last of those who read it closes it
		return nil
	}
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
