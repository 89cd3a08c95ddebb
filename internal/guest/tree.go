package guest

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"holdfast/internal/run"
)

// tree is the guest's root filesystem while it is put together in a directory:
// programs of this host with the libraries that they need.
type tree struct {
	dir  string
	done map[string]bool
}

// libraries are the directories that the dynamic linker looks in.
var libraries = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib",
	"/usr/lib/x86_64-linux-gnu/ceph",
}

func newTree(dir string) (*tree, error) {
	t := &tree{dir: dir, done: map[string]bool{}}
	for _, d := range []string{"usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc/lvm", "root", "proc", "sys", "dev", "run", "tmp", "var", "mnt"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+d, filepath.Join(dir, d)); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// program adds a program of this host, and what it needs.
func (t *tree) program(name string) error {
	path, err := run.Look(name)
	if err != nil {
		return err
	}
	return t.binary(path)
}

// binary adds an executable or library at its own path, and what it needs.
func (t *tree) binary(path string) error {
	if t.done[path] {
		return nil
	}
	t.done[path] = true
	if err := t.copy(path, path); err != nil {
		return err
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil //nolint:nilerr // a script: what it calls is added by name
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if linker := interpreter(f); linker != "" {
		needed = append(needed, linker)
	}
	for _, name := range needed {
		library, err := findLibrary(name)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := t.binary(library); err != nil {
			return err
		}
	}
	return nil
}

// interpreter is the program header PT_INTERP (elf(5)).
func interpreter(f *elf.File) string {
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			if err == nil {
				return strings.TrimRight(string(b), "\x00")
			}
		}
	}
	return ""
}

func findLibrary(name string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	for _, dir := range libraries {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("library %s is nowhere", name)
}

// copy puts a file of this host at a path of the tree.
func (t *tree) copy(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return t.write(to, b, info.Mode().Perm()|0o444)
}

func (t *tree) write(path string, b []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Join(t.dir, filepath.Dir(path)), 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(t.dir, path), b, mode)
}

// link adds a symbolic link, unless something is there.
func (t *tree) link(target, path string) error {
	err := os.Symlink(target, filepath.Join(t.dir, path))
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// guestPrograms are those that are used in a guest.
var guestPrograms = []string{
	"lvm", "dmsetup", "pdata_tools", "mke2fs", "resize2fs", "e2fsck", "tune2fs", "dumpe2fs", "debugfs", "e2image",
	"mkfs.xfs", "xfs_db", "xfs_repair", "xfs_growfs", "xfs_io", "mkfs.btrfs", "btrfs", "blkid", "fstrim", "blkdiscard", "losetup", "blockdev", "wipefs",
	"lsblk", "mount", "umount", "findmnt", "fio", "kmod", "cmp", "dd", "stat", "sha256sum", "truncate", "cp", "setsid",
}

// aliases are programs by other names.
var aliases = map[string]string{
	"mkfs.ext4": "mke2fs", "fsck.ext4": "e2fsck", "modprobe": "kmod", "insmod": "kmod", "rmmod": "kmod", "lsmod": "kmod",
}

var lvmNames = strings.Fields("pvs pvcreate pvresize pvremove pvscan vgs vgcreate vgremove vgextend vgreduce vgchange vgscan lvs lvcreate lvextend lvreduce lvremove lvchange lvconvert lvdisplay lvrename")
var thinNames = strings.Fields("thin_check thin_dump thin_repair thin_restore thin_delta thin_ls thin_metadata_size thin_trim")

// lvmConf: there is no udev in the guest, so LVM makes its device nodes itself.
const lvmConf = `devices { obtain_device_list_from_udev=0 use_devicesfile=0 issue_discards=1 external_device_info_source="none" }
activation { udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0 }
global { use_lvmpolld=0 event_activation=0 }
backup { backup=0 archive=0 }
`

// fill puts everything but the kernel's modules into the tree.
func (t *tree) fill(init string) error {
	for _, name := range guestPrograms {
		if err := t.program(name); err != nil {
			return fmt.Errorf("%w (the guest's programs are this host's: .ci/setup all)", err)
		}
	}
	if err := t.busybox(); err != nil {
		return err
	}
	for name, target := range aliases {
		if err := t.alias(name, target); err != nil {
			return err
		}
	}
	for _, name := range lvmNames {
		if err := t.alias(name, "lvm"); err != nil {
			return err
		}
	}
	for _, name := range thinNames {
		if err := t.alias(name, "pdata_tools"); err != nil {
			return err
		}
	}
	for path, text := range map[string]string{
		"/etc/lvm/lvm.conf": lvmConf, "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n", "/etc/group": "root:x:0:\nnogroup:x:65534:\n",
	} {
		if err := t.write(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(t.link("/proc/mounts", "etc/mtab"), t.copy("/etc/mke2fs.conf", "/etc/mke2fs.conf"), t.copy(init, "/init"))
}

// alias makes another name for a program, beside it.
func (t *tree) alias(name, target string) error {
	path, err := run.Look(target)
	if err != nil {
		return err
	}
	return t.link(filepath.Base(path), filepath.Join(filepath.Dir(path), name))
}

// busybox adds a shell and the small tools that are not there yet.
func (t *tree) busybox() error {
	path, err := run.Look("busybox")
	if err != nil {
		return err
	}
	if err := t.copy(path, "/usr/bin/busybox"); err != nil {
		return err
	}
	for _, name := range strings.Fields("sh ash cat ls echo rm mv mkdir rmdir ln chmod chown touch sync sleep test true false ps kill dmesg mknod mktemp head tail grep sed awk cut tr wc sort uniq seq od hexdump tar gzip df du free uname date env id hostname poweroff find xargs readlink realpath dirname basename md5sum mountpoint pidof ip vi less more expr printf tee yes") {
		if err := t.link("busybox", "usr/bin/"+name); err != nil {
			return err
		}
	}
	return nil
}
