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

// Witness is a File that tells by itself which blocks were written, whatever happens.
type Witness interface {
	File
	// Witnesses tells whether a block of this file is a hole until a write of all of it
	// is complete, and still is after a crash, and is none any more when Sync returns.
	Witnesses() bool
	// Written calls fn with the ranges between off and end, in bytes, that are no holes,
	// in order. It does not depend on Witnesses.
	Written(off, end int64, fn func(from, to int64)) error
}

// Files are those of one layer.
type Files struct{ Data, Map File }

// MapSize is how large the map of a volume of size bytes is, a 32,512th of it. A layer's
// map has its space from the beginning: a full pool cannot keep a Sync of blocks whose
// data has its space from succeeding, unless the filesystem writes nothing in place (btrfs).
func MapSize(size int64) int64 { return sectorAt(leavesFor(blocksOf(size))) }

func blocksOf(size int64) int64 { return (size + BlockSize - 1) / BlockSize }

// Create makes an empty layer for a volume of size bytes, a positive multiple of
// BlockSize, out of two empty files. Durable on return, the names of the files
// apart.
func Create(f Files, size int64) error {
	err := Make(f, size)
	if err == nil {
		err = f.Sync()
	}
	return blockdev.Op("overlay.Create", "", err)
}

// Make is Create, durable only when Sync has followed.
func Make(f Files, size int64) error { return blockdev.Op("overlay.Make", "", makeLayer(f, size)) }

func makeLayer(f Files, size int64) error {
	if err := checkSize(size); err != nil {
		return err
	}
	if err := f.truncate(size); err != nil {
		return err
	}
	return writeWhole(f.Map, header(size, false), 0)
}

// truncate makes both files fit a volume of size bytes. The map gets its space at once, as
// far as its filesystem can: a flush is not to fail for want of it when the data has got
// its own.
func (f Files) truncate(size int64) error {
	if err := errors.Join(f.Data.Truncate(size), f.Map.Truncate(MapSize(size))); err != nil {
		return err
	}
	a, ok := f.Map.(interface{ Allocate(size int64) error })
	if !ok {
		return nil
	}
	return a.Allocate(MapSize(size))
}

// Sync makes both files durable. blockdev.ErrFailed when it cannot.
func (f Files) Sync() error {
	data := make(chan error, 1)
	go func() { data <- f.Data.Sync() }() // they share a commit of the journal
	if err := errors.Join(f.Map.Sync(), <-data); err != nil {
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
	size    int64
	valid   *bitmap // blocks that are read from here
	witness bool    // the data tells by itself what was written
	sealed  bool    // it was the top once; set under the volume's gate

	commits   sync.Mutex // one at a time; guards what follows
	committed *bitmap    // blocks that the map file says are here, or is about to
	behind    bool       // the map file lacks some of committed: a write of it failed
	loose     bool       // the map file says, durably, that it may lack blocks that the data has
	broken    error      // a sync failed
	settled   []run      // durable in the data, not in the map

	mu      sync.Mutex
	pending []run // written since the last commit began, in the order of their ends
	holes   bool  // some of pending is held as a hole: only the map can tell
	dirty   atomic.Bool
	syncing atomic.Bool // a commit is under way that dirty does not tell of any more, or has failed
}

// settledMost bounds the runs of blocks that only the data tells of: what is to be
// found again when a layer is opened after a crash.
const settledMost = 4096

// run is the blocks from first to below end.
type run struct{ first, end int64 }

// openLayer opens a layer; of one that is to be the top nothing may be in the data
// that is not held when the map becomes loose.
func openLayer(f Files, top bool) (*layer, error) {
	m, err := loadMap(f.Map)
	if err != nil {
		return nil, err
	}
	if err := checkSize(m.size); err != nil {
		return nil, fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	l := &layer{Files: f, size: m.size, valid: m.bits, committed: m.bits.clone(), loose: m.loose}
	if w, ok := f.Data.(Witness); ok {
		l.witness = w.Witnesses()
	}
	if l.loose || top && l.witness {
		if err := l.adopt(run{0, blocksOf(l.size)}); err != nil {
			return nil, err
		}
	}
	if l.loose {
		l.settled, l.pending = l.pending, nil
		l.dirty.Store(false)
	}
	return l, nil
}

// adopt makes blocks valid that the data has and the map lacks.
func (l *layer) adopt(r run) error {
	w, ok := l.Data.(Witness)
	if !ok {
		return fmt.Errorf("%w: the map needs a file that tells what was written", blockdev.ErrInvalid)
	}
	return w.Written(r.first*BlockSize, min(r.end*BlockSize, l.size), func(from, to int64) {
		_ = l.fill(run{(from + BlockSize - 1) / BlockSize, to / BlockSize}, func(missing run) error {
			l.mark(missing.first, missing.end)
			return nil
		})
	})
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
func (l *layer) mark(first, end int64) { l.note(first, end, false) }

// markHoles makes blocks valid that are holes.
func (l *layer) markHoles(first, end int64) { l.note(first, end, true) }

func (l *layer) note(first, end int64, holes bool) {
	l.mu.Lock()
	if n := len(l.pending); n > 0 && l.pending[n-1].end == first {
		l.pending[n-1].end = end
	} else {
		l.pending = append(l.pending, run{first, end})
	}
	l.holes = l.holes || holes
	l.mu.Unlock()
	l.valid.set(first, end)
	l.dirty.Store(true)
}

// take begins a commit: what it gives has been written before.
func (l *layer) take() (runs []run, holes bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	runs, holes = l.pending, l.holes
	l.pending, l.holes = nil, false
	return runs, holes
}

func (l *layer) putBack(runs []run) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending, l.holes = append(runs, l.pending...), true
	l.dirty.Store(true)
}

// commit makes all durable that was written before it began. Where the data is a
// witness of it, that is one sync of the data; the map follows later, or when whole
// is asked for. blockdev.ErrFailed after a failed sync; any other error leaves what
// was to be written for the next commit.
func (l *layer) commit(whole bool) error {
	l.commits.Lock()
	defer l.commits.Unlock()
	return l.commitLocked(whole)
}

func (l *layer) commitLocked(whole bool) error {
	l.syncing.Store(true)
	l.dirty.Store(false) // a write that ends from here on sets it again
	err := l.sync(whole)
	l.syncing.Store(l.broken != nil)
	return err
}

func (l *layer) sync(whole bool) error {
	runs, holes := l.take()
	enough := len(runs) == 0 || l.witness && !holes && len(runs)+len(l.settled) <= settledMost
	if enough && !whole && !l.behind {
		return l.settle(runs)
	}
	if err := l.syncData(); err != nil {
		return err
	}
	runs = append(l.settled, runs...)
	l.settled = nil
	if len(runs) == 0 {
		return nil
	}
	if err := l.tellMap(runs); err != nil {
		l.putBack(runs)
		return err
	}
	l.behind = false
	return l.syncMap()
}

// finish is commit for a layer that nobody writes to any more; it does nothing where
// nothing is left to do.
func (l *layer) finish() error {
	if !l.dirty.Load() && !l.syncing.Load() {
		return nil
	}
	l.commits.Lock() // of a commit that is under way the end counts
	defer l.commits.Unlock()
	if l.broken != nil || !l.dirty.Load() {
		return l.broken
	}
	return l.commitLocked(false)
}

// tellMap writes to the map file that these blocks are held. The caller has commits.
func (l *layer) tellMap(runs []run) error {
	var leaves []int64
	for _, r := range runs {
		l.committed.set(r.first, r.end)
		for at := r.first / leafBits; at <= (r.end-1)/leafBits; at++ {
			leaves = append(leaves, at)
		}
	}
	if err := l.committed.writeLeaves(l.Map, leaves); err != nil {
		l.behind = true
		return fmt.Errorf("map: %w", err)
	}
	return nil
}

// tellHoles writes to the map that blocks are held as holes, which it alone can tell: a
// process that is killed may not take back zeroes that its guest believes in. Nothing is
// flushed for it. Should the map get to the disk before the punch, what is read is zero
// or what was written last: nothing else is in the data.
func (l *layer) tellHoles(r run) error {
	l.commits.Lock()
	defer l.commits.Unlock()
	var untold []run
	for first := r.first; first < r.end; {
		told, to := l.committed.run(first, r.end)
		if !told {
			untold = append(untold, run{first, to})
		}
		first = to
	}
	if len(untold) == 0 {
		return nil
	}
	return l.tellMap(untold)
}

// settle makes the data durable that these runs were written to, and that the map may
// lack them: which of the two is first does not matter, as long as nothing is acknowledged.
func (l *layer) settle(runs []run) error {
	if len(runs) > 0 && !l.loose {
		if err := l.sayLoose(true); err != nil {
			l.putBack(runs)
			return err
		}
		if l.broken = l.Files.Sync(); l.broken != nil {
			return l.broken
		}
		l.loose = true
	} else if err := l.syncData(); err != nil {
		return err
	}
	l.settled = append(l.settled, runs...)
	return nil
}

func (l *layer) sayLoose(loose bool) error {
	if err := writeWhole(l.Map, header(l.size, loose), 0); err != nil {
		return fmt.Errorf("map: %w", err)
	}
	return nil
}

// tighten makes the map whole and has it say so. Nobody writes meanwhile.
func (l *layer) tighten() error {
	l.commits.Lock()
	defer l.commits.Unlock()
	if l.dirty.Load() {
		if err := l.commitLocked(true); err != nil {
			return err
		}
	}
	if len(l.settled) > 0 {
		if err := l.tellMap(l.settled); err != nil {
			return err
		}
		if err := l.syncMap(); err != nil {
			return err
		}
		l.settled, l.behind = nil, false
	}
	if !l.loose {
		return nil
	}
	if err := l.sayLoose(false); err != nil {
		return err
	}
	if err := l.syncMap(); err != nil {
		return err
	}
	l.loose = false
	return nil
}

func (l *layer) syncData() error {
	if err := l.Data.Sync(); err != nil {
		l.broken = fmt.Errorf("%w: data: %w", blockdev.ErrFailed, err)
	}
	return l.broken
}

func (l *layer) syncMap() error {
	if err := l.Map.Sync(); err != nil {
		l.broken = fmt.Errorf("%w: map: %w", blockdev.ErrFailed, err)
	}
	return l.broken
}

// secure makes the map say which blocks of a run are held, before they become holes,
// of which the data tells nothing. The caller has the run locked alone.
func (l *layer) secure(r run) error {
	l.commits.Lock()
	defer l.commits.Unlock()
	if !l.witness && !l.loose || !l.behind && !l.valid.exceeds(l.committed, r.first, r.end) {
		return nil
	}
	return l.commitLocked(true)
}

// grow makes the layer larger. The caller is alone.
func (l *layer) grow(size int64) error {
	if err := l.Files.truncate(size); err != nil {
		return err
	}
	if err := l.Data.Sync(); err != nil {
		return fmt.Errorf("%w: data: %w", blockdev.ErrFailed, err)
	}
	if err := writeWhole(l.Map, header(size, l.loose), 0); err != nil {
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
