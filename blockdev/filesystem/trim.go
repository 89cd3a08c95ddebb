package filesystem

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"syscall"

	"holdfast/internal/sys"
)

// Trimmed is how far a trim came.
type Trimmed struct {
	Discarded int64 // bytes that the filesystem gave up; it may repeat what it gave up before
	Next      int64 // byte to go on from
	Done      bool  // nothing is left
}

// TrimMounted tells the device of the filesystem mounted at dir which blocks of
// length bytes from byte from on are free. Only what a flush has made free
// counts: SyncMounted first. btrfs has no ranges of its device to offer: one call
// does all. ErrReadOnly where it is mounted so; errors.ErrUnsupported where the
// device takes no discards.
func (x Tools) TrimMounted(ctx context.Context, dir string, t Type, from, length int64) (Trimmed, error) {
	if err := ctx.Err(); err != nil {
		return Trimmed{}, failed("trim", t, err)
	}
	root, err := openMounted(dir, t)
	if err != nil {
		return Trimmed{}, failed("trim", t, err)
	}
	defer root.Close()
	r, err := trimMounted(root, t, from, length)
	if errors.Is(err, syscall.EROFS) {
		err = fmt.Errorf("%w: %w", ErrReadOnly, err)
	}
	return r, failed("trim", t, err)
}

func trimMounted(root *os.File, t Type, from, length int64) (r Trimmed, err error) {
	if t == Btrfs {
		r.Discarded, err = sys.Trim(root, 0, math.MaxUint64)
		r.Done = true
		return r, err
	}
	if t == XFS && from <= 0 { // it frees what was removed in the background
		if err := errors.Join(sys.ReclaimXFS(root), sys.SyncFilesystem(root)); err != nil {
			return r, err
		}
	}
	total, err := sizeMounted(root, t)
	if err != nil {
		return r, err
	}
	if from >= total {
		return Trimmed{Next: total, Done: true}, nil
	}
	r.Discarded, err = sys.Trim(root, uint64(max(from, 0)), uint64(length))
	r.Next, r.Done = from+length, from+length >= total
	return r, err
}

// SyncMounted makes durable what was written to the filesystem mounted at dir,
// and what was removed free: without it a trim finds nothing.
func (x Tools) SyncMounted(ctx context.Context, dir string, t Type) error {
	if err := ctx.Err(); err != nil {
		return failed("sync", t, err)
	}
	root, err := openMounted(dir, t)
	if err != nil {
		return failed("sync", t, err)
	}
	defer root.Close()
	return failed("sync", t, sys.SyncFilesystem(root))
}
