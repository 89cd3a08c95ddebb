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

// TestRemoteFork: a fork of a volume that is not whole tells the same of its blocks as
// the volume does, also over a restart; one of a volume that is whole tells nothing.
func TestRemoteFork(t *testing.T) {
	w := newLayeredWorld(t)
	createFar(t, w)
	w.pool.MakeRemote(layeredVolume(t, w, "v").ID)
	look := func() {
		t.Helper()
		if err := w.engine.tend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	forkOf := func(snapshot, name string) {
		t.Helper()
		if _, err := w.engine.CreateSnapshot(t.Context(), CreateSnapshot{Workspace: space, Volume: "v", Name: snapshot}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.engine.CreateVolume(t.Context(), CreateVolume{Workspace: space, Name: name, Snapshot: "v/" + snapshot}); err != nil {
			t.Fatal(err)
		}
	}
	forkOf("early", "f")
	if v := layeredVolume(t, w, "f"); !v.Remote {
		t.Errorf("%+v", v)
	}
	expectEvents(t, w, "f", "fetched as they are wanted")
	look()
	w.restart(false)
	look()
	expectEvents(t, w, "f", "fetched")
	if s := sizesOf(t, w, layeredVolume(t, w, "f")); s.Hydration == nil || s.Hydration.Absent == 0 {
		t.Errorf("%+v", s.Hydration)
	}
	for _, name := range []string{"f", "v"} {
		if err := w.pool.Flatten(t.Context(), layeredVolume(t, w, name).ID); err != nil {
			t.Fatal(err)
		}
	}
	look()
	expectEvents(t, w, "f", "fetched", "All its blocks")
	forkOf("late", "g")
	if v := layeredVolume(t, w, "g"); v.Remote {
		t.Errorf("a fork of one that is whole: %+v", v)
	}
	expectEvents(t, w, "g")
}

// TestRemoteMove: of a volume that is not whole the blocks are fetched, it tells so, and
// what a move waits for; then it moves.
func TestRemoteMove(t *testing.T) {
	w := newLayeredWorld(t)
	w.second = blockdevtest.NewMemory()
	w.second.Failpoint = func(point string) error { return w.point(secondPool + " " + point) }
	w.restart(false)
	createFar(t, w)
	w.pool.MakeRemote(layeredVolume(t, w, "v").ID)
	away := true
	w.pool.Failpoint = func(point string) error {
		if point == "before flatten" && away {
			return blockdev.ErrUnreachable
		}
		return w.point(point)
	}
	v, err := w.engine.MoveVolume(t.Context(), space, "v", secondPool, "tester")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.engine.tend(t.Context()); !errors.Is(err, blockdev.ErrUnreachable) {
		t.Fatalf("with a store that is away: %v", err)
	}
	if v, _ = w.engine.catalog.get(v.ID); v.Move == nil || !strings.Contains(v.Move.Failure, "store of its blocks") || !v.Remote {
		t.Errorf("with a store that is away: %+v", v.Move)
	}
	expectEvents(t, w, "v", "fetched")
	away = false
	for range 2 {
		if err := w.engine.tend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if v, _ = w.engine.catalog.get(v.ID); v.Move != nil || v.Pool != secondPool || v.Remote {
		t.Errorf("moved: %+v", v)
	}
	var order []string
	for _, e := range v.Events {
		if e.Type == "hydration" || e.Type == "move" {
			order = append(order, e.Message)
		}
	}
	if want := []string{"fetched", "Moving from", "All its blocks", "Moved from"}; !slices.EqualFunc(order, want, strings.Contains) {
		t.Errorf("%q, want %q", order, want)
	}
}

// TestRemotePools: a volume of a remote version goes where the request says, or placement
// would have it, among the pools that can have it.
func TestRemotePools(t *testing.T) {
	w := newLayeredWorld(t)
	o := &w.engine.o
	o.Others = []OtherPool{
		{Name: "files", Ledger: NewLedger(LedgerOptions{Total: 1 << 45, Ratio: 1}), Remote: true},
		{Name: "group", Ledger: NewLedger(LedgerOptions{Total: 1 << 46, Ratio: 1})},
		{Name: "shut", Ledger: NewLedger(LedgerOptions{}), Err: errors.New("it is shut")},
	}
	for _, c := range []struct {
		policy, asked, want string
		err                 error
		says                string
	}{
		{want: ""}, {asked: o.PoolName, want: ""}, {asked: "files", want: "files"},
		{policy: PolicyMostRoom, want: "files"}, {policy: PolicyMostRoom, asked: o.PoolName, want: ""},
		{policy: "files", want: "files"}, {policy: "group", want: ""},
		{asked: "group", err: ErrUnsupported, says: "name one that can: " + o.PoolName + ", files"},
		{policy: "files", asked: "group", err: ErrUnsupported, says: "volume group"},
		{asked: "shut", err: blockdev.ErrUnavailable, says: "not available"}, {asked: "none", err: ErrInvalid, says: "no pool is called"},
	} {
		o.PoolPolicy = c.policy
		v, err := w.engine.design(t.Context(), CreateVolume{Workspace: space, Name: "x", Template: "far:1", Pool: c.asked})
		if !errors.Is(err, c.err) || err != nil && !strings.Contains(err.Error(), c.says) || err == nil && (v.Pool != c.want || !v.Remote) {
			t.Errorf("policy %q, %q is asked for: %q, %v", c.policy, c.asked, v.Pool, err)
		}
	}
	o.PoolPolicy = "group"
	if v, err := w.engine.design(t.Context(), CreateVolume{Workspace: space, Name: "x"}); err != nil || v.Pool != "group" {
		t.Errorf("one that is not remote: %q, %v", v.Pool, err)
	}
}

// countingPool counts what is asked at length.
type countingPool struct {
	*blockdevtest.Memory
	stats int
}

func (p *countingPool) Stat(ctx context.Context, id blockdev.ID) (blockdev.Info, error) {
	p.stats++
	return p.Memory.Stat(ctx, id)
}

func (p *countingPool) IsLayered(ctx context.Context, id blockdev.ID) (layered, open bool, err error) {
	info, err := p.Memory.Stat(ctx, id)
	return info.Layers > 0, info.Open, err
}

// closingPool makes one file of an image as soon as it is closed.
type closingPool struct{ *blockdevtest.Memory }

func (p closingPool) Close(ctx context.Context, id blockdev.ID, lease string) error {
	return errors.Join(p.Memory.Close(ctx, id, lease), p.Memory.Flatten(ctx, id))
}

// TestWholeAtItsDetach: that a volume has become whole is told also when the pool says so
// in the midst of a detach, after which nothing else is to be done for the volume.
func TestWholeAtItsDetach(t *testing.T) {
	w := newLayeredWorld(t)
	createFar(t, w)
	w.pool.MakeRemote(layeredVolume(t, w, "v").ID)
	attachTo(t, w, "v", "socket", "box", false)
	w.engine.o.Pool = closingPool{w.pool}
	do1(t, w, detachOp("v", "box"))
	if err := w.engine.tend(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectEvents(t, w, "v", "fetched", "All its blocks")
	if ids := w.engine.attentive(true); len(ids) != 0 {
		t.Errorf("looked at though nothing is to be done: %v", ids)
	}
}

// TestIdleRemoteVolume: one that nobody has is not looked at until the pool tells that
// it is whole, and of one in use the worker is asked, not the pool.
func TestIdleRemoteVolume(t *testing.T) {
	w := newLayeredWorld(t)
	createFar(t, w)
	v := layeredVolume(t, w, "v")
	w.pool.MakeRemote(v.ID)
	pool := &countingPool{Memory: w.pool}
	w.engine.o.Pool = pool
	look := func() {
		t.Helper()
		if err := w.engine.tend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	look()
	if ids := w.engine.attentive(true); len(ids) != 0 {
		t.Errorf("looked at though nothing is to be done: %v", ids)
	}
	attachTo(t, w, "v", "socket", "box", false)
	look()
	pool.stats = 0
	for range 5 {
		look()
	}
	if pool.stats != 0 {
		t.Errorf("the pool was asked %d times at length of a volume in use", pool.stats)
	}
	do1(t, w, detachOp("v", "box"))
	look()
	if ids := w.engine.attentive(true); len(ids) != 0 {
		t.Errorf("looked at though nothing is to be done: %v", ids)
	}
	if err := w.pool.Flatten(t.Context(), v.ID); err != nil {
		t.Fatal(err)
	}
	if ids := w.engine.attentive(true); !slices.Equal(ids, []blockdev.ID{v.ID}) {
		t.Errorf("that it is whole is not seen: %v", ids)
	}
	look()
	expectEvents(t, w, "v", "fetched", "All its blocks")
}
