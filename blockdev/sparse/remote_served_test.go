package sparse

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// TestRemoteWorkerDies: a worker that is killed while it copies loses nothing, and the
// next one goes on. It asks no other host, whatever the store says.
func TestRemoteWorkerDies(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m, workers := servedModel(t, nil)
	content, _ := farBytes()
	store, elsewhere := newFarStore(t, content), newFarStore(t, content)
	rev, vol := blockdevtest.NewID(blockdev.PrefixRevision), blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(m.far(rev, store), m.fork(vol, rev, farModel)); err != nil {
		t.Fatal(err)
	}
	// What it has behind the first MiB is somewhere else.
	store.do(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.Header.Get("Range"), fmt.Sprintf("bytes=%d-", 300*modelBlock)) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
			return
		}
		store.right(w, r)
	})
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}
	e, err := m.pool.Open(ctx, vol, want)
	if err != nil {
		t.Fatal(err)
	}
	client := blockdevtest.DialNBD(t, e.Path)
	if err := errors.Join(m.put(client, vol, 7, 1, 310), client.Close()); err != nil {
		t.Fatal(err)
	}
	await(t, "a part is there, and why not all", func() bool {
		s, err := m.pool.Observe(ctx, vol)
		return err == nil && s.Layers.Held >= 256*modelBlock && strings.Contains(s.Layers.Reason, "not below a prefix")
	})
	w, err := workers.Find(ctx, vol)
	if err == nil {
		err = w.Kill(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	store.do(nil)
	m.reopen() // and another daemon
	again, err := m.pool.Open(ctx, vol, want)
	if err != nil || again != e {
		t.Fatalf("%+v, %v; want %+v", again, err, e)
	}
	await(t, "all is there", func() bool {
		s, err := m.pool.Observe(ctx, vol)
		return err == nil && s.Layers.Held == s.Layers.Size
	})
	if err := m.pool.Close(ctx, vol, e.Lease); err != nil {
		t.Fatal(err)
	}
	store.do(down)
	if info, err := m.pool.Stat(ctx, vol); err != nil || info.Layers != 0 {
		t.Errorf("closed: %+v, %v", info, err)
	}
	m.compare("closed", vol, m.images[vol])
	if n := elsewhere.requests.Load(); n != 0 {
		t.Errorf("another host was asked %d times", n)
	}
}

// TestRemoteSealedServed: snapshots and forks of a volume in use need no store, also
// where little of it is here.
func TestRemoteSealedServed(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	m, _ := servedModel(t, nil)
	content, _ := farBytes()
	store := newFarStore(t, content)
	rev, vol, second := blockdevtest.NewID(blockdev.PrefixRevision), blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(m.far(rev, store), m.fork(vol, rev, farModel)); err != nil {
		t.Fatal(err)
	}
	store.do(down)
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}}
	e, err := m.pool.Open(ctx, vol, want)
	if err != nil {
		t.Fatal(err)
	}
	client := blockdevtest.DialNBD(t, e.Path)
	first, later := blockdevtest.NewID(blockdev.PrefixSnapshot), blockdevtest.NewID(blockdev.PrefixSnapshot)
	if err := errors.Join(
		m.snapshot(first, vol),
		m.put(client, vol, 7, 1, 310),
		m.snapshot(later, vol),
		m.put(client, vol, 8, 1, 2),
		m.fork(second, later, farModel+modelBlock),
		m.grow(vol, farModel+2*modelBlock),
	); err != nil {
		t.Fatal(err)
	}
	other, err := m.pool.Open(ctx, second, want)
	if err != nil {
		t.Fatal(err)
	}
	at := blockdevtest.DialNBD(t, other.Path)
	if err := errors.Join(m.put(at, second, 9, 3, 320), at.Close()); err != nil {
		t.Fatal(err)
	}
	store.do(nil)
	got := make([]byte, modelBlock)
	if _, err := client.ReadAt(got, 60*modelBlock); err != nil || got[0] != m.images[vol].blocks[60] {
		t.Errorf("a miss below its layers gives %d, %v", got[0], err)
	}
	if err := errors.Join(client.Close(), m.pool.Close(ctx, vol, e.Lease), m.pool.Close(ctx, second, other.Lease)); err != nil {
		t.Fatal(err)
	}
	m.check("closed", "", "")
	if err := errors.Join(m.pool.Flatten(ctx, vol), m.pool.Flatten(ctx, second), m.remove(first), m.remove(later), m.remove(rev)); err != nil {
		t.Fatal(err)
	}
	store.do(down)
	m.check("flat", "", "")
	m.tidy("flat")
}

// TestBackgroundLeavesStoresThatAreAway: one that does not answer keeps no other image
// from becoming flat, and its own follow when it does.
func TestBackgroundLeavesStoresThatAreAway(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	m, workers := servedModel(t, nil)
	content, _ := farBytes()
	away, well := newFarStore(t, content), newFarStore(t, content)
	vols := []blockdev.ID{"vol-00000000000000000000000001", "vol-00000000000000000000000002", "vol-00000000000000000000000003"} // in the order in which they are found
	if err := errors.Join(m.far(vols[0], away), m.far(vols[2], well), m.fork(vols[1], vols[0], farModel)); err != nil {
		t.Fatal(err)
	}
	away.do(down)
	m.kept.close()
	p, err := Open(t.Context(), filepath.Join(m.kept.dir), Options{Workers: workers, Rate: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	m.kept.pool, m.pool = p, p
	flat := func(id blockdev.ID) func() bool {
		return func() bool {
			info, err := p.Stat(t.Context(), id)
			return err == nil && info.Layers == 0
		}
	}
	await(t, "what can be made flat is", flat(vols[2]))
	if flat(vols[0])() || flat(vols[1])() {
		t.Error("what was far away became flat without its store")
	}
	away.do(nil)
	p.wakeBackground() // it would come by itself in a minute
	await(t, "the others are", func() bool { return flat(vols[0])() && flat(vols[1])() })
	away.do(down)
	m.check("at the end", "", "")
}
