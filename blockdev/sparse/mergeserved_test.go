package sparse

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// chainOfImage reads one that is there.
func (m *model) chainOfImage(id blockdev.ID) *chain {
	m.t.Helper()
	c, err := readChain(id, m.pool.image(id))
	if err != nil || c == nil {
		m.t.Fatalf("%+v, %v", c, err)
	}
	return c
}

// TestServedMergeInSlices: what is the volume's alone becomes one layer under the hands of
// a client, the smaller down into the larger, in slices of which none is lost when the
// worker dies in between.
func TestServedMergeInSlices(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	passes, killed := 0, false
	var m *model
	vol := blockdevtest.NewID(blockdev.PrefixVolume)
	workers := workersFor(t)
	m = newModel(t, filepath.Join(blockdevtest.Ext4Dir(t, blockdevtest.Size(256<<20)), "pool"), func(p *Pool) {
		p.layers = true
		p.crash = func(point string) error {
			if point != "merge.absorb" {
				return nil
			}
			if passes++; passes != 3 || killed {
				return nil
			}
			killed = true
			w, err := workers.Find(ctx, vol)
			return errors.Join(err, w.Kill(ctx))
		}
	})
	m.workers = workers
	m.reopen()
	var snaps []blockdev.ID
	snapshot := func() {
		t.Helper()
		snaps = append(snaps, blockdevtest.NewID(blockdev.PrefixSnapshot))
		if err := m.snapshot(snaps[len(snaps)-1], vol); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(m.create(vol), m.grow(vol, 64<<20), m.write(vol, 1, 9)); err != nil {
		t.Fatal(err)
	}
	snapshot()
	e, err := m.pool.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
	if err != nil {
		t.Fatal(err)
	}
	client := blockdevtest.DialNBD(t, e.Path)
	for i, n := range []int64{2560, 1280, 1} { // sealed layers of 10 and 5 MiB, and a block
		if err := m.put(client, vol, 10+byte(i), blocksFrom(2048*int64(i), n)...); err != nil {
			t.Fatal(err)
		}
		snapshot()
	}
	if err := m.put(client, vol, 20, 5, 4100); err != nil {
		t.Fatal(err)
	}
	large := m.chainOfImage(vol).Layers[3]
	for _, id := range snaps {
		if err := m.remove(id); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.pool.emptyTrash(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.pool.mergeServed(ctx, vol, m.pool.image(vol)); err != nil || !killed {
		t.Fatalf("killed %t: %v", killed, err)
	}
	c := m.chainOfImage(vol)
	if len(c.Layers) != 3 || c.Layers[2] != large || passes != 3 { // the smallest has gone down; it was cut in the next
		t.Fatalf("%d layers, %d slices", len(c.Layers), passes)
	}
	if e, err = m.pool.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}); err != nil {
		t.Fatal(err)
	}
	client.Close()
	client = blockdevtest.DialNBD(t, e.Path)
	if err := m.put(client, vol, 21, 6, 4200, 9000); err != nil {
		t.Fatal(err)
	}
	if err := m.pool.mergeServed(ctx, vol, m.pool.image(vol)); err != nil {
		t.Fatal(err)
	}
	if c := m.chainOfImage(vol); len(c.Layers) != 1 || passes < 6 {
		t.Errorf("%d layers, %d slices", len(c.Layers), passes)
	}
	if err := errors.Join(client.Close(), m.pool.Close(ctx, vol, e.Lease)); err != nil {
		t.Fatal(err)
	}
	m.check("at the end", "", "")
	m.tidy("at the end")
}

// TestMergedAwayGivesItsSpaceBack: a worker keeps nothing of a layer that has gone.
func TestMergedAwayGivesItsSpaceBack(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m := newModel(t, filepath.Join(blockdevtest.Ext4Dir(t), "pool"), func(p *Pool) { p.layers = true })
	m.workers = workersFor(t)
	m.reopen()
	vol, snap := blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixSnapshot)
	first := blockdevtest.NewID(blockdev.PrefixSnapshot)
	if err := errors.Join(m.create(vol), m.snapshot(first, vol)); err != nil {
		t.Fatal(err)
	}
	e, err := m.pool.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
	if err != nil {
		t.Fatal(err)
	}
	client := blockdevtest.DialNBD(t, e.Path)
	if err := errors.Join(m.put(client, vol, 1, 0, 1, 2), m.snapshot(snap, vol), m.put(client, vol, 2, 2, 3), m.remove(snap), m.pool.emptyTrash(ctx)); err != nil {
		t.Fatal(err)
	}
	gone := m.chainOfImage(vol).Layers[1]
	if err := m.pool.mergeServed(ctx, vol, m.pool.image(vol)); err != nil {
		t.Fatal(err)
	}
	s, err := m.pool.Observe(ctx, vol)
	if err != nil {
		t.Fatal(err)
	}
	if open := filesOf(t, s.Pid); slices.Contains(open, gone) || len(open) == 0 {
		t.Errorf("its worker has %v open, %s has gone", open, gone)
	}
	if err := errors.Join(client.Close(), m.pool.Close(ctx, vol, e.Lease)); err != nil {
		t.Fatal(err)
	}
	m.check("at the end", "", "")
}

// filesOf are the files of layers that a process has open.
func filesOf(t *testing.T, pid int) (names []string) {
	t.Helper()
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		name, err := os.Readlink(filepath.Join(dir, entry.Name()))
		if err == nil && partForm.MatchString(trimPart(strings.TrimSuffix(filepath.Base(name), " (deleted)"))) {
			names = append(names, trimPart(strings.TrimSuffix(filepath.Base(name), " (deleted)")))
		}
	}
	return names
}

// TestDeepChains: layers that snapshots read from are brought up when there are many,
// and when there are most of all a snapshot is refused with what to do.
func TestDeepChains(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m := newModel(t, filepath.Join(blockdevtest.Ext4Dir(t), "pool"), func(p *Pool) { p.layers = true })
	m.workers = workersFor(t)
	m.reopen()
	vol := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := m.create(vol); err != nil {
		t.Fatal(err)
	}
	for i := range int64(maxLayers) {
		if err := errors.Join(m.snapshot(blockdevtest.NewID(blockdev.PrefixSnapshot), vol), m.write(vol, byte(i), i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.snapshot(blockdevtest.NewID(blockdev.PrefixSnapshot), vol); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "merged in the background") {
		t.Errorf("a snapshot too many: %v", err)
	}
	e, err := m.pool.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.pool.mergeServed(ctx, vol, m.pool.image(vol)); err != nil {
		t.Fatal(err)
	}
	if c := m.chainOfImage(vol); len(c.Layers) != deepMost {
		t.Errorf("%d layers", len(c.Layers))
	}
	if err := m.snapshot(blockdevtest.NewID(blockdev.PrefixSnapshot), vol); err != nil {
		t.Error(err)
	}
	if err := m.pool.Close(ctx, vol, e.Lease); err != nil {
		t.Fatal(err)
	}
	m.check("at the end", "", "")
}

// TestServedMergeOfOtherLayers: where a worker has other layers than the chain, which a
// record that failed half-way may leave, nothing is merged and nothing goes.
func TestServedMergeOfOtherLayers(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	k := newKilled(t, filepath.Join(blockdevtest.Ext4Dir(t), "others"), false)
	for n := range 3 {
		snap := blockdevtest.NewID(blockdev.PrefixSnapshot)
		if err := errors.Join(k.put(byte(30+n), int64(n)), k.snapshot(snap, k.vol), k.remove(snap)); err != nil {
			t.Fatal(err)
		}
	}
	dir, c := k.pool.image(k.vol), k.chainOfImage(k.vol)
	shorter := *c
	shorter.Layers = append([]string{c.Layers[0]}, c.Layers[2:]...)
	if err := errors.Join(k.pool.emptyTrash(ctx), k.pool.writeChain(k.vol, dir, &shorter)); err != nil {
		t.Fatal(err)
	}
	if err := k.pool.mergeServed(ctx, k.vol, dir); !errors.Is(err, blockdev.ErrFailed) {
		t.Errorf("a merge of other layers: %v", err)
	}
	if now := k.chainOfImage(k.vol); !slices.Equal(now.Layers, shorter.Layers) {
		t.Errorf("layers %v, want %v", now.Layers, shorter.Layers)
	}
	if err := errors.Join(k.pool.writeChain(k.vol, dir, c), k.pool.mergeServed(ctx, k.vol, dir)); err != nil {
		t.Fatal(err)
	}
	k.same("merged")
	if err := errors.Join(k.client.Close(), k.pool.Close(ctx, k.vol, k.e.Lease)); err != nil {
		t.Fatal(err)
	}
}

// TestServedMergeCosts: of a merge at a worker what was copied counts for the pool's rate,
// and what is shared next to nothing.
func TestServedMergeCosts(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	workers := workersFor(t)
	for name, c := range map[string]struct {
		dir         string
		least, most int64 // of 16 MiB, in one slice
	}{
		"shared": {blockdevtest.ReflinkDir(t), 1, 3 << 20},
		"copied": {blockdevtest.Ext4Dir(t, blockdevtest.Size(256<<20)), mergeSlice, mergeSlice + 2<<20},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			k := keep(t, filepath.Join(c.dir, "pool"))
			p, err := Open(ctx, k.dir, Options{Workers: workers, Rate: -1})
			if err != nil {
				t.Fatal(err)
			}
			p.reflinks = false // else the clones would be flat
			k.pool = p
			vol, snap := layeredOver(t, p)
			want := bytesOf(t, p, vol)
			e, err := p.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
			if err != nil {
				t.Fatal(err)
			}
			w, err := p.worker(ctx, vol)
			if err != nil {
				t.Fatal(err)
			}
			dir := p.image(vol)
			chain, err := readChain(vol, dir)
			if err != nil {
				t.Fatal(err)
			}
			copied, err := p.mergeSome(ctx, w, vol, dir, chain, servedMerge{})
			if err != nil || copied < c.least || copied > c.most {
				t.Errorf("it counts as %d bytes, %v", copied, err)
			}
			if err := errors.Join(p.Close(ctx, vol, e.Lease), p.Remove(ctx, snap)); err != nil {
				t.Fatal(err)
			}
			if got := bytesOf(t, p, vol); !bytes.Equal(got, want) {
				t.Error("the bytes have changed")
			}
		})
	}
}
