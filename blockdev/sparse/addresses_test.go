package sparse

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// moveTo is what SetAddress is told when a base is in another store.
func (s *farStore) moveTo(t *testing.T) blockdev.RemoteBase {
	t.Helper()
	base := s.base(t)
	base.Chunks = nil
	return base
}

// TestAddressOfServed: volumes, forks and snapshots of a base whose store is gone have
// their blocks from where it has moved to: at workers that run, in this process, after a
// crash between the record and the workers, and at workers that come later.
func TestAddressOfServed(t *testing.T) {
	cheapFlushes(t)
	blockdevtest.LeakCheck(t)
	ctx := t.Context()
	crash := errors.New("crash")
	var cut string
	m, workers := servedModel(t, func(point string) error {
		if point == cut {
			return crash
		}
		return nil
	})
	content, _ := farBytes()
	stores := []*farStore{newFarStore(t, content), newFarStore(t, content), newFarStore(t, content)}
	alone := func(s *farStore) { // only this one is well
		for _, other := range stores {
			other.do(down)
		}
		s.do(nil)
	}
	rev, vol, snap, fork := blockdevtest.NewID(blockdev.PrefixRevision), blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixSnapshot), blockdevtest.NewID(blockdev.PrefixVolume)
	if err := errors.Join(m.far(rev, stores[0]), m.fork(vol, rev, farModel), m.snapshot(snap, vol), m.fork(fork, snap, farModel)); err != nil {
		t.Fatal(err)
	}
	stores[0].do(down)
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}, ReadOnly: true} // so that it copies nothing by itself
	e, err := m.pool.Open(ctx, vol, want)
	if err != nil {
		t.Fatal(err)
	}
	client := blockdevtest.DialNBD(t, e.Path)
	inside, err := m.pool.Access(ctx, fork, true)
	if err != nil {
		t.Fatal(err)
	}
	type reader interface {
		ReadAt(p []byte, off int64) (int, error)
	}
	ask := func(r reader, block int64) chan error {
		done := make(chan error, 1)
		go func() {
			p := make([]byte, modelBlock)
			_, err := r.ReadAt(p, block*modelBlock)
			if err == nil && !bytes.Equal(p, content[block*modelBlock:(block+1)*modelBlock]) {
				err = errors.New("other bytes")
			}
			done <- err
		}()
		return done
	}
	failing := func() bool {
		s, err := m.pool.Observe(ctx, vol)
		return err == nil && !s.Layers.FailingSince.IsZero()
	}
	// Both wait for the store that is gone, and have what they want from the next one.
	served, here := ask(client, 1), ask(inside, 2)
	await(t, "both wait", func() bool { return failing() && stores[0].requests.Load() >= 4 })
	alone(stores[1])
	other := stores[1].moveTo(t)
	other.Digest[0]++
	if err := m.pool.SetAddress(ctx, fork, stores[1].moveTo(t)); err != nil { // it is nobody's
		t.Fatal(err)
	}
	if n := stores[1].requests.Load(); n != 0 {
		t.Errorf("a base that has not moved was asked for %d times at another address", n)
	}
	if err := m.pool.SetAddress(ctx, rev, stores[1].moveTo(t)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-served, <-here, inside.Close()); err != nil {
		t.Fatal(err)
	}
	// It moves again; this process ends before it has told the worker.
	waits := ask(client, 60)
	if err := <-waits; err != nil {
		t.Fatal(err)
	}
	cut = "address.tell"
	if err := m.pool.SetAddress(ctx, rev, stores[2].moveTo(t)); !errors.Is(err, crash) {
		t.Fatalf("cut short: %v", err)
	}
	alone(stores[2])
	waits = ask(client, 300)
	await(t, "it waits for the store before", failing)
	cut = ""
	m.reopen()
	if err := <-waits; err != nil {
		t.Fatal(err)
	}
	// Of the bytes of another digest nothing is asked for there.
	if err := m.pool.SetAddress(ctx, rev, other); err != nil {
		t.Fatal(err)
	}
	if got := m.pool.urlOf(mustChain(t, m.pool, vol)); got != stores[0].base(t).URL {
		t.Errorf("bytes of another digest are fetched from %s", got)
	}
	if err := m.pool.SetAddress(ctx, rev, stores[2].moveTo(t)); err != nil {
		t.Fatal(err)
	}
	// The next worker, and the next process.
	w, err := workers.Find(ctx, vol)
	if err == nil {
		err = errors.Join(client.Close(), w.Kill(ctx))
	}
	if err != nil {
		t.Fatal(err)
	}
	m.reopen()
	if e, err = m.pool.Open(ctx, vol, want); err != nil {
		t.Fatal(err)
	}
	client = blockdevtest.DialNBD(t, e.Path)
	if err := errors.Join(<-ask(client, 301), client.Close(), m.pool.Close(ctx, vol, e.Lease)); err != nil {
		t.Fatal(err)
	}
	m.check("from the store of today", "", "")
	before := stores[0].requests.Load()
	if err := errors.Join(m.pool.Flatten(ctx, vol), m.pool.Flatten(ctx, fork), m.remove(snap), m.remove(rev)); err != nil {
		t.Fatal(err)
	}
	m.reopen()
	stores[2].do(down)
	m.check("flat", "", "")
	if n := stores[0].requests.Load() - before; n != 0 {
		t.Errorf("the first store was asked %d times more", n)
	}
	if entries, err := os.ReadDir(m.pool.path(addressesDir)); err != nil || len(entries) != 0 {
		t.Errorf("addresses that nobody follows: %v, %v", entries, err)
	}
}

func mustChain(t *testing.T, p *Pool, id blockdev.ID) *chain {
	t.Helper()
	c, err := readChain(id, p.image(id))
	if err != nil || c == nil {
		t.Fatal(c, err)
	}
	return c
}

// TestAddressRefused: what is no address changes nothing.
func TestAddressRefused(t *testing.T) {
	cheapFlushes(t)
	content, _ := farBytes()
	m, vol := farModelOf(t, newFarStore(t, content), farModel)
	c := mustChain(t, m.pool, vol)
	for _, bad := range []string{"", "ftp://x/y", "http://", "/etc/passwd"} {
		if err := m.pool.SetAddress(t.Context(), c.follows(), blockdev.RemoteBase{URL: bad}); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if got := m.pool.urlOf(c); got != c.URL {
		t.Errorf("it is at %s", got)
	}
	if err := m.pool.SetAddress(t.Context(), "../../x", blockdev.RemoteBase{URL: "http://x/y"}); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("an id that is none: %v", err)
	}
	m.pool.layers = false
	if err := m.pool.SetAddress(t.Context(), c.follows(), blockdev.RemoteBase{URL: "http://x/y"}); !errors.Is(err, errors.ErrUnsupported) || m.pool.HoldsRemote() {
		t.Errorf("a pool without workers: %v", err)
	}
}

// TestChunksHoldUpNobody: while a file of chunks is being verified others are found, and
// who wants the same has what the first has found.
func TestChunksHoldUpNobody(t *testing.T) {
	dir := t.TempDir()
	info := func(name string) os.FileInfo {
		t.Helper()
		if err := os.WriteFile(dir+"/"+name, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		i, err := os.Stat(dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	large, small := info("large"), info("small")
	var k chunkFiles
	_, known, done := k.find("large", large)
	if known {
		t.Fatal("known")
	}
	waiting := make(chan bool)
	go func() {
		_, known, _ := k.find("large", large)
		waiting <- known
	}()
	for range 2 { // in this goroutine: it would hang
		_, known, done := k.find("small", small)
		if !known {
			done(seenChunks{file: small}, nil)
		}
	}
	select {
	case <-waiting:
		t.Error("it does not wait for who verifies the same")
	default:
	}
	done(seenChunks{file: large}, nil)
	if !<-waiting {
		t.Error("it is verified twice")
	}
	_, _, done = k.find("bad", large)
	done(seenChunks{}, blockdev.ErrCorrupt)
	if _, known, _ := k.find("bad", large); known {
		t.Error("what is damaged is taken for verified")
	}
}
