package blockdevtest

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"holdfast/internal/run"
)

// Need is a feature of the machine that a test cannot do without. Its text is
// the name that waives it in HOLDFAST_SKIP.
type Need string

// The features that tests require.
const (
	Root  Need = "root"  // effective user 0
	Loop  Need = "loop"  // loop devices
	Ext4  Need = "ext4"  // kernel support and e2fsprogs
	XFS   Need = "xfs"   // kernel support and xfsprogs
	Btrfs Need = "btrfs" // kernel support and btrfs-progs
	Runc  Need = "runc"  // the program
	Qemu  Need = "qemu"  // qemu-system-x86_64 and qemu-img
	VM    Need = "vm"    // what guests are made of: QEMU, mksquashfs, and a mirror that has the kernel
	Fuse  Need = "fuse"  // /dev/fuse
	NBD   Need = "nbd"   // clients of other makers: libnbd's, QEMU's, nbdkit's, fio
	NPM   Need = "npm"   // node, npm, and the registry that it fetches from
	SDK   Need = "sdk"   // clients of other makers, wherever they are fetched from
	// Chromium is the browser, Debian's package of that name.
	Chromium Need = "chromium"
	// Registry is Debian's docker-registry.
	Registry Need = "registry"
	// ReflinkPool is all that ReflinkDir needs: root, loop and XFS.
	ReflinkPool Need = "reflink"
	// PowerCut is all that the power-cut rig needs: root, loop, FUSE and
	// qemu-storage-daemon.
	PowerCut Need = "powercut"
)

// SkipVariable names the environment variable that waives needs: a comma list.
const SkipVariable = "HOLDFAST_SKIP"

// Require fails the test at once when the machine lacks one of needs, because a
// test that quietly does not run proves nothing. A need named in HOLDFAST_SKIP
// is waived: the test is skipped, and the message says for which feature and
// whether the machine lacks it.
func Require(t testing.TB, needs ...Need) {
	t.Helper()
	for _, need := range needs {
		missing := need.missing()
		switch {
		case waived(need) && missing != nil:
			t.Skipf("needs %s, waived by %s: %v", need, SkipVariable, missing)
		case waived(need):
			t.Skipf("needs %s, waived by %s (the machine has it)", need, SkipVariable)
		case missing != nil:
			t.Fatalf("needs %s: %v (waive with %s=%s)", need, missing, SkipVariable, need)
		}
	}
}

// Waived tells whether a need is named in HOLDFAST_SKIP.
func Waived(need Need) bool { return waived(need) }

func waived(need Need) bool {
	for _, name := range strings.Split(os.Getenv(SkipVariable), ",") {
		if Need(strings.TrimSpace(name)) == need {
			return true
		}
	}
	for _, part := range composed[need] {
		if waived(part) {
			return true
		}
	}
	return false
}

var composed = map[Need][]Need{
	ReflinkPool: {Root, Loop, XFS},
	PowerCut:    {Root, Loop, Fuse},
}

// missing tells what of a need the machine lacks, nil for nothing.
func (n Need) missing() error {
	for _, part := range composed[n] {
		if err := part.missing(); err != nil {
			return err
		}
	}
	switch n {
	case Root:
		if os.Geteuid() != 0 {
			return fmt.Errorf("effective user is %d, not 0", os.Geteuid())
		}
	case Loop:
		return device("/dev/loop-control")
	case Fuse:
		return device("/dev/fuse")
	case Ext4:
		return filesystemAndTools("ext4", "mkfs.ext4", "e2fsck", "resize2fs", "debugfs")
	case XFS:
		return filesystemAndTools("xfs", "mkfs.xfs", "xfs_growfs", "xfs_repair")
	case Btrfs:
		return filesystemAndTools("btrfs", "mkfs.btrfs", "btrfs")
	case Runc:
		return programs("runc")
	case NPM:
		return programs("node", "npm")
	case VM:
		return programs("qemu-system-x86_64", "mksquashfs", "apt-get", "dpkg-deb", "depmod")
	case NBD:
		return programs("nbdinfo", "nbdcopy", "nbdkit", "qemu-img", "qemu-io", "fio")
	case Registry:
		return programs("docker-registry")
	case Chromium:
		return programs("chromium")
	case Qemu:
		return programs("qemu-system-x86_64", "qemu-img")
	case PowerCut:
		return programs("qemu-storage-daemon")
	case ReflinkPool, SDK:
	default:
		return fmt.Errorf("unknown need %q", string(n))
	}
	return nil
}

func device(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func programs(names ...string) error {
	for _, name := range names {
		if _, err := run.Look(name); err != nil {
			return err
		}
	}
	return nil
}

// filesystemAndTools checks programs, and that the kernel has the type built in
// or loaded, or can be expected to load it at mount time.
func filesystemAndTools(name string, tools ...string) error {
	if err := programs(tools...); err != nil {
		return err
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	for _, line := range strings.Split(string(known), "\n") {
		if strings.TrimSpace(strings.TrimPrefix(line, "nodev")) == name {
			return nil
		}
	}
	if _, err := os.Stat("/proc/sys/kernel/modprobe"); err != nil {
		return fmt.Errorf("kernel has no %s and loads no modules", name)
	}
	return nil
}
