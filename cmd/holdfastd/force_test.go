package main_test

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/blockdev/blockdevtest"
)

// writer is a process in a container that keeps a file of the volume open and
// writes to it, and to a new file each time, for as long as it lives. It counts its
// tries, and those that failed.
const writer = `exec 3>>/data/open
n=0
while :; do
  n=$((n+1))
  echo line $n >&3 2>/dev/null || echo $n >/tmp/failed
  echo line $n >>/data/log; sync /data/log 2>/dev/null
  echo $n >/tmp/tries
done`

func tries(c *runctest.Container) int {
	n, _ := strconv.Atoi(strings.TrimSpace(c.Shell("cat /tmp/tries 2>/dev/null || true")))
	return n
}

// goesOn waits until the writer has tried so many times more.
func goesOn(t *testing.T, c *runctest.Container, more int) {
	t.Helper()
	from, deadline := tries(c), time.Now().Add(patience)
	for tries(c) < from+more {
		if time.Now().After(deadline) {
			t.Fatal("the old holder does not go on writing")
		}
	}
}

// image finds the one volume's image.
func (n *node) image() string {
	n.t.Helper()
	found, err := filepath.Glob(filepath.Join(n.state, "pool", "images", "vol-*", "image"))
	must(n.t, err)
	if len(found) != 1 {
		n.t.Fatalf("images: %v", found)
	}
	return found[0]
}

func digest(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	must(t, err)
	return hex.EncodeToString(h.Sum(nil))
}

// onHost attaches a volume to a directory of the host and gives the directory.
func (n *node) onHost(volume string, readOnly bool) (string, client.Attachment) {
	n.t.Helper()
	dir := filepath.Join(n.state, "attach", volume+"-elsewhere")
	a, err := n.Attach(n.t.Context(), volume, client.Attachment{Holder: "sandbox:elsewhere", ReadOnly: readOnly, Target: client.Target{Type: "host", Path: dir}})
	must(n.t, err)
	return dir, a
}

// TestForceFencesAWriter: the old holder lives on, keeps its file open and goes on
// writing while it is fenced and after; nothing of that reaches the volume.
func TestForceFencesAWriter(t *testing.T) {
	for fs, check := range map[string][]string{"ext4": {"e2fsck", "-fn"}, "xfs": {"xfs_repair", "-n"}} {
		t.Run(fs, func(t *testing.T) {
			c := runctest.Start(t, runctest.Options{})
			n := newNode(t, "--runc-roots", c.Root)
			ctx := t.Context()
			n.create("data", client.VolumeSpec{Size: 320, Filesystem: fs})
			a := n.attachTo(c, "data", "/data")
			c.Shell("echo synced >/data/synced; sync; echo 'not synced' >/data/unsynced")
			c.Background(writer)
			goesOn(t, c, 20)
			if _, err := n.Detach(ctx, "data", a.ID); client.Status(err) != 409 {
				t.Fatalf("an ordinary detach: %v", err)
			}
			begin := time.Now()
			_, err := n.ForceDetach(ctx, "data", a.ID)
			must(t, err)
			t.Logf("fenced in %v", time.Since(begin))
			after := digest(t, n.image())
			goesOn(t, c, 60)
			if digest(t, n.image()) != after {
				t.Error("the image changes after force has returned")
			}
			if c.Shell("cat /tmp/failed") == "" {
				t.Error("the old holder is not told that its writes fail")
			}
			if v, err := n.Volume(ctx, "data"); err != nil || v.State.AttachedTo != "" {
				t.Errorf("%+v, %v", v.State, err)
			}

			dir, b := n.onHost("data", false)
			for name, want := range map[string]string{"synced": "synced\n", "unsynced": "not synced\n"} {
				if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v", name, got, err)
				}
			}
			log, err := os.ReadFile(filepath.Join(dir, "log"))
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, "new"), []byte("of the new holder\n"), 0o600))
			goesOn(t, c, 60)
			if again, err := os.ReadFile(filepath.Join(dir, "log")); err != nil || string(again) != string(log) {
				t.Errorf("the old holder reaches the new one's files: %d and %d bytes, %v", len(log), len(again), err)
			}
			_, err = n.Detach(ctx, "data", b.ID)
			must(t, err)
			if out, err := exec.Command(check[0], append(check[1:], n.image())...).CombinedOutput(); err != nil {
				t.Errorf("%v: %v\n%s", check, err, out)
			}
			c.Delete() // and with it the dead filesystem and its device: LeakCheck looks
		})
	}
}

// TestForceEndsWhatCannotBeShutDown: btrfs knows no shutdown; the container goes,
// also when it is frozen, and what it had written stays.
func TestForceEndsWhatCannotBeShutDown(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Btrfs)
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", c.Root)
	ctx := t.Context()
	n.create("data", client.VolumeSpec{Size: 128, Filesystem: "btrfs"})
	a := n.attachTo(c, "data", "/data")
	c.Shell("echo kept >/data/kept")
	pid := c.Background(writer)
	goesOn(t, c, 20)
	c.Pause()
	_, err := n.ForceDetach(ctx, "data", a.ID)
	must(t, err)
	for _, p := range []int{c.Pid, pid} {
		if stat, err := os.ReadFile("/proc/" + strconv.Itoa(p) + "/stat"); err == nil && !strings.Contains(string(stat), ") Z ") {
			t.Errorf("process %d lives: %s", p, stat)
		}
	}
	dir, _ := n.onHost("data", false)
	if got, err := os.ReadFile(filepath.Join(dir, "kept")); err != nil || string(got) != "kept\n" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestForceOfAHostDirectory: with a file open it is shut down; a btrfs is refused,
// and nothing has changed.
func TestForceOfAHostDirectory(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Btrfs)
	n := newNode(t)
	ctx := t.Context()
	n.create("b", client.VolumeSpec{Size: 128, Filesystem: "btrfs"})
	dir, a := n.onHost("b", false)
	f, err := os.Create(filepath.Join(dir, "open"))
	must(t, err)
	_, err = n.ForceDetach(ctx, "b", a.ID)
	if client.Status(err) != 409 || !strings.Contains(err.Error(), "nothing would prove") {
		t.Errorf("btrfs: %v", err)
	}
	if _, err := f.WriteString("still there"); err != nil {
		t.Errorf("after the refusal: %v", err)
	}
	if got, err := n.Attachment(ctx, "b", a.ID); err != nil || got.Phase != "attached" || got.Forced {
		t.Errorf("%+v, %v", got, err)
	}
	must(t, f.Close())

	n.create("e", client.VolumeSpec{Size: 16})
	dir, a = n.onHost("e", false)
	f, err = os.Create(filepath.Join(dir, "open"))
	must(t, err)
	code, out := command(t, holdfast, "--socket", filepath.Join(n.state, "holdfastd.sock"), "--workspace", "main", "attachment", "detach", "e", a.ID)
	if code == 0 {
		t.Errorf("without --force: %s", out)
	}
	code, out = command(t, holdfast, "--socket", filepath.Join(n.state, "holdfastd.sock"), "--workspace", "main", "attachment", "detach", "e", a.ID, "--force")
	if code != 0 {
		t.Errorf("with --force: %d, %s", code, out)
	}
	if _, err := f.WriteString("nowhere"); err == nil {
		t.Error("the open file can still be written")
	}
	if err := f.Close(); err != nil {
		t.Logf("close: %v", err)
	}
	n.onHost("e", true)
}

// TestTakeover: a new holder takes the volume by force.
func TestTakeover(t *testing.T) {
	old, next := runctest.Start(t, runctest.Options{}), runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", old.Root+","+next.Root)
	n.create("data", client.VolumeSpec{Size: 16})
	a := n.attachTo(old, "data", "/data")
	old.Background(writer)
	goesOn(t, old, 20)
	b, err := n.Attach(t.Context(), "data", client.Attachment{
		Holder: "sandbox:" + next.ID, MountPath: "/data", Force: true, Target: client.Target{Type: "runc", Container: next.ID, Root: next.Root},
	})
	must(t, err)
	if b.Epoch <= a.Epoch {
		t.Errorf("epochs %d, %d", a.Epoch, b.Epoch)
	}
	before := next.Shell("sha256sum /data/log /data/open")
	goesOn(t, old, 100)
	if after := next.Shell("sha256sum /data/log /data/open"); after != before {
		t.Errorf("the old holder goes on in the new one's volume:\n%s%s", before, after)
	}
	next.Shell("echo mine >/data/mine && sync")
	old.Delete()
}
