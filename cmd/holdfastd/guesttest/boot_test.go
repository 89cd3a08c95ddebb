package guesttest_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/guest"
	"holdfast/internal/vmtest"
)

// TestMachineBootsFromVolume: a bootable disk is written into a volume by its export, and
// machines get forks of its snapshot. One boots from it: the firmware by itself reads
// boot sector, kernel and initramfs through the worker, the kernel its root. The worker is
// killed under it, and it is reset; after all that it holds what it held.
func TestMachineBootsFromVolume(t *testing.T) {
	blockdevtest.LeakCheck(t)
	sockets := t.TempDir()
	d := startLayered(t, sockets)
	ctx, c := t.Context(), d.Client
	const size = 112
	image := filepath.Join(sockets, "disk")
	vmtest.BootDisk(t, image, size<<20)
	parts, err := guest.Parts(ctx)
	must(t, err)
	sum, err := exec.Command("sha256sum", parts.Root).Output()
	must(t, err)

	makeLayered(t, c, "golden", client.VolumeSpec{Size: size, Filesystem: "none"})
	a, err := c.Attach(ctx, "golden", client.Attachment{Holder: "agent:builder", Target: client.Target{Type: "export", Protocol: "nbd"}})
	must(t, err)
	if out, err := exec.CommandContext(ctx, "nbdcopy", "--flush", image, a.Launch.URI).CombinedOutput(); err != nil {
		t.Fatalf("nbdcopy: %v\n%s", err, out)
	}
	_, err = c.Detach(ctx, "golden", a.ID)
	must(t, err)
	_, err = c.CreateSnapshot(ctx, "golden", client.NewSnapshot{Name: "v1"}, "")
	must(t, err)
	makeLayered(t, c, "root", client.VolumeSpec{Snapshot: "golden/v1"})

	to := toStart("sandbox:one", "")
	to.Target.Transport = "vhost-user"
	a, err = c.Attach(ctx, "root", to)
	must(t, err)
	v, err := c.Volume(ctx, "root")
	must(t, err)
	if a.Kind != "vhost-user" || a.Launch == nil || v.State.Sizes.Hydration == nil {
		t.Fatalf("%+v, %+v", a, v.State.Sizes)
	}
	g := vmtest.Start(t, vmtest.Options{Firmware: true, SharedMemory: true, Args: a.Launch.Arguments})
	if got := g.Sh(t, "cat /sys/block/?d*/serial; grep -c guest_root=vda1 /proc/cmdline"); got != a.Serial+"1" {
		t.Errorf("the guest's disks, and whether it was told of its root: %q", got)
	}
	g.Sh(t, "set -e; mkfs.ext4 -q /dev/vda2; mount /dev/vda2 /mnt; echo kept > /mnt/kept; sync")
	began := served(t, c, "root", time.Time{}).Since
	reads := g.Script(ctx, "echo begun; sha256sum < /dev/vda1")
	_, err = reads.Next()
	must(t, err)
	killWorker(t, a)
	served(t, c, "root", began)
	read, err := reads.Next()
	must(t, err)
	if got, _, _ := strings.Cut(string(sum), " "); strings.Fields(read.Text)[0] != got {
		t.Errorf("the root's digest is %s in the guest, and was %s", read.Text, got)
	}
	must(t, g.Reset(ctx)) // the firmware starts and stops the device once more
	if got := g.Sh(t, "mount /dev/vda2 /mnt && cat /mnt/kept && umount /mnt && e2fsck -fn /dev/vda2 >/dev/null && echo clean"); got != "kept\nclean" {
		t.Errorf("after the reset: %q", got)
	}
	_, err = c.Detach(ctx, "root", a.ID)
	refused(t, err, "CONFLICT", fmt.Sprintf("process %d", g.Pid()))
	must(t, g.Close())
	await(t, c, "root", func(v client.Volume) bool { return len(v.State.Attachments) == 0 })
}
