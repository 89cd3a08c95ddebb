package overlay_test

import (
	"bytes"
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
