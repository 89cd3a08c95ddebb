package cage

import (
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"

	"holdfast/internal/sys"
)

const (
	// firstID is the host's user and group that is root in a cage, the first of
	// idCount. Nobody has them: systemd and the usual subordinate ranges stay below
	// 2^31 (systemd's UIDS-GIDS document).
	firstID = 0xF0000000
	idCount = 1 << 16

	processes = 128 // xfs_repair starts some threads for each allocation group and CPU
	openFiles = 1024
)

// writeSpec writes the bundle's config.json, which says all that the package's
// comment promises.
func (c *Cages) writeSpec(k *cage, d device) error {
	program, err := c.program()
	if err != nil {
		return err
	}
	text, err := json.Marshal(c.spec(k.id, program, d))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(k.dir, "config.json"), text, 0o600)
}

func (c *Cages) spec(id, program string, d device) *specs.Spec {
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: firstID, Size: idCount}}
	return &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: c.root.dir, Readonly: true},
		Process: c.process(),
		Mounts:  c.mounts(program),
		Linux: &specs.Linux{
			UIDMappings: ids,
			GIDMappings: ids,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.UserNamespace}, {Type: specs.MountNamespace}, {Type: specs.PIDNamespace},
				{Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			},
			CgroupsPath: c.groups.path(id),
			Resources:   c.resources(d),
			Seccomp:     seccomp(),
		},
	}
}

func (c *Cages) process() *specs.Process {
	oom := 500 // before anything else of the daemon's, whose own figure it would inherit
	limit := func(what string, n uint64) specs.POSIXRlimit {
		return specs.POSIXRlimit{Type: what, Hard: n, Soft: n}
	}
	return &specs.Process{
		Args:            append([]string{"/" + insideName}, c.o.Inside...),
		Cwd:             "/",
		Env:             []string{},
		Capabilities:    &specs.LinuxCapabilities{},
		NoNewPrivileges: true,
		OOMScoreAdj:     &oom,
		Rlimits: []specs.POSIXRlimit{
			limit("RLIMIT_CORE", 0),
			limit("RLIMIT_NOFILE", openFiles),
			limit("RLIMIT_NPROC", processes), // counted for the user namespace
			limit("RLIMIT_MEMLOCK", 0),
			limit("RLIMIT_MSGQUEUE", 0),
			// What a Go program sets aside and does not use is more than any tool's.
			limit("RLIMIT_AS", uint64(c.o.Memory)+4<<30), //nolint:gosec // not negative
		},
	}
}

func (c *Cages) mounts(program string) []specs.Mount {
	all := []specs.Mount{
		// For runc alone: it goes before the image comes.
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "mode=755", "size=64k", "nr_inodes=64", "ro"}},
		{
			Destination: "/" + insideName, Type: "bind", Options: []string{"bind", "ro", "nosuid", "nodev", "private"},
			Source: program,
		},
	}
	for _, dir := range c.root.shown {
		all = append(all, specs.Mount{Destination: dir, Type: "bind", Source: dir, Options: []string{"bind", "ro", "nosuid", "nodev", "private"}})
	}
	return all
}

func (c *Cages) resources(d device) *specs.LinuxResources {
	r := &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}}
	if d.block {
		major, minor := sys.MajorMinor(d.number)
		major64, minor64 := int64(major), int64(minor)
		r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major64, Minor: &minor64, Access: "rw"})
	}
	if c.groups.memory {
		r.Memory = &specs.LinuxMemory{Limit: &c.o.Memory}
	}
	if c.groups.pids {
		most := int64(processes)
		r.Pids = &specs.LinuxPids{Limit: &most}
	}
	return r
}
