package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/blockdev/serve/overlay"
)

// TestMoved: readers and hydration that wait for an answer, or for the next try, of a
// store that has moved have their bytes from the new address at once.
func TestMoved(t *testing.T) {
	for name, old := range map[string]overlay.Fetch{
		"silent":  func(ctx context.Context, _ []byte, _ int64) error { <-ctx.Done(); return ctx.Err() },
		"failing": func(context.Context, []byte, int64) error { return errors.New("it is not here any more") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := remoteBase()
				var moved atomic.Bool
				r, err := overlay.NewRemote(chunksOf(m), func(ctx context.Context, p []byte, off int64) error {
					if !moved.Load() {
						return old(ctx, p, off)
					}
					copy(p, m[off:])
					return nil
				}, overlay.RemoteOptions{Try: time.Hour})
				must(t, err)
				defer r.Close()
				done := make(chan error, 2)
				read, filled := make([]byte, chunk), make([]byte, chunk)
				go func() { _, err := r.ReadAt(read, chunk); done <- err }()
				go func() { done <- r.Fill(t.Context(), filled, 5*chunk) }()
				time.Sleep(10 * time.Minute) // pauses between tries have their greatest length
				synctest.Wait()
				if s := r.Status(); name == "failing" && (s.Failing.IsZero() || s.Err == nil) {
					t.Errorf("before: %+v", s)
				}
				begin := time.Now()
				moved.Store(true)
				r.Moved()
				for range 2 {
					must(t, <-done)
				}
				if took := time.Since(begin); took > 0 {
					t.Errorf("it took %s", took)
				}
				if !bytes.Equal(read, m[chunk:2*chunk]) || !bytes.Equal(filled, m[5*chunk:6*chunk]) {
					t.Error("other bytes")
				}
				if s := r.Status(); !s.Failing.IsZero() || s.Err != nil || s.Fetched != 2*chunk {
					t.Errorf("after: %+v", s)
				}
			})
		})
	}
}
