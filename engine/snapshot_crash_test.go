package engine

import (
	"context"
	"errors"
	"testing"

	"holdfast/blockdev"
)

// markAt is where tests write what tells one state of a volume from another.
const markAt = 64 << 10

func (w *world) mark(id blockdev.ID, text string) error {
	image, err := w.pool.Image("mem:" + string(id))
	if err != nil {
		return err
	}
	b := make([]byte, 16)
	copy(b, text)
	_, err = image.WriteAt(b, markAt)
	return err
}

func (w *world) marked(t testing.TB, id blockdev.ID) string {
	t.Helper()
	image, err := w.pool.Image("mem:" + string(id))
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16)
	if _, err := image.ReadAt(b, markAt); err != nil {
		t.Fatal(err)
	}
	n := 0
	for n < len(b) && b[n] != 0 {
		n++
	}
	return string(b[:n])
}

// writeOp changes a volume's bytes: no step of the engine, so nothing to cut.
func writeOp(name, text string) op {
	return op{
		name: "write " + text + " to " + name,
		do: func(w *world) error {
			v, err := w.engine.Volume(space, name)
			if err != nil {
				return err
			}
			return w.mark(v.ID, text)
		},
		want: func(*model) {},
	}
}

func snapshotOp(volume, name, holds string, c Consistency) op {
	return op{
		name: "snapshot " + volume + "/" + name,
		do: func(w *world) error {
			_, err := w.engine.CreateSnapshot(context.Background(), CreateSnapshot{Workspace: space, Volume: volume, Name: name, Consistency: c, IdempotencyKey: "key-" + name})
			return err
		},
		want: func(m *model) { m.kept[volume+"/"+name] = holds },
	}
}

func unsnapOp(volume, name string) op {
	return op{
		name: "delete snapshot " + volume + "/" + name,
		do: func(w *world) error {
			s, err := w.engine.SnapshotOf(space, volume, name)
			if errors.Is(err, ErrNotFound) {
				return nil // deleted by the first try
			}
			if err != nil {
				return err
			}
			_, err = w.engine.DeleteSnapshot(context.Background(), space, s.ID, "")
			return err
		},
		want: func(m *model) { delete(m.kept, volume+"/"+name) },
	}
}

func forkOp(name, ref string, size int64) op {
	return op{
		name: "fork " + ref + " as " + name,
		do: func(w *world) error {
			_, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Name: name, Snapshot: ref, SizeMiB: mib(size), IdempotencyKey: "key-" + name})
			return err
		},
		want: func(m *model) { m.sizes[name] = size },
	}
}

// snapshotLife takes snapshots of a volume that nobody uses and of one that is in use,
// with and without a freeze, makes volumes of them and takes all away again.
func snapshotLife() []op {
	return []op{
		createOp("b2", "demo", "ext4", 16),
		writeOp("b2", "one"),
		snapshotOp("b2", "s1", "one", CrashConsistent),
		attachOp("b2", "host", "user", false),
		writeOp("b2", "two"),
		snapshotOp("b2", "s2", "two", CrashConsistent),
		snapshotOp("b2", "s3", "two", FilesystemConsistent),
		writeOp("b2", "three"),
		forkOp("same", "b2/s1", 16),
		forkOp("larger", "b2/s3", 32), // its filesystem grows
		unsnapOp("b2", "s1"),
		detachOp("b2", "user"),
		deleteOp("same"),
		unsnapOp("b2", "s2"),
		deleteOp("larger"),
		unsnapOp("b2", "s3"),
	}
}

// layersLife is the same where the pool shares no bytes between files: snapshots are
// layers, of a volume that nobody uses and of one that a worker serves.
func layersLife() []op {
	return []op{
		createOp("b2", "demo", "ext4", 16),
		writeOp("b2", "one"),
		snapshotOp("b2", "s1", "one", CrashConsistent),
		forkOp("same", "b2/s1", 16),
		forkOp("larger", "b2/s1", 32), // its filesystem grows
		attachOp("b2", "socket", "machine", false),
		writeOp("b2", "two"),
		snapshotOp("b2", "s2", "two", CrashConsistent),
		writeOp("b2", "three"),
		forkOp("tainted", "b2/s2", 16),
		unsnapOp("b2", "s1"),
		detachOp("b2", "machine"),
		deleteOp("same"),
		deleteOp("larger"),
		unsnapOp("b2", "s2"),
		deleteOp("tainted"),
	}
}

// verifyKept checks that acknowledged snapshots are there, and hold what they must.
func (w *world) verifyKept(t *testing.T, m, after *model, where string, during op) {
	t.Helper()
	for ref, holds := range m.kept {
		s, err := w.engine.ResolveSnapshot(space, ref)
		if _, stays := after.kept[ref]; err != nil && stays {
			t.Fatalf("crash at %s during %s: snapshot %s is lost: %v", where, during.name, ref, err)
		}
		if err == nil && w.marked(t, s.ID) != holds {
			t.Fatalf("crash at %s during %s: snapshot %s holds %q, not %q", where, during.name, ref, w.marked(t, s.ID), holds)
		}
	}
}

// verifySnapshots holds the snapshots' records against the pool, and tells what is
// promised to them.
func (w *world) verifySnapshots(t *testing.T) (promised int64) {
	t.Helper()
	for _, s := range w.engine.snapshots.list(func(Snapshot) bool { return true }) {
		info, err := w.pool.Stat(context.Background(), s.ID)
		switch {
		case err != nil:
			t.Errorf("snapshot %s: %v", s.Ref(), err)
		case s.Status() != SnapshotStatusReady || info.Draft:
			t.Errorf("snapshot %s is %s, a draft %v", s.Ref(), s.Status(), info.Draft)
		case info.Allocated != s.Bytes:
			t.Errorf("snapshot %s is promised %d bytes and has %d", s.Ref(), s.Bytes, info.Allocated)
		}
		said, err := parseSnapshot(info.Description)
		if err != nil || said.Sequence != s.Sequence || said.Name != s.Name {
			t.Errorf("snapshot %s describes itself as %+v (%v)", s.Ref(), said, err)
		}
		promised += s.Bytes
	}
	if left := w.engine.snapshots.allLeaving(); len(left) > 0 {
		t.Errorf("deletions are not finished: %+v", left)
	}
	return promised
}
