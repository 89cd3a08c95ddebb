package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// Tools makes, identifies, measures, checks, grows and reads filesystems. It is
// a value without state and safe for concurrent use; calls for one image must
// not overlap (the engine's volume lock). The zero value is not usable: NewTools.
type Tools struct {
	// MakeTimeout bounds one mkfs.
	MakeTimeout time.Duration
	// CheckTimeout bounds one checker or offline growth; these read and write in
	// proportion to the filesystem's metadata.
	CheckTimeout time.Duration

	cages Cages
}

// In makes Tools of x that run every program which reads an image in a cage: all
// but those of Make, whose image reads as zero. What our own code reads, it reads
// here in any case.
func (x Tools) In(cages Cages) Tools {
	x.cages = cages
	return x
}

// NewTools gives Tools with timeouts for images of up to 64 TiB, which run their
// programs on this host: for images that only this host has written. See In.
func NewTools() Tools {
	return Tools{MakeTimeout: 5 * time.Minute, CheckTimeout: 2 * time.Hour}
}

// UUID is a filesystem's identity, as it stands in the superblock.
type UUID [16]byte

// MakeOptions shape a new filesystem. The zero value is a filesystem with a
// random UUID, sized for the image that it is made on.
type MakeOptions struct {
	// UUID, when set, becomes the filesystem's UUID and (ext4) seeds its directory
	// hash, so that the same calls give the same bytes.
	UUID string
	// Time, when set, stands for now in all that mkfs writes (ext4), so that the
	// same calls give the same bytes.
	Time time.Time
	// Inodes is the least number of inodes that files can use (ext4 only; the
	// others make inodes as they go). 0: by the size class.
	Inodes int64
	// Label is the volume label, at most 12 bytes of [A-Za-z0-9_.-].
	Label string
}

// Make puts an empty filesystem on an image file or block device that reads as
// zero throughout. ErrTooSmall, naming the minimum, when it cannot hold one.
// Nothing is flushed: the caller does that when it publishes the image.
func (x Tools) Make(ctx context.Context, path string, t Type, o MakeOptions) error {
	size, err := deviceSize(path)
	if err != nil {
		return failed("make", t, err)
	}
	if least := t.Minimum(); size < least {
		return failed("make", t, fmt.Errorf("%w: %s needs at least %d MiB", ErrTooSmall, t, least/MiB))
	}
	if err := o.validate(); err != nil {
		return failed("make", t, err)
	}
	switch t {
	case Ext4:
		err = x.makeExt4(ctx, path, size, o)
	case XFS:
		err = x.makeXFS(ctx, path, size, o)
	case Btrfs:
		err = x.makeBtrfs(ctx, path, o)
	default:
		err = errors.ErrUnsupported
	}
	return failed("make", t, err)
}

// Identify gives a clean, unmounted filesystem that was made or copied by us its
// own UUID by patching superblocks in place. Only the blocks that hold the UUID
// are written, so that clones go on sharing the rest. Nothing is flushed: the
// UUID is durable when the caller has flushed the image (Backend.Publish).
// ErrDirty or ErrDamaged, with nothing written, when the image is not what it
// should be.
func (x Tools) Identify(ctx context.Context, path string, t Type, uuid string) error {
	size, err := deviceSize(path)
	if err != nil {
		return failed("identify", t, err)
	}
	f, err := openExclusive(path)
	if err != nil {
		return failed("identify", t, err)
	}
	err = identify(ctx, f, size, t, uuid)
	if closing := f.Close(); err == nil {
		err = closing
	}
	return failed("identify", t, err)
}

// Size reads the size in bytes of an unmounted filesystem from its superblock,
// with one or two reads. For a filesystem that may be mounted, see SizeMounted.
// ErrDamaged when the superblock is not one of type t.
func (x Tools) Size(ctx context.Context, path string, t Type) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, failed("size", t, err)
	}
	size, err := sizeAt(path, t)
	return size, failed("size", t, err)
}

func sizeAt(path string, t Type) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return sizeIn(f, t)
}

// Grow grows an unmounted filesystem to its device; it is there already is
// success, found without a tool. What an interrupted growth left is repaired
// first. ErrNeedsMount for types that only grow mounted; ErrDamaged when the
// checker could not repair what it found. The tools flush what they write.
func (x Tools) Grow(ctx context.Context, path string, t Type) error {
	switch t {
	case Ext4:
		return failed("grow", t, x.growExt4(ctx, path))
	case XFS:
		return failed("grow", t, growUnmounted(path, XFS))
	case Btrfs:
		return failed("grow", t, growUnmounted(path, Btrfs))
	}
	return failed("grow", t, errors.ErrUnsupported)
}

// Check runs the type's checker on an unmounted filesystem and returns nil when
// it is clean afterwards, else ErrDamaged. With repair an ext4 is recovered from
// its journal and repaired; XFS is repaired; btrfs is only checked. ErrDirty when
// a journal stands in the way: without repair, and for XFS, which only a mount
// recovers.
func (x Tools) Check(ctx context.Context, path string, t Type, repair bool) error {
	switch t {
	case Ext4:
		w := x.at(path)
		return failed("check", t, w.leave(w.checkExt4(ctx, repair)))
	case XFS:
		return failed("check", t, x.checkXFS(ctx, path, repair))
	case Btrfs:
		return failed("check", t, x.checkBtrfs(ctx, path))
	}
	return failed("check", t, errors.ErrUnsupported)
}

// Dirty reports whether an unmounted filesystem must be recovered before it can
// be read or identified: it was not unmounted cleanly. The superblock tells, for
// XFS the log's last record. A btrfs that was mounted shows it only after a file
// in it was flushed: it is consistent either way.
func (x Tools) Dirty(ctx context.Context, path string, t Type) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, failed("check", t, err)
	}
	var dirty bool
	var err error
	switch t {
	case Ext4:
		dirty, err = dirtyExt4(path)
	case XFS:
		dirty, err = dirtyXFS(path)
	case Btrfs:
		dirty, err = dirtyBtrfs(path)
	default:
		err = errors.ErrUnsupported
	}
	return dirty, failed("check", t, err)
}

// failed adds the operation and the type, once, at the package's edge.
func failed(op string, t Type, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s filesystem: %w", op, t, err)
}
