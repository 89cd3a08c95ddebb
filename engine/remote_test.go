package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/serve"
)

// farPool is a pool whose workers say how their store does.
type farPool struct {
	*blockdevtest.Memory
	failing time.Time
}

func (p *farPool) Observe(ctx context.Context, id blockdev.ID) (serve.Service, error) {
	s, err := p.Memory.Observe(ctx, id)
	if s.Layers != nil {
		s.Layers.FailingSince = p.failing
	}
	return s, err
}

// createFar makes the volume v, with nothing said but its template.
func createFar(t *testing.T, w *world) {
	t.Helper()
	if _, err := w.engine.CreateVolume(t.Context(), CreateVolume{Workspace: space, Name: "v", Template: "far:1"}); err != nil {
		t.Fatal(err)
	}
}

func hydrationEvents(t *testing.T, w *world, name string) (texts []string) {
	t.Helper()
	for _, e := range layeredVolume(t, w, name).Events {
		if e.Type == "hydration" {
			texts = append(texts, e.Message)
		}
	}
	return texts
}

func expectEvents(t *testing.T, w *world, name string, want ...string) {
	t.Helper()
	got := hydrationEvents(t, w, name)
	if !slices.EqualFunc(got, want, strings.Contains) {
		t.Fatalf("events of hydration: %q, want %q", got, want)
	}
}

// TestRemoteVolume: it takes the size and the filesystem of what was published, tells
// when its store fails for long, when that is back, and when it is whole; also over
// restarts, each once.
func TestRemoteVolume(t *testing.T) {
	w := newLayeredWorld(t)
	pool := &farPool{Memory: w.pool}
	w.engine.o.Pool = pool
	createFar(t, w)
	if v := layeredVolume(t, w, "v"); v.SizeMiB != 20 || v.Filesystem != filesystem.Ext4 || !v.Remote {
		t.Errorf("%+v", v)
	}
	expectEvents(t, w, "v", "fetched as they are wanted")
	attachTo(t, w, "v", "socket", "box", false)
	look := func(failing time.Duration) {
		t.Helper()
		pool.failing = time.Time{}
		if failing > 0 {
			pool.failing = w.engine.now().Add(-failing)
		}
		if err := w.engine.tend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	look(awaitedLong - time.Second)
	expectEvents(t, w, "v", "fetched")
	look(awaitedLong)
	look(2 * awaitedLong)
	w.restart(false)
	w.engine.o.Pool = pool
	look(3 * awaitedLong)
	expectEvents(t, w, "v", "fetched", "does not answer since")
	look(0)
	look(0)
	expectEvents(t, w, "v", "fetched", "does not answer since", "answers again")
	do1(t, w, detachOp("v", "box"))
	if err := w.pool.Flatten(t.Context(), layeredVolume(t, w, "v").ID); err != nil {
		t.Fatal(err)
	}
	look(0)
	look(0)
	expectEvents(t, w, "v", "fetched", "does not answer since", "answers again", "All its blocks")
	if v := layeredVolume(t, w, "v"); v.Remote || v.Awaiting != nil {
		t.Errorf("it is whole, and %+v", v)
	}
}

// TestRemoteVolumeGrows: one that is larger than its image is there at once, and its
// filesystem grows when it is whole.
func TestRemoteVolumeGrows(t *testing.T) {
	w := newLayeredWorld(t)
	w.engine.o.FlattenWait = 1 // is over at once: nobody waits in a create
	do1(t, w, createOp("v", "far:1", "", 64))
	v := layeredVolume(t, w, "v")
	if s := sizesOf(t, w, v); s.Device != 64<<20 || s.Filesystem != 20<<20 || s.Pending != pendingFlat || s.Hydration == nil {
		t.Errorf("%+v", s)
	}
	w.restart(false)
	if s := sizesOf(t, w, v); s.Pending != pendingFlat {
		t.Errorf("after a restart: %+v", s)
	}
	w.engine.o.FlattenWait = time.Minute
	for range 2 {
		if err := w.engine.tend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if s := sizesOf(t, w, v); s.Filesystem != 64<<20 || s.Pending != "" || s.Hydration != nil {
		t.Errorf("when it is whole: %+v", s)
	}
	for _, c := range []struct {
		fs   string
		size int64
		what string
	}{{"", 10, "needs 20 MB"}, {"xfs", 300, "holds ext4"}} {
		if err := createOp("no", "far:1", c.fs, c.size).do(w); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.what) {
			t.Errorf("filesystem %q, %d MB: %v", c.fs, c.size, err)
		}
	}
}

// stuck are bytes that do not come until the context of their opening ends.
type stuck struct {
	blockdev.Bytes
	ctx context.Context
}

func (s stuck) ReadAt([]byte, int64) (int, error) { <-s.ctx.Done(); return 0, context.Cause(s.ctx) }

type stuckPool struct{ *blockdevtest.Memory }

func (p stuckPool) Access(ctx context.Context, id blockdev.ID, readOnly bool) (blockdev.Bytes, error) {
	b, err := p.Memory.Access(ctx, id, readOnly)
	return stuck{b, ctx}, err
}

// TestSilentStoreHoldsNoLock: who reads files of a volume whose store is silent is told
// so, and the volume can be deleted.
func TestSilentStoreHoldsNoLock(t *testing.T) {
	w := newLayeredWorld(t)
	createFar(t, w)
	w.engine.o.Pool, w.engine.o.FlattenWait = stuckPool{w.pool}, time.Millisecond
	if _, err := w.engine.ListDir(t.Context(), space, "v", "/"); !errors.Is(err, blockdev.ErrLayered) || !strings.Contains(err.Error(), "is being hydrated") {
		t.Errorf("its files: %v", err)
	}
	w.engine.o.Pool = w.pool
	do1(t, w, deleteOp("v"))
}
