package guesttest_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/vmtest"
)

// toStart is a target that does not run yet.
func toStart(holder, socket string) client.Attachment {
	return client.Attachment{Holder: holder, Target: client.Target{Type: "vm", VMM: "qemu", Socket: socket}}
}

// TestVolumeAtStart: QEMU is started with exactly what is printed, and the guest finds
// the volume by its serial number; the daemon finds QEMU. The volume grows under it, is
// not detached while it runs, is released with its end, and goes to a second machine.
// The arguments of the first are of no use then.
func TestVolumeAtStart(t *testing.T) {
	blockdevtest.LeakCheck(t)
	sockets := t.TempDir()
	monitor := filepath.Join(sockets, "monitor")
	d := startWith(t, sockets)
	ctx, c := t.Context(), d.Client
	_, err := c.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: "v"}, Spec: client.VolumeSpec{Size: 64}}, "")
	must(t, err)
	a, err := c.Attach(ctx, "v", toStart("sandbox:one", monitor))
	must(t, err)
	_, err = c.SetLimits(ctx, "v", a.ID, client.RateLimits{ReadIOPS: 5000})
	refused(t, err, "UNSUPPORTED", "in the arguments")
	if a.Launch == nil || a.Launch.Process != 0 || a.Phase != "attached" {
		t.Fatalf("%+v", a)
	}

	one := vmtest.Start(t, vmtest.Options{Boot: true, Args: append(a.Launch.Arguments, "-qmp", "unix:"+monitor+",server=on,wait=off")})
	node := disk(t, one, a.Serial)
	one.Sh(t, "set -e; mount "+node+" /mnt; echo before > /mnt/before; sync")
	await(t, c, "v", func(client.Volume) bool {
		at, err := c.Attachment(ctx, "v", a.ID)
		must(t, err)
		return at.Launch != nil && at.Launch.Process == one.Pid()
	})
	_, err = c.Attach(ctx, "v", toStart("sandbox:two", ""))
	refused(t, err, "VOLUME_ATTACHED", "sandbox:one")
	limited, err := c.SetLimits(ctx, "v", a.ID, client.RateLimits{ReadIOPS: 5000})
	must(t, err)
	if limited.Limits == nil || limited.Enforcement.Mechanism != "QEMU throttle group" {
		t.Errorf("%+v", limited)
	}

	must(t, d.Kill())
	must(t, d.Restart(ctx))
	c = d.Client
	size := int64(128)
	_, err = c.UpdateVolume(ctx, "v", client.VolumeChange{SizeMiB: &size})
	must(t, err)
	one.Sh(t, fmt.Sprintf("set -e; for n in $(seq 6000); do [ $(cat /sys/block/%s/size) = %d ] && break; sleep 0.01; done; resize2fs %s 2>/dev/null; echo after > /mnt/after; umount /mnt", filepath.Base(node), size<<20/512, node))

	_, err = c.Detach(ctx, "v", a.ID)
	refused(t, err, "CONFLICT", fmt.Sprintf("process %d has it open", one.Pid()))
	if _, err := os.Stat(a.Launch.Path); !os.IsNotExist(err) {
		t.Errorf("while it is being detached its path is there: %v", err)
	}
	must(t, one.Close())
	v := await(t, c, "v", func(v client.Volume) bool { return len(v.State.Attachments) == 0 })

	b, err := c.Attach(ctx, "v", toStart("sandbox:two", ""))
	must(t, err)
	if b.Epoch <= a.Epoch || b.Launch.Path == a.Launch.Path {
		t.Errorf("the second attachment is %+v, the first was %+v", b, a)
	}
	two := vmtest.Start(t, vmtest.Options{Boot: true, Args: b.Launch.Arguments})
	if got := two.Sh(t, "mount "+disk(t, two, b.Serial)+" /mnt; cat /mnt/before /mnt/after"); got != "before\nafter" {
		t.Errorf("the second guest reads %q", got)
	}
	if _, err := os.Open(a.Launch.Path); !os.IsNotExist(err) {
		t.Errorf("the arguments of the first machine lead to the image of the second: %v", err)
	}
	_, err = c.ForceDetach(ctx, "v", b.ID) // also when it was not looked at since it was started
	must(t, err)
	if err := two.Do(ctx, "query-status", nil); err == nil {
		t.Error("the second machine lives")
	}
	if v, err = c.Volume(ctx, "v"); err != nil || len(v.State.Attachments) != 0 {
		t.Errorf("%+v, %v", v.State, err)
	}
}

// TestEphemeralVolumeAtStart: made for a machine, and gone with its end.
func TestEphemeralVolumeAtStart(t *testing.T) {
	blockdevtest.LeakCheck(t)
	d := startWith(t, t.TempDir())
	ctx, c := t.Context(), d.Client
	ask := toStart("sandbox:one", "")
	ask.Ephemeral = &client.Ephemeral{SizeMiB: 32}
	a, err := c.Attach(ctx, "scratch", ask)
	must(t, err)
	one := vmtest.Start(t, vmtest.Options{Boot: true, Args: a.Launch.Arguments})
	one.Sh(t, "set -e; mount "+disk(t, one, a.Serial)+" /mnt; echo x > /mnt/x; sync")
	await(t, c, "scratch", func(client.Volume) bool {
		at, err := c.Attachment(ctx, "scratch", a.ID)
		must(t, err)
		return at.Launch != nil && at.Launch.Process == one.Pid()
	})
	must(t, d.Kill())
	must(t, one.Close()) // while nobody looks
	must(t, d.Restart(ctx))
	_, err = d.Client.Volume(ctx, "scratch")
	refused(t, err, "NOT_FOUND", "scratch")
	left, err := filepath.Glob(filepath.Join(d.State, "vm", "*"))
	must(t, err)
	if len(left) > 0 {
		t.Errorf("left: %s", strings.Join(left, ", "))
	}
}
