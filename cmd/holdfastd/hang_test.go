package main_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/sys"
)

// stepTimeout is short, for what hangs here hangs for ever, and long enough for the
// steps beside it.
const stepTimeout = "3s"

// answersSoon runs a call that meets something that hangs.
func answersSoon(t *testing.T, what, word string, call func() error) {
	t.Helper()
	begin := time.Now()
	err := call()
	if client.Status(err) < 400 || !strings.Contains(fmt.Sprintf("%+v %v", err, err), word) {
		t.Errorf("%s: %v; want %s", what, err, word)
	}
	if took := time.Since(begin); took > time.Minute {
		t.Errorf("%s took %v", what, took)
	}
}

// othersWork: a volume that has nothing to do with what hangs is attached and detached.
func (n *node) othersWork(t *testing.T) {
	t.Helper()
	_, a := n.onHost("other", false)
	_, err := n.Detach(t.Context(), "other", a.ID)
	must(t, err)
}

// untilDetached waits for what goes on by itself.
func (n *node) untilDetached(t *testing.T, volume string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		all, err := n.Attachments(t.Context(), volume)
		must(t, err)
		if len(all) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still %+v", all)
		}
	}
}

// deadMount is a FUSE filesystem whose server never answers, like a dead NFS
// server; it ends with the answer "not connected".
func deadMount(t *testing.T, dir string) (end func()) {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Fuse)
	must(t, os.MkdirAll(dir, 0o755))
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	must(t, err)
	must(t, syscall.Mount("dead", dir, "fuse", syscall.MS_NOSUID|syscall.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fuse.Fd())))
	ended := false
	end = func() {
		if !ended {
			ended = true
			must(t, fuse.Close())
		}
	}
	t.Cleanup(func() {
		end()
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return end
}

// TestDeadHostPath: the directory to attach to is on a filesystem that does not answer.
func TestDeadHostPath(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "prefix")
	must(t, os.Mkdir(prefix, 0o755))
	n := newNode(t, "--attach-step-timeout", stepTimeout, "--host-prefixes", prefix+"/dead,"+prefix)
	end := deadMount(t, filepath.Join(prefix, "dead"))
	ctx := t.Context()
	n.create("data", client.VolumeSpec{Size: 16})
	n.create("other", client.VolumeSpec{Size: 16})
	attach := func() error {
		_, err := n.Attach(ctx, "data", client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: prefix + "/dead/a/b"}})
		return err
	}
	answersSoon(t, "attach", "finding the sandbox has not ended", attach)
	answersSoon(t, "attach again", "finding the sandbox has not ended", attach)
	for range 3 {
		dir := prefix + "/alive"
		a, err := n.Attach(ctx, "other", client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: dir}})
		must(t, err)
		_, err = n.Detach(ctx, "other", a.ID)
		must(t, err)
	}
	begin := time.Now()
	n.stop()
	if took := time.Since(begin); took > 90*time.Second {
		t.Errorf("shutdown took %v", took)
	}
	n.start()
	end()
}

// TestFrozenContainer and a runc that hangs: finding it is bounded, and detaching
// needs no help of the frozen.
func TestFrozenContainer(t *testing.T) {
	bin := t.TempDir()
	runc, err := exec.LookPath("runc")
	must(t, err)
	hangs := "#!/bin/sh\ncase \" $* \" in *\" state \"*) exec sleep 1000;; esac\nexec " + runc + " \"$@\"\n"
	must(t, os.WriteFile(filepath.Join(bin, "runc"), []byte(hangs), 0o755))
	c := runctest.Start(t, runctest.Options{})
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	// Cages need a runc that works.
	n := newNode(t, "--cage", "off", "--attach-step-timeout", stepTimeout, "--runc-roots", c.Root)
	t.Setenv("PATH", strings.TrimPrefix(os.Getenv("PATH"), bin+":"))
	ctx := t.Context()
	n.create("data", client.VolumeSpec{Size: 16})
	n.create("second", client.VolumeSpec{Size: 16})
	n.create("other", client.VolumeSpec{Size: 16})
	a := n.attachTo(c, "data", "/data") // runc is not asked
	c.Pause()
	answersSoon(t, "attach to a frozen container, with a runc that hangs", "", func() error {
		_, err := n.Attach(ctx, "second", client.Attachment{Holder: "sandbox:s", MountPath: "/second", Target: client.Target{Type: "runc", Container: c.ID, Root: c.Root}})
		return err
	})
	n.othersWork(t)
	_, err = n.Detach(ctx, "data", a.ID)
	must(t, err)
	if v, err := n.Volume(ctx, "second"); err != nil || len(v.State.Attachments) != 0 {
		t.Errorf("%+v, %v", v.State, err)
	}
	c.Resume()
}

// TestDeadMountInASandbox: something above the volume does not answer any more.
// Detaching hangs in there and says so; force ends the sandbox.
func TestDeadMountInASandbox(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Fuse)
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--attach-step-timeout", stepTimeout, "--runc-roots", c.Root)
	ctx := t.Context()
	n.create("data", client.VolumeSpec{Size: 16})
	n.create("other", client.VolumeSpec{Size: 16})
	a := n.attachTo(c, "data", "/above/data")
	c.Shell("echo kept >/above/data/kept; sync")
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	must(t, err)
	defer fuse.Close() // however this ends: what hangs in there would keep the daemon from its end
	ns, err := sys.MountNamespace(c.Pid)
	must(t, err)
	must(t, sys.InMountNamespace(ns, func(sys.Inside) error {
		return syscall.Mount("dead", "/above", "fuse", syscall.MS_NOSUID|syscall.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fuse.Fd()))
	}))
	must(t, ns.Close())
	answersSoon(t, "detach", "unmounting in the sandbox has not ended", func() error { _, err := n.Detach(ctx, "data", a.ID); return err })
	n.othersWork(t)
	answersSoon(t, "force", "cannot be fenced", func() error { _, err := n.ForceDetach(ctx, "data", a.ID); return err })
	must(t, fuse.Close()) // in life its server is in the sandbox, and has ended with it
	n.untilDetached(t, "data")
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.Pid)); err == nil && !strings.Contains(string(stat), ") Z ") {
		t.Error("the sandbox lives")
	}
	dir, _ := n.onHost("data", false)
	if got, err := os.ReadFile(filepath.Join(dir, "kept")); err != nil || string(got) != "kept\n" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestSuspendedPool: what is dirty cannot be flushed. That is said, force is refused
// because what is under way may still be written, and all goes on once it answers.
func TestSuspendedPool(t *testing.T) {
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--attach-step-timeout", stepTimeout, "--runc-roots", c.Root)
	ctx := t.Context()
	n.create("data", client.VolumeSpec{Size: 16})
	a := n.attachTo(c, "data", "/data")
	c.Shell("dd if=/dev/zero of=/data/dirty bs=64k count=32 2>/dev/null")
	pool := filepath.Join(n.state, "pool")
	if out, err := exec.Command("fsfreeze", "--freeze", pool).CombinedOutput(); err != nil {
		t.Fatalf("suspend the pool: %v, %s", err, out)
	}
	frozen := true
	thaw := func() {
		if frozen {
			frozen = false
			if out, err := exec.Command("fsfreeze", "--unfreeze", pool).CombinedOutput(); err != nil {
				t.Errorf("thaw: %v, %s", err, out)
			}
		}
	}
	defer thaw()
	answersSoon(t, "detach", "flushing and releasing the device has not ended", func() error { _, err := n.Detach(ctx, "data", a.ID); return err })
	got, err := n.Attachment(ctx, "data", a.ID)
	if err != nil || got.Phase != "detaching" || !strings.Contains(got.Failure, "goes on as soon as that ends") {
		t.Errorf("%+v, %v", got, err)
	}
	answersSoon(t, "detach again", "has not ended", func() error { _, err := n.Detach(ctx, "data", a.ID); return err })
	answersSoon(t, "force", "cannot be fenced", func() error { _, err := n.ForceDetach(ctx, "data", a.ID); return err })
	answersSoon(t, "takeover", "cannot be fenced", func() error {
		_, err := n.Attach(ctx, "data", client.Attachment{Holder: "sandbox:s", Force: true, Target: client.Target{Type: "host", Path: filepath.Join(n.state, "attach", "x")}})
		return err
	})
	thaw()
	n.untilDetached(t, "data")
	dir, _ := n.onHost("data", false)
	if info, err := os.Stat(filepath.Join(dir, "dirty")); err != nil || info.Size() != 2<<20 {
		t.Errorf("%+v, %v", info, err)
	}
}
