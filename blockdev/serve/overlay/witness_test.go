package overlay_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/powercut"
	"holdfast/internal/sys"
)

// TestOneSync: a flush of first writes is one sync of the data where that is a
// witness, two of both files elsewhere, and a discard makes it both once.
func TestOneSync(t *testing.T) {
	for _, witness := range []bool{true, false} {
		l := newLifeOn(t, &disk{witness: witness}, someBase(rand.New(rand.NewPCG(2, 2)), 10), 64*block)
		cost := func(do func() error) int {
			t.Helper()
			must(t, do())
			before := l.d.ops
			must(t, l.v.Sync())
			return l.d.ops - before
		}
		write := func(b int64) func() error {
			return func() error {
				_, err := l.v.WriteAt(bytes.Repeat([]byte{1}, block), b*block)
				return err
			}
		}
		cost(write(1)) // the map is loose from now on
		want := 3      // data, a sector of the map, map
		if witness {
			want = 1
		}
		if got := cost(write(3)); got != want {
			t.Errorf("witness %v: a flush of a first write has %d side effects", witness, got)
		}
		if got := cost(write(3)); got != 1 {
			t.Errorf("witness %v: a flush of a rewrite has %d side effects", witness, got)
		}
		if got := cost(func() error { return l.v.Discard(20*block, block) }); got != 3 {
			t.Errorf("witness %v: a flush of a discard has %d side effects", witness, got)
		}
		must(t, l.v.Close())
		if _, held, err := overlay.Survey(l.stack[0].Map); err != nil || held != 3*block {
			t.Errorf("witness %v: closed its map tells of %d bytes, %v", witness, held, err)
		}
	}
}

// TestSealIsConstant: what a seal does does not depend on how much there is, in how
// many pieces.
func TestSealIsConstant(t *testing.T) {
	ops := map[int64]int{}
	for _, pieces := range []int64{10, 5000} {
		const leaf = 4064 * block
		l := newLifeOn(t, &disk{witness: true}, nil, 3*leaf)
		for i := range pieces {
			_, err := l.v.WriteAt(bytes.Repeat([]byte{1}, block), 2*i*block)
			must(t, err)
		}
		must(t, l.v.Close()) // nothing is left to do
		_, err := l.v.WriteAt(bytes.Repeat([]byte{1}, block), 3*leaf-block)
		must(t, errors.Join(err, l.v.Sync()))
		_, err = l.v.WriteAt(bytes.Repeat([]byte{1}, block), 3*leaf-2*block)
		must(t, err)
		top := l.d.layer()
		must(t, overlay.Create(top, l.v.Size()))
		before := l.d.ops
		must(t, l.v.Seal(top, func() error { return nil }))
		ops[pieces] = l.d.ops - before
	}
	if ops[10] != ops[5000] || ops[10] > 10 {
		t.Errorf("side effects by pieces: %v", ops)
	}
}

// TestWitnesses: ext4 and XFS tell what was written past the page cache, also beside
// space that is only allocated, and are believed; what goes through the cache, or
// lies on another filesystem, is not.
func TestWitnesses(t *testing.T) {
	f := files(t, "top", syscall.O_DIRECT).Data.(overlay.OSFile)
	kind, err := sys.FilesystemMagic(f.File)
	must(t, err)
	if !f.Witnesses() {
		t.Skipf("the tests' directory is on a filesystem of type %#x", kind)
	}
	if files(t, "cached", 0).Data.(overlay.OSFile).Witnesses() {
		t.Error("a file that is written through the page cache is a witness")
	}
	must(t, f.Truncate(1<<30))
	must(t, sys.Allocate(f.File, 512<<20, 1<<20))
	want := map[int64]bool{}
	p := directBuffer(block)
	for _, b := range []int64{0, 2, 1000, 512<<20/block + 7, 1<<30/block - 1} {
		fill(rand.New(rand.NewPCG(1, 1)), p)
		_, err := f.WriteAt(p, b*block)
		must(t, err)
		want[b] = true
	}
	_, err = f.ReadAt(directBuffer(1<<20), 512<<20)
	must(t, err)
	must(t, f.Written(0, 1<<30, func(from, to int64) {
		for ; from < to; from += block {
			if !want[from/block] {
				t.Errorf("block %d was not written", from/block)
			}
			delete(want, from/block)
		}
	}))
	if len(want) > 0 {
		t.Errorf("blocks that were written and are not told: %v", want)
	}
	memory := t.TempDir()
	must(t, syscall.Mount("none", memory, "tmpfs", 0, "size=1m"))
	defer func() { must(t, syscall.Unmount(memory, syscall.MNT_DETACH)) }()
	m, err := os.OpenFile(filepath.Join(memory, "top"), os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	must(t, err)
	defer m.Close()
	if (overlay.OSFile{File: m}).Witnesses() {
		t.Error("a file in memory is a witness")
	}
}

// TestWitnessPowerCut writes, flushes, discards, seals, merges and hydrates on XFS, where
// blocks are shared for that, and on ext4, where they are copied, while the power is cut
// under it: what was flushed by each moment is there, and no block of the base over it.
func TestWitnessPowerCut(t *testing.T) {
	for name, start := range map[string]func(testing.TB, int64) *powercut.Rig{"xfs": powercut.Start, "ext4": powercut.StartExt4} {
		t.Run(name, func(t *testing.T) { cutWitness(t, start(t, 512<<20)) })
	}
}

const cutBlocks = 2048

// cutLife is a volume on a disk whose power is cut.
type cutLife struct {
	t      *testing.T
	rig    *powercut.Rig
	r      *rand.Rand
	v      *overlay.Overlay
	m      *model
	opened []*os.File
	acks   []cutAck
	stacks []cutStack
}

type cutAck struct {
	at    powercut.Moment
	state model
}

// cutStack is what was recorded durably at a moment.
type cutStack struct {
	at    powercut.Moment
	stack []string
}

func cutWitness(t *testing.T, rig *powercut.Rig) {
	l := &cutLife{t: t, rig: rig, r: rand.New(rand.NewPCG(4, 7))}
	t.Cleanup(l.shut) // before the rig unmounts, however this ends
	base := someBase(l.r, cutBlocks)
	must(t, os.WriteFile(filepath.Join(rig.Dir, "base"), base, 0o600))
	f := l.openFile(rig.Dir, "base", os.O_RDWR)
	must(t, f.Sync())
	top := l.newLayer("top")
	if !top.Data.(overlay.OSFile).Witnesses() {
		t.Fatal("the rig's filesystem is no witness: nothing of this would be tried")
	}
	var err error
	l.v, err = overlay.Open([]overlay.Files{top}, overlay.NewImage(f, base.Size()))
	must(t, err)
	l.m = newModel(base, cutBlocks*block)
	must(t, l.record([]string{"top"}))
	l.acks = []cutAck{{at: rig.Mark(), state: *l.m.copied()}}
	for round := range 60 {
		l.change(l.r)
		l.acks[len(l.acks)-1].state = *l.m.copied() // with all that may have happened until the next flush
		switch round {
		case 15:
			next := l.newLayer("next")
			must(t, l.v.Seal(next, func() error { return l.record([]string{"next", "top"}) }))
		case 25:
			last := l.newLayer("last")
			must(t, l.v.Seal(last, func() error { return l.record([]string{"last", "next", "top"}) }))
		case 35:
			down := overlay.Merge{Layer: 1, Into: &top}
			_, _, err := l.v.Merge(t.Context(), down, func() error { return l.record([]string{"last", "top"}) })
			must(t, errors.Join(err, l.v.Sync())) // it is below the top
		case 45:
			must(t, l.v.Absorb(t.Context(), 0, func() error { return l.record([]string{"last"}) }))
		case 55:
			must(t, overlay.NewHydrator(l.v, nil, nil).Run(t.Context()))
		default:
			must(t, l.v.Sync())
		}
		l.m.flush()
		l.acks = append(l.acks, cutAck{at: rig.Mark(), state: *l.m.copied()})
	}
	l.shut()
	rig.Stop(t)
	for i, at := range rig.Moments(l.acks[0].at, l.acks[len(l.acks)-1].at, 14, 5) {
		rebuilt := rig.Rebuild(t, at, uint64(i))
		t.Cleanup(l.shut) // before that is unmounted
		l.look(rebuilt, at, base.Size())
		l.shut()
		rig.Discard(t, rebuilt)
	}
}

// record notes a stack, whose files have their names durably.
func (l *cutLife) record(stack []string) error {
	dir, err := os.Open(l.rig.Dir)
	if err == nil {
		err = errors.Join(dir.Sync(), dir.Close())
	}
	l.stacks = append(l.stacks, cutStack{l.rig.Mark(), stack})
	return err
}

func (l *cutLife) openFile(dir, name string, flag int) *os.File {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|flag, 0o600)
	must(l.t, err)
	l.opened = append(l.opened, f)
	return f
}

func (l *cutLife) open(dir, name string) overlay.Files {
	return overlay.Files{
		Data: overlay.OSFile{File: l.openFile(dir, name+".data", os.O_RDWR|syscall.O_DIRECT)},
		Map:  overlay.OSFile{File: l.openFile(dir, name+".map", os.O_RDWR)},
	}
}

func (l *cutLife) newLayer(name string) overlay.Files {
	f := l.open(l.rig.Dir, name)
	must(l.t, overlay.Create(f, cutBlocks*block))
	return f
}

func (l *cutLife) shut() {
	for _, f := range l.opened {
		if err := f.Close(); err != nil {
			l.t.Error(err)
		}
	}
	l.opened = nil
}

// change writes and discards a few times.
func (l *cutLife) change(r *rand.Rand) {
	p := directBuffer(8 * block)
	for range 1 + r.IntN(12) {
		n := (1 + r.Int64N(8)) * block
		off := r.Int64N(cutBlocks-n/block) * block
		if r.IntN(8) == 0 {
			must(l.t, l.v.Discard(off, n))
			l.m.wrote(make([]byte, n), off)
			continue
		}
		fill(r, p[:n])
		_, err := l.v.WriteAt(p[:n], off)
		must(l.t, err)
		l.m.wrote(p[:n], off)
	}
}

// look compares what a moment has left.
func (l *cutLife) look(dir string, at powercut.Moment, baseSize int64) {
	then, stack := l.acks[0].state, l.stacks[0].stack
	for _, a := range l.acks {
		if a.at <= at {
			then = a.state
		}
	}
	for _, s := range l.stacks {
		if s.at <= at {
			stack = s.stack
		}
	}
	var layers []overlay.Files
	for _, name := range stack {
		layers = append(layers, l.open(dir, name))
	}
	v, err := overlay.Open(layers, overlay.NewImage(l.openFile(dir, "base", os.O_RDONLY), baseSize))
	must(l.t, err)
	then.check(l.t, v)
}

// TestDiscardAfterOneSync: what only the data told of, flushed, does not become the
// base's again when it is discarded, wherever the power is cut.
func TestDiscardAfterOneSync(t *testing.T) {
	p := bytes.Repeat([]byte{9}, block)
	for cut := 1; ; cut++ {
		l := newLifeOn(t, &disk{witness: true}, bytes.Repeat([]byte{3}, 16*block), 16*block)
		_, err := l.v.WriteAt(p, 5*block)
		must(t, err)
		l.m.wrote(p, 5*block)
		must(t, l.v.Sync())
		l.m.flush()
		l.d.cutAt = l.d.ops + cut
		l.m.tried(make([]byte, block), 5*block)
		if err = l.v.Discard(5*block, block); err == nil {
			clear(l.m.now[5*block : 6*block])
			if err = l.v.Sync(); err == nil {
				l.m.flush()
			}
		}
		uncut := err == nil
		l.d.restart(rand.New(rand.NewPCG(1, uint64(cut))))
		l.open()
		l.m.check(t, l.v)
		if uncut {
			return
		}
	}
}

// TestLooseMap: whoever opens a layer that was not closed finds what only its data
// tells of, through files that are no witnesses as well, and below a top.
func TestLooseMap(t *testing.T) {
	l := newLifeOn(t, &disk{witness: true}, bytes.Repeat([]byte{3}, 16*block), 16*block)
	p := bytes.Repeat([]byte{9}, block)
	_, err := l.v.WriteAt(p, 5*block)
	must(t, errors.Join(err, l.v.Sync()))
	l.m.wrote(p, 5*block)
	top := l.d.layer()
	must(t, overlay.Create(top, 16*block))
	if _, held, err := overlay.Survey(l.stack[0].Map); err != nil || held == 0 {
		t.Errorf("its map tells of %d bytes, %v", held, err)
	}
	l.stack[0].Data.(*diskFile).witness = false
	l.open()
	l.m.same(t, l.v)
	below, err := overlay.Open([]overlay.Files{top, l.stack[0]}, l.base)
	must(t, err)
	l.m.same(t, below)
	must(t, l.v.Close())
	l.stack[0].Data.(*diskFile).data = nil // the map tells all
	l.open()
	l.m.same(t, l.v)
	mute := struct{ overlay.File }{l.stack[0].Data}
	if _, err := overlay.Open([]overlay.Files{{Data: mute, Map: l.stack[0].Map}}, l.base); err != nil {
		t.Errorf("a layer that was closed, in a file that tells nothing: %v", err)
	}
}

// TestUnfinishedWriteStays: what a write that never ended has left in a layer is there
// from the next opening on, or never: not first later, after a crash.
func TestUnfinishedWriteStays(t *testing.T) {
	l := newLifeOn(t, &disk{witness: true}, bytes.Repeat([]byte{3}, 16*block), 16*block)
	p := bytes.Repeat([]byte{9}, block)
	_, err := l.stack[0].Data.WriteAt(p, 7*block)
	must(t, errors.Join(err, l.stack[0].Data.Sync()))
	l.open()
	_, err = l.v.ReadAt(l.m.now, 0)
	must(t, err)
	_, err = l.v.WriteAt(p, block)
	must(t, errors.Join(err, l.v.Sync()))
	l.m.wrote(p, block)
	l.d.restart(rand.New(rand.NewPCG(1, 1)))
	l.open()
	l.m.same(t, l.v)
}

// TestKilledProcess: a process that is killed loses no byte that it has acknowledged,
// flushed or not: its guest lives on and believes in them. That holds in the middle of a
// seal as well, and where a file is no witness.
func TestKilledProcess(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 31))
		base := someBase(r, 30)
		l := newLifeOn(t, &disk{witness: seed%2 == 0}, base, 64*block)
		for range 150 {
			must(t, l.one(r))
			if len(l.stack) < 4 && r.IntN(8) == 0 {
				l.killedInSeal(r)
			}
			if r.IntN(4) == 0 {
				l.reopen(true) // nothing is said to the one before
				l.m.same(t, l.v)
			}
		}
	}
}

// killedInSeal ends the process when a new top is recorded, and things have been done
// since.
func (l *life) killedInSeal(r *rand.Rand) {
	top := l.d.layer()
	must(l.t, overlay.Create(top, l.v.Size()))
	before, dead := l.v, errors.New("dead")
	err := before.Seal(top, func() error {
		for range r.IntN(4) {
			off := r.Int64N(60) * block
			p := make([]byte, block)
			if r.IntN(3) == 0 {
				must(l.t, l.v.Discard(off, block))
			} else {
				fill(r, p)
				_, err := l.v.WriteAt(p, off)
				must(l.t, err)
			}
			l.m.wrote(p, off)
		}
		return dead
	})
	if !errors.Is(err, dead) {
		l.t.Fatal(err)
	}
	l.stack = append([]overlay.Files{top}, l.stack...)
	l.reopen(true)
	l.m.same(l.t, l.v)
	l.snaps[len(l.stack)-1] = bytes.Clone(l.m.now)
}

// TestTighten: after it a sealed layer's map tells all by itself.
func TestTighten(t *testing.T) {
	l := newLifeOn(t, &disk{witness: true}, bytes.Repeat([]byte{3}, 16*block), 16*block)
	for range 2 {
		p := bytes.Repeat([]byte{9}, block)
		_, err := l.v.WriteAt(p, int64(5+len(l.stack))*block)
		must(t, err)
		l.m.wrote(p, int64(5+len(l.stack))*block)
		must(t, l.seal(true))
	}
	l.d.restart(rand.New(rand.NewPCG(1, 3)))
	for _, below := range l.stack[1:] {
		below.Data.(*diskFile).data = nil
	}
	l.open()
	l.m.same(t, l.v)
	l.snapshots()
}
