package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"holdfast/metadata"
)

// snap takes a snapshot that must work.
func (w *world) snap(volume, name string) Snapshot {
	w.t.Helper()
	s, err := w.engine.CreateSnapshot(context.Background(), CreateSnapshot{Workspace: space, Volume: volume, Name: name, Labels: map[string]string{"kind": "test"}, Actor: "ann"})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) mustDo(ops ...op) {
	w.t.Helper()
	for _, o := range ops {
		if err := o.do(w); err != nil {
			w.t.Fatalf("%s: %v", o.name, err)
		}
	}
}

func TestSnapshotHoldsItsMoment(t *testing.T) {
	w := newWorld(t)
	w.mustDo(createOp("a", "demo", "ext4", 16), writeOp("a", "before"))
	v := w.volume("a")
	s := w.snap("a", "s")
	w.mustDo(writeOp("a", "after"))
	if s.Status() != SnapshotStatusReady || s.SizeMiB != 16 || s.VolumeID != v.ID || s.Template != "demo:1" || s.CreatedBy != "ann" || s.Consistency != CrashConsistent {
		t.Errorf("%+v", s)
	}
	w.mustDo(forkOp("f", "a/s", 16))
	f := w.volume("f")
	if w.marked(t, s.ID) != "before" || w.marked(t, f.ID) != "before" || w.marked(t, v.ID) != "after" {
		t.Errorf("snapshot %q, fork %q, volume %q", w.marked(t, s.ID), w.marked(t, f.ID), w.marked(t, v.ID))
	}
	if f.UUID == v.UUID || f.Template != v.Template || f.Revision != v.Revision || f.ForkOf != "a/s" || f.Snapshot != s.ID {
		t.Errorf("the fork is %+v", f)
	}
	if last := w.volume("a").Events; !strings.Contains(last[len(last)-1].Message, "Snapshot s was taken") {
		t.Errorf("%+v", last)
	}
	w.verifyConsistent(t)
}

// TestSnapshotOutlivesItsVolume also loses the records: all comes back from what the
// images say.
func TestSnapshotOutlivesItsVolume(t *testing.T) {
	w := newWorld(t)
	w.mustDo(createOp("a", "", "xfs", 300), writeOp("a", "kept"))
	s := w.snap("a", "s")
	w.mustDo(deleteOp("a"))
	if _, err := w.engine.ResolveSnapshot(space, "a/s"); !errors.Is(err, ErrNotFound) {
		t.Errorf("by the name of a deleted volume: %v", err)
	}
	if _, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Name: "a"}); err != nil { // has no snapshots of the other one
		t.Fatal(err)
	}
	if p, err := w.engine.Snapshots(space, SnapshotQuery{Volume: "a"}); err != nil || p.Total != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	err := w.store.Update(context.Background(), func(tx *metadata.Tx) error { return snapshotsTable.Delete(tx, string(s.ID)) })
	if err != nil {
		t.Fatal(err)
	}
	w.restart(true)
	again, err := w.engine.Snapshot(space, s.ID)
	if err != nil || again.Name != "s" || again.Bytes != s.Bytes || again.Labels["kind"] != "test" || w.marked(t, s.ID) != "kept" {
		t.Fatalf("%+v, %v", again, err)
	}
	w.mustDo(forkOp("back", string(s.ID), 300))
	if w.marked(t, w.volume("back").ID) != "kept" {
		t.Error("the fork of a deleted volume's snapshot holds something else")
	}
	w.verifyConsistent(t)
}

func TestSnapshotWithoutItsImageFails(t *testing.T) {
	w := newWorld(t)
	w.mustDo(createOp("a", "", "ext4", 16))
	s := w.snap("a", "s")
	if err := w.pool.Remove(context.Background(), s.ID); err != nil {
		t.Fatal(err)
	}
	w.restart(false)
	got, err := w.engine.Snapshot(space, s.ID)
	if err != nil || got.Status() != SnapshotStatusFailed {
		t.Fatalf("%+v, %v", got, err)
	}
	_, err = w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Name: "f", Snapshot: "a/s"})
	refusedAs(t, err, ErrConflict, "missing from the pool")
	w.mustDo(unsnapOp("a", "s"))
	w.verifyConsistent(t)
}

func refusedAs(t *testing.T, err, kind error, part string) {
	t.Helper()
	if !errors.Is(err, kind) || !isProblem(err) || !strings.Contains(err.Error(), part) {
		t.Errorf("%v: want %v with %q", err, kind, part)
	}
}

func TestSnapshotsThatAreRefused(t *testing.T) {
	w := newWorld(t)
	w.mustDo(createOp("a", "", "ext4", 16), createOp("raw", "", "none", 1))
	w.snap("a", "s")
	for _, c := range []struct {
		r    CreateSnapshot
		kind error
		part string
	}{
		{CreateSnapshot{Volume: "nothing"}, ErrNotFound, "not found"},
		{CreateSnapshot{Volume: "a", Name: "s"}, ErrExists, "already"},
		{CreateSnapshot{Volume: "a", Name: "UPPER"}, ErrInvalid, "metadata.name"},
		{CreateSnapshot{Volume: "a", Labels: map[string]string{"a=b": ""}}, ErrInvalid, "metadata.labels"},
		{CreateSnapshot{Volume: "a", Consistency: "perfect"}, ErrInvalid, "spec.consistency"},
		{CreateSnapshot{Volume: "raw", Consistency: FilesystemConsistent}, ErrUnsupported, "spec.consistency"},
	} {
		c.r.Workspace = space
		_, err := w.engine.CreateSnapshot(context.Background(), c.r)
		refusedAs(t, err, c.kind, c.part)
	}
	for _, c := range []struct {
		r    CreateVolume
		kind error
		part string
	}{
		{CreateVolume{Snapshot: "a/none"}, ErrInvalid, "spec.snapshot"},
		{CreateVolume{Snapshot: "snp-nothing"}, ErrInvalid, "spec.snapshot"},
		{CreateVolume{Snapshot: "a/s", Template: "demo"}, ErrInvalid, "not from both"},
		{CreateVolume{Snapshot: "a/s", Filesystem: "xfs"}, ErrInvalid, "holds ext4"},
		{CreateVolume{Snapshot: "a/s", SizeMiB: mib(15)}, ErrInvalid, "spec.size"},
	} {
		c.r.Workspace = space
		_, err := w.engine.CreateVolume(context.Background(), c.r)
		refusedAs(t, err, c.kind, c.part)
	}
	_, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: "other", Snapshot: "a/s"})
	refusedAs(t, err, ErrInvalid, "spec.snapshot")
	w.verifyConsistent(t)
}

// TestSnapshotBeside has the rules of docs/snapshots.md: what a snapshot may be taken
// beside, and what it is refused for.
func TestSnapshotBeside(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.mustDo(createOp("a", "", "ext4", 16), attachOp("a", "host", "user", false))
	if _, err := w.engine.FreezeVolume(ctx, space, "a", 0, "ann"); err != nil {
		t.Fatal(err)
	}
	for i, c := range []Consistency{CrashConsistent, FilesystemConsistent} { // a freeze that is there does, and stays
		s, err := w.engine.CreateSnapshot(ctx, CreateSnapshot{Workspace: space, Volume: "a", Name: fmt.Sprint("frozen-", i), Consistency: c})
		if err != nil || s.Consistency != c || !w.volume("a").frozenAt(w.now()) {
			t.Errorf("%s: %+v, %v", c, s, err)
		}
	}
	if _, err := w.engine.ThawVolume(ctx, space, "a", "ann"); err != nil {
		t.Fatal(err)
	}
	w.mustDo(detachOp("a", "user"), attachOp("a", "host", "reader", true))
	w.snap("a", "read-only")
	w.mustDo(detachOp("a", "reader"), forkOp("from-reader", "a/read-only", 16))
	if got, err := w.engine.CaptureVolume(ctx, space, "from-reader", CaptureVolume{Template: "captured"}); err != nil {
		t.Errorf("a fork is captured: %+v, %v", got, err)
	}
}

// TestSnapshotsStayWhereTheyAre: a move takes the volume alone.
func TestSnapshotsStayWhereTheyAre(t *testing.T) {
	w := newWorldOfTwo(t)
	ctx := context.Background()
	w.mustDo(createOp("a", "", "none", 1), writeOp("a", "first"))
	w.snap("a", "first")
	if _, err := w.engine.MoveVolume(ctx, space, "a", secondPool, "ann"); err != nil {
		t.Fatal(err)
	}
	_, err := w.engine.CreateSnapshot(ctx, CreateSnapshot{Workspace: space, Volume: "a"})
	refusedAs(t, err, ErrConflict, "being moved")
	for w.volume("a").Move != nil {
		if err := w.engine.tend(ctx); err != nil {
			t.Fatal(err)
		}
	}
	first, err := w.engine.SnapshotOf(space, "a", "first")
	if err != nil || first.Pool != "" {
		t.Fatalf("%+v, %v", first, err)
	}
	if s := w.snap("a", "moved"); s.Pool != secondPool {
		t.Errorf("%+v", s)
	}
	w.mustDo(forkOp("old", "a/first", 1), forkOp("new", "a/moved", 1))
	if w.volume("old").Pool != "" || w.volume("new").Pool != secondPool || w.marked(t, w.volume("old").ID) != "first" {
		t.Errorf("forks are in %q and %q", w.volume("old").Pool, w.volume("new").Pool)
	}
	_, err = w.engine.CreateVolume(ctx, CreateVolume{Workspace: space, Snapshot: "a/first", Pool: secondPool})
	refusedAs(t, err, ErrInvalid, "spec.pool")
	w.restart(true)
	if s, err := w.engine.SnapshotOf(space, "a", "moved"); err != nil || s.Status() != SnapshotStatusReady {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestSnapshotsAreAccountedFor: what a snapshot may come to occupy alone is promised,
// counted in the workspace's share, and given back.
func TestSnapshotsAreAccountedFor(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.mustDo(createOp("a", "", "ext4", 16), writeOp("a", "x"))
	status := func() (s PoolStatus) { w.engine.o.Ledger.status(&s); return s }
	before := status()
	s := w.snap("a", "s")
	if s.Bytes == 0 || status().Provisioned != before.Provisioned+s.Bytes || status().Snapshots != 1 || status().Volumes != 1 {
		t.Errorf("%+v, then %+v", before, status())
	}
	if err := w.engine.SetQuota(ctx, space, Quota{Snapshots: 1}); err != nil {
		t.Fatal(err)
	}
	_, err := w.engine.CreateSnapshot(ctx, CreateSnapshot{Workspace: space, Volume: "a"})
	refusedAs(t, err, ErrQuota, "1 snapshots")
	if err := w.engine.SetQuota(ctx, space, Quota{MiB: 16}); err != nil {
		t.Fatal(err)
	}
	_, err = w.engine.CreateSnapshot(ctx, CreateSnapshot{Workspace: space, Volume: "a"})
	if s.Bytes >= 1<<20 {
		refusedAs(t, err, ErrQuota, "together")
	}
	if err := w.engine.SetQuota(ctx, space, Quota{}); err != nil {
		t.Fatal(err)
	}
	w.engine.o.Ledger.Resize(status().Provisioned, 0)
	_, err = w.engine.CreateSnapshot(ctx, CreateSnapshot{Workspace: space, Volume: "a", Name: "full"})
	refusedAs(t, err, ErrNoSpace, "pool has 0 MiB left")
	w.mustDo(unsnapOp("a", "s"))
	for _, s := range w.engine.snapshots.list(func(Snapshot) bool { return true }) {
		w.mustDo(unsnapOp("a", s.Name))
	}
	if status().Provisioned != before.Provisioned || status().Snapshots != 0 {
		t.Errorf("after all are deleted: %+v", status())
	}
	w.verifyConsistent(t)
}

func TestSnapshotsOfOneVolumeAreBounded(t *testing.T) {
	w := newWorld(t)
	w.mustDo(createOp("a", "", "none", 1))
	for i := range maxSnapshots {
		w.snap("a", fmt.Sprint("s", i))
	}
	_, err := w.engine.CreateSnapshot(context.Background(), CreateSnapshot{Workspace: space, Volume: "a"})
	refusedAs(t, err, ErrQuota, "maximum of 128")
	var names []string
	q := SnapshotQuery{Volume: "a", Limit: 50, Sort: OldestFirst, Labels: map[string]string{"kind": "test"}}
	for {
		p, err := w.engine.Snapshots(space, q)
		if err != nil || p.Total != maxSnapshots {
			t.Fatalf("%d, %v", p.Total, err)
		}
		for _, s := range p.Snapshots {
			names = append(names, s.Name)
		}
		if q.After = p.Next; q.After == nil {
			break
		}
	}
	if len(names) != maxSnapshots || names[0] != "s0" || names[127] != "s127" {
		t.Errorf("%d listed: %v", len(names), names)
	}
}

// TestForkOfATaintedVolume: what a guest has written is never mounted here, nor is
// what was made from it.
func TestForkOfATaintedVolume(t *testing.T) {
	w := newWorld(t)
	w.mustDo(createOp("a", "", "ext4", 16), attachOp("a", "vm", "machine", false), writeOp("a", "guest"))
	s := w.snap("a", "s")
	if !s.Tainted {
		t.Errorf("%+v", s)
	}
	w.mustDo(detachOp("a", "machine"))
	_, err := w.engine.CreateSnapshot(context.Background(), CreateSnapshot{Workspace: space, Volume: "a", Consistency: FilesystemConsistent})
	refusedAs(t, err, ErrUnsupported, `consistency "crash"`)
	w.mustDo(forkOp("f", "a/s", 16))
	f := w.volume("f")
	if !f.Tainted || f.UUID != s.UUID || w.marked(t, f.ID) != "guest" {
		t.Errorf("%+v", f)
	}
	if _, err := w.engine.CaptureVolume(context.Background(), space, "f", CaptureVolume{Template: "t"}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a fork of a tainted volume is mounted: %v", err)
	}
	w.verifyConsistent(t)
}

// TestSnapshotInAPoolWithoutReflink: bytes are not copied behind anybody's back.
func TestSnapshotInAPoolWithoutReflink(t *testing.T) {
	w := newWorld(t)
	w.pool.Layered = true
	w.mustDo(createOp("a", "", "ext4", 16), attachOp("a", "host", "user", false))
	_, err := w.engine.CreateSnapshot(context.Background(), CreateSnapshot{Workspace: space, Volume: "a", Name: "s"})
	refusedAs(t, err, ErrUnsupported, "detach it for the moment")
	w.mustDo(detachOp("a", "user"), writeOp("a", "held"))
	s := w.snap("a", "s")
	w.mustDo(writeOp("a", "later"))
	if w.marked(t, s.ID) != "held" {
		t.Errorf("%q", w.marked(t, s.ID))
	}
}

// TestForkInLayers: it is usable at once, and is made flat for who needs that.
func TestForkInLayers(t *testing.T) {
	w := newLayeredWorld(t)
	w.mustDo(createOp("a", "", "ext4", 16), writeOp("a", "held"))
	w.snap("a", "s")
	w.mustDo(writeOp("a", "later"), forkOp("f", "a/s", 16))
	f := w.volume("f")
	info, err := w.pool.Stat(context.Background(), f.ID)
	if err != nil || info.Layers == 0 || w.marked(t, f.ID) != "held" || f.UUID == w.volume("a").UUID {
		t.Errorf("%+v, %+v, %v", f, info, err)
	}
	w.mustDo(attachOp("f", "host", "dir", false))
	if info, err := w.pool.Stat(context.Background(), f.ID); err != nil || info.Layers != 0 || w.marked(t, f.ID) != "held" {
		t.Errorf("attached to the host: %+v, %v", info, err)
	}
	w.verifyConsistent(t)
}

func TestSnapshotOnce(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.mustDo(createOp("a", "", "ext4", 16))
	r := CreateSnapshot{Workspace: space, Volume: "a", IdempotencyKey: "again"}
	first, err := w.engine.CreateSnapshot(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	w.restart(false)
	if second, err := w.engine.CreateSnapshot(ctx, r); err != nil || second.ID != first.ID {
		t.Errorf("%+v, %v", second, err)
	}
	other := r
	other.Name = "other"
	_, err = w.engine.CreateSnapshot(ctx, other)
	refusedAs(t, err, ErrConflict, "another request")
	_, err = w.engine.CreateVolume(ctx, CreateVolume{Workspace: space, IdempotencyKey: "again"})
	refusedAs(t, err, ErrConflict, "another request")
	if _, err := w.engine.DeleteSnapshot(ctx, space, first.ID, ""); err != nil {
		t.Fatal(err)
	}
	_, err = w.engine.CreateSnapshot(ctx, r)
	refusedAs(t, err, ErrConflict, "deleted since")
	if _, err := w.engine.Snapshot("other", first.ID); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if !first.ID.Valid() {
		t.Errorf("%q", first.ID)
	}
}
