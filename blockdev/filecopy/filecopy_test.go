package filecopy_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/blockdev"
	"holdfast/blockdev/attach/attachtest"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filecopy"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mounted makes a filesystem and gives a mount of it that is nowhere, so that the
// paths of a test go through /proc.
func mounted(t *testing.T, typ filesystem.Type) (root *os.File, dir string) {
	t.Helper()
	v := attachtest.New(t, typ)
	mount, err := sys.NewMount(sys.Filesystem{Device: v.Endpoint.Path, Type: string(typ)}, sys.MountAttr{NoSuid: true, NoDev: true})
	must(t, err)
	root, err = sys.OpenMount(mount)
	must(t, err)
	t.Cleanup(func() { must(t, errors.Join(root.Close(), mount.Close())) })
	return root, fmt.Sprintf("/proc/self/fd/%d", root.Fd())
}

// capability is security.capability of revision 2 with cap_net_raw, effective:
// struct vfs_cap_data of the kernel's include/uapi/linux/capability.h.
var capability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// acl is system.posix_acl_access: user 1000 may read and write (include/uapi/linux/posix_acl_xattr.h).
var acl = []byte{
	2, 0, 0, 0, // version
	1, 0, 6, 0, 0xff, 0xff, 0xff, 0xff, // owner rw-
	2, 0, 6, 0, 0xe8, 3, 0, 0, // user 1000 rw-
	4, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, // group r--
	0x10, 0, 6, 0, 0xff, 0xff, 0xff, 0xff, // mask rw-
	0x20, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, // others ---
}

// plant makes a tree of all that can be copied.
func plant(t *testing.T, dir string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"empty", "sticky", "closed", "acl", "deep/" + strings.Repeat("d/", 100)} {
		must(t, os.MkdirAll(in(d), 0o755))
	}
	for name, text := range map[string]string{
		"plain": "x", "none": "", "setuid": "#!", "closed/inside": "y", "acl/below": "z", "acl-file": "a", "caps": "c", "trusted": "t",
		"-rf": "dash", " two  blanks ": "b", "line\nbreak": "l", "café-日本語-🚀.txt": "u", strings.Repeat("n", 255): "long", "\xff\xfe": "bytes", "owner": "o", "linked": "h",
	} {
		must(t, os.WriteFile(in(name), []byte(text), 0o640))
	}
	sparse, err := os.Create(in("sparse"))
	must(t, err)
	for _, at := range []int64{0, 1 << 20, 5<<20 - 4096} {
		_, err := sparse.WriteAt([]byte(strings.Repeat("s", 4096)), at)
		must(t, err)
	}
	must(t, errors.Join(sparse.Truncate(64<<20), sparse.Close()))
	must(t, os.Link(in("linked"), in("closed/other name")))
	must(t, os.Link(in("linked"), in("deep/third")))
	must(t, os.Symlink("../../../../../../etc/passwd", in("escape")))
	must(t, os.Symlink("/", in("to-root")))
	must(t, os.Symlink(".", in("loop")))
	must(t, os.Link(in("loop"), in("loop-again")))
	for name, owner := range map[string]int{"owner": 1<<32 - 2, "plain": 1000, "setuid": 1, "escape": 70000, "empty": 1 << 31} {
		must(t, os.Lchown(in(name), owner, owner-1))
	}
	for name, mode := range map[string]uint32{"setuid": 0o6755, "none": 0, "sticky": 0o1777, "closed": 0, "plain": 0o7777} {
		must(t, unix.Chmod(in(name), mode))
	}
	for name, attrs := range map[string]map[string][]byte{
		"caps":     {"security.capability": capability},
		"trusted":  {"trusted.overlay.opaque": []byte("y"), "user.empty": {}},
		"plain":    {"user.name": []byte("value\x00with\xffbytes")},
		"acl-file": {"system.posix_acl_access": acl},
		"acl":      {"system.posix_acl_default": acl, "user.dir": []byte("d")},
		"escape":   {"trusted.link": []byte("l")},
	} {
		for key, value := range attrs {
			must(t, unix.Lsetxattr(in(name), key, value, 0))
		}
	}
	at := time.Date(1999, 12, 31, 23, 59, 59, 123456789, time.UTC)
	must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		must(t, err)
		ts := []unix.Timespec{unix.NsecToTimespec(at.UnixNano()), unix.NsecToTimespec(at.UnixNano())}
		at = at.Add(time.Second)
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// survey describes every name in a tree by all that must be kept.
func survey(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	peers := map[uint64][]string{}
	must(t, filepath.WalkDir(dir+"/.", func(path string, d fs.DirEntry, err error) error {
		must(t, err)
		name, err := filepath.Rel(dir, path)
		must(t, err)
		if name == "lost+found" {
			return fs.SkipDir
		}
		var st unix.Stat_t
		must(t, unix.Lstat(path, &st))
		text := fmt.Sprintf("mode %o owner %d:%d time %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch {
		case d.Type().IsRegular():
			content, err := os.ReadFile(path)
			must(t, err)
			text += fmt.Sprintf(" size %d content %x", st.Size, sha256.Sum256(content))
			if name == "sparse" && st.Blocks*512 > 1<<20 {
				t.Errorf("%s: %d bytes are occupied", path, st.Blocks*512)
			}
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			must(t, err)
			text += " to " + target
		}
		if !d.IsDir() {
			peers[st.Ino] = append(peers[st.Ino], name)
		}
		found[name] = text + attributes(t, path)
		return nil
	}))
	for _, names := range peers {
		for _, name := range names {
			found[name] += fmt.Sprintf(" same as %q", names)
		}
	}
	return found
}

func attributes(t *testing.T, path string) (text string) {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	must(t, err)
	names := strings.Split(string(buf[:n]), "\x00")
	slices.Sort(names)
	for _, name := range names {
		if name == "" || strings.HasPrefix(name, "trusted.SGI_") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		must(t, err)
		text += fmt.Sprintf(" %s=%x", name, value[:n])
	}
	return text
}

func TestTree(t *testing.T) {
	blockdevtest.LeakCheck(t)
	from, fromDir := mounted(t, filesystem.Ext4)
	plant(t, fromDir)
	must(t, unix.Fchown(int(from.Fd()), 5, 6))
	must(t, unix.Fchmod(int(from.Fd()), 0o2751))
	want := survey(t, fromDir)
	for _, typ := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		t.Run(string(typ), func(t *testing.T) {
			to, toDir := mounted(t, typ)
			must(t, filecopy.Tree(t.Context(), from, to))
			have := survey(t, toDir)
			for _, name := range slices.Sorted(maps.Keys(want)) {
				if want[name] != have[name] {
					t.Errorf("%q is\n%s, want\n%s", name, have[name], want[name])
				}
			}
			if len(have) != len(want) || len(have) < 125 {
				t.Errorf("%d names, want %d", len(have), len(want))
			}
		})
	}
}

func TestTreeErrors(t *testing.T) {
	blockdevtest.LeakCheck(t)
	from, fromDir := mounted(t, filesystem.Ext4)
	to, toDir := mounted(t, filesystem.Ext4)
	must(t, os.WriteFile(filepath.Join(fromDir, "file"), []byte("x"), 0o600))
	must(t, os.Symlink("/etc", filepath.Join(toDir, "dir")))
	must(t, os.Mkdir(filepath.Join(fromDir, "dir"), 0o700))
	if err := filecopy.Tree(t.Context(), from, to); err == nil {
		t.Error("a link in the place of a directory was followed")
	}
	must(t, os.Remove(filepath.Join(toDir, "dir")))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := filecopy.Tree(ended, from, to); !errors.Is(err, context.Canceled) {
		t.Errorf("after its end: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(toDir, "file"), []byte("y"), 0o600))
	if err := filecopy.Tree(t.Context(), from, to); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	must(t, os.Remove(filepath.Join(toDir, "file")))
	must(t, unix.Mkfifo(filepath.Join(fromDir, "pipe"), 0o600))
	if err := filecopy.Tree(t.Context(), from, to); !errors.Is(err, filecopy.ErrKind) {
		t.Errorf("a pipe: %v", err)
	}
	must(t, os.Remove(filepath.Join(fromDir, "pipe")))
	must(t, os.RemoveAll(filepath.Join(toDir, "file")))
	must(t, os.WriteFile(filepath.Join(toDir, "filler"), make([]byte, 8<<20), 0o600))
	must(t, os.WriteFile(filepath.Join(fromDir, "large"), make([]byte, 8<<20), 0o600))
	if err := filecopy.Tree(t.Context(), from, to); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("too large: %v", err)
	}
}
