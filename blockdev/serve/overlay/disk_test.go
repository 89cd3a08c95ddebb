package overlay_test

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
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

	witness bool // the holes of layers' data tell what was written, as in overlay.Witness
	shares  bool // files can share bytes, as in overlay.Sharer
}

const sector = 512

type diskFile struct {
	d       *disk
	durable []byte
	cached  []byte
	dirty   map[int64]bool // sectors
	blocks  bool           // a write that fails leaves each block of 4 KiB as it was, or has written it
	before  func()         // if set, called once before the next write or sync

	// Of a witness: by block, whether it is data now, and what it has been since the
	// last sync of its file; the first is what is durable.
	witness bool
	data    map[int64]bool // of others, too
	past    map[int64][]blockState
}

// blockState is a block at the moment at which it became data, or a hole (nil).
type blockState []byte

// interrupt lets a test happen in the middle of something.
func (f *diskFile) interrupt() {
	if do := f.before; do != nil {
		f.before = nil
		do()
	}
}

func (d *disk) file() *diskFile {
	f := &diskFile{d: d, dirty: map[int64]bool{}, data: map[int64]bool{}, past: map[int64][]blockState{}}
	d.files = append(d.files, f)
	return f
}

func (d *disk) layer() overlay.Files {
	data := d.file()
	data.witness, data.blocks = d.witness, true
	return overlay.Files{Data: data, Map: d.file()}
}

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
		for _, b := range slices.Sorted(maps.Keys(f.past)) {
			f.settleBlock(b, r)
		}
		f.cached = append([]byte(nil), f.durable...)
		for b := range f.data {
			if !f.witness {
				one := f.cached[b*block : min((b+1)*block, int64(len(f.cached)))]
				f.data[b] = !bytes.Equal(one, make([]byte, len(one))) || f.data[b] && r.IntN(2) == 0
			}
		}
		f.dirty, f.past = map[int64]bool{}, map[int64][]blockState{}
	}
}

// settleBlock decides which of the states of a witness's block the journal has kept:
// of data all that was there when it became data, and any later sector or not.
func (f *diskFile) settleBlock(b int64, r *rand.Rand) {
	n := r.IntN(len(f.past[b]))
	durable, state := f.durable[b*block:(b+1)*block], f.past[b][n]
	f.data[b] = state != nil
	if state == nil {
		clear(durable)
		return
	}
	for s := 0; s < block; s += sector {
		if n < len(f.past[b])-1 || r.IntN(2) == 0 {
			copy(durable[s:s+sector], state[s:s+sector])
		} else {
			copy(durable[s:s+sector], f.cached[b*block+int64(s):])
		}
	}
}

// become notes that a block is data or a hole from now on.
func (f *diskFile) become(b int64, data bool) {
	if f.data[b] == data || !f.witness {
		f.data[b] = data
		return
	}
	if len(f.past[b]) == 0 {
		f.past[b] = []blockState{f.state(b, f.durable)}
	}
	f.data[b] = data
	f.past[b] = append(f.past[b], f.state(b, f.cached))
}

func (f *diskFile) state(b int64, from []byte) blockState {
	if !f.data[b] {
		return nil
	}
	return slices.Clone(from[b*block : (b+1)*block])
}

// Witnesses and Written implement overlay.Witness.
func (f *diskFile) Witnesses() bool { return f.witness }

func (f *diskFile) Written(off, end int64, fn func(from, to int64)) error {
	f.d.mu.Lock()
	blocks := slices.Sorted(maps.Keys(f.data))
	blocks = slices.DeleteFunc(blocks, func(b int64) bool { return !f.data[b] || b*block < off || b*block >= end })
	f.d.mu.Unlock()
	for _, b := range blocks {
		fn(b*block, (b+1)*block)
	}
	return nil
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
	if f.blocks {
		half = max(0, int((off+int64(half))/block*block-off))
	}
	if err := f.d.effect(); err != nil {
		f.put(p[:half], off)
		return half, err
	}
	f.put(p, off)
	return len(p), nil
}

func (f *diskFile) put(p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	if end := off + int64(len(p)); end > int64(len(f.cached)) {
		f.cached = append(f.cached, make([]byte, end-int64(len(f.cached)))...)
	}
	copy(f.cached[off:], p)
	for s := off / sector; s < (off+int64(len(p))+sector-1)/sector; s++ {
		f.dirty[s] = true
	}
	for b := off / block; b*block < off+int64(len(p)); b++ {
		f.become(b, true)
	}
}

func (f *diskFile) Punch(off, n int64) error {
	if f.witness {
		return f.punch(off, n)
	}
	_, err := f.WriteAt(make([]byte, n), off)
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	for b := (off + block - 1) / block; err == nil && (b+1)*block <= off+n; b++ {
		f.become(b, false)
	}
	return err
}

func (f *diskFile) punch(off, n int64) error {
	f.interrupt()
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	err := f.d.effect()
	end := off + n
	if err != nil {
		end = off + n/2/block*block // it has got half-way
	}
	for b := off / block; (b+1)*block <= end; b++ {
		f.become(b, false)
		clear(f.cached[b*block : (b+1)*block])
	}
	return err
}

// Extent implements overlay.Extenter, as far as the journal keeps the holes.
func (f *diskFile) Extent(off, limit int64) (length int64, hole bool, err error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	hole = f.witness && !f.data[off/block]
	for b := off / block; b*block < off+limit && (f.witness && !f.data[b]) == hole; b++ {
		length = min((b+1)*block-off, limit)
	}
	return length, hole, nil
}

// ShareInto implements overlay.Sharer.
func (f *diskFile) ShareInto(dst overlay.File, off, n int64) error {
	f.d.mu.Lock()
	p := make([]byte, n)
	copy(p, f.cached[min(off, int64(len(f.cached))):])
	hole := func(b int64) bool { return f.witness && !f.data[b] }
	f.d.mu.Unlock()
	return dst.(*diskFile).takeIn(p, off, hole) //nolint:forcetypeassert // there is no other
}

// takeIn makes blocks those of another file, each whole or not at all where the journal
// keeps the holes.
func (f *diskFile) takeIn(p []byte, off int64, hole func(b int64) bool) error {
	if !f.d.shares {
		return errors.ErrUnsupported
	}
	f.interrupt()
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	err := f.d.effect()
	if err != nil {
		p = p[:len(p)/2/block*block] // it has got half-way
	}
	for ; len(p) > 0; p, off = p[block:], off+block {
		if f.witness && hole(off/block) {
			f.become(off/block, false)
			clear(f.cached[off : off+block])
			continue
		}
		f.put(p[:block], off)
	}
	return err
}

// lent is a base on the disk that the layers are on.
type lent struct{ memory }

func (l lent) ShareInto(dst overlay.File, off, n int64) error {
	return dst.(*diskFile).takeIn(l.memory[off:off+n], off, func(int64) bool { return false }) //nolint:forcetypeassert // there is no other
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
	f.dirty, f.past = map[int64]bool{}, map[int64][]blockState{}
	return nil
}
