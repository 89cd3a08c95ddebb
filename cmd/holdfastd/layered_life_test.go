package main_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
)

// layeredLife is a node with a pool whose volumes of a template are layered for a while,
// and what they have.
type layeredLife struct {
	*node
	t       *testing.T
	content []byte
}

// TestLayeredLife: what can be done to a volume is done to layered ones as well, and each
// keeps its bytes; what is made of them outlives them, and the records.
func TestLayeredLife(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	n := newNode(t, "--pool-size", "1GiB", "--pool", "second=sparse:"+t.TempDir(), "--worker", buildWorker(t))
	l := &layeredLife{n, t, make([]byte, 96<<20)} // more than the background copies while one of these begins
	_, _ = rand.NewChaCha8([32]byte{5}).Read(l.content)
	tree := t.TempDir()
	must(t, os.WriteFile(filepath.Join(tree, "large"), l.content, 0o644))
	n.push("tools", tree)

	l.snapshots()
	l.grows()
	l.isCaptured()
	l.moves()
	l.isSanitized()
	l.isTrimmed()

	before := n.snapshotList()
	n.stop()
	must(t, os.RemoveAll(filepath.Join(n.state, "meta", "store")))
	if code, out := command(t, holdfastd, append([]string{"rebuild", "--yes"}, n.args...)...); code != 0 {
		t.Fatalf("rebuild: exit code %d\n%s", code, out)
	}
	n.start()
	if after := n.snapshotList(); after != before {
		t.Errorf("after the rebuild:\n%s\nbefore:\n%s", after, before)
	}
	for _, name := range []string{"fork", "forkfork", "grown", "moved", "trimmed", "clean"} {
		l.has(name)
	}
}

// make makes a volume that is layered.
func (l *layeredLife) make(name string) {
	l.t.Helper()
	l.layered(l.create(name, client.VolumeSpec{Size: 128, Pool: "second", Template: "tools"}))
}

func (l *layeredLife) layered(v client.Volume) {
	l.t.Helper()
	if h := v.State.Sizes.Hydration; h == nil || h.Absent == 0 {
		l.t.Fatalf("%s is not layered: %+v", v.Metadata.Name, v.State.Sizes)
	}
}

// has compares what a volume has with the template's file.
func (l *layeredLife) has(name string) {
	l.t.Helper()
	var got bytes.Buffer
	err := l.ReadFile(l.t.Context(), name, "/large", &got)
	if err != nil || !bytes.Equal(got.Bytes(), l.content) {
		l.t.Errorf("%s has %d bytes that are not the template's, %v", name, got.Len(), err)
	}
}

// snapshots takes two of a layered volume, forks, and deletes the one in the middle and
// the volume.
func (l *layeredLife) snapshots() {
	t, ctx := l.t, l.t.Context()
	l.make("origin")
	for _, name := range []string{"one", "two", "three"} {
		_, err := l.CreateSnapshot(ctx, "origin", client.NewSnapshot{Name: name}, "")
		must(t, err)
	}
	fork := func(name, of string) {
		t.Helper()
		v, err := l.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Snapshot: of}}, "")
		must(t, err)
		l.layered(v)
	}
	fork("fork", "origin/two")
	_, err := l.CreateSnapshot(ctx, "fork", client.NewSnapshot{Name: "inner"}, "")
	must(t, err)
	fork("forkfork", "fork/inner")
	_, err = l.DeleteSnapshot(ctx, "origin", "two")
	must(t, err)
	_, err = l.DeleteVolume(ctx, "origin")
	must(t, err)
	l.has("fork")
	l.has("forkfork")
}

func (l *layeredLife) grows() {
	l.make("grown")
	size := int64(256)
	v, err := l.UpdateVolume(l.t.Context(), "grown", client.VolumeChange{SizeMiB: &size})
	must(l.t, err)
	if v.Spec.Size != 256 {
		l.t.Errorf("grown to %d MiB", v.Spec.Size)
	}
	l.has("grown")
	l.await("grown", func(v client.Volume) bool {
		return v.State.Sizes.Device == 256<<20 && v.State.Sizes.Filesystem > 200<<20
	})
}

// isCaptured makes a version of a template, from which a volume in the other pool is made.
func (l *layeredLife) isCaptured() {
	l.make("captured")
	_, err := l.Capture(l.t.Context(), "captured", "again", "")
	must(l.t, err)
	l.create("recreated", client.VolumeSpec{Size: 128, Template: "again"})
	l.has("recreated")
	for _, name := range []string{"captured", "recreated"} {
		_, err := l.DeleteVolume(l.t.Context(), name)
		must(l.t, err)
	}
}

// moves takes a layered volume to the other pool, its snapshot stays.
func (l *layeredLife) moves() {
	ctx := l.t.Context()
	l.make("moved")
	_, err := l.CreateSnapshot(ctx, "moved", client.NewSnapshot{Name: "before"}, "")
	must(l.t, err)
	_, err = l.MoveVolume(ctx, "moved", "default")
	must(l.t, err)
	l.await("moved", func(v client.Volume) bool { return v.State.Move == nil && v.Spec.Pool == "" })
	l.has("moved")
}

// isSanitized takes the files of a layered volume that a client has written out of it.
func (l *layeredLife) isSanitized() {
	ctx := l.t.Context()
	l.make("tainted")
	a, err := l.Attach(ctx, "tainted", client.Attachment{Holder: "agent:writer", Target: client.Target{Type: "export", Protocol: "nbd"}})
	must(l.t, err)
	must(l.t, greeted(l.t, a.Socket).Close())
	_, err = l.Detach(ctx, "tainted", a.ID)
	must(l.t, err)
	_, err = l.SanitizeVolume(ctx, "tainted", "clean", 0)
	must(l.t, err)
	l.await("clean", func(v client.Volume) bool { return v.Status == "DEPLOYED" })
	l.has("clean")
	_, err = l.DeleteVolume(ctx, "tainted")
	must(l.t, err)
}

// isTrimmed gives back what the filesystem has free of a layered volume.
func (l *layeredLife) isTrimmed() {
	l.make("trimmed")
	_, err := l.Trim(l.t.Context(), "trimmed")
	must(l.t, err)
	l.has("trimmed")
}
