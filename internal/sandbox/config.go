package sandbox

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	// toolPath is where every sandbox has busybox, read-only: its first process,
	// the shell of images that have none, and the tools that read and write files.
	toolDir  = "/.holdfast"
	toolPath = toolDir + "/busybox"
	// idRange is the number of users and groups that a sandbox has.
	idRange = 65536
	// execOOM makes the kernel choose commands before the first process when the
	// sandbox has used up its memory: so the sandbox survives.
	execOOM = 500
)

// capabilities are those that programs need to be root among their own files
// and processes; none reaches beyond the sandbox.
var capabilities = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT"}

// reaper is the first process: it does nothing but wait for children, its own
// sleep and every orphan of the sandbox, so that none stays a zombie.
const reaper = `trap 'exit 143' TERM; while :; do ` + toolPath + ` sleep 1000000 & wait $!; done`

// limits bound one sandbox.
type limits struct {
	memory int64 // bytes
	pids   int64
}

// writeConfig writes the container's config.json.
func writeConfig(bundle string, c configuration) error {
	text, err := json.Marshal(c.spec())
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundle, "config.json"), text, 0o600)
}

// configuration is what differs between sandboxes.
type configuration struct {
	name    string
	rootfs  string
	tool    string // the host's busybox
	cgroup  string
	firstID int // 0: no user namespace
	limits  limits
}

func (c configuration) spec() *specs.Spec {
	s := &specs.Spec{
		Version:  "1.0.2",
		Hostname: c.name,
		Root:     &specs.Root{Path: c.rootfs},
		Process:  newProcess([]string{toolPath, "sh", "-c", reaper}, nil, "/"),
		Mounts:   c.mounts(),
		Linux: &specs.Linux{
			CgroupsPath: c.cgroup,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
			},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
				Memory:  &specs.LinuxMemory{Limit: &c.limits.memory, Swap: &c.limits.memory},
				Pids:    &specs.LinuxPids{Limit: &c.limits.pids},
			},
			Seccomp:           seccompFilter(),
			RootfsPropagation: "private",
			MaskedPaths: []string{
				"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
				"/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
			},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
	if c.firstID > 0 {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: uint32(c.firstID), Size: idRange}} //nolint:gosec // bounded in Options.check
		s.Linux.UIDMappings, s.Linux.GIDMappings = ids, ids
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	}
	return s
}

func (c configuration) mounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=64k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{
			"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%d", min(64<<20, c.limits.memory/8)),
		}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: toolPath, Type: "bind", Source: c.tool, Options: []string{"bind", "ro", "nosuid", "nodev"}},
	}
}

// newProcess is a process with the rights of every process in a sandbox.
func newProcess(args, env []string, dir string) *specs.Process {
	score := 0 // not the daemon's, which is not to be killed
	return &specs.Process{
		OOMScoreAdj:     &score,
		Args:            args,
		Env:             append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}, env...),
		Cwd:             dir,
		NoNewPrivileges: true,
		Capabilities:    &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
		Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: 0, Hard: 0}, {Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}},
	}
}
