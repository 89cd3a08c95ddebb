package overlay_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

const chunk = 16 * block

// chunksOf digests a base.
func chunksOf(m memory) overlay.Chunks {
	var sums []byte
	for off := 0; off < len(m); off += chunk {
		p := m[off:min(off+chunk, len(m))]
		var digest [32]byte
		if !bytes.Equal(p, make([]byte, len(p))) {
			digest = sha256.Sum256(p)
		}
		sums = append(sums, digest[:]...)
	}
	return overlay.Chunks{Size: m.Size(), Chunk: chunk, Digests: bytes.NewReader(sums)}
}

func remoteBase() memory {
	r := rand.New(rand.NewPCG(5, 5))
	m := make(memory, 40*chunk+5*block+1024)
	for c := range 41 {
		if c%5 != 2 {
			fill(r, m[c*chunk:min((c+1)*chunk, len(m))])
		}
	}
	return m
}

func openRemote(t *testing.T, m memory, fetch overlay.Fetch) *overlay.Remote {
	t.Helper()
	r, err := overlay.NewRemote(chunksOf(m), fetch, overlay.RemoteOptions{Cache: 4 * chunk})
	must(t, err)
	t.Cleanup(r.Close)
	return r
}

// TestRemoteReadsAsItIs: any range, by many at once, each chunk verified and few
// fetched twice.
func TestRemoteReadsAsItIs(t *testing.T) {
	m := remoteBase()
	var fetched atomic.Int64
	r := openRemote(t, m, func(_ context.Context, p []byte, off int64) error {
		fetched.Add(1)
		_, err := m.ReadAt(p, off)
		return err
	})
	var readers sync.WaitGroup
	for seed := range uint64(8) {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 2))
			for range 100 {
				off := rnd.Int64N(m.Size())
				p := make([]byte, min(1+rnd.Int64N(6*chunk), m.Size()-off))
				if _, err := r.ReadAt(p, off); err != nil || !bytes.Equal(p, m[off:off+int64(len(p))]) {
					t.Errorf("%d bytes at %d: %v", len(p), off, err)
				}
			}
		})
	}
	readers.Wait()
	before := fetched.Load()
	for range 10 {
		if _, err := r.ReadAt(make([]byte, block), 3*chunk); err != nil {
			t.Error(err)
		}
	}
	if n := fetched.Load() - before; n > 1 {
		t.Errorf("ten reads of one chunk fetch %d times", n)
	}
	var data int64
	for off := int64(0); ; {
		from, to, err := r.Next(off)
		if err != nil {
			break
		}
		data += to - from
		off = to
	}
	if want := m.Size() - 8*chunk; data != want {
		t.Errorf("%d bytes are told to be data, want %d", data, want)
	}
}

// TestRemoteIsAskedForEver: failures, lies and silence make a reader wait; it gets
// the right bytes in the end and never others, and Status tells meanwhile.
func TestRemoteIsAskedForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := remoteBase()
		broken := errors.New("no route to the store")
		answers := []func(ctx context.Context, p []byte) error{
			func(context.Context, []byte) error { return broken },
			func(_ context.Context, p []byte) error { p[100] ^= 1; return nil }, // one bit
			func(_ context.Context, p []byte) error { clear(p); return nil },
			func(ctx context.Context, _ []byte) error { <-ctx.Done(); return ctx.Err() }, // silence
		}
		var tries int
		r := openRemote(t, m, func(ctx context.Context, p []byte, off int64) error {
			_, _ = m.ReadAt(p, off)
			tries++
			if tries <= 20 {
				return answers[tries%len(answers)](ctx, p)
			}
			return nil
		})
		got := make(chan []byte)
		go func() {
			p := make([]byte, 3*block)
			if _, err := r.ReadAt(p, chunk+block); err != nil {
				t.Error(err)
			}
			got <- p
		}()
		time.Sleep(time.Minute) // of the bubble's clock
		if s := r.Status(); s.Failing.IsZero() || s.Tries == 0 || s.Err == nil {
			t.Errorf("while the store fails its status is %+v", s)
		}
		if p := <-got; !bytes.Equal(p, m[chunk+block:chunk+4*block]) {
			t.Error("the reader got something else than the base")
		}
		if s := r.Status(); !s.Failing.IsZero() || s.Err != nil || s.Fetched != chunk {
			t.Errorf("afterwards its status is %+v", s)
		}
	})
}

// TestRemoteCloses: who waits gets an error, and nothing goes on.
func TestRemoteCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := remoteBase()
		r := openRemote(t, m, func(context.Context, []byte, int64) error { return errors.New("down") })
		go func() {
			time.Sleep(time.Hour)
			r.Close()
		}()
		if _, err := r.ReadAt(make([]byte, block), 0); !errors.Is(err, overlay.ErrClosed) {
			t.Errorf("a read of a closed source: %v", err)
		}
	})
}

// TestRemoteOverHTTP: stores that answer a range wrongly are refused.
func TestRemoteOverHTTP(t *testing.T) {
	m := remoteBase()
	var turn atomic.Int64
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch turn.Add(1) {
		case 1:
			http.Error(w, "busy", http.StatusServiceUnavailable)
		case 2: // all of it, as a store without ranges
			_, _ = w.Write(m)
		case 3:
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", block-1, len(m)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(m[:block])
		case 4: // short
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", chunk, 2*chunk-1, len(m)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(m[chunk : chunk+block])
		default:
			http.ServeContent(w, r, "image", time.Time{}, bytes.NewReader(m))
		}
	}))
	t.Cleanup(store.Close)
	fetch := overlay.HTTPFetch(store.Client(), store.URL)
	p := make([]byte, chunk)
	for n := range 4 {
		if err := fetch(t.Context(), p, chunk); err == nil || !strings.Contains(err.Error(), "the store's answer is of no use") {
			t.Errorf("answer %d of the store: %v", n+1, err)
		}
	}
	turn.Store(0)
	r := openRemote(t, m, fetch)
	got := make([]byte, 2*chunk)
	if _, err := r.ReadAt(got, chunk/2); err != nil || !bytes.Equal(got, m[chunk/2:chunk/2+2*chunk]) {
		t.Errorf("over a store that recovers: %v", err)
	}
}

// TestHydrateFromFarAway: a volume is usable at once, what is missed comes first,
// whole overwrites fetch nothing, and in the end the store is not needed.
func TestHydrateFromFarAway(t *testing.T) {
	m := remoteBase()
	var mu sync.Mutex
	var order []int64
	r := openRemote(t, m, func(_ context.Context, p []byte, off int64) error {
		mu.Lock()
		defer mu.Unlock()
		order = append(order, off/chunk)
		_, err := m.ReadAt(p, off)
		return err
	})
	size := (m.Size() + 30*block) / block * block
	d := &disk{}
	top := d.layer()
	must(t, overlay.Create(top, size))
	v, err := overlay.Open([]overlay.Files{top}, r)
	must(t, err)
	want := newModel(m, size)
	p := make([]byte, 4*chunk)
	fill(rand.New(rand.NewPCG(3, 1)), p)
	_, err = v.WriteAt(p, 8*chunk) // whole blocks
	must(t, err)
	want.wrote(p, 8*chunk)
	if len(order) != 0 {
		t.Errorf("a full overwrite fetches %v", order)
	}
	h := overlay.NewHydrator(v, nil, nil)
	_, err = v.ReadAt(make([]byte, block), 35*chunk)
	must(t, err)
	must(t, h.Run(t.Context()))
	if order[0] != 35 {
		t.Errorf("what was missed is not fetched first: %v", order[:4])
	}
	if slices.ContainsFunc(order, func(c int64) bool { return c%5 == 2 }) {
		t.Error("chunks of zeroes are fetched")
	}
	if got := h.Trace(); len(got) != 1 || got[0] != 35*chunk>>20 {
		t.Errorf("the trace is %v", got)
	}
	plain := make([]byte, size)
	_, err = top.Data.ReadAt(plain, 0)
	must(t, err)
	if !bytes.Equal(plain, want.now) {
		t.Error("the top layer's data is not the volume")
	}
	d.restart(rand.New(rand.NewPCG(3, 2)))
	v, err = overlay.Open([]overlay.Files{top}, nil)
	must(t, err)
	want.same(t, v)
}

func TestRemoteRefuses(t *testing.T) {
	m := remoteBase()
	for name, spoil := range map[string]func(*overlay.Chunks){
		"no size":         func(c *overlay.Chunks) { c.Size = 0 },
		"too large":       func(c *overlay.Chunks) { c.Size = 1 << 50 },
		"odd chunks":      func(c *overlay.Chunks) { c.Chunk = 3 * block },
		"small chunks":    func(c *overlay.Chunks) { c.Chunk = 512 },
		"large chunks":    func(c *overlay.Chunks) { c.Chunk = 1 << 30 },
		"no digests":      func(c *overlay.Chunks) { c.Digests = nil },
		"negative chunks": func(c *overlay.Chunks) { c.Chunk = -chunk },
	} {
		c := chunksOf(m)
		spoil(&c)
		if _, err := overlay.NewRemote(c, nil, overlay.RemoteOptions{}); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSilentStore: while a store is silent only who needs its bytes waits: not
// writers of whole blocks, not a seal, not who reads what is here.
func TestSilentStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := remoteBase()
		answers := make(chan struct{})
		r := openRemote(t, m, func(ctx context.Context, p []byte, off int64) error {
			select {
			case <-answers:
				_, err := m.ReadAt(p, off)
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		size := (m.Size() + block) / block * block
		d := &disk{}
		top, next := d.layer(), d.layer()
		must(t, errors.Join(overlay.Create(top, size), overlay.Create(next, size)))
		v, err := overlay.Open([]overlay.Files{top}, r)
		must(t, err)
		want := newModel(m, size)
		half := bytes.Repeat([]byte{5}, block/2)
		want.wrote(half, 3*chunk+block/2)
		var waiting sync.WaitGroup
		waiting.Go(func() {
			if _, err := v.WriteAt(half, 3*chunk+block/2); err != nil {
				t.Error(err)
			}
		})
		got := make([]byte, block)
		waiting.Go(func() {
			if _, err := v.ReadAt(got, 5*chunk); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if !v.Absent(5*chunk, block) || v.Absent(2*chunk, block) {
			t.Error("what is absent is not told from zeroes")
		}
		p := bytes.Repeat([]byte{6}, 2*block)
		write := func(off int64) {
			t.Helper()
			_, err := v.WriteAt(p, off)
			must(t, err)
			want.wrote(p, off)
			if v.Absent(off, int64(len(p))) {
				t.Error("what was written is absent")
			}
		}
		write(chunk)
		must(t, v.Seal(next, func() error { return nil }))
		write(chunk + block)
		must(t, v.Sync())
		close(answers)
		waiting.Wait()
		if !bytes.Equal(got, m[5*chunk:5*chunk+block]) {
			t.Error("a read that waited has other bytes")
		}
		want.same(t, v)
	})
}

// TestRemoteHasRoomForFew: of many readers whose chunks have to be fetched few have room
// for them at a time, and none keeps it while its chunk fails.
func TestRemoteHasRoomForFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := remoteBase()
		var now, most atomic.Int64
		var good atomic.Bool
		r := openRemote(t, m, func(_ context.Context, p []byte, off int64) error {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			time.Sleep(time.Millisecond)
			if off < 32*chunk && !good.Load() {
				return errors.New("these fail")
			}
			_, err := m.ReadAt(p, off)
			return err
		})
		var readers sync.WaitGroup
		read := func(c int64) {
			p := make([]byte, block)
			if _, err := r.ReadAt(p, c*chunk); err != nil || !bytes.Equal(p, m[c*chunk:c*chunk+block]) {
				t.Errorf("chunk %d: %v", c, err)
			}
		}
		for c := range int64(32) {
			readers.Go(func() { read(c) })
		}
		time.Sleep(time.Minute) // of this bubble
		read(35)
		good.Store(true)
		readers.Wait()
		if n := most.Load(); n != 16 {
			t.Errorf("%d fetches at a time", n)
		}
	})
}
