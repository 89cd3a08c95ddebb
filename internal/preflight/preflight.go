package preflight

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/limit"
	"holdfast/blockdev/nbddevice"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// Status is how a check came out.
type Status string

const (
	OK   Status = "ok"
	Warn Status = "warn" // Holdfast works, with the consequence
	Fail Status = "fail" // Holdfast cannot do its main job
)

// Check is one thing that was looked at.
type Check struct {
	Name        string `json:"name"`
	Status      Status `json:"status"`
	Found       string `json:"found"`
	Consequence string `json:"consequence,omitempty"` // empty when all is well
	Fix         string `json:"fix,omitempty"`
}

// Host looks at what does not depend on a configuration: privileges, kernel,
// tools and limits.
func Host(ctx context.Context) []Check {
	checks := []Check{root(), loopDevices(), nbdClient(), mountCalls(), capability(), openFiles(), rateLimits()}
	for _, t := range tools {
		if ctx.Err() != nil {
			break
		}
		checks = append(checks, t.check())
	}
	return checks
}

// Place looks at the directories of one daemon, which exist.
func Place(stateDir, poolDir, metadataDir string) []Check {
	return []Check{space("pool-space", poolDir), space("metadata-space", metadataDir), apart(poolDir, metadataDir)}
}

// Failed gives the checks that forbid the main job.
func Failed(checks []Check) []Check {
	var failed []Check
	for _, c := range checks {
		if c.Status == Fail {
			failed = append(failed, c)
		}
	}
	return failed
}

func root() Check {
	c := Check{Name: "root", Status: OK, Found: fmt.Sprintf("uid %d", os.Geteuid())}
	admin, err := sys.HasCapability(sys.CapSysAdmin)
	switch {
	case os.Geteuid() != 0 || (err == nil && !admin):
		c.Status = Fail
		c.Consequence = "no loop device can be made and nothing can be mounted"
		c.Fix = "run holdfastd as root with CAP_SYS_ADMIN"
	case err != nil:
		c.Status, c.Found = Warn, err.Error()
	}
	return c
}

func loopDevices() Check {
	c := Check{Name: "loop-devices", Status: OK, Found: "/dev/loop-control opens"}
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		c.Status, c.Found = Fail, err.Error()
		c.Consequence = "volumes cannot become block devices: no attachment to containers or host paths, no pool image"
		c.Fix = "modprobe loop, and let this process see /dev/loop-control and /dev/loop*"
		return c
	}
	if err := f.Close(); err != nil {
		c.Status, c.Found = Warn, err.Error()
	}
	return c
}

func nbdClient() Check {
	c := Check{Name: "nbd-client", Status: OK, Found: "the kernel has one"}
	if err := nbddevice.Available(); err != nil {
		c.Status, c.Found = Warn, err.Error()
		if errors.Is(err, sys.ErrNoNBD) {
			c.Found = "absent"
		}
		c.Consequence = "volumes whose bytes do not lie in one place yet wait for that before they are mounted (HYDRATING)"
		c.Fix = "modprobe nbd max_part=0, of Linux 5.14 or newer, where volumes from templates are in a pool without reflink"
	}
	return c
}

func mountCalls() Check {
	c := Check{Name: "kernel", Status: OK, Found: "Linux " + sys.KernelRelease()}
	if missing := sys.MissingMountCalls(); len(missing) > 0 {
		c.Status = Fail
		c.Found += ", without " + strings.Join(missing, ", ")
		c.Consequence = "volumes cannot be attached to running containers"
		c.Fix = "use Linux 5.12 or newer, and no seccomp filter that hides these calls"
	}
	return c
}

func capability() Check {
	c := Check{Name: "cap-sys-resource", Status: OK, Found: "present"}
	has, err := sys.HasCapability(sys.CapSysResource)
	switch {
	case err != nil:
		c.Status, c.Found = Warn, err.Error()
	case !has:
		c.Status, c.Found = Warn, "absent"
		c.Consequence = "ext4 volumes do not grow while attached here: growth is pending until they are detached; XFS and btrfs volumes do"
		c.Fix = "give the daemon CAP_SYS_RESOURCE"
	}
	return c
}

// enoughFiles covers a few hundred attached volumes and connections.
const enoughFiles = 4096

func openFiles() Check {
	n, err := sys.OpenFileLimit()
	c := Check{Name: "open-files", Status: OK, Found: fmt.Sprintf("limit %d", n)}
	switch {
	case err != nil:
		c.Status, c.Found = Warn, err.Error()
	case n < enoughFiles:
		c.Status = Warn
		c.Consequence = "many connections or volumes at once will fail with \"too many open files\""
		c.Fix = fmt.Sprintf("raise LimitNOFILE to %d or more", enoughFiles)
	}
	return c
}

func rateLimits() Check {
	c := Check{Name: "rate-limits", Status: OK}
	l, err := limit.New()
	if err == nil {
		var e blockdev.Enforcement
		e, err = l.Explain(attach.Target{Pid: os.Getpid()}, false)
		c.Found = e.Mechanism
	}
	if err != nil {
		c.Status, c.Found = Warn, err.Error()
		c.Consequence = "attachments cannot have rate limits: asking for them is refused"
		c.Fix = "use cgroup v2 with the io controller, or mount cgroup v1's blkio"
	}
	return c
}

// tool is a program that is called.
type tool struct {
	name, pkg, consequence string
	missing                Status
}

var tools = []tool{
	{"mkfs.ext4", "e2fsprogs", "no ext4 volumes and no templates can be made", Fail},
	{"e2fsck", "e2fsprogs", "ext4 volumes cannot be grown or checked", Fail},
	{"resize2fs", "e2fsprogs", "ext4 volumes cannot be grown, and templates not sized", Fail},
	{"mkfs.xfs", "xfsprogs", "no XFS volumes, and no pool image where the file system cannot reflink", Warn},
	{"xfs_repair", "xfsprogs", "damaged XFS volumes cannot be repaired", Warn},
	{"mkfs.btrfs", "btrfs-progs", "no btrfs volumes", Warn},
	{"runc", "runc", "no attachments to runc containers", Warn},
}

func (t tool) check() Check {
	path, err := run.Look(t.name)
	if err == nil {
		return Check{Name: t.name, Status: OK, Found: path}
	}
	c := Check{Name: t.name, Status: t.missing, Found: err.Error(), Consequence: t.consequence, Fix: "install the package " + t.pkg}
	if errors.Is(err, run.ErrNotFound) {
		c.Found = "not installed"
	}
	return c
}

// littleSpace is where an operator should hear of it: a twentieth.
const littleSpace = 20

func space(name, dir string) Check {
	s, err := sys.SpaceOf(dir)
	if err != nil {
		return Check{Name: name, Status: Warn, Found: err.Error(), Consequence: "free space is not known"}
	}
	c := Check{Name: name, Status: OK, Found: fmt.Sprintf("%s: %d MiB of %d MiB free", dir, s.Free>>20, s.Total>>20)}
	if s.Free < s.Total/littleSpace {
		c.Status = Warn
		c.Consequence = "creates are refused soon; deletes and detaches go on working"
		c.Fix = "delete volumes or template versions, or make the file system larger"
	}
	return c
}

func apart(poolDir, metadataDir string) Check {
	c := Check{Name: "metadata-apart", Status: OK, Found: "metadata and volumes are on different file systems"}
	pool, err := sys.SpaceOf(poolDir)
	meta, err2 := sys.SpaceOf(metadataDir)
	switch {
	case err != nil || err2 != nil:
		c.Status, c.Found = Warn, errors.Join(err, err2).Error()
	case pool.Device == meta.Device:
		c.Status, c.Found = Warn, "metadata and volumes share a file system"
		c.Consequence = "volumes that fill the file system stop the metadata store, and the daemon with it"
		c.Fix = "let holdfastd make its metadata image (not with --pool-mode=copy on a full disk), or move --state-dir to another file system"
	}
	return c
}
