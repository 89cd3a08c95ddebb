package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/vhost/frontend"
)

// layer makes an empty one of the volume's size.
func layer(t testing.TB) control.Layer { t.Helper(); return layerOf(t, size) }

func layerOf(t testing.TB, size int64) control.Layer {
	t.Helper()
	dir := t.TempDir()
	create := func(name string, flags int) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, filepath.Base(filepath.Dir(dir))+name), os.O_RDWR|os.O_CREATE|flags, 0o600)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	l := control.Layer{Data: create("data", syscall.O_DIRECT), Map: create("map", 0)}
	must(t, overlay.Create(overlay.Files{Data: overlay.OSFile{File: l.Data}, Map: overlay.OSFile{File: l.Map}}, size))
	return l
}

// stack is what the daemon has recorded: the top first.
type stack []control.Layer

func (s *stack) seal(l control.Layer) func() error {
	return func() error { *s = append(stack{l}, *s...); return nil }
}

// without is the record of a merge that takes layer i out.
func (s *stack) without(i int) func() error {
	return func() error { *s = append(append(stack{}, (*s)[:i]...), (*s)[i+1:]...); return nil }
}

// merge makes two layers one: upwards, or downwards in slices below the top.
func (s *stack) merge(t *testing.T, w *control.Worker, down bool) {
	t.Helper()
	if !down {
		_, err := w.Merge(t.Context(), control.Merge{}, s.without(1))
		must(t, err)
		return
	}
	lower := (*s)[2]
	for done := false; !done; {
		var err error
		done, err = w.Merge(t.Context(), control.Merge{Layer: 1, Down: &lower, Most: 1}, s.without(1))
		must(t, err)
	}
}

// TestLayersUnderLoad: a flat volume gets layers on top, loses some and grows under a
// virtual machine's load; no request fails, and the recorded stack is the volume.
func TestLayersUnderLoad(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	spec := flat(t, blockdev.VhostUser)
	w, err := s.Serve(ctx, spec)
	must(t, err)
	l := newLoad(t)
	l.connect(w.Socket())
	var layers stack
	turn, most := 0, time.Duration(0)
	l.run(3000, func(done int) {
		if done < 200*(turn+1) {
			return
		}
		if turn++; turn%3 == 0 {
			layers.merge(t, w, turn%2 == 0 && len(layers) > 2)
			return
		}
		next := layer(t)
		held, err := w.Seal(ctx, next, layers.seal(next))
		must(t, err)
		most = max(most, held)
	})
	l.good(frontend.Flush, 0, 0)
	st, err := w.Status(ctx)
	must(t, err)
	if st.Layers == nil || st.Layers.Sealed != len(layers)-1 || len(layers) < 4 || st.Failed != "" {
		t.Errorf("%d layers, %+v, %q", len(layers), st.Layers, st.Failed)
	}
	t.Logf("%d turns, requests held for %v at most", turn, most)
	must(t, w.Grow(ctx, 2*size))
	l.good(frontend.Write, 2*size/512-8, block)
	l.verify()
	must(t, w.Stop(ctx))

	spec = control.Spec{ID: volumeID, Kind: blockdev.VhostUser, Size: 2 * size, Layers: layers, Base: spec.Flat, BaseSize: size}
	w, err = s.Serve(ctx, spec)
	must(t, err)
	l.connect(w.Socket())
	l.verify()
	must(t, w.Stop(ctx))
}

// TestSealThatIsNotRecorded: the volume goes on as it was. Where nobody knows what is
// recorded it fails, says so, and so does its end.
func TestSealThatIsNotRecorded(t *testing.T) {
	for _, layered := range []bool{false, true} {
		s, ctx := starter(t, nil), t.Context()
		spec := flat(t, blockdev.VhostUser)
		w, err := s.Serve(ctx, spec)
		must(t, err)
		g := newGuest(t, frontend.Options{})
		must(t, g.f.Connect(w.Socket()))
		g.good(frontend.Write, 0, block)
		if layered {
			_, err := w.Seal(ctx, layer(t), func() error { return nil })
			must(t, err)
		}
		for _, why := range []error{errors.New("no ink"), fmt.Errorf("%w: torn paper", blockdev.ErrFailed)} {
			failed := errors.Is(why, blockdev.ErrFailed)
			_, err := w.Seal(ctx, layer(t), func() error { return why })
			if err == nil || !strings.Contains(err.Error(), why.Error()) || errors.Is(err, blockdev.ErrFailed) != failed {
				t.Errorf("layered %v: sealed: %v", layered, err)
			}
			for _, kind := range []uint32{frontend.Write, frontend.Flush} {
				if acknowledged := g.do(kind, 0, block*int(1-kind/frontend.Flush)) == 0; acknowledged == failed {
					t.Errorf("layered %v: after %v request %d is acknowledged: %v", layered, why, kind, acknowledged)
				}
			}
			g.good(frontend.Read, 0, block)
			st, err := w.Status(ctx)
			must(t, err)
			if (st.Failed != "") != failed || (st.Layers != nil) != layered {
				t.Errorf("layered %v: failed: %q, %+v", layered, st.Failed, st.Layers)
			}
		}
		if err := w.Stop(ctx); !errors.Is(err, blockdev.ErrFailed) {
			t.Errorf("layered %v: ended: %v", layered, err)
		}
	}
}

// TestLayersOverNBD: a client of a flat volume sees one disk while layers come, also in
// a worker that begins with them; a new size is seen by the next connection.
func TestLayersOverNBD(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	spec := flat(t, blockdev.NBD)
	w, err := s.Serve(ctx, spec)
	must(t, err)
	c := dialNBD(t, w.Socket())
	var layers stack
	for n := range 4 {
		c.write(int64(n)*block, stamped(uint64(n+1)))
		next := layer(t)
		_, err := w.Seal(ctx, next, layers.seal(next))
		must(t, err)
		for k := range n + 1 {
			if got := c.read(int64(k) * block); !bytes.Equal(got, stamped(uint64(k+1))) {
				t.Fatalf("block %d reads as %x after seal %d", k, got[:8], n)
			}
		}
	}
	c.flush()
	st, err := w.Status(ctx)
	must(t, err)
	if st.Clients != 1 || st.Meter.Kinds[meter.Write].Bytes != 4*block {
		t.Errorf("%d clients, %+v", st.Clients, st.Meter.Kinds[meter.Write])
	}
	must(t, w.Grow(ctx, 2*size))
	if c := dialNBD(t, w.Socket()); c.size != 2*size {
		t.Errorf("a new client sees %d bytes", c.size)
	}
	must(t, w.Stop(ctx))
	w, err = s.Serve(ctx, control.Spec{ID: volumeID, Kind: blockdev.NBD, Size: 2 * size, Layers: layers, Base: spec.Flat, BaseSize: size, ReadOnly: true})
	must(t, err)
	c = dialNBD(t, w.Socket())
	for k := range 4 {
		if got := c.read(int64(k) * block); !bytes.Equal(got, stamped(uint64(k+1))) {
			t.Errorf("block %d reads as %x", k, got[:8])
		}
	}
	must(t, w.Stop(ctx))
}

// base is an image with something in every other 64 KiB.
func base(t testing.TB) *os.File {
	t.Helper()
	f := image(t, size)
	plain, err := os.OpenFile(f.Name(), os.O_RDWR, 0)
	must(t, err)
	defer plain.Close()
	for off := int64(0); off < size; off += 128 << 10 {
		_, err := plain.WriteAt(stamped(uint64(off)+1), off)
		must(t, err)
	}
	must(t, plain.Sync())
	return f
}

// hydrated asks until the top layer holds everything.
func hydrated(t *testing.T, w *control.Worker, each func(serve.Hydration)) {
	t.Helper()
	for {
		st, err := w.Status(t.Context())
		must(t, err)
		if each != nil {
			each(*st.Layers)
		}
		if st.Layers.Held == size {
			return
		}
	}
}

func sameBytes(t *testing.T, a, b *os.File) {
	t.Helper()
	left, err := os.ReadFile(a.Name())
	must(t, err)
	right, err := os.ReadFile(b.Name())
	must(t, err)
	if !bytes.Equal(left, right) {
		t.Error("the top layer is not the volume")
	}
}

// TestHydration: the base comes up by itself and the top layer's data is the volume.
func TestHydration(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	top, b := layer(t), base(t)
	w, err := s.Serve(ctx, control.Spec{ID: volumeID, Kind: blockdev.VhostUser, Size: size, Layers: []control.Layer{top}, Base: b, BaseSize: size, Hydrate: true, Trace: []int64{5, 1 << 40, -1}})
	must(t, err)
	hydrated(t, w, nil)
	must(t, w.Stop(ctx))
	sameBytes(t, top.Data, b)
}

// TestHydrationFromFarAway: while the store fails readers wait and it is told; what it
// has is fetched verified, by a worker that has the network and nothing else.
func TestHydrationFromFarAway(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	top, b := layer(t), base(t)
	plain, err := os.Open(b.Name())
	must(t, err)
	defer plain.Close()
	var broken atomic.Bool
	broken.Store(true)
	store := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if broken.Load() {
			rw.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		http.ServeContent(rw, r, "", time.Time{}, io.NewSectionReader(plain, 0, size))
	}))
	defer store.Close()
	chunks, err := overlay.Digest(overlay.NewImage(plain, size), 64<<10)
	must(t, err)
	digests, err := os.Create(filepath.Join(t.TempDir(), "digests"))
	must(t, err)
	defer digests.Close()
	must(t, overlay.WriteChunks(digests, chunks))
	w, err := s.Serve(ctx, control.Spec{
		ID: volumeID, Kind: blockdev.VhostUser, Size: size, Layers: []control.Layer{top}, Hydrate: true,
		Remote: &control.Remote{URL: strings.Replace(store.URL, "127.0.0.1", "localhost", 1), Chunks: digests},
	})
	must(t, err)
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	q := g.f.Queues[0]
	q.Put(0, frontend.Read, 0, block)
	must(t, q.Show())
	told := false
	hydrated(t, w, func(h serve.Hydration) {
		if !told && h.Tries > 0 {
			told = strings.Contains(h.Reason, "503") && !h.FailingSince.IsZero()
			broken.Store(false)
		}
	})
	must(t, q.Wait())
	if _, status, ok := q.Take(); !ok || status != 0 || !bytes.Equal(q.Data(0), stamped(1)) {
		t.Errorf("status %d, %t, %x", status, ok, q.Data(0)[:8])
	}
	trace, err := w.Trace(ctx)
	must(t, err)
	if !told || len(trace) == 0 || trace[0] != 0 {
		t.Errorf("told %t, trace %v", told, trace)
	}
	must(t, w.Stop(ctx))
	sameBytes(t, top.Data, b)
}
