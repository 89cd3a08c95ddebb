package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

// fileBase is a base in a file of the disk.
type fileBase struct {
	*diskFile
	size int64
}

func (b fileBase) Size() int64 { return b.size }

func (b fileBase) Next(off int64) (from, to int64, err error) {
	return memory(b.cached[:b.size]).Next(off)
}

// TestMergeIntoBase: what a layer holds goes into a file that is the volume then, and
// wherever the power is cut, or a call fails, before that, the volume is what it was.
func TestMergeIntoBase(t *testing.T) {
	for _, kind := range []struct{ witness, shares bool }{{}, {witness: true}, {shares: true}, {true, true}} {
		for cut := 1; ; cut++ {
			d := &disk{witness: kind.witness, shares: kind.shares}
			r := rand.New(rand.NewPCG(3, 9))
			text := someBase(r, 10)
			file := d.file()
			_, err := file.WriteAt(text, 0)
			must(t, errors.Join(err, file.Sync()))
			top, m := d.layer(), newModel(text, 16*block)
			must(t, overlay.Create(top, 16*block))
			open := func() *overlay.Overlay {
				v, err := overlay.Open([]overlay.Files{top}, fileBase{file, text.Size()})
				must(t, err)
				return v
			}
			v := open()
			p := make([]byte, 2*block)
			for _, at := range []int64{0, 4, 13} {
				fill(r, p)
				_, err := v.WriteAt(p, at*block)
				must(t, err)
				m.wrote(p, at*block)
			}
			must(t, v.Discard(6*block, 2*block))
			m.wrote(p[:0], 0)
			clear(m.now[6*block : 8*block])
			must(t, v.Sync())
			if cut%2 == 0 {
				d.fail = d.ops + cut/2
			} else {
				d.cutAt = d.ops + cut/2 + 1
			}
			err = v.MergeIntoBase(t.Context(), file, nil, nil)
			if over := err == nil && cut%2 == 1; over {
				file.cached = slices.Clone(file.durable)
				if !bytes.Equal(file.cached, m.now) {
					t.Fatalf("%+v: the file is not the volume", kind)
				}
				break
			}
			d.restart(rand.New(rand.NewPCG(1, uint64(cut))))
			v = open()
			m.same(t, v)
			must(t, v.MergeIntoBase(t.Context(), file, nil, nil))
			if !bytes.Equal(file.durable, m.now) {
				t.Fatalf("%+v: cut %d: the file is not the volume", kind, cut)
			}
		}
	}
}

// TestMergeDownAlone: what goes down from the top goes at once, and a stack that has no
// two layers, or no base, is told.
func TestMergeDownAlone(t *testing.T) {
	l := newLife(t, nil, 16*block)
	if _, _, err := l.v.Merge(t.Context(), overlay.Merge{}, nil); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a merge of one layer: %v", err)
	}
	must(t, l.seal(false))
	unused := overlay.Files{Data: l.d.file(), Map: l.d.file()}
	_, back, err := l.v.Merge(t.Context(), overlay.Merge{Into: &unused, Most: 1}, nil)
	if !errors.Is(err, blockdev.ErrInvalid) || len(back) != 1 || back[0] != unused {
		t.Errorf("down from the top in steps: %v, %v", back, err)
	}
	if err := l.v.MergeIntoBase(t.Context(), l.d.file(), nil, nil); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("two layers into a base: %v", err)
	}
}

// TestMergeDownBringsNothingElse: what an unfinished write has left in a layer that is
// written again, long after, does not come up, also when a flush comes meanwhile.
func TestMergeDownBringsNothingElse(t *testing.T) {
	l := newLifeOn(t, &disk{witness: true}, someBase(rand.New(rand.NewPCG(7, 7)), 16), 16*block)
	seal := func() {
		t.Helper()
		top := l.d.layer()
		must(t, overlay.Create(top, 16*block))
		must(t, l.v.Seal(top, func() error { l.stack = append([]overlay.Files{top}, l.stack...); return nil }))
		must(t, l.v.Tighten())
	}
	write := func(b int64, fill byte) {
		t.Helper()
		p := bytes.Repeat([]byte{fill}, block)
		_, err := l.v.WriteAt(p, b*block)
		must(t, err)
		l.m.wrote(p, b*block)
	}
	write(1, 1)
	seal()
	for b, fill := range []byte{5, 0, 6} { // in three pieces
		write(int64(b), fill)
	}
	seal()
	lower, ok := l.stack[2].Data.(*diskFile)
	if !ok {
		t.Fatal("no file of the disk")
	}
	_, err := lower.WriteAt(bytes.Repeat([]byte{9}, block), 8*block)
	must(t, errors.Join(err, lower.Sync()))
	l.open()
	l.m.same(t, l.v)
	flushed := false
	lower.before = func() {
		lower.before = func() { flushed = true; must(t, l.v.Sync()) }
	}
	into := l.stack[2]
	_, _, err = l.v.Merge(t.Context(), overlay.Merge{Layer: 1, Into: &into}, func() error { return errBroken })
	if !errors.Is(err, errBroken) || !flushed {
		t.Fatalf("flushed %t: %v", flushed, err)
	}
	l.open()
	l.m.same(t, l.v)
}

// TestMergeAfterSealThatFailed: what a seal could not make durable is not taken for
// durable by a merge that was begun before.
func TestMergeAfterSealThatFailed(t *testing.T) {
	l := newLife(t, someBase(rand.New(rand.NewPCG(7, 8)), 16), 16*block)
	write := func(b int64) {
		t.Helper()
		p := bytes.Repeat([]byte{byte(20 + b)}, block)
		_, err := l.v.WriteAt(p, b*block)
		must(t, err)
		l.m.wrote(p, b*block)
	}
	for _, b := range []int64{1, 3, 5} {
		write(b)
	}
	must(t, l.seal(true))
	some := func(layer int) {
		t.Helper()
		if done, _, err := l.v.Merge(t.Context(), overlay.Merge{Layer: layer, Most: 1}, nil); err != nil || done {
			t.Fatalf("done %t: %v", done, err)
		}
	}
	some(0)
	must(t, l.v.Sync())
	write(7)
	index, ok := l.stack[0].Map.(*diskFile)
	if !ok {
		t.Fatal("no file of the disk")
	}
	var refuse func()
	refuse = func() {
		index.before = refuse
		l.d.mu.Lock()
		defer l.d.mu.Unlock()
		l.d.fail = l.d.ops + 1
	}
	index.before = refuse
	top := l.d.layer()
	must(t, overlay.Create(top, 16*block))
	err := l.v.Seal(top, func() error { l.stack = append([]overlay.Files{top}, l.stack...); return nil })
	if !errors.Is(err, errBroken) || errors.Is(err, blockdev.ErrFailed) {
		t.Fatalf("a seal whose map cannot be written: %v", err)
	}
	index.before, l.d.fail = nil, 0
	some(1)
	must(t, l.v.Sync())
	l.m.flush()
	for seed := range uint64(20) {
		l.d.restart(rand.New(rand.NewPCG(1, seed)))
		l.open()
		l.m.check(t, l.v)
	}
}

// TestMergeDownFromTheTopGoesOn: what a merge down has brought before it ended early is
// there when another process has brought the rest.
func TestMergeDownFromTheTopGoesOn(t *testing.T) {
	for _, witness := range []bool{false, true} {
		l := newLifeOn(t, &disk{witness: witness}, someBase(rand.New(rand.NewPCG(7, 9)), 16), 16*block)
		write := func(b int64) {
			t.Helper()
			p := bytes.Repeat([]byte{byte(20 + b)}, block)
			_, err := l.v.WriteAt(p, b*block)
			must(t, err)
			l.m.wrote(p, b*block)
		}
		write(9)
		must(t, l.seal(true))
		for _, b := range []int64{0, 2, 4, 6} {
			write(b)
		}
		must(t, l.v.Sync())
		lower, ok := l.stack[1].Data.(*diskFile)
		if !ok {
			t.Fatal("no file of the disk")
		}
		into, progress := l.stack[1], int64(0)
		ctx, cancel := context.WithCancel(t.Context())
		lower.before = func() { lower.before = cancel }
		down := func(ctx context.Context) error {
			_, _, err := l.v.Merge(ctx, overlay.Merge{Into: &into, Progress: &progress}, func() error {
				l.stack = l.stack[1:]
				return nil
			})
			return err
		}
		if err := down(ctx); !errors.Is(err, context.Canceled) || progress == 0 || progress > 6*block {
			t.Fatalf("%d bytes: %v", progress, err)
		}
		l.open()
		must(t, down(t.Context()))
		l.m.same(t, l.v)
		l.open()
		l.m.same(t, l.v)
	}
}
