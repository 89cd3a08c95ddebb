package templates

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"sync"

	"holdfast/blockdev/extent"
	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
)

// digestWorkers share the work.
const digestWorkers = 2

// digestMade is extent.Digest of an image that was just made, by several workers,
// reading from r what f holds: the extents are those of f.
func digestMade(ctx context.Context, f *os.File, r io.ReaderAt) (string, error) {
	status, err := sys.StatusOf(f)
	if err != nil {
		return "", err
	}
	chunks := make([]tree.Digest, (status.Size+tree.Chunk-1)/tree.Chunk)
	work, failed := make(chan int64, digestWorkers), make(chan error, digestWorkers)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	for range digestWorkers {
		group.Go(func() {
			if err := digestChunks(r, status.Size, chunks, work); err != nil {
				cancel(err)
				failed <- err
			}
		})
	}
	next := int64(0)
	err = extent.Each(ctx, f, func(data extent.Range) error {
		for next = max(next, data.Offset/tree.Chunk); next*tree.Chunk < data.End(); next++ {
			select {
			case work <- next:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
	close(work)
	group.Wait()
	close(failed)
	if err = errors.Join(err, <-failed); err != nil {
		return "", err
	}
	sum := sha256.New()
	sum.Write(binary.LittleEndian.AppendUint64([]byte("holdfast image 1\n"), uint64(status.Size))) //nolint:gosec // not negative
	for _, d := range chunks {
		sum.Write(d[:])
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
}

func digestChunks(r io.ReaderAt, size int64, to []tree.Digest, work <-chan int64) error {
	buf := make([]byte, tree.Chunk)
	for k := range work {
		b := buf[:min(tree.Chunk, size-k*tree.Chunk)]
		if n, err := r.ReadAt(b, k*tree.Chunk); n < len(b) {
			return err
		}
		to[k] = tree.DigestOf(b)
	}
	return nil
}
