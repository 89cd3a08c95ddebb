package main_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
)

// TestRelocatedTemplates: volumes of a remote version are made in the pool that is asked
// for, without the store; when that has moved, readers that wait, in both pools and of a
// fork, have their bytes from the new one, and so do those that come after the daemon was
// killed and a worker was started anew. Of a version that was deleted a volume says where
// its bytes are.
func TestRelocatedTemplates(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	old, next, cdn := newStore(t), newStore(t), newStore(t)
	n := newNode(t, "--worker", buildWorker(t), "--pool", "second=sparse:"+t.TempDir(), "--remote-templates", old.URL+"/,"+next.URL+"/")
	ctx := t.Context()
	content := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(content)
	tree := t.TempDir()
	must(t, os.WriteFile(filepath.Join(tree, "large"), content, 0o644))
	n.push("tools", tree)
	manifest, files := n.publish(old, "tools", client.Publication{Size: 64})
	_, err := n.RegisterTemplate(ctx, "far", client.Registration{Manifest: manifest, Digest: files.Digest})
	must(t, err)
	image, err := os.ReadFile(files.Image)
	must(t, err)
	for _, name := range []string{files.Image, files.Chunks, files.Manifest} {
		b, err := os.ReadFile(name)
		must(t, err)
		for _, s := range []*store{next, cdn} {
			must(t, os.WriteFile(filepath.Join(s.dir, filepath.Base(name)), b, 0o600))
		}
	}

	old.away.Store(true)
	n.create("first", client.VolumeSpec{Template: "far"})
	second := n.create("second", client.VolumeSpec{Template: "far", Pool: "second"})
	if second.Spec.Pool != "second" || second.State.Sizes.Hydration == nil {
		t.Fatalf("in the second pool: %+v", second.Spec)
	}
	_, err = n.CreateSnapshot(ctx, "second", client.NewSnapshot{Name: "s"}, "")
	must(t, err)
	n.create("fork", client.VolumeSpec{Snapshot: "second/s"})
	hole := int64(bytes.Index(image, content[:4096])) // it comes from the store
	reads := map[string]*disk{}
	attach := func(name string) client.Attachment {
		a, err := n.Attach(ctx, name, client.Attachment{Holder: "agent:a", Target: client.Target{Type: "export", Protocol: "nbd"}})
		must(t, err)
		reads[name] = dialDisk(t, a.Socket)
		return a
	}
	for _, name := range []string{"first", "second"} {
		attach(name)
		reads[name].ask(hole, 4096)
		eventually(t, "a reader waits for the store", func() bool {
			io, err := n.IO(ctx, name)
			return err == nil && slices.ContainsFunc(io.Waits, func(w client.Wait) bool { return w.Cause == "hydration" && w.Requests == 1 })
		})
	}
	if _, err := n.RelocateVersion(ctx, "far", "1", cdn.URL+"/"+filepath.Base(files.Manifest)); codeOf(err) != "STORE_NOT_ALLOWED" {
		t.Errorf("a store that is not allowed: %v", err)
	}
	if _, err := n.RelocateVersion(ctx, "far", "1", manifest); codeOf(err) != "STORE_FAILED" {
		t.Errorf("a store that is away: %v", err)
	}
	moved, err := n.RelocateVersion(ctx, "far", "1", next.URL+"/"+filepath.Base(files.Manifest))
	must(t, err)
	if moved.Remote == nil || !strings.HasSuffix(next.URL, moved.Remote.Host) {
		t.Errorf("%+v", moved.Remote)
	}
	for name, d := range reads {
		if got := d.take(4096); !bytes.Equal(got, image[hole:hole+4096]) {
			t.Errorf("%s reads something else", name)
		}
	}
	n.kill()
	n.start()
	asks := old.asks.Load()
	attach("fork")
	n.create("late", client.VolumeSpec{Template: "far", Pool: "second"})
	attach("late")
	for name, d := range reads {
		for _, at := range []int64{hole + 1<<20, hole + 3<<20} {
			d.ask(at, 4096)
			if got := d.take(4096); !bytes.Equal(got, image[at:at+4096]) {
				t.Errorf("%s reads something else at %d", name, at)
			}
		}
		must(t, d.Close())
	}
	if k := old.asks.Load(); k != asks {
		t.Errorf("the store that is gone was asked %d times", k-asks)
	}
	eventually(t, "the fork tells when it is whole", func() bool {
		v, err := n.Volume(ctx, "fork")
		var said []string
		for _, e := range v.Events {
			if e.Type == "hydration" {
				said = append(said, e.Message)
			}
		}
		return err == nil && len(said) >= 2 && strings.Contains(said[0], "fetched as they are wanted") && strings.Contains(said[len(said)-1], "All its blocks")
	})

	next.away.Store(true)
	n.create("orphan", client.VolumeSpec{Template: "far", Pool: "second"})
	old.away.Store(false)
	if _, err := n.RelocateVolume(ctx, "orphan", manifest); codeOf(err) != "INVALID_REQUEST" || !strings.Contains(err.Error(), "far:1") {
		t.Errorf("while its version is there: %v", err)
	}
	_, err = n.DeleteTemplate(ctx, "far")
	must(t, err)
	attach("orphan")
	d := reads["orphan"]
	d.ask(hole, 4096)
	_, err = n.RelocateVolume(ctx, "orphan", manifest)
	must(t, err)
	if got := d.take(4096); !bytes.Equal(got, image[hole:hole+4096]) {
		t.Error("the volume of a deleted version reads something else")
	}
	must(t, d.Close())
}

// codeOf is the word of a refusal, "" for anything else.
func codeOf(err error) string {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}
