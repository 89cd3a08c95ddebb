package guesttest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/vmtest"
)

// must is what has to go well for a test to go on.
func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// plugServed attaches a volume by its worker, and tells where the guest has it.
func plugServed(t *testing.T, a *qemu.Attacher, guest *vmtest.VM, w *control.Worker) (r attach.Request, node string) {
	t.Helper()
	target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: guest.Monitor, Transport: string(blockdev.VhostUser)}, "")
	must(t, err)
	r = attach.Request{Volume: w.ID(), Target: target, Endpoint: blockdev.Endpoint{Kind: blockdev.VhostUser, Path: w.Socket(), Size: w.Size()}}
	plug(t, a, r)
	return r, disk(t, guest, w.ID())
}

func status(t *testing.T, w *control.Worker) serve.Service {
	t.Helper()
	s, err := w.Status(t.Context())
	must(t, err)
	return s
}

func checked(t *testing.T, image string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

// TestServedVolume: a guest makes a filesystem on a volume that the real worker serves,
// fills, trims and grows it. While it writes the daemon is killed, the worker is killed
// and replaced, and ended and replaced: no request fails and no byte is lost.
func TestServedVolume(t *testing.T) {
	blockdevtest.LeakCheck(t)
	guest := vmtest.Start(t, vmtest.Options{SharedMemory: true})
	d, a := newDaemons(t), attacher(t, guest, patience)
	image := newVolume(t, 1, 96*mib)
	v := served{ID: image.id, Size: 96 * mib, Flat: image.path}
	w, killDaemon := d.serve(t, v)
	r, node := plugServed(t, a, guest, w)

	guest.Sh(t, "set -e; mkfs.ext4 -q "+node+"; mount "+node+" /mnt; dd if=/dev/urandom of=/mnt/data bs=64k count=128 2>/dev/null; cp /mnt/data /mnt/gone; sync; sha256sum < /mnt/data > /tmp/sum")
	full := blocks(t, image.path)
	guest.Sh(t, "set -e; rm /mnt/gone; sync; fstrim /mnt")
	if now := blocks(t, image.path); now > full-4*mib/512 {
		t.Errorf("%d blocks are allocated after fstrim, %d were before", now, full)
	}

	writer := guest.Write(t, "/mnt")
	before := status(t, w)
	writer.Through(t, func() {
		image.resize(t, 160*mib)
		v.Size = 160 * mib
		must(t, w.Grow(t.Context(), v.Size), a.Resized(t.Context(), r))
		guest.Sh(t, fmt.Sprintf("set -e; while [ $(cat /sys/block/%s/size) != %d ]; do sleep 0.02; done; resize2fs %s 2>/dev/null; [ $(($(stat -f -c %%b /mnt) * $(stat -f -c %%S /mnt))) -gt %d ]", filepath.Base(node), v.Size/512, node, 128*mib))
		killDaemon()
	})
	found, err := d.Find(t.Context(), image.id) // by the next daemon
	must(t, err)
	if now := status(t, found); now.Pid != before.Pid || !now.Since.Equal(before.Since) || now.Clients != 1 || now.Meter.Kinds[meter.Write].Requests <= before.Meter.Kinds[meter.Write].Requests {
		t.Errorf("after the daemon's end: %+v, before %+v", now, before)
	}
	writer.Through(t, func() {
		must(t, found.Kill(t.Context()))
		w, _ = d.serve(t, v)
	})
	writer.Through(t, func() {
		must(t, w.Stop(t.Context()))
		w, _ = d.serve(t, v)
	})
	writer.Enough(t)
	if s := status(t, w); s.Failed != "" || s.Meter.Kinds[meter.Write].Errors+s.Meter.Kinds[meter.Read].Errors+s.Meter.Kinds[meter.Flush].Errors > 0 {
		t.Errorf("the worker: %+v", s)
	}
	guest.Sh(t, "set -e; echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/data | cmp - /tmp/sum; umount /mnt")
	unplug(t, a, r)
	must(t, w.Stop(t.Context()))
	checked(t, image.path)
}

// TestServedWhileItHydrates: a guest uses a volume at once whose bytes are a template's,
// and writes it; its worker ends, and while the guest goes on writing the next one brings
// all bytes into one plain file.
func TestServedWhileItHydrates(t *testing.T) {
	blockdevtest.LeakCheck(t)
	guest := vmtest.Start(t, vmtest.Options{SharedMemory: true})
	d, a := newDaemons(t), attacher(t, guest, patience)
	const size = 96 * mib
	v := served{ID: "vol-06c8qk4g1h6s9tj2m0a4n7v002", Size: size, Base: template(t, size), Rate: 4 * mib}
	layer(t, &v)
	w, _ := d.serve(t, v)
	r, node := plugServed(t, a, guest, w)

	sums, err := os.ReadFile(v.Base + ".sums")
	must(t, err)
	guest.Sh(t, "mount "+node+" /mnt")
	if s := status(t, w); s.Layers == nil || s.Layers.Held >= size {
		t.Errorf("nothing is left to hydrate: %+v", s.Layers)
	}
	if got := guest.Sh(t, "cd /mnt/files && sha256sum *"); got != strings.TrimSpace(string(sums)) {
		t.Errorf("the guest reads\n%s\nthe template has\n%s", got, sums)
	}
	writer := guest.Write(t, "/mnt")
	writer.Through(t, func() {
		must(t, w.Kill(t.Context()))
		v.Hydrate = true
		w, _ = d.serve(t, v)
	})
	writer.Enough(t)
	hydrated(t, w)
	guest.Sh(t, "set -e; echo 3 > /proc/sys/vm/drop_caches; cmp /mnt/files/1 /mnt/files/2 && exit 1; rm /mnt/files/1; sync; umount /mnt")
	unplug(t, a, r)
	must(t, w.Stop(t.Context()))
	checked(t, v.Data)
	if out, err := exec.CommandContext(t.Context(), "sh", "-c", "debugfs -R 'cat files/2' "+v.Data+" 2>/dev/null | sha256sum").Output(); err != nil || !strings.Contains(string(sums), strings.Fields(string(out))[0]+"  2") {
		t.Errorf("the plain file has another file 2: %s, %v", out, err)
	}
}

// template makes an ext4 with files in it, and a list of their digests beside it.
func template(t *testing.T, size int64) string {
	t.Helper()
	dir := t.TempDir()
	image := filepath.Join(dir, "template")
	script := fmt.Sprintf("set -e; cd %s; mkdir -p root/files; for n in 1 2 3 4; do head -c 8000000 /dev/urandom > root/files/$n; done; (cd root/files; sha256sum *) > template.sums; truncate -s %d template; mkfs.ext4 -q -d root template", dir, size)
	if out, err := exec.CommandContext(t.Context(), "sh", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return image
}

// layer gives a volume an empty one over its base.
func layer(t *testing.T, v *served) {
	t.Helper()
	dir := t.TempDir()
	v.Data, v.Map = filepath.Join(dir, "data"), filepath.Join(dir, "map")
	data, err := os.Create(v.Data)
	must(t, err)
	defer data.Close()
	bits, err := os.Create(v.Map)
	must(t, err)
	defer bits.Close()
	must(t, overlay.Create(overlay.Files{Data: overlay.OSFile{File: data}, Map: overlay.OSFile{File: bits}}, v.Size))
}

// hydrated waits until the top layer holds the whole volume.
func hydrated(t *testing.T, w *control.Worker) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	for {
		s, err := w.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if s.Layers == nil || s.Layers.Held >= s.Layers.Size {
			return
		}
		if s.Layers.Reason != "" {
			t.Errorf("the base fails: %s", s.Layers.Reason)
		}
	}
}
