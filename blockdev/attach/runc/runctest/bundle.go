package runctest

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// userOffset is the host's user that is root in a user namespace.
const userOffset = 100000

var applets = []string{
	"sh", "ls", "cat", "mount", "umount", "df", "dd", "sleep", "sync", "stat", "touch", "mkdir", "rmdir",
	"mv", "rm", "ln", "id", "echo", "grep", "ps", "unshare", "sha256sum", "readlink", "true", "mknod", "chmod",
}

func makeBundle(dir string, o Options) error {
	// A mapped root must be able to come down to its root filesystem.
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o711); err != nil { //nolint:gosec // a test's temporary directory
			return err
		}
	}
	rootfs := filepath.Join(dir, "rootfs")
	if err := makeRootfs(rootfs, o); err != nil {
		return err
	}
	text, err := json.Marshal(spec(o))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600)
}

func makeRootfs(dir string, o Options) error {
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range o.Bind {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	program, err := busybox()
	if err != nil {
		return err
	}
	text, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), text, 0o755); err != nil { //nolint:gosec // a program
		return err
	}
	var errs []error
	for _, name := range applets {
		errs = append(errs, os.Symlink("busybox", filepath.Join(dir, "bin", name)))
	}
	if o.UserNamespace {
		errs = append(errs, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(path, userOffset, userOffset))
		}))
	}
	return errors.Join(errs...)
}

func spec(o Options) *specs.Spec {
	args := o.Args
	if args == nil {
		args = []string{"sleep", "1000000"}
	}
	s := &specs.Spec{
		Version:  "1.0.2",
		Process:  process(args, o.Capabilities),
		Root:     &specs.Root{Path: "rootfs", Readonly: o.ReadOnlyRoot},
		Hostname: "sandbox",
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=65536k"}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=1777", "size=16m"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
			},
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
		},
	}
	for _, dir := range o.Bind {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: dir, Type: "bind", Source: dir, Options: []string{"rbind", "rw", "rprivate"}})
	}
	if o.UserNamespace {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: userOffset, Size: 65536}}
		s.Linux.UIDMappings, s.Linux.GIDMappings = ids, ids
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	}
	return s
}

func process(args, more []string) *specs.Process {
	caps := append([]string{"CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"}, more...)
	return &specs.Process{
		Args: args,
		Cwd:  "/",
		Env:  []string{"PATH=/bin", "HOME=/"},
		Capabilities: &specs.LinuxCapabilities{
			Bounding: caps, Effective: caps, Permitted: caps,
		},
		NoNewPrivileges: true,
	}
}
