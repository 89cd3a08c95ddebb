package sparse

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/control"
)

// killed is a served volume whose worker is killed under its client's hands.
type killed struct {
	*model
	workers *control.Starter
	vol     blockdev.ID
	e       blockdev.Endpoint
	client  blockdevtest.File
	point   func(string) // what happens between two side effects
}

// newKilled makes a volume on this filesystem, over a base or flat, and opens it.
func newKilled(t *testing.T, dir string, flat bool) *killed {
	t.Helper()
	k := &killed{workers: workersFor(t), vol: blockdevtest.NewID(blockdev.PrefixVolume), point: func(string) {}}
	k.model = newModel(t, dir, func(p *Pool) {
		p.layers, p.reflinks = true, false
		p.crash = func(point string) error { k.point(point); return nil }
	})
	k.model.workers = k.workers
	k.reopen()
	src := k.vol
	if !flat {
		src = blockdevtest.NewID(blockdev.PrefixSource)
	}
	err := errors.Join(k.create(src), k.write(src, 1, 0, 1, 2, 3, 4, 5))
	if err == nil && !flat {
		err = k.fork(k.vol, src, modelSize)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.serve()
	return k
}

func (k *killed) serve() {
	k.t.Helper()
	var err error
	if k.e, err = k.pool.Open(k.t.Context(), k.vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}); err != nil {
		k.t.Fatal(err)
	}
	k.client = blockdevtest.DialNBD(k.t, k.e.Path)
}

// put writes a block, and does not flush it.
func (k *killed) put(fill byte, block int64) error {
	_, err := k.client.WriteAt(bytes.Repeat([]byte{fill}, modelBlock), block*modelBlock)
	if err == nil {
		k.images[k.vol].blocks[block] = fill
	}
	return err
}

// kill ends the worker, at once.
func (k *killed) kill() {
	k.t.Helper()
	w, err := k.workers.Find(k.t.Context(), k.vol)
	if err == nil {
		err = w.Kill(k.t.Context())
	}
	if err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		k.t.Fatal(err)
	}
}

// same has the next worker show all that was acknowledged.
func (k *killed) same(when string) {
	k.t.Helper()
	got := make([]byte, modelSize)
	if _, err := k.client.ReadAt(got, 0); err != nil {
		k.t.Fatalf("%s: %v", when, err)
	}
	for n := range int64(modelSize / modelBlock) {
		if want := k.images[k.vol].blocks[n]; !bytes.Equal(got[n*modelBlock:(n+1)*modelBlock], bytes.Repeat([]byte{want}, modelBlock)) {
			k.t.Fatalf("%s: block %d begins with %d, want %d", when, n, got[n*modelBlock], want)
		}
	}
}

// killedPlaces are the filesystems on which a worker is killed.
func killedPlaces(t *testing.T) map[string]string {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.ReflinkPool, blockdevtest.Ext4, blockdevtest.Btrfs)
	return map[string]string{"ext4": blockdevtest.Ext4Dir(t), "xfs": blockdevtest.ReflinkDir(t), "btrfs": blockdevtest.BtrfsDir(t)}
}

// TestWorkerKilledInASeal: a worker that is killed at any point of a snapshot, by itself
// or with the daemon, loses no write that it has acknowledged, flushed or not.
func TestWorkerKilledInASeal(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	places := killedPlaces(t)
	delete(places, "xfs")                                  // which is as ext4 here
	places["flat"] = filepath.Join(places["ext4"], "flat") // the first snapshot puts layers over it
	for name, base := range places {
		t.Run(name, func(t *testing.T) {
			points := map[string]bool{}
			for cut := 0; ; cut++ {
				at := killedInASeal(t, filepath.Join(base, fmt.Sprint(cut)), cut, name == "flat")
				if at == "" {
					break
				}
				points[at] = true
			}
			for _, point := range []string{"seal.layer", "seal.record", "describe.rename", "describe.flush", "draft.links"} {
				if !points[point] {
					t.Errorf("it was not killed at %s", point)
				}
			}
		})
	}
}

func killedInASeal(t *testing.T, dir string, cut int, flat bool) (killedAt string) {
	t.Helper()
	k := newKilled(t, dir, flat)
	defer k.kept.close()
	if err := errors.Join(k.put(2, 1), k.put(3, 10)); err != nil {
		t.Fatal(err)
	}
	passed := 0
	k.point = func(point string) {
		passed++
		if err := k.put(byte(100+passed), int64(20+passed)); err != nil && killedAt == "" {
			t.Errorf("a write at %s: %v", point, err)
		}
		if passed == cut+1 {
			killedAt = point
			k.kill()
		}
	}
	snap := blockdevtest.NewID(blockdev.PrefixSnapshot)
	_, err := k.pool.Snapshot(t.Context(), snap, k.vol)
	k.point = func(string) {}
	if err != nil && killedAt == "" {
		t.Fatal(err)
	}
	if killedAt == "" {
		k.kill()
	}
	if cut%2 == 1 {
		k.reopen()
	}
	k.removeUnknown()
	k.serve()
	k.same("killed at " + killedAt)
	if err := errors.Join(k.put(4, 2), k.snapshot(snap, k.vol), k.put(5, 3), k.client.Close(), k.pool.Close(t.Context(), k.vol, k.e.Lease)); err != nil {
		t.Fatalf("killed at %s: %v", killedAt, err)
	}
	k.check("killed at "+killedAt, "", "")
	if err := k.pool.Flatten(t.Context(), k.vol); err != nil {
		t.Fatal(err)
	}
	k.check("killed at "+killedAt+", then flat", "", "")
	k.tidy("killed at " + killedAt)
	return killedAt
}

// TestWorkerKilledUnderLoad: one that is killed at any moment, while snapshots are made,
// loses no write that it has acknowledged.
func TestWorkerKilledUnderLoad(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	for name, base := range killedPlaces(t) {
		t.Run(name, func(t *testing.T) {
			k := newKilled(t, filepath.Join(base, "pool"), false)
			for round := range 12 {
				var writer sync.WaitGroup
				begun, most := make(chan struct{}), 6+7*round
				writer.Go(func() {
					for n := range most {
						if n == 5 {
							close(begun)
						}
						if err := k.put(byte(1+(round*31+n)%250), int64(n*13)%64); err != nil {
							t.Errorf("a write: %v", err)
						}
					}
					k.kill()
				})
				<-begun
				_, err := k.pool.Snapshot(t.Context(), blockdevtest.NewID(blockdev.PrefixSnapshot), k.vol) // whatever it is worth
				writer.Wait()
				if round%2 == 1 {
					k.reopen()
				}
				k.removeUnknown()
				k.serve()
				k.same(fmt.Sprintf("round %d, the snapshot: %v", round, err))
			}
			if err := errors.Join(k.client.Close(), k.pool.Close(t.Context(), k.vol, k.e.Lease), k.pool.Flatten(t.Context(), k.vol)); err != nil {
				t.Fatal(err)
			}
			k.check("at the end", "", "")
			k.tidy("at the end")
		})
	}
}

// TestWorkerKilledAndNotFollowed: what a killed worker has acknowledged is there for who
// works on the image without another one, in whatever order.
func TestWorkerKilledAndNotFollowed(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	for name, base := range killedPlaces(t) {
		t.Run(name, func(t *testing.T) {
			k := newKilled(t, filepath.Join(base, "unfollowed"), false)
			// Over another layer nothing is hydrated, which would flush.
			if err := errors.Join(k.snapshot(blockdevtest.NewID(blockdev.PrefixSnapshot), k.vol), k.put(2, 1), k.put(3, 10)); err != nil {
				t.Fatal(err)
			}
			k.kill()
			if err := k.pool.Close(t.Context(), k.vol, k.e.Lease); err != nil {
				t.Fatal(err)
			}
			k.check("closed", "", "")
			snap := blockdevtest.NewID(blockdev.PrefixSnapshot)
			if err := k.snapshot(snap, k.vol); err != nil {
				t.Fatal(err)
			}
			k.check("with a snapshot", "", "")
			if err := errors.Join(k.remove(snap), k.pool.emptyTrash(t.Context())); err != nil {
				t.Fatal(err)
			}
			k.serve()
			k.same("served again")
			if err := errors.Join(k.client.Close(), k.pool.Close(t.Context(), k.vol, k.e.Lease)); err != nil {
				t.Fatal(err)
			}
			k.check("at the end", "", "")
		})
	}
}

// TestUnfinishedWritesAreDecidedOnce: what was not flushed before the host went down is
// there or not, for all who come afterwards.
func TestUnfinishedWritesAreDecidedOnce(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	for name, base := range killedPlaces(t) {
		t.Run(name, func(t *testing.T) {
			k := newKilled(t, filepath.Join(base, "decided"), false)
			// Over another layer nothing is hydrated, which would flush.
			if err := errors.Join(k.snapshot(blockdevtest.NewID(blockdev.PrefixSnapshot), k.vol), k.put(2, 1), k.put(3, 10)); err != nil {
				t.Fatal(err)
			}
			k.kill()
			if err := clearServed(k.pool.image(k.vol)); err != nil { // as after a boot
				t.Fatal(err)
			}
			k.reopen()
			if name == "btrfs" { // its extents prove nothing
				k.images[k.vol].blocks[1], k.images[k.vol].blocks[10] = 1, 0
			}
			snap := blockdevtest.NewID(blockdev.PrefixSnapshot)
			if err := k.snapshot(snap, k.vol); err != nil {
				t.Fatal(err)
			}
			k.check("with a snapshot", "", "")
			if err := errors.Join(k.remove(snap), k.pool.emptyTrash(t.Context())); err != nil {
				t.Fatal(err)
			}
			k.serve()
			k.same("served again")
			if err := errors.Join(k.client.Close(), k.pool.Close(t.Context(), k.vol, k.e.Lease)); err != nil {
				t.Fatal(err)
			}
		})
	}
}
