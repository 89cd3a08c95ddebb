package overlay_test

import (
	"bytes"
	"errors"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

// torn is a map that another process writes: each sector is first read as half of what
// was there and half of what comes.
type torn struct {
	overlay.File
	old   []byte
	whole map[int64]bool // sectors that were read before; nil: none ever is
}

func (f torn) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	for at := off; at+sector <= off+int64(n); at += sector {
		if f.whole[at] {
			continue
		}
		if f.whole != nil {
			f.whole[at] = true
		}
		copy(p[at-off:at-off+sector/2], f.old[at:])
		copy(p[at-off+sector/2:at-off+sector], f.old[at+sector/2:at+sector-4]) // as far as the checksum
	}
	return n, err
}

// TestMapReadWhileItIsWritten: a map can be looked at while a worker writes to it, and
// what makes no sense however often it is read is damage.
func TestMapReadWhileItIsWritten(t *testing.T) {
	l := newLife(t, nil, 16*block)
	index, ok := l.stack[0].Map.(*diskFile)
	if !ok {
		t.Fatal("no file of the disk")
	}
	old := bytes.Clone(index.cached)
	_, err := l.v.WriteAt(make([]byte, block), 0)
	must(t, errors.Join(err, l.v.Sync()))
	must(t, l.v.Grow(17*block))
	f := torn{index, append(old, make([]byte, len(index.cached)-len(old))...), map[int64]bool{}}
	if size, held, err := overlay.Survey(f); err != nil || size != 17*block || held != block {
		t.Errorf("%d bytes, %d held: %v", size, held, err)
	}
	f.whole = map[int64]bool{}
	if size, err := overlay.SizeOf(f); err != nil || size != 17*block {
		t.Errorf("%d bytes: %v", size, err)
	}
	f.whole = nil
	if _, _, err := overlay.Survey(f); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("a map that is damaged: %v", err)
	}
}
