package sparse

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/sys"
)

// TestCountersBeginWithTheOpening: the kernel counts on from one use of a loop
// number to the next; the pool does not, also not after a restart of the process.
func TestCountersBeginWithTheOpening(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop)
	blockdevtest.LeakCheck(t)
	k := keep(t, filepath.Join(t.TempDir(), "pool"))
	p, id := k.open(t), blockdevtest.NewID("vol")
	must(t, p.Create(t.Context(), id, 1<<20))
	must(t, p.Publish(t.Context(), id, []byte("{}")))
	if _, err := p.Counters(t.Context(), id); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("closed: %v", err)
	}
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}}
	for range 2 {
		e, err := p.Open(t.Context(), id, want)
		must(t, err)
		writeSync(t, e.Path, 64<<10)
		p = k.open(t) // a restart
		c, err := p.Counters(t.Context(), id)
		must(t, err)
		if c.WriteBytes != 64<<10 || c.Writes < 1 || c.Flushes < 1 || c.Since.IsZero() {
			t.Errorf("%+v", c)
		}
		e, err = p.Open(t.Context(), id, want)
		must(t, err)
		must(t, p.Close(t.Context(), id, e.Lease))
	}
	// A device that nobody noted is not counted wrongly.
	e, err := p.Open(t.Context(), id, want)
	must(t, err)
	must(t, os.Truncate(filepath.Join(k.dir, imagesDir, string(id), lockFile), 0))
	if _, err := p.Counters(t.Context(), id); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("without a note: %v", err)
	}
	must(t, p.Close(t.Context(), id, e.Lease))
}

func writeSync(t *testing.T, path string, n int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.Write(make([]byte, n))
	must(t, err)
	must(t, f.Sync())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestExclusiveCountsWhatRemovalFrees, whatever a clone shares.
func TestExclusiveCountsWhatRemovalFrees(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.ReflinkPool)
	p := openPool(t, filepath.Join(blockdevtest.ReflinkDir(t), "pool"))
	defer p.Shutdown()
	a, b := blockdevtest.NewID("vol"), blockdevtest.NewID("vol")
	must(t, p.Create(t.Context(), a, 4<<20))
	f, err := os.OpenFile(p.draft(a)+"/"+imageFile, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.Write(make([]byte, 1<<20))
	must(t, err)
	must(t, p.Publish(t.Context(), a, nil))
	if n, err := p.Exclusive(t.Context(), a); err != nil || n != 1<<20 {
		t.Errorf("alone: %d, %v", n, err)
	}
	must(t, p.Clone(t.Context(), b, a, 4<<20))
	if n, err := p.Exclusive(t.Context(), a); err != nil || n != 0 {
		t.Errorf("shared: %d, %v", n, err)
	}
	must(t, sys.PunchHole(f, 0, 256<<10))
	if n, err := p.Exclusive(t.Context(), b); err != nil || n != 256<<10 {
		t.Errorf("half shared: %d, %v", n, err)
	}
	must(t, p.Remove(t.Context(), b))
}
