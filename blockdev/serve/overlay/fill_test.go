package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/blockdev/serve/overlay"
)

// farBase opens a base whose readers are answered by fetch and whose hydration is by
// bulk.
func farBase(t *testing.T, m memory, fetch, bulk overlay.Fetch) *overlay.Remote {
	t.Helper()
	r, err := overlay.NewRemote(chunksOf(m), fetch, overlay.RemoteOptions{Bulk: bulk})
	must(t, err)
	t.Cleanup(r.Close)
	return r
}

// from answers with what is there.
func (m memory) from(_ context.Context, p []byte, off int64) error {
	_, err := m.ReadAt(p, off)
	return err
}

func silent(ctx context.Context, _ []byte, _ int64) error { <-ctx.Done(); return ctx.Err() }

// TestSeveralRangesAtOnce: hydration asks for four ranges before it has one, and for no
// more; what it brings is the base, and none of it is fetched for readers.
func TestSeveralRangesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := make(memory, 9<<20)
		for at := range m {
			m[at] = byte(at>>12 | 1)
		}
		var underway, most, asked atomic.Int64
		answers := make(chan struct{})
		r := farBase(t, m, silent, func(ctx context.Context, p []byte, off int64) error {
			most.Store(max(most.Load(), underway.Add(1)))
			defer underway.Add(-1)
			asked.Add(int64(len(p)))
			select {
			case <-answers:
			case <-ctx.Done():
				return ctx.Err()
			}
			return m.from(ctx, p, off)
		})
		d := &disk{}
		top := d.layer()
		must(t, overlay.Create(top, m.Size()))
		v, err := overlay.Open([]overlay.Files{top}, r)
		must(t, err)
		done := make(chan error)
		go func() { done <- overlay.NewHydrator(v, nil, nil).Run(t.Context()) }()
		synctest.Wait()
		if n := underway.Load(); n != 4 {
			t.Errorf("%d ranges are under way", n)
		}
		close(answers)
		must(t, <-done)
		if most.Load() != 4 || asked.Load() != m.Size() {
			t.Errorf("%d at once, %d of %d bytes", most.Load(), asked.Load(), m.Size())
		}
		got := make([]byte, m.Size())
		_, err = top.Data.ReadAt(got, 0)
		must(t, err)
		if !bytes.Equal(got, m) {
			t.Error("it is something else than the base")
		}
	})
}

// TestHydrationEndsWithItsContext: while the store is silent, or fails, a run ends when
// it is told to.
func TestHydrationEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := remoteBase()
		for _, bulk := range []overlay.Fetch{silent, func(context.Context, []byte, int64) error { return errors.New("down") }} {
			d := &disk{}
			top := d.layer()
			must(t, overlay.Create(top, 64*chunk))
			v, err := overlay.Open([]overlay.Files{top}, farBase(t, m, silent, bulk))
			must(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			if err := overlay.NewHydrator(v, nil, nil).Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("it ends with %v", err)
			}
		}
	})
}

// TestReadersGoFirst: hydration asks for nothing while a reader waits, for a while; and
// a reader whose own fetch is slow has what hydration brings.
func TestReadersGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := remoteBase()
		var asked atomic.Int64
		r := farBase(t, m, silent, func(ctx context.Context, p []byte, off int64) error {
			asked.Add(1)
			return m.from(ctx, p, off)
		})
		got := make([]byte, 3*block)
		var reader sync.WaitGroup
		reader.Go(func() {
			if _, err := r.ReadAt(got, chunk-block); err != nil { // of two chunks
				t.Error(err)
			}
		})
		synctest.Wait()
		filled := make([]byte, 5*chunk)
		go func() {
			if err := r.Fill(t.Context(), filled, 0); err != nil {
				t.Error(err)
			}
		}()
		synctest.Wait()
		if n := asked.Load(); n != 0 {
			t.Errorf("hydration has asked %d times while a reader waits", n)
		}
		reader.Wait() // time passes
		synctest.Wait()
		if !bytes.Equal(got, m[chunk-block:chunk+2*block]) {
			t.Error("the reader has something else than the base")
		}
		if !bytes.Equal(filled, m[:5*chunk]) {
			t.Error("what was filled in is something else than the base")
		}
		if n := asked.Load(); n != 2 { // around a chunk of zeroes
			t.Errorf("hydration has asked %d times", n)
		}
	})
}

// TestFillIsVerified: what is not the base is asked for again, whatever was there before.
func TestFillIsVerified(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := remoteBase()
		var asked int
		r := farBase(t, m, silent, func(ctx context.Context, p []byte, off int64) error {
			err := m.from(ctx, p, off)
			if asked++; asked <= 3 {
				p[len(p)-1] ^= 1
			}
			return err
		})
		for _, c := range []struct{ off, n int64 }{{3 * chunk, 2 * chunk}, {40 * chunk, m.Size() - 40*chunk}, {chunk, chunk}} {
			got := bytes.Repeat([]byte{9}, int(c.n))
			must(t, r.Fill(t.Context(), got, c.off))
			if !bytes.Equal(got, m[c.off:c.off+c.n]) {
				t.Errorf("%d bytes at %d are something else than the base", c.n, c.off)
			}
		}
		if asked != 6 || r.Status().Err != nil {
			t.Errorf("asked %d times, %+v", asked, r.Status())
		}
	})
}
