package overlay

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"holdfast/blockdev"
)

// File is what a layer's data or map is kept in. It is safe for concurrent use.
type File interface {
	io.ReaderAt // behind its end as os.File does: what there is, and io.EOF
	io.WriterAt
	// Sync makes what was written durable, with what finds it: fdatasync(2).
	Sync() error
	// Punch makes a range read as zero and gives its space back.
	Punch(off, n int64) error
	// Truncate makes it size bytes large; new bytes read as zero.
	Truncate(size int64) error
}

// Files are those of one layer.
type Files struct{ Data, Map File }

// MapSize is how large the map of a volume of size bytes is. Where the map's space
// is allocated beforehand a full pool cannot keep a Sync of blocks whose data has
// its space from succeeding.
func MapSize(size int64) int64 { return sectorAt(leavesFor(blocksOf(size))) }

func blocksOf(size int64) int64 { return (size + BlockSize - 1) / BlockSize }

// Create makes an empty layer for a volume of size bytes, a positive multiple of
// BlockSize, out of two empty files. Durable on return, the names of the files
// apart.
func Create(f Files, size int64) error {
	return blockdev.Op("overlay.Create", "", create(f, size))
}

func create(f Files, size int64) error {
	if err := checkSize(size); err != nil {
		return err
	}
	if err := errors.Join(f.Data.Truncate(size), f.Map.Truncate(MapSize(size))); err != nil {
		return err
	}
	if err := writeWhole(f.Map, header(size), 0); err != nil {
		return err
	}
	if err := errors.Join(f.Data.Sync(), f.Map.Sync()); err != nil {
		return fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
	}
	return nil
}

func checkSize(size int64) error {
	if size <= 0 || size > maxSize || size%BlockSize != 0 {
		return fmt.Errorf("%w: a size of %d bytes: a multiple of %d up to %d is possible", blockdev.ErrInvalid, size, BlockSize, int64(maxSize))
	}
	return nil
}

// layer is one layer of the stack.
type layer struct {
	Files
	size  int64
	valid *bitmap // blocks that are read from here

	commits   sync.Mutex // one at a time
	committed *bitmap    // blocks that the map file says are here, or is about to; under commits

	mu      sync.Mutex
	pending []run // written since the last commit began, in the order of their ends
	dirty   atomic.Bool
}

// run is the blocks from first to below end.
type run struct{ first, end int64 }

func openLayer(f Files) (*layer, error) {
	valid, size, err := loadMap(f.Map)
	if err != nil {
		return nil, err
	}
	if err := checkSize(size); err != nil {
		return nil, fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	return &layer{Files: f, size: size, valid: valid, committed: valid.clone()}, nil
}

// holds reports whether all of [first, end) is read from here.
func (l *layer) holds(first, end int64) bool {
	return end <= blocksOf(l.size) && l.valid.all(first, end)
}

// run is bitmap.run for a layer that may be smaller than the volume.
func (l *layer) run(first, end int64) (held bool, to int64) {
	blocks := blocksOf(l.size)
	if first >= blocks {
		return false, end
	}
	held, to = l.valid.run(first, min(end, blocks))
	if !held && to == blocks {
		to = end
	}
	return held, to
}

// mark makes blocks valid whose bytes have been written.
func (l *layer) mark(first, end int64) {
	l.mu.Lock()
	if n := len(l.pending); n > 0 && l.pending[n-1].end == first {
		l.pending[n-1].end = end
	} else {
		l.pending = append(l.pending, run{first, end})
	}
	l.mu.Unlock()
	l.valid.set(first, end)
	l.dirty.Store(true)
}

// take begins a commit: what it gives has been written before.
func (l *layer) take() []run {
	l.mu.Lock()
	defer l.mu.Unlock()
	runs := l.pending
	l.pending = nil
	return runs
}

func (l *layer) putBack(runs []run) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending = append(runs, l.pending...)
}

// commit makes all durable that was written before it began: the data, then the
// map of its new blocks. blockdev.ErrFailed after a failed sync; any other error
// leaves what was to be written for the next commit.
func (l *layer) commit() error {
	l.commits.Lock()
	defer l.commits.Unlock()
	l.dirty.Store(false) // a write that ends from here on sets it again
	runs := l.take()
	if err := l.Data.Sync(); err != nil {
		return fmt.Errorf("%w: data: %w", blockdev.ErrFailed, err)
	}
	if len(runs) == 0 {
		return nil
	}
	var leaves []int64
	for _, r := range runs {
		l.committed.set(r.first, r.end)
		for at := r.first / leafBits; at <= (r.end-1)/leafBits; at++ {
			leaves = append(leaves, at)
		}
	}
	if err := l.committed.writeLeaves(l.Map, leaves); err != nil {
		l.putBack(runs)
		l.dirty.Store(true)
		return fmt.Errorf("map: %w", err)
	}
	if err := l.Map.Sync(); err != nil {
		return fmt.Errorf("%w: map: %w", blockdev.ErrFailed, err)
	}
	return nil
}

// grow makes the layer larger. The caller is alone.
func (l *layer) grow(size int64) error {
	if err := errors.Join(l.Data.Truncate(size), l.Map.Truncate(MapSize(size))); err != nil {
		return err
	}
	if err := l.Data.Sync(); err != nil {
		return fmt.Errorf("%w: data: %w", blockdev.ErrFailed, err)
	}
	if err := writeWhole(l.Map, header(size), 0); err != nil {
		return err
	}
	if err := l.Map.Sync(); err != nil {
		return fmt.Errorf("%w: map: %w", blockdev.ErrFailed, err)
	}
	l.valid.grow(blocksOf(size))
	l.committed.grow(blocksOf(size))
	l.size = size
	return nil
}
