package main_test

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
)

// TestMove: a volume goes to another pool and back with its bytes, its labels and its
// taint, also when the daemon is killed on the way; what it occupied is given back, and
// a move can be taken back.
func TestMove(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	second := t.TempDir()
	n := newNode(t, "--pool-size", "2GiB", "--pool", "second=sparse:"+second)
	ctx := t.Context()
	n.push("sample", sampleTree(t))
	n.create("v", client.VolumeSpec{Size: 512, Template: "sample"})
	_, err := n.UpdateVolume(ctx, "v", client.VolumeChange{Labels: map[string]string{"keep": "me"}})
	must(t, err)

	content := make([]byte, 260<<20) // more than two checkpoints
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte("move"))).Read(content)
	at := filepath.Join(n.state, "attach", "there")
	must(t, os.MkdirAll(at, 0o755))
	onHost := func(do func()) {
		t.Helper()
		a, err := n.Attach(ctx, "v", client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}})
		must(t, err)
		do()
		_, err = n.Detach(ctx, "v", a.ID)
		must(t, err)
	}
	onHost(func() {
		must(t, os.WriteFile(filepath.Join(at, "data"), content, 0o600))
		_, err := n.MoveVolume(ctx, "v", "second")
		if !client.IsConflict(err) {
			t.Errorf("moving an attached volume: %v", err)
		}
	})
	before, err := n.Pools(ctx)
	must(t, err)

	v, err := n.MoveVolume(ctx, "v", "second")
	must(t, err)
	if v.State.Move == nil || v.State.Move.To != "second" || v.Spec.Pool != "" {
		t.Errorf("begun: %+v, in %q", v.State.Move, v.Spec.Pool)
	}
	_, err = n.Attach(ctx, "v", client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}})
	if v, _ := n.Volume(ctx, "v"); err == nil && v.Spec.Pool == "" {
		t.Error("a volume on its way was attached")
	}
	n.untilMove(func(m *client.Move) bool { return m == nil || m.Done > 0 })
	n.kill()
	n.start()
	n.untilMove(func(m *client.Move) bool { return m == nil })

	if v, err = n.Volume(ctx, "v"); err != nil || v.Spec.Pool != "second" || v.Metadata.Labels["keep"] != "me" {
		t.Errorf("moved: %+v, %+v, %v", v.Metadata, v.Spec, err)
	}
	check := func() {
		t.Helper()
		onHost(func() {
			if got, err := os.ReadFile(filepath.Join(at, "data")); err != nil || !bytes.Equal(got, content) {
				t.Errorf("the data: %d bytes, %v", len(got), err)
			}
			if got, err := os.ReadFile(filepath.Join(at, "hello.txt")); err != nil || string(got) != "from the template\n" {
				t.Errorf("the file of the template: %q, %v", got, err)
			}
		})
	}
	check()
	for pool, want := range map[string]int{n.state: 0, second: 1} {
		if got := volumesBelow(t, pool); got != want {
			t.Errorf("%d images are below %s, want %d", got, pool, want)
		}
	}
	after, err := n.Pools(ctx)
	must(t, err)
	if after[0].Volumes != before[0].Volumes-1 || after[1].Volumes != 1 || after[1].Provisioned != 512<<20 || after[0].Provisioned != before[0].Provisioned-512<<20 {
		t.Errorf("pools: %+v\nbefore: %+v", after, before)
	}

	_, err = n.MoveVolume(ctx, "v", "default")
	must(t, err)
	n.untilMove(func(m *client.Move) bool { return m == nil })
	check()
	if _, err = n.MoveVolume(ctx, "v", "second"); err == nil {
		_, err = n.MoveVolume(ctx, "v", "default") // taken back, or there and back
	}
	if err != nil && !client.IsConflict(err) {
		t.Error(err)
	}
	n.untilMove(func(m *client.Move) bool { return m == nil })
	check()
	_, err = n.MoveVolume(ctx, "v", "second")
	must(t, err)
	_, err = n.DeleteVolume(ctx, "v")
	must(t, err)
	for _, pool := range []string{n.state, second} {
		if got := volumesBelow(t, pool); got != 0 {
			t.Errorf("after the delete %d images are below %s", got, pool)
		}
	}
}

// untilMove looks at the volume "v" until its move is as wanted.
func (n *node) untilMove(as func(m *client.Move) bool) {
	n.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		v, err := n.Volume(n.t.Context(), "v")
		must(n.t, err)
		if as(v.State.Move) {
			return
		}
		if time.Now().After(end) {
			n.t.Fatalf("the move: %+v\n%s", v.State.Move, n.log)
		}
	}
}

// volumesBelow counts the images of volumes, published or not.
func volumesBelow(t *testing.T, dir string) (n int) {
	t.Helper()
	for _, pattern := range []string{"pool/images/vol-*", "pool/mnt/images/vol-*", "*/images/vol-*", "*/*/images/vol-*"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		must(t, err)
		n = max(n, len(found))
	}
	return n
}
