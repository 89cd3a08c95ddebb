package overlay_test

import (
	"errors"
	"io"
	"math/rand/v2"
	"sync"

	"holdfast/blockdev/serve/overlay"
)

var errCut = errors.New("the power is cut")

// disk is files with a cache that loses what was not synced: at a cut each sector
// that was written since the last sync of its file is old or new, by itself.
type disk struct {
	mu    sync.Mutex
	files []*diskFile
	ops   int // side effects so far
	cutAt int // the one before which the power goes; 0: never
	fail  int // the one that fails, once
	cut   bool
}

const sector = 512

type diskFile struct {
	d       *disk
	durable []byte
	cached  []byte
	dirty   map[int64]bool // sectors
	before  func()         // if set, called once before the next write or sync
}

// interrupt lets a test happen in the middle of something.
func (f *diskFile) interrupt() {
	if do := f.before; do != nil {
		f.before = nil
		do()
	}
}

func (d *disk) file() *diskFile {
	f := &diskFile{d: d, dirty: map[int64]bool{}}
	d.files = append(d.files, f)
	return f
}

func (d *disk) layer() overlay.Files { return overlay.Files{Data: d.file(), Map: d.file()} }

var errBroken = errors.New("the disk is broken")

// effect counts a side effect; it is called under mu.
func (d *disk) effect() error {
	d.ops++
	if d.cut || d.ops == d.cutAt {
		d.cut = true
		return errCut
	}
	if d.ops == d.fail {
		return errBroken
	}
	return nil
}

// restart gives the power back: what was in the cache is there or not, sector by sector.
func (d *disk) restart(r *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut, d.cutAt, d.fail = false, 0, 0
	for _, f := range d.files {
		if len(f.durable) < len(f.cached) {
			f.durable = append(f.durable, make([]byte, len(f.cached)-len(f.durable))...)
		}
		for s := range int64(len(f.cached)+sector-1) / sector {
			from, to := s*sector, min((s+1)*sector, int64(len(f.cached)))
			if f.dirty[s] && r.IntN(2) == 0 {
				copy(f.durable[from:to], f.cached[from:to])
			}
		}
		f.cached = append([]byte(nil), f.durable...)
		f.dirty = map[int64]bool{}
	}
}

func (f *diskFile) ReadAt(p []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.d.cut {
		return 0, errCut
	}
	if off >= int64(len(f.cached)) {
		return 0, io.EOF
	}
	n := copy(p, f.cached[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *diskFile) WriteAt(p []byte, off int64) (int, error) {
	f.interrupt()
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	// A write that is cut has got half-way, as far as the cache goes.
	half := len(p) / 2 / sector * sector
	if err := f.d.effect(); err != nil {
		f.put(p[:half], off)
		return half, err
	}
	f.put(p, off)
	return len(p), nil
}

func (f *diskFile) put(p []byte, off int64) {
	if end := off + int64(len(p)); end > int64(len(f.cached)) {
		f.cached = append(f.cached, make([]byte, end-int64(len(f.cached)))...)
	}
	copy(f.cached[off:], p)
	for s := off / sector; s < (off+int64(len(p))+sector-1)/sector; s++ {
		f.dirty[s] = true
	}
}

func (f *diskFile) Punch(off, n int64) error {
	_, err := f.WriteAt(make([]byte, n), off)
	return err
}

func (f *diskFile) Truncate(size int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.effect(); err != nil {
		return err
	}
	if size > int64(len(f.cached)) {
		f.cached = append(f.cached, make([]byte, size-int64(len(f.cached)))...)
	}
	f.cached = f.cached[:size]
	return nil
}

func (f *diskFile) Sync() error {
	f.interrupt()
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.effect(); err != nil {
		return err
	}
	f.durable = append(f.durable[:0], f.cached...)
	f.dirty = map[int64]bool{}
	return nil
}
