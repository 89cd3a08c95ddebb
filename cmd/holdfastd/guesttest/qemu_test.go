package guesttest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/localdaemon"
	"holdfast/internal/vmtest"
)

const patience = time.Minute

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start starts a daemon that may use the guests' monitors.
func start(t *testing.T, guests ...*vmtest.VM) *localdaemon.Daemon {
	t.Helper()
	var prefixes []string
	for _, g := range guests {
		prefixes = append(prefixes, g.Dir)
	}
	return startWith(t, prefixes...)
}

// startWith is start for sockets below directories.
func startWith(t *testing.T, prefixes ...string) *localdaemon.Daemon {
	t.Helper()
	return startArgs(t, "--vm-sockets", strings.Join(prefixes, ","))
}

// built is where programs are that were built, which TestMain removes.
var built string

// daemonProgram builds the daemon, once, workerProgram the worker, as it is installed.
// That is not beside the daemon, which has workers when a test says so.
var (
	daemonProgram = sync.OnceValues(func() (string, error) { return build("holdfastd") })
	workerProgram = sync.OnceValues(func() (string, error) { return build("holdfast-blockd") })
)

func build(name string) (string, error) {
	program := filepath.Join(built, name+".d", name)
	c := exec.Command("go", "build", "-o", program, "holdfast/cmd/"+name)
	c.Env = append(os.Environ(), "CGO_ENABLED=0") // what a worker gives up holds for all its threads
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return program, nil
}

// startArgs starts a daemon with arguments.
func startArgs(t *testing.T, args ...string) *localdaemon.Daemon {
	t.Helper()
	program, err := daemonProgram()
	must(t, err)
	d, err := localdaemon.Start(t.Context(), program, filepath.Join(t.TempDir(), "state"), append(args, "--pool-size", "2GiB")...)
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := d.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	return d
}

func into(g *vmtest.VM, holder string) client.Attachment {
	return client.Attachment{Holder: holder, Target: client.Target{Type: "qemu", Socket: g.Monitor}}
}

func refused(t *testing.T, err error, code, text string) {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) || e.Status/100 != 4 || e.Code != code || !strings.Contains(e.Message, text) {
		t.Errorf("%v; want %s with %q", err, code, text)
	}
}

// await polls a volume until it fits.
func await(t *testing.T, c *client.Client, name string, fits func(client.Volume) bool) client.Volume {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		v, err := c.Volume(t.Context(), name)
		must(t, err)
		if fits(v) {
			return v
		}
		if time.Now().After(deadline) {
			t.Fatalf("volume %+v", v)
		}
	}
}

func disk(t *testing.T, g *vmtest.VM, serial string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	node, err := g.Disk(ctx, serial)
	must(t, err)
	return node
}

// TestVolumeInMachines: a volume as the engine makes it goes into a guest, grows
// there, outlives the daemon's death, leaves a guest that stands still, and goes to
// another one, with which it is released when that is killed. The host never mounts
// it again.
func TestVolumeInMachines(t *testing.T) {
	blockdevtest.LeakCheck(t)
	one, two := vmtest.Start(t, vmtest.Options{}), vmtest.Start(t, vmtest.Options{})
	d := start(t, one, two)
	ctx, c := t.Context(), d.Client
	_, err := c.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: "v"}, Spec: client.VolumeSpec{Size: 64}}, "")
	must(t, err)

	for what, bad := range map[string]client.Target{
		"below one of the directories": {Type: "qemu", Socket: "/run/other/monitor"},
		"not a unix":                   {Type: "qemu", Socket: filepath.Join(one.Dir, "qemu.log")},
		"a socket only":                {Type: "qemu", Socket: one.Monitor, Path: "/x"},
	} {
		_, err := c.Attach(ctx, "v", client.Attachment{Holder: "sandbox:one", Target: bad})
		refused(t, err, "INVALID_REQUEST", what)
	}
	_, err = c.Attach(ctx, "v", client.Attachment{Holder: "sandbox:one", Target: client.Target{Type: "qemu", Socket: filepath.Join(one.Dir, "none")}})
	refused(t, err, "CONFLICT", "not running")

	a, err := c.Attach(ctx, "v", into(one, "sandbox:one"))
	must(t, err)
	if a.Phase != "attached" || len(a.Serial) != 20 {
		t.Fatalf("%+v", a)
	}
	node := disk(t, one, a.Serial)
	one.Sh(t, "set -e; mount "+node+" /mnt; echo before > /mnt/before; sync")

	size := int64(128)
	v, err := c.UpdateVolume(ctx, "v", client.VolumeChange{SizeMiB: &size})
	must(t, err)
	if s := v.State.Sizes; s == nil || s.Device != size<<20 || !strings.Contains(s.Pending, "in the guest") {
		t.Errorf("grown: %+v", s)
	}
	one.Sh(t, fmt.Sprintf("set -e; for n in $(seq 6000); do [ $(cat /sys/block/%s/size) = %d ] && break; sleep 0.01; done; resize2fs %s 2>/dev/null; echo after > /mnt/after; umount /mnt", filepath.Base(node), size<<20/512, node))

	must(t, d.Kill())
	must(t, d.Restart(ctx))
	c = d.Client
	if v := await(t, c, "v", func(client.Volume) bool { return true }); len(v.State.Attachments) != 1 || v.State.Attachments[0].Phase != "attached" {
		t.Fatalf("after the daemon's death: %+v", v.State.Attachments)
	}
	if again, err := c.Attach(ctx, "v", into(one, "sandbox:one")); err != nil || again.ID != a.ID {
		t.Errorf("the same request again: %+v, %v", again, err)
	}
	_, err = c.Trim(ctx, "v")
	refused(t, err, "UNSUPPORTED", "raw blocks")
	limited, err := c.SetLimits(ctx, "v", a.ID, client.RateLimits{ReadIOPS: 20})
	must(t, err)
	if e := limited.Enforcement; e == nil || e.Mechanism != "QEMU throttle group" {
		t.Errorf("limits hold by %+v", e)
	}
	begin := time.Now()
	one.Sh(t, "dd if="+node+" of=/dev/null bs=4096 count=25 iflag=direct 2>/dev/null")
	// Two pass at once, a tenth of a second's worth, and one begins.
	if took := time.Since(begin); took < (25-3)*time.Second/20 {
		t.Errorf("25 reads took %s at 20 a second", took)
	}
	_, err = c.SetLimits(ctx, "v", a.ID, client.RateLimits{})
	must(t, err)

	must(t, one.Do(ctx, "stop", nil))
	_, err = c.Detach(ctx, "v", a.ID)
	refused(t, err, "CONFLICT", "not running (paused)")
	if at, err := c.Attachment(ctx, "v", a.ID); err != nil || at.Phase != "detaching" || !strings.Contains(at.Failure, "paused") || at.RetryAt.IsZero() {
		t.Errorf("%+v, %v", at, err)
	}
	must(t, one.Do(ctx, "cont", nil))
	await(t, c, "v", func(v client.Volume) bool { return len(v.State.Attachments) == 0 })

	_, err = c.Attach(ctx, "v", client.Attachment{Holder: "sandbox:h", Target: client.Target{Type: "host", Path: filepath.Join(d.State, "attach", "v")}})
	refused(t, err, "UNSUPPORTED", "never mounts it again")
	_, err = c.Capture(ctx, "v", "template", "")
	refused(t, err, "UNSUPPORTED", "raw blocks")

	a, err = c.Attach(ctx, "v", into(two, "sandbox:two"))
	must(t, err)
	node = disk(t, two, a.Serial)
	if got := two.Sh(t, "mount "+node+" /mnt; cat /mnt/before /mnt/after"); got != "before\nafter" {
		t.Errorf("the second guest reads %q", got)
	}
	must(t, two.Close())
	v = await(t, c, "v", func(v client.Volume) bool { return len(v.State.Attachments) == 0 })
	if !slices.ContainsFunc(v.Events, func(e client.VolumeEvent) bool { return e.Message == "sandbox:two is gone" }) {
		t.Errorf("events %+v", v.Events)
	}
}

// TestForceKillsTheMachine: a guest that does not let go is ended, and then the
// volume goes elsewhere.
func TestForceKillsTheMachine(t *testing.T) {
	blockdevtest.LeakCheck(t)
	one, two := vmtest.Start(t, vmtest.Options{}), vmtest.Start(t, vmtest.Options{})
	d := start(t, one, two)
	ctx, c := t.Context(), d.Client
	_, err := c.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: "v"}, Spec: client.VolumeSpec{Size: 16, Filesystem: "none"}}, "")
	must(t, err)
	a, err := c.Attach(ctx, "v", into(one, "sandbox:one"))
	must(t, err)
	one.Sh(t, "echo kept | dd of="+disk(t, one, a.Serial)+" conv=sync,fsync 2>/dev/null")
	_, err = c.Attach(ctx, "v", into(two, "sandbox:two"))
	refused(t, err, "VOLUME_ATTACHED", "sandbox:one")
	must(t, one.Do(ctx, "stop", nil))
	forced := into(two, "sandbox:two")
	forced.Force = true
	a, err = c.Attach(ctx, "v", forced)
	must(t, err)
	if err := one.Do(ctx, "query-status", nil); err == nil {
		t.Error("the first machine lives")
	}
	if got := two.Sh(t, "head -c 4 "+disk(t, two, a.Serial)); got != "kept" {
		t.Errorf("the second guest reads %q", got)
	}
	_, err = c.Detach(ctx, "v", a.ID)
	must(t, err)
}
