package guesttest_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/loop"
	"holdfast/internal/vmtest"
)

const (
	mib      = 1 << 20
	patience = time.Minute
)

// volume is an image, as a pool gives it.
type volume struct {
	id   blockdev.ID
	path string
	at   blockdev.Endpoint
}

func newVolume(t testing.TB, n int, size int64) *volume {
	t.Helper()
	v := &volume{id: blockdev.ID(fmt.Sprintf("vol-06c8qk4g1h6s9tj2m0a4n7v%03d", n)), path: filepath.Join(t.TempDir(), "image")}
	if !v.id.Valid() {
		t.Fatalf("id %s", v.id)
	}
	if err := errors.Join(os.WriteFile(v.path, nil, 0o600), os.Truncate(v.path, size)); err != nil {
		t.Fatal(err)
	}
	v.at = blockdev.Endpoint{Kind: blockdev.File, Path: v.path, Size: size}
	return v
}

// resize grows the image, as Backend.Grow does.
func (v *volume) resize(t *testing.T, size int64) {
	t.Helper()
	if err := os.Truncate(v.path, size); err != nil {
		t.Fatal(err)
	}
	v.at.Size = size
}

func attacher(t *testing.T, v *vmtest.VM, wait time.Duration) *qemu.Attacher {
	t.Helper()
	door, err := vmsocket.New([]string{v.Dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return qemu.New(qemu.Options{Door: door, Wait: wait})
}

func resolve(t testing.TB, a *qemu.Attacher, v *vmtest.VM) attach.Target {
	t.Helper()
	target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: v.Monitor}, "")
	if err != nil {
		t.Fatal(err)
	}
	if target.Pid != v.Pid() || target.StartTime == 0 || target.Boot == "" {
		t.Fatalf("resolved to %+v, QEMU is %d", target, v.Pid())
	}
	return target
}

func request(v *volume, target attach.Target) attach.Request {
	return attach.Request{Volume: v.id, Endpoint: v.at, Target: target, ReadOnly: v.at.ReadOnly}
}

func plug(t *testing.T, a *qemu.Attacher, r attach.Request) {
	t.Helper()
	for range 2 {
		if err := a.Attach(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, a, r, attach.StateAttached)
}

func unplug(t *testing.T, a *qemu.Attacher, r attach.Request) {
	t.Helper()
	for range 2 {
		if err := a.Detach(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, a, r, attach.StateMissing)
}

func expect(t *testing.T, a *qemu.Attacher, r attach.Request, want attach.State) {
	t.Helper()
	if got, err := a.Probe(t.Context(), r); err != nil || got != want {
		t.Fatalf("%s, %v; want %s", got, err, want)
	}
}

func disk(t testing.TB, v *vmtest.VM, id blockdev.ID) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	node, err := v.Disk(ctx, qemu.Serial(id))
	if err != nil || node == "" {
		t.Fatalf("the guest has no disk %s: %q, %v", qemu.Serial(id), node, err)
	}
	return node
}

// openBy tells whether a process has a file open.
func openBy(t *testing.T, pid int, path string) bool {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if at, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name())); at == path {
			return true
		}
	}
	return false
}

// TestLife: plugged into a guest, written, grown under it, taken away, and read in
// another guest.
func TestLife(t *testing.T) {
	blockdevtest.LeakCheck(t)
	one, two := vmtest.Start(t, vmtest.Options{}), vmtest.Start(t, vmtest.Options{})
	v := newVolume(t, 1, 64*mib)
	a := attacher(t, one, 0)
	r := request(v, resolve(t, a, one))
	expect(t, a, r, attach.StateMissing)
	plug(t, a, r)

	node := disk(t, one, v.id)
	one.Sh(t, "set -e; mkfs.ext4 -q "+node+"; mount "+node+" /mnt; echo before > /mnt/before; sync")
	v.resize(t, 128*mib)
	for range 2 {
		if err := a.Resized(t.Context(), request(v, r.Target)); err != nil {
			t.Fatal(err)
		}
	}
	one.Sh(t, fmt.Sprintf("set -e; for n in $(seq 6000); do [ $(cat /sys/block/%s/size) = %d ] && break; sleep 0.01; done; resize2fs %s 2>/dev/null; echo after > /mnt/after; [ $(($(stat -f -c %%b /mnt) * $(stat -f -c %%S /mnt))) -gt %d ]; umount /mnt",
		filepath.Base(node), 128*mib/512, node, 100*mib))
	if !openBy(t, one.Pid(), v.path) {
		t.Error("the test cannot tell who has the image open")
	}
	unplug(t, a, r)
	if openBy(t, one.Pid(), v.path) {
		t.Error("QEMU still has the image open")
	}

	b := attacher(t, two, 0)
	r = request(v, resolve(t, b, two))
	plug(t, b, r)
	node = disk(t, two, v.id)
	if got := two.Sh(t, "mount "+node+" /mnt; cat /mnt/before /mnt/after; umount /mnt"); got != "before\nafter" {
		t.Errorf("the second guest reads %q", got)
	}
	unplug(t, b, r)
}

// TestReadersAndDevices: a reader cannot write, also of a block device; discards
// reach the image.
func TestReadersAndDevices(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Loop)
	guest := vmtest.Start(t, vmtest.Options{})
	v := newVolume(t, 2, 64*mib)
	f, err := os.OpenFile(v.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	device, err := loop.Attach(f, true)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := device.Detach(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	file := v.at
	a := attacher(t, guest, 0)
	target := resolve(t, a, guest)

	v.at = blockdev.Endpoint{Kind: blockdev.Block, Path: device.Path, Size: 64 * mib, ReadOnly: true}
	plug(t, a, request(v, target))
	node := disk(t, guest, v.id)
	if got := guest.Sh(t, "cat /sys/block/"+filepath.Base(node)+"/ro; dd if=/dev/zero of="+node+" bs=4096 count=1 oflag=direct 2>/dev/null || echo refused"); got != "1\nrefused" {
		t.Errorf("a reader: %q", got)
	}
	writable := request(v, target)
	writable.ReadOnly = false
	if err := a.Attach(t.Context(), writable); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "another mode") {
		t.Errorf("in the other mode: %v", err)
	}
	unplug(t, a, request(v, target))

	v.at = file
	plug(t, a, request(v, target))
	node = disk(t, guest, v.id)
	guest.Sh(t, "dd if=/dev/urandom of="+node+" bs=1M count=8 oflag=direct 2>/dev/null")
	before := blocks(t, v.path)
	guest.Sh(t, "blkdiscard "+node)
	if after := blocks(t, v.path); before < 8*mib/512 || after > before/8 {
		t.Errorf("a discard leaves %d of %d blocks", after, before)
	}
	unplug(t, a, request(v, target))
}

// TestGuestStandsStill: it gets a volume and its growth, which it sees when it runs
// again; it lets go of nothing, which is said, and does when it runs again; asked by
// another life of the daemon, too.
func TestGuestStandsStill(t *testing.T) {
	blockdevtest.LeakCheck(t)
	guest := vmtest.Start(t, vmtest.Options{})
	v := newVolume(t, 3, 16*mib)
	a := attacher(t, guest, 300*time.Millisecond)
	r := request(v, resolve(t, a, guest))
	command(t, guest, "stop", nil)
	plug(t, a, r)
	v.resize(t, 32*mib)
	if err := a.Resized(t.Context(), request(v, r.Target)); err != nil {
		t.Fatal(err)
	}
	command(t, guest, "cont", nil)
	if got := guest.Sh(t, "cat /sys/block/"+filepath.Base(disk(t, guest, v.id))+"/size"); got != fmt.Sprint(32*mib/512) {
		t.Errorf("the guest sees %s sectors", got)
	}
	command(t, guest, "stop", nil)
	for range 2 {
		if err := a.Detach(t.Context(), r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "not running (paused)") {
			t.Fatalf("%v", err)
		}
		expect(t, a, r, attach.StateAttached)
	}
	command(t, guest, "cont", nil)
	unplug(t, attacher(t, guest, patience), r)
}

// TestKilledGuest: gone is told by the process alone, at once, and nothing of a
// gone machine hinders a detach.
func TestKilledGuest(t *testing.T) {
	blockdevtest.LeakCheck(t)
	guest := vmtest.Start(t, vmtest.Options{})
	v := newVolume(t, 4, 16*mib)
	a := attacher(t, guest, 0)
	r := request(v, resolve(t, a, guest))
	plug(t, a, r)
	told := make(chan error, 1)
	go func() { told <- a.AwaitEnd(t.Context(), r.Target) }()
	if err := os.Rename(guest.Monitor, guest.Monitor+".away"); err != nil {
		t.Fatal(err)
	}
	// The socket's end proves nothing.
	if state, err := a.Probe(t.Context(), r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("without a monitor: %s, %v", state, err)
	}
	if err := a.Detach(t.Context(), r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("without a monitor: %v", err)
	}
	for range 2 {
		if err := a.Fence(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-told:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("nobody was told")
	}
	expect(t, a, r, attach.StateGone)
	if err := a.Detach(t.Context(), r); err != nil {
		t.Error(err)
	}
	if err := a.Attach(t.Context(), r); !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("attached to a dead machine: %v", err)
	}
}

// TestPlaces: root ports first, then SCSI; what is refused leaves nothing behind.
func TestPlaces(t *testing.T) {
	blockdevtest.LeakCheck(t)
	guest := vmtest.Start(t, vmtest.Options{})
	a := attacher(t, guest, 0)
	target := resolve(t, a, guest)
	var all []*volume
	for n := range 9 { // there are eight ports
		v := newVolume(t, 10+n, 16*mib)
		plug(t, a, request(v, target))
		all = append(all, v)
	}
	if got := guest.Sh(t, "for n in $(seq 6000); do ls /dev/disk/by-id /sys/block 2>/dev/null | grep -q '^sda$' && break; sleep 0.01; done; cat /sys/block/sda/device/vpd_pg80 | tr -d '\\000-\\037'"); !strings.HasSuffix(got, qemu.Serial(all[8].id)) {
		t.Errorf("the ninth is no SCSI disk: %q", got)
	}
	disk(t, guest, all[7].id)
	unplug(t, a, request(all[8], target))
	unplug(t, a, request(all[3], target))
	plug(t, a, request(all[3], target))
	disk(t, guest, all[3].id) // on the port that became free

	other := newVolume(t, 31, 16*mib) // a node that nobody can plug in any more: QEMU has the image locked
	other.at.Path = all[0].path
	if err := a.Attach(t.Context(), request(other, target)); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "locked") {
		t.Errorf("an image that is in use: %v", err)
	}
	expect(t, a, request(other, target), attach.StateMissing)
	if nodes := query(t, guest, "query-named-block-nodes"); strings.Contains(nodes, strings.TrimPrefix(string(other.id), "vol-")) {
		t.Errorf("a node of what was refused is left: %s", nodes)
	}
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var status syscall.Stat_t
	if err := syscall.Stat(path, &status); err != nil {
		t.Fatal(err)
	}
	return status.Blocks
}

func command(t testing.TB, v *vmtest.VM, name string, args qmp.Args) {
	t.Helper()
	if err := v.Do(t.Context(), name, args); err != nil {
		t.Fatal(err)
	}
}

func query(t *testing.T, v *vmtest.VM, name string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m, err := qmp.Dial(ctx, v.Monitor)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	answer, err := m.Do(ctx, name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return string(answer)
}
