package lvm

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/powercut"
	"holdfast/internal/sys"
	"holdfast/internal/vmtest"
)

// rigBytes is the size of the disk under the pools of these tests.
const rigBytes = 160 << 20

// rig is a volume group of its own on a device that can do harm.
type rig struct {
	place
	device string // name in device mapper
	disk   string
}

// newRig makes a device from a table of device mapper, and a pool on it.
func newRig(t *testing.T, table string) *rig {
	t.Helper()
	r := &rig{place: place{name: "rig/pool"}, device: "rigdisk", disk: vmtest.Disks()[1]}
	r.table(t, table)
	sh(t, "vgcreate -qq -s 1m rig "+r.node()+" "+r.only())
	sh(t, "lvcreate -qq -y -L 64m --poolmetadatasize 4m --zero y -T rig/pool "+r.only())
	t.Cleanup(func() { r.down(t); sh(t, "dd if=/dev/zero of="+r.disk+" bs=1M count=1 conv=fsync 2>/dev/null") })
	return r
}

func (r *rig) node() string { return "/dev/mapper/" + r.device }

// only shows LVM the rig's disk: what lies below it looks the same.
func (r *rig) only() string { return "--config '" + filter([]string{r.node()}) + "'" }

func (r *rig) table(t *testing.T, table string) {
	t.Helper()
	sh(t, fmt.Sprintf("export DM_DISABLE_UDEV=1; dmsetup create --noudevsync %s --table '0 %d %s'", r.device, rigBytes/sector, table))
}

// becomes changes what the device does, at once.
func (r *rig) becomes(t *testing.T, table string) {
	t.Helper()
	sh(t, fmt.Sprintf("export DM_DISABLE_UDEV=1; dmsetup suspend --noflush --nolockfs %s && dmsetup load %s --table '0 %d %s' && dmsetup resume --noudevsync %s", r.device, r.device, rigBytes/sector, table, r.device))
}

// down takes the process, the pool and the device away, as far as they are there.
func (r *rig) down(t *testing.T) {
	t.Helper()
	if r.pool != nil {
		r.pool.Shutdown()
		r.pool = nil
	}
	sh(t, "export DM_DISABLE_UDEV=1; vgchange -qq -an rig "+r.only()+" 2>/dev/null; for n in 1 2 3; do for d in $(dmsetup ls | grep '^rig-' | cut -f1); do dmsetup remove --noudevsync $d 2>/dev/null; done; done; "+
		"if dmsetup info "+r.device+" >/dev/null 2>&1; then dmsetup remove --noudevsync --retry "+r.device+"; fi; rm -rf /dev/rig; echo 3 > /proc/sys/vm/drop_caches")
}

// TestPowerCuts cuts the power after each call that was acknowledged, and between:
// the kernel logs what has reached the disk, and the disk is made again as it was
// then. Everything acknowledged by then is there.
func TestPowerCuts(t *testing.T) {
	logged := vmtest.Disks()[2]
	r := newRig(t, "log-writes "+vmtest.Disks()[1]+" "+logged)
	mark := func(n int) {
		if err := sys.MapperMessage(r.device, fmt.Sprintf("mark %d", n)); err != nil {
			t.Fatal(err)
		}
	}
	told := calls()
	after := []allowed{{}} // each call
	mark(-1)
	p := r.open(t)
	mark(0)
	for n, c := range told {
		if err := c.do(t, p); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		mark(n + 1)
		now := after[n].clone()
		now.after(c, true)
		after = append(after, now)
	}
	r.down(t)
	log, err := openLog(t, logged)
	if err != nil {
		t.Fatal(err)
	}
	sh(t, "dd if=/dev/zero of="+r.disk+" bs=1M count=1 conv=fsync 2>/dev/null")
	tried, n, cuts := points(t, 24), 0, 0
	cut := func(entries int, a allowed, when string) {
		if n++; tried(n) {
			cuts++
			r.revive(t, log, entries)
			t.Log(when)
			a.holds(t, r.open(t), when)
			r.down(t)
		}
	}
	for _, at := range log.Flushes(log.Mark("-1"), log.Mark("0")) {
		cut(at, allowed{}, fmt.Sprintf("cut at %d, while the pool is made ours", at))
	}
	for k, c := range told {
		from, to := log.Mark(fmt.Sprint(k)), log.Mark(fmt.Sprint(k+1))
		if from < 0 || to < from {
			t.Fatalf("marks %d and %d are at %d and %d of %d", k, k+1, from, to, log.Len())
		}
		during := after[k].clone()
		during.after(c, false)
		for _, at := range log.Flushes(from, to) {
			cut(at, during, fmt.Sprintf("cut at %d, during %s", at, c.name))
		}
		cut(to, after[k+1], fmt.Sprintf("cut at %d, after %s", to, c.name))
	}
	t.Logf("%d of %d cuts, in a log of %d entries", cuts, n, log.Len())
}

func openLog(t *testing.T, path string) (*powercut.KernelLog, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { f.Close() })
	return powercut.ReadKernelLog(f, rigBytes)
}

// sparseDisk is a file that reads as zero where nothing was written.
type sparseDisk struct{ *os.File }

func (d sparseDisk) Zero(offset, length int64) error { return sys.PunchHole(d.File, offset, length) }

// revive makes the rig's disk as the log has it after some entries.
func (r *rig) revive(t *testing.T, log *powercut.KernelLog, entries int) {
	t.Helper()
	const image = "/tmp/rig.img"
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(rigBytes), log.Replay(sparseDisk{f}, entries), f.Close()); err != nil {
		t.Fatal(err)
	}
	loop := sh(t, "l=$(losetup -f) && losetup $l "+image+" && echo $l") // the shell has its own losetup
	r.table(t, "linear "+loop+" 0")
	sh(t, "losetup -d "+loop) // it goes with the device
}

// TestFailingDisk has writes to the disk fail, or vanish, from the middle of the
// story on. What failed was told as such; when the disk is well again, everything
// that was acknowledged is there.
func TestFailingDisk(t *testing.T) {
	for name, harm := range map[string]string{"writes fail": "1 error_writes", "writes vanish": "1 drop_writes", "nothing works": "0"} {
		t.Run(name, func(t *testing.T) {
			well := "linear " + vmtest.Disks()[1] + " 0"
			r := newRig(t, well)
			p := r.open(t)
			told := calls()
			const first = 3 // something has been acknowledged by then
			begins := first + today(t)%(len(told)-first)
			a, failed := allowed{}, 0
			for n, c := range told {
				if n == begins {
					r.becomes(t, "flakey "+vmtest.Disks()[1]+" 0 0 3600 "+harm)
				}
				err := c.do(t, p)
				// A disk that lies about flushes keeps nothing from then on, and nobody can know.
				a.after(c, err == nil && (n < begins || !strings.Contains(harm, "drop")))
				if err != nil {
					failed++
					t.Logf("%s: %v", c.name, err)
				}
				if errors.Is(err, blockdev.ErrFailed) {
					break // what the process does then
				}
			}
			if !strings.Contains(harm, "drop") {
				if failed == 0 {
					t.Error("writes failed, and nobody was told")
				}
			}
			r.down(t)
			r.table(t, well)
			a.holds(t, r.open(t), fmt.Sprintf("%s from %q on", name, told[begins].name))
		})
	}
}

// TestFailedPool: a pool that the kernel has given up says so, and what to do. It
// takes no changes and counts as full; when its disk is well again, it is as before.
func TestFailedPool(t *testing.T) {
	well := "linear " + vmtest.Disks()[1] + " 0"
	r := newRig(t, well)
	p := r.open(t)
	id := published(t, p, 8<<20)
	if err := writeImage(t, p, id, "before"); err != nil {
		t.Fatal(err)
	}
	e, err := p.Open(t.Context(), id, anyBlock)
	if err != nil {
		t.Fatal(err)
	}
	r.becomes(t, "flakey "+vmtest.Disks()[1]+" 0 0 3600 1 error_writes")
	if err := (rawWriter{e.Path}).write(1); err == nil {
		t.Error("a write to a disk that takes none was acknowledged")
	}
	_, stat := p.Stat(t.Context(), id)
	_, capacity := p.Capacity(t.Context())
	for what, err := range map[string]error{
		"create": p.Create(t.Context(), blockdevtest.NewID(blockdev.PrefixVolume), 1<<20), "describe": p.Describe(t.Context(), id, []byte("y")),
		"publish": p.Publish(t.Context(), id, []byte("y")), "stat": stat, "capacity": capacity,
	} {
		if !errors.Is(err, blockdev.ErrNeedsRepair) {
			t.Errorf("%s in a pool that has failed: %v", what, err)
		}
	}
	if h := health(t, p); h.State != blockdev.PoolFailed && h.State != blockdev.PoolNeedsRepair || !strings.Contains(h.Reason, "lvchange -ay rig/pool") {
		t.Errorf("health %+v", h)
	}
	r.down(t)
	r.table(t, well)
	allowed{id: {{8 << 20, "x", "before"}}}.holds(t, r.open(t), "after a failed pool")
}

// TestLostDisk: a group of which a disk is missing is refused with what to do.
func TestLostDisk(t *testing.T) {
	r := newRig(t, "linear "+vmtest.Disks()[1]+" 0")
	sh(t, "vgextend -qq rig "+vmtest.Disks()[2]+" --config '"+filter([]string{r.node(), vmtest.Disks()[2]})+"'")
	t.Cleanup(func() { sh(t, "wipefs -qa "+vmtest.Disks()[2]) })
	sh(t, "wipefs -qa "+vmtest.Disks()[2])
	if _, err := r.tryOpen(t); !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "missing") {
		t.Errorf("a group without one of its disks: %v", err)
	}
}
