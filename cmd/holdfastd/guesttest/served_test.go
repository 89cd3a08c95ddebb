package guesttest_test

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/localdaemon"
	"holdfast/internal/sys"
	"holdfast/internal/tarball"
	"holdfast/internal/vmtest"
)

// startLayered starts a daemon whose pool "second" cannot share bytes, and which has
// workers to serve what is layered for that.
func startLayered(t *testing.T, sockets string) *localdaemon.Daemon {
	t.Helper()
	worker, err := workerProgram()
	must(t, err)
	return startArgs(t, "--vm-sockets", sockets, "--pool", "second=sparse:"+t.TempDir(), "--worker", worker)
}

// push makes a template of files of noise, and gives the digests of the smaller ones as
// sha256sum lists them. The larger one keeps a volume of it from becoming flat in the
// background before it is attached.
func push(t *testing.T, c *client.Client, name string) string {
	t.Helper()
	tree := t.TempDir()
	out, err := exec.Command("sh", "-c", "cd "+tree+" && for n in 1 2 3; do head -c 4000000 /dev/urandom > $n; done && sha256sum * && head -c 120000000 /dev/urandom > bulk").Output()
	must(t, err)
	plan, err := tarball.New(t.Context(), tree)
	must(t, err)
	archive := plan.Reader()
	defer archive.Close()
	_, err = c.PushTemplate(t.Context(), client.Push{Name: name, Archive: archive, Length: plan.Length()})
	must(t, err)
	return strings.TrimSpace(string(out))
}

// makeLayered creates a volume in the pool that cannot share bytes.
func makeLayered(t *testing.T, c *client.Client, name string, spec client.VolumeSpec) {
	t.Helper()
	spec.Pool = "second"
	_, err := c.CreateVolume(t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: spec}, "")
	must(t, err)
}

// plug attaches a volume to a guest, and tells where it has it.
func plug(t *testing.T, c *client.Client, g *vmtest.VM, name string, to client.Attachment) (a client.Attachment, node string) {
	t.Helper()
	a, err := c.Attach(t.Context(), name, to)
	must(t, err)
	return a, disk(t, g, a.Serial)
}

// plugLayered is plug for a volume that has layers, and no other way therefore.
func plugLayered(t *testing.T, c *client.Client, g *vmtest.VM, name string, to client.Attachment) (a client.Attachment, node string) {
	t.Helper()
	a, node = plug(t, c, g, name, to)
	v, err := c.Volume(t.Context(), name)
	must(t, err)
	if a.Kind != "vhost-user" || a.Socket == "" || v.State.Sizes.Hydration == nil {
		t.Fatalf("%s is attached as %+v, %+v", name, a, v.State.Sizes)
	}
	return a, node
}

// killWorker kills the process that serves an attachment, and has the daemon know
// nothing of it but what it sees.
func killWorker(t *testing.T, a client.Attachment) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(filepath.Dir(a.Socket), "control.sock")}))
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	must(t, err)
	worker, err := sys.OpenPidfd(int(peer.Pid))
	must(t, err)
	defer worker.Close()
	must(t, sys.KillProcess(worker))
	bounded, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must(t, sys.AwaitEnd(bounded, worker))
}

// served waits until a worker that began after a time has a client.
func served(t *testing.T, c *client.Client, name string, after time.Time) client.Worker {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		io, err := c.IO(t.Context(), name)
		must(t, err)
		if io.Worker != nil && io.Worker.Since.After(after) && io.Worker.Clients == 1 {
			return *io.Worker
		}
		if time.Now().After(deadline) {
			t.Fatalf("no other worker serves %s: %+v", name, io.Worker)
		}
	}
}

// TestLayeredVolumeInMachine: a guest uses a template's volume whose bytes are in layers,
// mounted by its agent. While it writes, the volume is trimmed, grown and kept as it is by
// snapshots; its worker is killed, the daemon is killed, and both are: no request fails
// and no byte is lost. What the snapshots hold is whole.
func TestLayeredVolumeInMachine(t *testing.T) {
	blockdevtest.LeakCheck(t)
	g := vmtest.Start(t, vmtest.Options{SharedMemory: true})
	d := startLayered(t, g.Dir)
	ctx, c := t.Context(), d.Client
	sums := push(t, c, "tools")
	mounted := into(g, "sandbox:one")
	mounted.Target.Agent, mounted.MountPath = volumeAgent(t, g), "/mnt/work"
	makeLayered(t, c, "work", client.VolumeSpec{Size: 192, Template: "tools"})
	a, _ := plugLayered(t, c, g, "work", mounted)
	if got := g.Sh(t, "cd /mnt/work && sha256sum ?"); got != sums {
		t.Errorf("the guest reads\n%s\nthe template has\n%s", got, sums)
	}

	plainInMachine(t, c, g)

	w := g.Write(t, "/mnt/work")
	w.Through(t, func() {
		g.Sh(t, "dd if=/dev/urandom of=/mnt/work/junk bs=1M count=16 2>/dev/null; sync; rm /mnt/work/junk")
		trimmed, err := c.Trim(ctx, "work")
		must(t, err)
		if trimmed.Freed < 10<<20 {
			t.Errorf("a trim frees %+v", trimmed)
		}
	})
	w.Through(t, func() {
		before, size := used(t, g, "work", 2), int64(320)
		_, err := c.UpdateVolume(ctx, "work", client.VolumeChange{SizeMiB: &size})
		must(t, err)
		await(t, c, "work", func(v client.Volume) bool { return v.State.Sizes.Pending == "" })
		if after := used(t, g, "work", 2); after < before*3/2 {
			t.Errorf("the filesystem in the guest had %d KiB and has %d", before, after)
		}
	})
	for _, consistency := range []string{"crash", "filesystem"} {
		w.Through(t, func() {
			g.Sh(t, "echo "+consistency+" > /mnt/work/last; sync")
			_, err := c.CreateSnapshot(ctx, "work", client.NewSnapshot{Name: consistency, Consistency: consistency}, "")
			must(t, err)
			g.Sh(t, "echo later > /mnt/work/last; rm /mnt/work/3")
		})
		g.Sh(t, "cp /mnt/work/2 /mnt/work/3")
	}

	at := served(t, c, "work", time.Time{})
	w.Through(t, func() {
		killWorker(t, a)
		at = served(t, c, "work", at.Since)
	})
	w.Through(t, func() {
		must(t, d.Kill())
		must(t, d.Restart(ctx))
		c = d.Client
	})
	if now := served(t, c, "work", time.Time{}); !now.Since.Equal(at.Since) {
		t.Errorf("the daemon's end has cost the worker: it began %s, now %s", at.Since, now.Since)
	}
	w.Through(t, func() {
		must(t, d.Kill())
		killWorker(t, a)
		must(t, d.Restart(ctx))
		c = d.Client
		at = served(t, c, "work", at.Since)
	})
	w.Enough(t)
	for kind, done := range at.Requests {
		if done.Errors > 0 {
			t.Errorf("%d requests to %s failed", done.Errors, kind)
		}
	}
	g.Sh(t, "echo 3 > /proc/sys/vm/drop_caches; cd /mnt/work && sha256sum 1 2 > /tmp/sums; cmp 2 3")
	if got := g.Sh(t, "cat /tmp/sums"); !strings.HasPrefix(sums, got) {
		t.Errorf("the guest reads\n%s\nthe template has\n%s", got, sums)
	}
	_, err := c.Detach(ctx, "work", a.ID)
	must(t, err)
	if c, err := net.Dial("unix", a.Socket); err == nil {
		_ = c.Close()
		t.Error("a worker serves a volume that is detached")
	}

	a, node := plug(t, c, g, "work", into(g, "sandbox:one"))
	g.Sh(t, "e2fsck -fn "+node)
	_, err = c.Detach(ctx, "work", a.ID)
	must(t, err)
	for _, consistency := range []string{"crash", "filesystem"} {
		fork := "of-" + consistency
		makeLayered(t, c, fork, client.VolumeSpec{Snapshot: "work/" + consistency})
		a, node := plugLayered(t, c, g, fork, into(g, "sandbox:one"))
		check := fmt.Sprintf("mount %[1]s /mnt && umount /mnt && e2fsck -fn %[1]s", node) // as after a power cut
		if consistency == "filesystem" {
			check = "e2fsck -fn " + node
		}
		got := g.Sh(t, "set -e; { "+check+"; } >/dev/null; mount -o ro "+node+" /mnt; cd /mnt; cat last; sha256sum 1 2; cd /; umount /mnt")
		if last, files, _ := strings.Cut(got, "\n"); last != consistency || !strings.HasPrefix(sums, files) {
			t.Errorf("the snapshot holds\n%s\nthe template has\n%s", got, sums)
		}
		_, err := c.Detach(ctx, fork, a.ID)
		must(t, err)
	}
}

// plainInMachine has a guest make a filesystem on a volume that has layers because of a
// snapshot, and use it; the snapshot has none of that.
func plainInMachine(t *testing.T, c *client.Client, g *vmtest.VM) {
	t.Helper()
	ctx := t.Context()
	makeLayered(t, c, "plain", client.VolumeSpec{Size: 16, Filesystem: "none"})
	_, err := c.CreateSnapshot(ctx, "plain", client.NewSnapshot{Name: "empty"}, "")
	must(t, err)
	to := into(g, "sandbox:one")
	to.Target.Transport = "vhost-user" // what holds nothing may be flat again already
	a, node := plug(t, c, g, "plain", to)
	g.Sh(t, fmt.Sprintf("set -e; mkfs.ext4 -q %[1]s; mount %[1]s /mnt; dd if=/dev/urandom of=/mnt/gone bs=1M count=8 2>/dev/null; sync; rm /mnt/gone; fstrim /mnt", node))
	g.Write(t, "/mnt").Enough(t)
	g.Sh(t, fmt.Sprintf("umount /mnt && e2fsck -fn %s", node))
	_, err = c.Detach(ctx, "plain", a.ID)
	must(t, err)
	makeLayered(t, c, "fork", client.VolumeSpec{Snapshot: "plain/empty"})
	a, node = plug(t, c, g, "fork", to)
	g.Sh(t, "cmp -n 16777216 "+node+" /dev/zero")
	_, err = c.Detach(ctx, "fork", a.ID)
	must(t, err)
}

// TestForceEndsTheWorkerOfAMachine: a guest that stands still, and does not let go of a volume that
// a worker serves, loses the volume and nothing else: what it had written is with the next machine, its disk
// fails every request when it goes on, is unplugged then, and it can have the volume again.
func TestForceEndsTheWorkerOfAMachine(t *testing.T) {
	blockdevtest.LeakCheck(t)
	one, two := vmtest.Start(t, vmtest.Options{SharedMemory: true}), vmtest.Start(t, vmtest.Options{SharedMemory: true})
	d := startLayered(t, one.Dir+","+two.Dir)
	ctx, c := t.Context(), d.Client
	makeLayered(t, c, "v", client.VolumeSpec{Size: 16, Filesystem: "none"})
	served := func(g *vmtest.VM, holder string) client.Attachment {
		to := into(g, holder)
		to.Target.Transport = "vhost-user"
		return to
	}
	a, node := plug(t, c, one, "v", served(one, "sandbox:one"))
	one.Sh(t, "echo kept | dd of="+node+" conv=sync,fsync 2>/dev/null")
	one.Sh(t, "(while dd if="+node+" of=/dev/null bs=4k count=1 iflag=direct 2>/tmp/last; do :; done; touch /tmp/failed) >/dev/null 2>&1 &")
	must(t, one.Do(ctx, "stop", nil))
	forced := served(two, "sandbox:two")
	forced.Force = true
	b, node := plug(t, c, two, "v", forced)
	if a.Socket == b.Socket {
		t.Errorf("both are at %s", a.Socket)
	}
	if got := two.Sh(t, "head -c 4 "+node+"; echo mine | dd of="+node+" conv=sync,fsync 2>/dev/null"); got != "kept" {
		t.Errorf("the second guest reads %q", got)
	}
	must(t, one.Do(ctx, "cont", nil))
	one.Sh(t, "for i in $(seq 1200); do [ -e /tmp/failed ] && [ ! -e "+"/dev/disk/by-id/virtio-"+a.Serial+" ] && ! grep -qs "+a.Serial+" /sys/block/*/serial && exit 0; sleep 0.1; done; cat /tmp/last; exit 1")
	v, err := c.Volume(ctx, "v")
	must(t, err)
	var said []string
	for _, e := range v.Events {
		said = append(said, e.Message)
	}
	if !strings.Contains(strings.Join(said, "\n"), "Detached from sandbox:one by force: its worker was ended") {
		t.Errorf("it says %q", said)
	}
	if got := two.Sh(t, "head -c 4 "+node); got != "mine" {
		t.Errorf("the second guest has written, and reads %q", got)
	}
	_, err = c.Detach(ctx, "v", b.ID)
	must(t, err)
	again, node := plug(t, c, one, "v", served(one, "sandbox:one"))
	if got := one.Sh(t, "head -c 4 "+node); got != "mine" {
		t.Errorf("the first guest has it again, and reads %q", got)
	}
	_, err = c.Detach(ctx, "v", again.ID)
	must(t, err)
}
