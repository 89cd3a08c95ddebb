package main_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/vhost/frontend"
)

// farStore is a store on this host whose image has another stamp in each block.
type farStore struct {
	*httptest.Server
	image   []byte
	digests *os.File

	silent chan struct{} // closed: it answers

	mu     sync.Mutex
	ranges []string // that were asked for
}

func newFarStore(t *testing.T) *farStore {
	t.Helper()
	s := &farStore{silent: make(chan struct{})}
	for off := range size / block {
		s.image = append(s.image, stamped(uint64(off)+1)...)
	}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.ranges = append(s.ranges, r.Header.Get("Range"))
		s.mu.Unlock()
		select {
		case <-s.silent:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(s.image))
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(s.Close)
	t.Cleanup(s.CloseClientConnections) // a request that waits would keep Close waiting
	s.digests = digestsOf(t, s.image)
	return s
}

// digestsOf makes the file of an image's digests.
func digestsOf(t *testing.T, image []byte) *os.File {
	t.Helper()
	plain := filepath.Join(t.TempDir(), "plain")
	must(t, os.WriteFile(plain, image, 0o600))
	f, err := os.Open(plain)
	must(t, err)
	defer f.Close()
	chunks, err := overlay.Digest(overlay.NewImage(f, int64(len(image))), overlay.DefaultChunk)
	must(t, err)
	digests, err := os.Create(filepath.Join(t.TempDir(), "digests"))
	must(t, err)
	t.Cleanup(func() { digests.Close() })
	must(t, overlay.WriteChunks(digests, chunks))
	return digests
}

func (s *farStore) answer() { close(s.silent) }

// asked is what was asked for so far.
func (s *farStore) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ranges)
}

func (s *farStore) spec(t *testing.T, kind blockdev.Kind) control.Spec {
	return control.Spec{ID: volumeID, Kind: kind, Size: size, Layers: []control.Layer{layer(t)}, Remote: &control.Remote{URL: s.URL, Chunks: s.digests}}
}

// waiting waits until so many requests wait for the store.
func waiting(t *testing.T, w *control.Worker, count int64) {
	t.Helper()
	for {
		st, err := w.Status(t.Context())
		must(t, err)
		if st.Meter.Waits[meter.Hydration].Now == count {
			return
		}
	}
}

const (
	farReads  = 180 // of blocks in the second half
	farWrites = 70  // of parts of blocks, in the first half
)

// TestSilentStoreVhost: with reads and writes of parts of blocks waiting for the store,
// more than there are helpers, all that needs no store goes on; when it answers each gets what is right.
func TestSilentStoreVhost(t *testing.T) {
	s, ctx, store := starter(t, nil), t.Context(), newFarStore(t)
	w, err := s.Serve(ctx, store.spec(t, blockdev.VhostUser))
	must(t, err)
	g := newGuest(t, frontend.Options{Depth: 256})
	must(t, g.f.Connect(w.Socket()))
	q := g.f.Queues[0]
	for n := range farReads {
		q.Put(n, frontend.Read, uint64(size/2/512+n*block/512), block)
	}
	for n := range farWrites {
		copy(q.Data(farReads+n), stamped(7))
		q.Put(farReads+n, frontend.Write, uint64(n*block/512+3), 512)
	}
	must(t, q.Show())
	waiting(t, w, farReads+farWrites)
	const free, at = farReads + farWrites, 1024 * 1024 / 512 // a slot, and where it writes
	local := func(what string, put func()) {
		t.Helper()
		put()
		must(t, errors.Join(q.Show(), q.Wait()))
		if slot, status, ok := q.Take(); !ok || slot != free || status != 0 {
			t.Fatalf("%s while the store is silent: request %d, status %d", what, slot, status)
		}
	}
	copy(q.Data(free), stamped(5))
	local("a write", func() { q.Put(free, frontend.Write, at, block) })
	local("a flush", func() { q.Put(free, frontend.Flush, 0, 0) })
	clear(q.Data(free))
	local("a read", func() { q.Put(free, frontend.Read, at, block) })
	if !bytes.Equal(q.Data(free), stamped(5)) {
		t.Error("what was written reads otherwise")
	}
	local("a write of zeroes", func() { q.PutRange(free, frontend.WriteZeroes, at+8, 16, 1) })
	local("a discard", func() { q.PutRange(free, frontend.Discard, at+8, 8, 0) })
	local("a write of a part of what is here", func() { q.Put(free, frontend.Write, at+1, 512) })

	store.answer()
	for left := farReads + farWrites; left > 0; {
		must(t, q.Wait())
		for slot, status, ok := q.Take(); ok; slot, status, ok = q.Take() {
			left--
			if status != 0 || slot < farReads && !bytes.Equal(q.Data(slot), stamped(uint64(size/2/block+slot+1))) {
				t.Fatalf("request %d: status %d, %x", slot, status, q.Data(slot)[:8])
			}
		}
	}
	for n := range farWrites {
		g.good(frontend.Read, uint64(n*block/512), block)
		if want := slices.Concat(stamped(uint64(n + 1))[:3*512], stamped(7)[:512], stamped(uint64(n + 1))[4*512:]); !bytes.Equal(q.Data(0), want) {
			t.Fatalf("block %d that was written in part reads as %x", n, q.Data(0)[:2048])
		}
	}
	must(t, w.Stop(ctx))
}

// TestSilentStoreNBD is the same for a client that does not wait for answers.
func TestSilentStoreNBD(t *testing.T) {
	s, ctx, store := starter(t, nil), t.Context(), newFarStore(t)
	w, err := s.Serve(ctx, store.spec(t, blockdev.NBD))
	must(t, err)
	c := dialNBD(t, w.Socket())
	for n := range farReads {
		c.send(uint64(1000+n), 0, size/2+int64(n)*block, block, nil)
	}
	for n := range farWrites / 2 {
		c.send(uint64(2000+n), 1, int64(n)*block+512, 512, stamped(7)[:512])
	}
	waiting(t, w, farReads+farWrites/2)
	const at = 1 << 20
	c.write(at, stamped(5))
	c.flush()
	if !bytes.Equal(c.read(at), stamped(5)) {
		t.Error("what was written reads otherwise")
	}
	c.request(4, at+block, block, nil) // trim
	c.request(6, at+block, block, nil) // zeroes
	store.answer()
	for range farReads + farWrites/2 {
		reply := c.take(16)
		cookie, failed := binary.BigEndian.Uint64(reply[8:]), binary.BigEndian.Uint32(reply[4:])
		if failed != 0 {
			t.Fatalf("request %d: error %d", cookie, failed)
		}
		if n := cookie - 1000; n < farReads && !bytes.Equal(c.take(block), stamped(size/2/block+n+1)) {
			t.Fatalf("block %d of the second half is something else", n)
		}
	}
	for n := range farWrites / 2 {
		if want := slices.Concat(stamped(uint64(n + 1))[:512], stamped(7)[:512], stamped(uint64(n + 1))[1024:]); !bytes.Equal(c.read(int64(n)*block), want) {
			t.Fatalf("block %d that was written in part is something else", n)
		}
	}
	must(t, w.Stop(ctx))
}

// TestStopWhileTheStoreIsSilent: a worker ends though requests wait for its store. A
// virtual machine's come to the next worker, an NBD client's fail.
func TestStopWhileTheStoreIsSilent(t *testing.T) {
	s, ctx, store := starter(t, nil), t.Context(), newFarStore(t)
	spec := store.spec(t, blockdev.VhostUser)
	w, err := s.Serve(ctx, spec)
	must(t, err)
	const reads = 100
	g := newGuest(t, frontend.Options{Depth: reads, Inflight: true})
	must(t, g.f.Connect(w.Socket()))
	q := g.f.Queues[0]
	for n := range reads {
		q.Put(n, frontend.Read, uint64(n*block/512), block)
	}
	must(t, q.Show())
	waiting(t, w, reads)
	must(t, w.Stop(ctx))
	if slot, status, ok := q.Take(); ok {
		t.Errorf("request %d is answered: status %d", slot, status)
	}

	spec.Kind = blockdev.NBD
	w, err = s.Serve(ctx, spec)
	must(t, err)
	c := dialNBD(t, w.Socket())
	c.send(1, 0, 0, block, nil)
	waiting(t, w, 1)
	must(t, w.Stop(ctx))
	if failed := binary.BigEndian.Uint32(c.take(16)[4:]); failed == 0 {
		t.Error("a read that nobody could serve has succeeded")
	}

	store.answer()
	spec.Kind = blockdev.VhostUser
	w, err = s.Serve(ctx, spec)
	must(t, err)
	must(t, g.f.Connect(w.Socket()))
	for left := reads; left > 0; {
		must(t, q.Wait())
		for slot, status, ok := q.Take(); ok; slot, status, ok = q.Take() {
			left--
			if status != 0 || !bytes.Equal(q.Data(slot), stamped(uint64(slot+1))) {
				t.Fatalf("request %d: status %d, %x", slot, status, q.Data(slot)[:8])
			}
		}
	}
	must(t, w.Stop(ctx))
}

// TestTraceOfAFarBase: what earlier volumes of a base wanted is asked for before the rest,
// and in the end the top layer's data is the store's image.
func TestTraceOfAFarBase(t *testing.T) {
	s, ctx, store := starter(t, nil), t.Context(), newFarStore(t)
	spec := store.spec(t, blockdev.VhostUser)
	spec.Hydrate, spec.Trace = true, []int64{7, 5}
	w, err := s.Serve(ctx, spec)
	must(t, err)
	const flights = 4
	for len(store.asked()) < flights {
		runtime.Gosched()
	}
	asked := store.asked()
	slices.Sort(asked)
	want := []string{"bytes=0-1048575", "bytes=1048576-2097151", "bytes=5242880-6291455", "bytes=7340032-8388607"}
	if !slices.Equal(asked, want) {
		t.Errorf("it asks for %v first", asked)
	}
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	q := g.f.Queues[0]
	q.Put(0, frontend.Read, 3<<20/512, block)
	must(t, q.Show())
	waiting(t, w, 1)
	for len(store.asked()) == flights { // a reader does not wait for hydration's connections
		runtime.Gosched()
	}
	if asked := store.asked(); !strings.HasPrefix(asked[flights], "bytes=3145728-") {
		t.Errorf("for a reader it asks for %v", asked[flights:])
	}
	store.answer()
	must(t, q.Wait())
	if _, status, ok := q.Take(); !ok || status != 0 || !bytes.Equal(q.Data(0), stamped(3<<20/block+1)) {
		t.Errorf("status %d, %x", status, q.Data(0)[:8])
	}
	hydrated(t, w, nil)
	trace, err := w.Trace(ctx)
	must(t, err)
	if !slices.Equal(trace, []int64{3}) {
		t.Errorf("the trace is %v", trace)
	}
	must(t, w.Stop(ctx))
	if got, err := os.ReadFile(spec.Layers[0].Data.Name()); err != nil || !bytes.Equal(got, store.image) {
		t.Errorf("the top layer is not the store's image: %v", err)
	}
}
