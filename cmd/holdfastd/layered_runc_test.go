package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/api/client"
	"holdfast/blockdev/attach/runc/runctest"
)

// TestLayeredVolumeInContainer: in a pool that cannot share bytes, a container waits for a
// volume of a template until it is one file. It is told how far that is, and it goes on
// by itself. Snapshots are taken while nobody has it, and refused with the ways out while
// the container has.
func TestLayeredVolumeInContainer(t *testing.T) {
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", c.Root, "--pool", "second=sparse:"+t.TempDir(), "--worker", buildWorker(t), "--attach-step-timeout", "200ms", "--pool-size", "2GiB")
	ctx := t.Context()
	tree := t.TempDir()
	content := noise("in a template")
	for i := range 8 {
		must(t, os.WriteFile(filepath.Join(tree, strconv.Itoa(i)), content, 0o644))
	}
	n.push("tools", tree)
	n.create("data", client.VolumeSpec{Size: 320, Pool: "second", Template: "tools"})
	var e *client.Error
	for deadline := time.Now().Add(patience); ; {
		a, err := n.Attach(ctx, "data", inContainer(c, "/data", false))
		if err == nil && time.Now().Before(deadline) { // it became flat while steps hung: once more, from the beginning
			if _, err = n.Detach(ctx, "data", a.ID); err != nil {
				n.untilDetached(t, "data")
			}
			_, err = n.DeleteVolume(ctx, "data")
			must(t, err)
			n.create("data", client.VolumeSpec{Size: 320, Pool: "second", Template: "tools"})
			continue
		}
		if !errors.As(err, &e) {
			t.Fatalf("of 256 MiB, %v", err)
		}
		if e.Code != "VOLUME_HANGING" || time.Now().After(deadline) { // on a busy machine runc takes longer than a step may
			break
		}
	}
	if e.Status != 409 || e.Code != "HYDRATING" || !strings.Contains(e.Message, `volume "data" is being hydrated`) || !strings.Contains(e.Message, "try again later") {
		t.Errorf("%+v", e)
	}
	n.await("data", func(v client.Volume) bool { return v.State.Sizes.Hydration == nil })
	n.stop()
	n.args = append(n.args, "--attach-step-timeout", "20s")
	n.start()

	a := n.attachTo(c, "data", "/data")
	c.Shell("for f in 0 7; do cmp /data/$f /data/3 || exit 1; done; echo first > /data/word; sync")
	_, err := n.CreateSnapshot(ctx, "data", client.NewSnapshot{Name: "in-use"}, "")
	if !errors.As(err, &e) || e.Code != "UNSUPPORTED" || !strings.Contains(e.Message, "detach") {
		t.Errorf("a snapshot while the container has it: %v", err)
	}
	_, err = n.Detach(ctx, "data", a.ID)
	must(t, err)
	_, err = n.CreateSnapshot(ctx, "data", client.NewSnapshot{Name: "first"}, "")
	must(t, err)
	a = n.attachTo(c, "data", "/data")
	c.Shell("echo second > /data/word; sync")
	if got := c.Shell("cmp /data/5 /data/3 && cat /data/word"); got != "second\n" {
		t.Errorf("the container reads %q", got)
	}
	_, err = n.Detach(ctx, "data", a.ID)
	must(t, err)
	n.create("fork", client.VolumeSpec{Snapshot: "data/first"})
	var word bytes.Buffer
	must(t, n.ReadFile(ctx, "fork", "/word", &word))
	if word.String() != "first\n" {
		t.Errorf("the fork of the snapshot has %q", word.String())
	}
	var got bytes.Buffer
	must(t, n.ReadFile(ctx, "data", "/6", &got))
	if !bytes.Equal(got.Bytes(), content) {
		t.Errorf("a file of the template has %d bytes that are not its own", got.Len())
	}
}

// TestFragmentedVolumeInContainer: in a pool with reflink a volume in many pieces that
// nobody has gets a layer for its snapshot, and a container gets it all the same, in one
// file again. One that a container writes to is shared by reflink, at one moment.
func TestFragmentedVolumeInContainer(t *testing.T) {
	const pieces = 5000
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", c.Root, "--worker", buildWorker(t))
	ctx := t.Context()
	n.create("data", client.VolumeSpec{Size: 96})
	dir, a := n.onHost("data", false)
	content := noise("fragmented")
	want := append(bytes.Clone(content), content[:2*pieces*4096-len(content)]...)
	writeDurably(t, filepath.Join(dir, "file"), want)
	f, err := os.OpenFile(filepath.Join(dir, "file"), os.O_RDWR, 0)
	must(t, err)
	for i := range pieces {
		must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(i)*8192, 4096))
		clear(want[i*8192 : i*8192+4096])
	}
	must(t, errors.Join(f.Sync(), f.Close()))
	_, err = n.Trim(ctx, "data")
	must(t, err)
	_, err = n.Detach(ctx, "data", a.ID)
	must(t, err)
	_, err = n.CreateSnapshot(ctx, "data", client.NewSnapshot{Name: "holes"}, "")
	must(t, err)
	v, err := n.Volume(ctx, "data")
	must(t, err)
	if v.State.Sizes.Hydration == nil {
		t.Errorf("a snapshot of a volume in %d pieces was not taken by a layer", pieces)
	}
	n.attachTo(c, "data", "/data")
	c.Shell("rm /data/file; sync")
	n.create("fork", client.VolumeSpec{Snapshot: "data/holes"})
	n.holds("fork", "file", want)

	c.Background("i=0; while :; do i=$((i+1)); echo $i >> /data/log; sync; echo $i > /data/synced; done")
	c.Shell("until [ -s /data/synced ]; do sleep 0.01; done")
	before := c.Shell("cat /data/synced")
	_, err = n.CreateSnapshot(ctx, "data", client.NewSnapshot{Name: "live"}, "")
	must(t, err)
	after := c.Shell("tail -n 1 /data/log")
	n.create("live", client.VolumeSpec{Snapshot: "data/live"})
	var log bytes.Buffer
	must(t, n.ReadFile(ctx, "live", "/log", &log))
	lines := strings.Fields(log.String())
	first, _ := strconv.Atoi(strings.TrimSpace(before))
	last, _ := strconv.Atoi(strings.TrimSpace(after))
	if len(lines) < first || len(lines) > last+1 || lines[len(lines)-1] != fmt.Sprint(len(lines)) {
		t.Errorf("the snapshot has %d lines of what was written; before it there were %d, after it %d", len(lines), first, last)
	}
	c.Delete()
	must(t, n.detachAll("data"))
}

// await polls a volume until it fits.
func (n *node) await(name string, fits func(client.Volume) bool) {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		v, err := n.Volume(n.t.Context(), name)
		must(n.t, err)
		if fits(v) {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("volume %+v", v)
		}
	}
}
