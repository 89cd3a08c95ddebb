package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

const block = overlay.BlockSize

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// memory is a base in memory.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) Size() int64                             { return int64(len(m)) }

// Next finds the next block that is not zero.
func (m memory) Next(off int64) (from, to int64, err error) {
	for ; off < int64(len(m)); off += block {
		end := min(off+block, int64(len(m)))
		if !bytes.Equal(m[off:end], make([]byte, end-off)) {
			return off, end, nil
		}
	}
	return 0, 0, io.EOF
}

// someBase has data and holes, and ends in the middle of a block.
func someBase(r *rand.Rand, blocks int) memory {
	m := make(memory, blocks*block-1536)
	for b := range blocks - 1 {
		if r.IntN(3) > 0 {
			fill(r, m[b*block:(b+1)*block])
		}
	}
	fill(r, m[(blocks-1)*block:])
	return m
}

func fill(r *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(r.Uint32()) | 1 // never zero
	}
}

// model is what a volume may read as: for each sector the flushed bytes, and those
// of every later write.
type model struct {
	now     []byte
	flushed []byte
	later   map[int64][][]byte // by sector
}

func newModel(base []byte, size int64) *model {
	m := &model{now: make([]byte, size), later: map[int64][][]byte{}}
	copy(m.now, base)
	m.flushed = slices.Clone(m.now)
	return m
}

// wrote notes a write that was acknowledged; tried notes one that was not: it may
// have happened in part.
func (m *model) wrote(p []byte, off int64) { m.tried(p, off); copy(m.now[off:], p) }

func (m *model) tried(p []byte, off int64) {
	for at := off; at < off+int64(len(p)); at += sector {
		m.later[at/sector] = append(m.later[at/sector], slices.Clone(p[at-off:at-off+sector]))
	}
}

func (m *model) flush() { m.flushed = slices.Clone(m.now); m.later = map[int64][][]byte{} }

// check compares after a crash.
func (m *model) check(t *testing.T, v *overlay.Overlay) {
	t.Helper()
	got := make([]byte, v.Size())
	_, err := v.ReadAt(got, 0)
	must(t, err)
	for at := int64(0); at < int64(len(m.flushed)); at += sector {
		s := got[at : at+sector]
		if bytes.Equal(s, m.flushed[at:at+sector]) || slices.ContainsFunc(m.later[at/sector], func(w []byte) bool { return bytes.Equal(w, s) }) {
			continue
		}
		t.Fatalf("sector %d reads as %x…: neither what was flushed (%x…) nor one of %d later writes", at/sector, s[:8], m.flushed[at:at+8], len(m.later[at/sector]))
	}
}

func (m *model) same(t *testing.T, v io.ReaderAt) {
	t.Helper()
	got := make([]byte, len(m.now))
	_, err := v.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, m.now) {
		at := 0
		for got[at] == m.now[at] {
			at++
		}
		t.Fatalf("differs from byte %d on: %x, want %x", at, got[at:at+4], m.now[at:at+4])
	}
}

// life is a volume, what it lies on and what it should read as.
type life struct {
	t     *testing.T
	d     *disk
	v     *overlay.Overlay
	base  memory
	m     *model
	stack []overlay.Files // as recorded durably
	snaps map[int][]byte  // what the layers below the top read as, by how many there are
}

func newLife(t *testing.T, base memory, size int64) *life { return newLifeOn(t, &disk{}, base, size) }

func newLifeOn(t *testing.T, d *disk, base memory, size int64) *life {
	l := &life{t: t, d: d, base: base, m: newModel(base, size), snaps: map[int][]byte{}}
	top := l.d.layer()
	must(t, overlay.Create(top, size))
	l.stack = []overlay.Files{top}
	l.open()
	return l
}

// reopen opens it as whoever finds that it is open and that nobody serves it.
func (l *life) reopen(killed bool) {
	l.t.Helper()
	for _, f := range l.stack[:min(len(l.stack), 2)] {
		must(l.t, overlay.Recover(f, killed))
	}
	l.open()
}

func (l *life) open() {
	l.t.Helper()
	var err error
	l.v, err = overlay.Open(l.stack, lent{l.base})
	must(l.t, err)
}

// one does one random thing and returns its error.
func (l *life) one(r *rand.Rand) error {
	size := l.v.Size()
	span := func(most int64) (off, n int64) {
		n = (1 + r.Int64N(most/sector)) * sector
		return r.Int64N((size-n)/sector+1) * sector, n
	}
	switch r.IntN(12) {
	case 0, 1:
		err := l.v.Sync()
		if err == nil {
			l.m.flush()
		}
		return err
	case 2:
		off, n := span(6 * block)
		err := l.v.Zero(off, n, true)
		if err == nil {
			l.m.wrote(make([]byte, n), off)
		} else {
			l.m.tried(make([]byte, n), off)
		}
		return err
	case 3:
		return l.seal(r.IntN(2) == 0)
	case 4:
		return l.merge(r, false)
	case 5:
		h := overlay.NewHydrator(l.v, nil, []int64{0, -1, 99})
		err := h.Run(l.t.Context())
		if errors.Is(err, blockdev.ErrBusy) && len(l.stack) > 1 {
			return nil
		}
		if err == nil {
			l.m.flush()
		}
		return err
	default:
		off, n := span(4 * block)
		if r.IntN(3) == 0 { // whole blocks
			off, n = off/block*block, block
		}
		p := make([]byte, n)
		fill(r, p)
		_, err := l.v.WriteAt(p, off)
		if err == nil {
			l.m.wrote(p, off)
		} else {
			l.m.tried(p, off)
		}
		return err
	}
}

// seal leaves a sealed layer's map loose, or not.
func (l *life) seal(tighten bool) error {
	if len(l.stack) > 3 {
		return nil
	}
	top := l.d.layer()
	if err := overlay.Make(top, l.v.Size()); err != nil {
		return err
	}
	before := slices.Clone(l.m.now)
	err := l.v.Seal(top, func() error {
		if err := top.Sync(); err != nil {
			return err
		}
		l.stack = slices.Insert(slices.Clone(l.stack), 0, top)
		return nil
	})
	if err != nil {
		return err
	}
	l.snaps[len(l.stack)-1] = before
	l.m.flush() // all before it is durable
	if tighten {
		return l.v.Tighten()
	}
	return nil
}

// merge makes one layer of two, upwards or downwards, in steps, perhaps not to the end.
// The top of a volume that is live stays.
func (l *life) merge(r *rand.Rand, live bool) error {
	if len(l.stack) < 2 {
		return nil
	}
	i := r.IntN(len(l.stack) - 1)
	m := overlay.Merge{Layer: i, Most: r.Int64N(3) * overlay.ShareCost}
	gone := len(l.stack) - 1 - i // the snapshot that the lower one was the top of
	out := i + 1
	if r.IntN(2) == 0 && !(live && i == 0) {
		m.Into, out = &l.stack[i+1], i
		m.Most *= int64(min(i, 1))
		delete(l.snaps, gone)
	}
	for {
		done, _, err := l.v.Merge(l.t.Context(), m, func() error { return l.merged(out, gone) })
		if done || err != nil || r.IntN(4) == 0 {
			return err
		}
	}
}

// merged records a stack without a layer.
func (l *life) merged(out, gone int) error {
	l.stack = slices.Delete(slices.Clone(l.stack), out, out+1)
	// The snapshot is gone, those above it move down.
	delete(l.snaps, gone)
	moved := map[int][]byte{}
	for n, snap := range l.snaps {
		if n > gone {
			n--
		}
		moved[n] = snap
	}
	l.snaps = moved
	return nil
}

// snapshots compares each snapshot with what the volume was when it was made.
func (l *life) snapshots() {
	l.t.Helper()
	for n, want := range l.snaps {
		snap, err := overlay.Open(l.stack[len(l.stack)-n:], lent{l.base})
		must(l.t, err)
		got := make([]byte, len(want))
		_, err = snap.ReadAt(got, 0)
		must(l.t, err)
		if !bytes.Equal(got, want) {
			l.t.Fatalf("a snapshot below %d layers has changed", len(l.stack)-n)
		}
	}
}

const steps = 40

// TestEveryCut cuts the power before each side effect of many lives.
func TestEveryCut(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			for cut := 1; ; cut++ {
				r := rand.New(rand.NewPCG(seed, 1))
				l := newLifeOn(t, &disk{witness: seed%2 == 1, shares: seed%4 >= 2}, someBase(r, 10), 16*block)
				l.d.cutAt = l.d.ops + cut
				var err error
				for n := 0; n < steps && err == nil; n++ {
					err = l.one(r)
				}
				if err == nil {
					l.m.same(t, l.v)
					l.snapshots()
					return // past the last one
				}
				l.d.restart(rand.New(rand.NewPCG(seed, uint64(cut))))
				l.reopen(false)
				l.m.check(t, l.v)
				l.snapshots()
				// It lives on: what it reads as now stays.
				_, err = l.v.ReadAt(l.m.now, 0)
				must(t, err)
				if cut%2 == 0 { // for a short life
					l.reopen(true)
					l.m.same(t, l.v)
				}
				must(t, l.v.Sync())
				l.m.flush()
				if len(l.stack) == 1 { // nothing comes up of what was never finished
					must(t, overlay.NewHydrator(l.v, nil, nil).Run(t.Context()))
					l.m.same(t, l.v)
				}
				for range 10 {
					must(t, l.one(r))
				}
				l.m.same(t, l.v)
			}
		})
	}
}

// TestEveryFailure has each side effect fail once. Whatever was answered with
// success holds, and after a failed sync nothing is.
func TestEveryFailure(t *testing.T) {
	for seed := range uint64(10) {
		for fail := 1; ; fail++ {
			r := rand.New(rand.NewPCG(seed, 2))
			l := newLifeOn(t, &disk{witness: seed%2 == 1, shares: seed%4 >= 2}, someBase(r, 10), 16*block)
			l.d.fail = l.d.ops + fail
			var err error
			n := 0
			for ; n < steps && err == nil; n++ {
				err = l.one(r)
			}
			if n == steps && err == nil {
				break
			}
			if l.v.Failed() != nil {
				if err := l.v.Sync(); !errors.Is(err, blockdev.ErrFailed) {
					t.Fatalf("a flush after a failed sync: %v", err)
				}
				if _, err := l.v.WriteAt(make([]byte, block), 0); !errors.Is(err, blockdev.ErrFailed) {
					t.Fatalf("a write after a failed sync: %v", err)
				}
			} else {
				must(t, l.v.Sync())
				_, err = l.v.ReadAt(l.m.now, 0)
				must(t, err)
				l.m.check(t, l.v)
				l.m.flush()
			}
			l.d.restart(rand.New(rand.NewPCG(seed, uint64(fail))))
			l.open()
			l.m.check(t, l.v)
			l.snapshots()
		}
	}
}

// TestFeet: readers, writers of halves of one block, hydration, seals and absorbs
// at once.
func TestFeet(t *testing.T) {
	const writers, rounds = 8, 200
	r := rand.New(rand.NewPCG(1, 1))
	l := newLife(t, someBase(r, 200), 256*block)
	ctx, cancel := context.WithCancel(t.Context())
	var work, moving sync.WaitGroup
	turns := rand.New(rand.NewPCG(3, 3))
	moving.Go(func() {
		for ctx.Err() == nil {
			if err := errors.Join(l.seal(true), l.seal(false), l.merge(turns, true)); err != nil {
				t.Error(err)
				return
			}
			if err := overlay.NewHydrator(l.v, nil, nil).Run(ctx); err != nil && !errors.Is(err, blockdev.ErrBusy) && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	// Writer w owns the sectors s with s % writers == w.
	want := slices.Clone(l.m.now)
	for w := range int64(writers) {
		r := rand.New(rand.NewPCG(7, uint64(w)))
		work.Go(func() {
			got := make([]byte, sector)
			for range rounds {
				at := (r.Int64N(256*block/sector/writers)*writers + w) * sector
				fill(r, want[at:at+sector])
				if _, err := l.v.WriteAt(want[at:at+sector], at); err != nil {
					t.Error(err)
				}
				if _, err := l.v.ReadAt(got, at); err != nil || !bytes.Equal(got, want[at:at+sector]) {
					t.Errorf("sector %d does not read as written: %v", at/sector, err)
				}
				if r.IntN(20) == 0 {
					if err := l.v.Sync(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	work.Wait()
	cancel()
	moving.Wait()
	copy(l.m.now, want)
	l.m.same(t, l.v)
	must(t, l.v.Sync())
	l.m.flush()
	l.d.restart(r)
	l.open()
	l.m.check(t, l.v)
}

func TestGrow(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 9))
	l := newLife(t, someBase(r, 6), 8*block)
	must(t, l.seal(false))
	for _, size := range []int64{16 * block, 16 * block, 8 * block, 5000 * block} {
		must(t, l.v.Grow(size))
		for int64(len(l.m.now)) < size {
			l.m.now = append(l.m.now, 0)
		}
		l.m.same(t, l.v)
	}
	p := make([]byte, 3*block)
	fill(r, p)
	_, err := l.v.WriteAt(p, 4996*block-sector)
	must(t, err)
	l.m.wrote(p, 4996*block-sector)
	must(t, l.v.Sync())
	l.d.restart(r)
	l.open()
	l.m.same(t, l.v)
	for _, bad := range []int64{0, -block, block + 1, 1 << 62} {
		if err := l.v.Grow(bad); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("grow to %d: %v", bad, err)
		}
	}
	if _, err := l.v.ReadAt(make([]byte, block), 5000*block-1); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a read past the end: %v", err)
	}
	if _, err := l.v.WriteAt(make([]byte, block), -1); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a write before the beginning: %v", err)
	}
}

// TestRecordComesFirst: until the new stack is recorded all goes to the old top, as
// ever; whoever opens either stack finds it, flushed or not.
func TestRecordComesFirst(t *testing.T) {
	for _, witness := range []bool{true, false} {
		l := newLifeOn(t, &disk{witness: witness}, someBase(rand.New(rand.NewPCG(1, 5)), 10), 16*block)
		old := l.stack
		top := l.d.layer()
		must(t, overlay.Make(top, l.v.Size()))
		put := func(fill byte, at int64) {
			p := bytes.Repeat([]byte{fill}, block)
			_, err := l.v.WriteAt(p, at*block)
			must(t, err)
			l.m.wrote(p, at*block)
		}
		put(7, 3)
		must(t, l.v.Seal(top, func() error {
			l.stack = []overlay.Files{top, old[0]}
			must(t, l.stack[0].Sync())
			found := func() { // by whoever comes when this process is killed
				must(t, overlay.Recover(old[0], true))
				v, err := overlay.Open(l.stack, l.base)
				must(t, err)
				l.m.same(t, v)
			}
			put(8, 4)
			found()
			must(t, l.v.Sync()) // it does not wait
			put(9, 5)
			found()
			return nil
		}))
		l.m.flush()
		if l.v.Layers() != 2 {
			t.Errorf("%d layers", l.v.Layers())
		}
		put(10, 3)
		l.d.restart(rand.New(rand.NewPCG(2, 5)))
		l.open()
		l.m.check(t, l.v)
	}
}

// TestSealThatIsNotRecorded: the volume goes on as it was, unless nobody knows what is
// recorded.
func TestSealThatIsNotRecorded(t *testing.T) {
	l := newLife(t, nil, 16*block)
	next := func() overlay.Files {
		top := l.d.layer()
		must(t, overlay.Create(top, l.v.Size()))
		return top
	}
	if err := l.v.Seal(next(), func() error { return errBroken }); !errors.Is(err, errBroken) || errors.Is(err, blockdev.ErrFailed) {
		t.Errorf("a stack that is not recorded: %v", err)
	}
	for range 10 {
		must(t, l.one(rand.New(rand.NewPCG(4, 4))))
	}
	must(t, l.v.Sync())
	l.m.flush()
	l.d.restart(rand.New(rand.NewPCG(2, 5)))
	l.open()
	l.m.same(t, l.v)
	if err := l.v.Seal(next(), func() error { return fmt.Errorf("%w: %w", blockdev.ErrFailed, errBroken) }); !errors.Is(err, blockdev.ErrFailed) {
		t.Errorf("a stack of which nobody knows: %v", err)
	}
	if err := l.v.Sync(); !errors.Is(err, blockdev.ErrFailed) {
		t.Errorf("a flush after it: %v", err)
	}
}

// TestSealTakesAllBefore: a write that ends while a seal flushes and records belongs to the snapshot, durably.
func TestSealTakesAllBefore(t *testing.T) {
	l := newLife(t, someBase(rand.New(rand.NewPCG(1, 5)), 10), 16*block)
	p := bytes.Repeat([]byte{9}, block)
	_, err := l.v.WriteAt(p, 0)
	must(t, err)
	l.m.wrote(p, 0)
	top := l.d.layer()
	must(t, overlay.Create(top, l.v.Size()))
	must(t, l.v.Seal(top, func() error {
		_, err := l.v.WriteAt(p, 12*block)
		l.m.wrote(p, 12*block)
		return err
	}))
	l.d.mu.Lock() // nothing of the caches survives
	for _, f := range l.d.files {
		f.cached, f.dirty = slices.Clone(f.durable), map[int64]bool{}
	}
	l.d.mu.Unlock()
	l.open()
	l.m.same(t, l.v)
}

// TestWriterBeatsHydration: a block that is written while it is copied from the
// base reads as written.
func TestWriterBeatsHydration(t *testing.T) {
	l := newLife(t, someBase(rand.New(rand.NewPCG(1, 6)), 10), 16*block)
	p := bytes.Repeat([]byte{6}, block)
	done := make(chan error)
	l.stack[0].Data.(*diskFile).before = func() {
		running := make(chan struct{})
		go func() {
			close(running)
			for at := int64(0); at < 10*block; at += block {
				if _, err := l.v.WriteAt(p, at); err != nil {
					done <- err
					return
				}
			}
			close(done)
		}()
		<-running
		for range 10_000 { // where nothing holds it back the writer is through by then
			runtime.Gosched()
		}
	}
	must(t, overlay.NewHydrator(l.v, nil, nil).Run(t.Context()))
	must(t, <-done)
	copy(l.m.now, bytes.Repeat(p, 10))
	l.m.same(t, l.v)
}

// TestDirect: what is in one file can be had without the overlay.
func TestDirect(t *testing.T) {
	l := newLife(t, someBase(rand.New(rand.NewPCG(1, 4)), 10), 16*block)
	if _, ok := l.v.Begin(0, block); ok {
		t.Error("a block of the base is had directly")
	}
	p := bytes.Repeat([]byte{7}, 2*block)
	_, err := l.v.WriteAt(p, block)
	must(t, err)
	f, first, ok := l.v.BeginWrite(block+sector, block)
	if !ok || first {
		t.Fatal("blocks of the top cannot be had directly")
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{8}, block), block+sector)
	l.v.EndWrite(block+sector, block, first, err == nil)
	must(t, err)
	if _, ok := l.v.Begin(2*block, 2*block); ok {
		t.Error("the top's and the base's are had from one file")
	}
	copy(p[sector:], bytes.Repeat([]byte{8}, block))
	l.m.wrote(p, block)
	must(t, l.v.Sync())
	l.m.flush()
	must(t, l.seal(false))
	f, ok = l.v.Begin(block+sector, block)
	if !ok {
		t.Fatal("blocks of a sealed layer cannot be had directly")
	}
	got := make([]byte, block)
	_, err = f.ReadAt(got, block+sector)
	l.v.End()
	must(t, err)
	if !bytes.Equal(got, bytes.Repeat([]byte{8}, block)) {
		t.Error("a sealed layer's are not what was written")
	}
	if _, first, ok := l.v.BeginWrite(block, block); !ok || !first {
		t.Error("a block of a sealed layer is not new to the top")
	} else {
		l.v.EndWrite(block, block, first, false)
	}
	l.d.restart(rand.New(rand.NewPCG(2, 4)))
	l.open()
	l.m.same(t, l.v)
}

// TestDamage: a map that is none is told, whatever it holds.
func TestDamage(t *testing.T) {
	l := newLife(t, nil, 5000*block)
	_, err := l.v.WriteAt(make([]byte, block), 4500*block)
	must(t, err)
	must(t, l.v.Sync())
	m := l.stack[0].Map.(*diskFile)
	for at := range len(m.cached) {
		if at/sector == 1 { // a sector of zeroes is one
			continue
		}
		m.cached[at] ^= 0x10
		if _, err := overlay.Open(l.stack, nil); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Fatalf("byte %d is damaged: %v", at, err)
		}
		m.cached[at] ^= 0x10
	}
}

func (m *model) copied() *model {
	c := &model{now: slices.Clone(m.now), flushed: slices.Clone(m.flushed), later: map[int64][][]byte{}}
	for at, writes := range m.later {
		c.later[at] = slices.Clone(writes)
	}
	return c
}
