package main_test

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
)

// TestSnapshot: a snapshot of a volume that is written to holds what was there at its
// moment; volumes made from it are whole, on each filesystem; it comes back from what
// its image says; and with it goes what it alone occupied.
func TestSnapshot(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	n := newNode(t, "--pool-size", "3GiB")
	ctx := t.Context()
	var ids []string
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		ids = append(ids, n.snapshotWhileWritten(fs, 320))
	}

	// The records are lost: the snapshots are not.
	before := n.snapshotList()
	n.stop()
	must(t, os.RemoveAll(filepath.Join(n.state, "meta", "store")))
	code, out := command(t, holdfastd, append([]string{"rebuild", "--yes"}, n.args...)...)
	if code != 0 {
		t.Fatalf("rebuild: exit code %d\n%s", code, out)
	}
	n.start()
	if after := n.snapshotList(); after != before {
		t.Errorf("after the rebuild:\n%s\nbefore:\n%s", after, before)
	}
	n.kill()
	n.start()
	pools, err := n.Pools(ctx)
	must(t, err)
	held, free := pools[0].Provisioned, pools[0].Free
	for _, id := range ids {
		s, err := n.Snapshot(ctx, "", id)
		must(t, err)
		if space := s.State.Space; space == nil || space.Exclusive == nil {
			t.Errorf("%s/%s: what it occupies alone is not told: %+v", s.Spec.Volume, s.Metadata.Name, space)
		} else if s.Spec.Filesystem != "btrfs" && *space.Exclusive < 30<<20 { // btrfs writes elsewhere, and its old blocks stay shared
			t.Errorf("volume %s was written anew, and its snapshot occupies %d of %d bytes alone", s.Spec.Volume, *space.Exclusive, space.Allocated)
		}
		_, err = n.DeleteSnapshot(ctx, "", id)
		must(t, err)
		held -= s.State.Promised
	}
	pools, err = n.Pools(ctx)
	must(t, err)
	if pools[0].Provisioned != held {
		t.Errorf("%d bytes are promised without snapshots, want %d", pools[0].Provisioned, held)
	}
	if left := n.snapshotList(); left != "" {
		t.Errorf("left are %s", left)
	}
	// Two had 32 MiB each of their own. XFS gives the space of a file that was removed
	// back a moment later.
	for deadline := time.Now().Add(time.Minute); pools[0].Trash > 0 || pools[0].Free-free < 60<<20; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("what was deleted is not given back: %+v, free were %d", pools[0], free)
		}
		pools, err = n.Pools(ctx)
		must(t, err)
	}
}

// snapshotWhileWritten takes a snapshot of an attached volume between two writes, makes
// volumes of it and compares; it gives the snapshot's id.
func (n *node) snapshotWhileWritten(fs string, size int64) string {
	n.t.Helper()
	ctx := n.t.Context()
	n.create(fs, client.VolumeSpec{Size: size, Filesystem: fs})
	at := filepath.Join(n.state, "attach", fs)
	must(n.t, os.MkdirAll(at, 0o755))
	a, err := n.Attach(ctx, fs, client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}})
	must(n.t, err)
	old, fresh := noise(fs+" old"), noise(fs+" new")
	writeDurably(n.t, filepath.Join(at, "data"), old)
	s, err := n.CreateSnapshot(ctx, fs, client.NewSnapshot{Name: "crash"}, "")
	must(n.t, err)
	writeDurably(n.t, filepath.Join(at, "data"), fresh)
	must(n.t, os.WriteFile(filepath.Join(at, "unflushed"), []byte("in the page cache"), 0o600))
	_, err = n.CreateSnapshot(ctx, fs, client.NewSnapshot{Name: "frozen", Consistency: "filesystem"}, "")
	must(n.t, err)
	must(n.t, os.WriteFile(filepath.Join(at, "later"), nil, 0o600)) // nobody is frozen any more

	n.create(fs+"-crash", client.VolumeSpec{Snapshot: fs + "/crash"})
	n.create(fs+"-frozen", client.VolumeSpec{Snapshot: fs + "/frozen", Size: size + 64})
	n.holds(fs+"-crash", "data", old)
	n.holds(fs+"-frozen", "data", fresh)
	n.holds(fs+"-frozen", "unflushed", []byte("in the page cache"))
	// Beside their original, in the same kernel: each has an identity of its own.
	there := at + "-fork"
	must(n.t, os.MkdirAll(there, 0o755))
	b, err := n.Attach(ctx, fs+"-frozen", client.Attachment{Holder: "sandbox:f", Target: client.Target{Type: "host", Path: there}})
	must(n.t, err)
	if _, err := os.Stat(filepath.Join(there, "later")); !os.IsNotExist(err) {
		n.t.Errorf("%s: what was written later is in the fork: %v", fs, err)
	}
	for volume, id := range map[string]string{fs: a.ID, fs + "-frozen": b.ID} {
		_, err = n.Detach(ctx, volume, id)
		must(n.t, err)
	}
	n.holds(fs, "data", fresh)
	_, err = n.DeleteSnapshot(ctx, fs, "frozen")
	must(n.t, err)
	for _, volume := range []string{fs + "-crash", fs + "-frozen"} {
		_, err = n.DeleteVolume(ctx, volume)
		must(n.t, err)
	}
	return s.Metadata.ID
}

// noise is 32 MiB that are the same for the same name.
func noise(name string) []byte {
	b := make([]byte, 32<<20)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte(name))).Read(b)
	return b
}

func writeDurably(t testing.TB, path string, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	must(t, err)
	_, err = f.Write(b)
	must(t, err)
	must(t, f.Sync())
	must(t, f.Close())
}

// holds compares a file of a detached volume.
func (n *node) holds(volume, file string, want []byte) {
	n.t.Helper()
	v, err := n.Volume(n.t.Context(), volume)
	must(n.t, err)
	at := filepath.Join(n.state, "attach", "look")
	must(n.t, os.MkdirAll(at, 0o755))
	a, err := n.Attach(n.t.Context(), volume, client.Attachment{Holder: "sandbox:look", Target: client.Target{Type: "host", Path: at}, ReadOnly: true})
	must(n.t, err)
	if got, err := os.ReadFile(filepath.Join(at, file)); err != nil || !bytes.Equal(got, want) {
		n.t.Errorf("%s (%s): file %s has %d bytes that are not what was written (%v)", volume, v.Spec.Filesystem, file, len(got), err)
	}
	_, err = n.Detach(n.t.Context(), volume, a.ID)
	must(n.t, err)
}

// snapshotList is all snapshots in a comparable form, "" for none.
func (n *node) snapshotList() string {
	n.t.Helper()
	var b strings.Builder
	for s, err := range n.Snapshots(n.t.Context(), "", nil) {
		must(n.t, err)
		b.WriteString(strings.Join([]string{s.Spec.Volume, s.Metadata.Name, s.Metadata.ID, s.Status, s.Spec.Filesystem, s.Metadata.CreatedAt.String()}, " ") + "\n")
	}
	return b.String()
}
