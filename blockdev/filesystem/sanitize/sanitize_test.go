package sanitize_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/filesystem/sanitize"
	"holdfast/blockdev/tree"
)

const mib = 1 << 20

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func command(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

func blank(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	must(t, errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)))
	return path
}

// mounted mounts an image for as long as use runs.
func mounted(t *testing.T, image string, options string, use func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	command(t, "mount", "-o", "loop,"+options, image, dir)
	defer command(t, "umount", dir)
	use(dir)
}

// plant makes files of every kind below dir.
func plant(t *testing.T, dir string, many int) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o750))
	must(t, os.WriteFile(filepath.Join(dir, "a/small"), []byte("small"), 0o640))
	must(t, os.WriteFile(filepath.Join(dir, "a/large"), bytes.Repeat([]byte("0123456789abcdef"), 200_001), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "a/empty"), nil, 0o600))
	must(t, os.Chown(filepath.Join(dir, "a/small"), 1234, 70000))
	must(t, os.Chmod(filepath.Join(dir, "a/b"), 0o750|os.ModeSetgid|os.ModeSticky))
	must(t, os.Link(filepath.Join(dir, "a/small"), filepath.Join(dir, "a/b/hard")))
	must(t, os.Symlink("../small", filepath.Join(dir, "a/b/soft")))
	must(t, os.Symlink(strings.Repeat("long/", 60), filepath.Join(dir, "a/b/long")))
	must(t, os.Symlink("/etc/passwd", filepath.Join(dir, "a/b/\xff odd\nname")))
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	sparse, err := os.Create(filepath.Join(dir, "a/sparse"))
	must(t, err)
	for _, at := range []int64{0, 5 * mib, 300 * mib} {
		_, err = sparse.WriteAt([]byte("data"), at)
		must(t, err)
	}
	must(t, sparse.Close())
	for i := range many {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("a/b/many-%03d", i)), []byte(strings.Repeat("x", i*17)), 0o600))
	}
	must(t, syscall.Setxattr(filepath.Join(dir, "a/small"), "user.note", []byte("kept"), 0))
	must(t, syscall.Setxattr(filepath.Join(dir, "a/large"), "security.capability", []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	must(t, os.Chtimes(filepath.Join(dir, "a"), time.Unix(1, 0), time.Unix(2, 345678)))
}

// treeOf is what a mounted filesystem shows.
func treeOf(t *testing.T, dir string) tree.Tree {
	t.Helper()
	root, err := os.Open(dir)
	must(t, err)
	defer root.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "store"))
	must(t, err)
	defer f.Close()
	s := tree.NewStore(f)
	defer s.Close()
	all, _, err := tree.ReadDirectory(t.Context(), root, tree.Limits{Bytes: 1 << 50, Entries: 1 << 20, Text: 1 << 30}, s)
	must(t, err)
	return all
}

// TestCopy: what each type of filesystem held is in the new one, byte for byte.
func TestCopy(t *testing.T) {
	for _, typ := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		for _, size := range []int64{320 * mib, 15 * mib} {
			if size < typ.Minimum() {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", typ, size/mib), func(t *testing.T) {
				blockdevtest.LeakCheck(t)
				from, to := blank(t, size), blank(t, size)
				must(t, filesystem.NewTools().Make(t.Context(), from, typ, filesystem.MakeOptions{}))
				var before tree.Tree
				mounted(t, from, "rw", func(dir string) { plant(t, dir, int(size/mib)); before = treeOf(t, dir) })
				held, err := os.ReadFile(from)
				must(t, err)
				c, err := sanitize.New(filesystem.NewTools(), t.TempDir()).Copy(t.Context(), from, typ, to)
				must(t, err)
				if c.Entries != int64(len(before.Nodes)) || c.Left.Pipes != 1 || c.Left.Attributes != 0 {
					t.Errorf("%+v of %d", c, len(before.Nodes))
				}
				if now, err := os.ReadFile(from); err != nil || !bytes.Equal(now, held) {
					t.Errorf("the old image was changed (%v)", err)
				}
				command(t, "e2fsck", "-fn", to)
				mounted(t, to, "ro", func(dir string) {
					err := tree.Diff(before.Source(), treeOf(t, dir).Source(), func(c tree.Change) error {
						t.Errorf("differs: %+v", c)
						return nil
					})
					must(t, err)
					var st syscall.Stat_t
					must(t, syscall.Stat(filepath.Join(dir, "a/sparse"), &st))
					if st.Size != 300*mib+4 || st.Blocks*512 > mib {
						t.Errorf("the sparse file has %d bytes in %d", st.Size, st.Blocks*512)
					}
				})
			})
		}
	}
}

// planted is an ext4 with a few files, tampered with by debugfs and by hand.
func planted(t *testing.T) string {
	t.Helper()
	path := blank(t, 32*mib)
	must(t, filesystem.NewTools().Make(t.Context(), path, filesystem.Ext4, filesystem.MakeOptions{}))
	debugfs(t, path, "mkdir a", "mkdir a/b", "write /etc/passwd a/file", "write /etc/group a/b/other")
	return path
}

func debugfs(t *testing.T, path string, commands ...string) {
	t.Helper()
	c := exec.Command("debugfs", "-w", "-f", "-", path)
	c.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func write(t *testing.T, path string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt(b, at)
	must(t, errors.Join(err, f.Close()))
}

// patch writes beside the first place where an image has a text.
func patch(t *testing.T, path, text string, off int64, b []byte) {
	t.Helper()
	image, err := os.ReadFile(path)
	must(t, err)
	at := bytes.Index(image, []byte(text))
	if at < 0 {
		t.Fatalf("the image has no %q", text)
	}
	write(t, path, int64(at)+off, b)
}

// TestTampered: an image that a guest has made up ends in an error that says what is
// wrong, soon, and leaves nothing.
func TestTampered(t *testing.T) {
	for name, c := range map[string]struct {
		do   []string // to debugfs
		then func(t *testing.T, path string)
		want error
	}{
		"as it is":                 {},
		"loop of directories":      {do: []string{"ln a a/b/up"}, want: filesystem.ErrDamaged},
		"root in a directory":      {do: []string{"ln <2> a/b/root"}, want: filesystem.ErrDamaged},
		"directory with two names": {do: []string{"ln a/b twice"}, want: filesystem.ErrDamaged},
		"two entries of one name":  {do: []string{"ln a/file a/filf"}, then: func(t *testing.T, p string) { patch(t, p, "filf", 0, []byte("file")) }, want: filesystem.ErrDamaged},
		"extent beyond the device": {do: []string{"sif a/file block[5] 0x7fffffff"}, want: filesystem.ErrDamaged},
		"extent far beyond":        {do: []string{"sif a/file block[4] 0xffff0001"}, want: filesystem.ErrDamaged},
		"huge file":                {do: []string{"sif a/file size 0x7fffffffffffffff"}, want: filesystem.ErrUnfit},
		"huge directory":           {do: []string{"sif a size 0x7ffffffffffff000"}},
		"extents too deep":         {do: []string{"sif a/file block[1] 0x00ff0001"}, want: filesystem.ErrDamaged},
		"no such inode":            {do: []string{"ln a/file a/ghost"}, then: func(t *testing.T, p string) { patch(t, p, "ghost", -8, []byte{0, 9, 61, 0}) }, want: filesystem.ErrDamaged},
		"name with a slash":        {do: []string{"ln a/file a/slash"}, then: func(t *testing.T, p string) { patch(t, p, "slash", 0, []byte("s/../")) }, want: filesystem.ErrDamaged},
		"odd type":                 {do: []string{"sif a/file mode 0170644"}, want: filesystem.ErrDamaged},
		"no owner":                 {do: []string{"sif a/file uid 0xffffffff"}, want: filesystem.ErrDamaged},
		"attributes elsewhere":     {do: []string{"sif a/file file_acl 0x7fffffff"}, want: filesystem.ErrDamaged},
		"device node":              {do: []string{"cd a", "mknod null c 1 3"}},
		"qcow2 header":             {then: func(t *testing.T, p string) { write(t, p, 0, []byte("QFI\xfb")) }, want: filesystem.ErrForeign},
		"partition table": {then: func(t *testing.T, p string) {
			write(t, p, 446, []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0})
			write(t, p, 510, []byte{0x55, 0xAA})
		}, want: filesystem.ErrForeign},
		"bad superblock": {then: func(t *testing.T, p string) { write(t, p, 1024+0x38, []byte{0, 0}) }, want: filesystem.ErrDamaged},
		"wrong checksum": {then: func(t *testing.T, p string) { write(t, p, 1024+0x14C, []byte{1}) }, want: filesystem.ErrDamaged},
		"not unmounted":  {do: []string{"feature needs_recovery"}, want: filesystem.ErrDirty},
		"no groups": {then: func(t *testing.T, p string) { // the descriptors are in block 1
			write(t, p, 4096, make([]byte, 4096))
		}, want: filesystem.ErrDamaged},
	} {
		t.Run(name, func(t *testing.T) {
			path, to, dir := planted(t), blank(t, 32*mib), t.TempDir()
			if c.do != nil {
				debugfs(t, path, c.do...)
			}
			if c.then != nil {
				c.then(t, path)
			}
			_, err := sanitize.New(filesystem.NewTools(), dir).Copy(t.Context(), path, filesystem.Ext4, to)
			if !errors.Is(err, c.want) {
				t.Errorf("%v; want %v", err, c.want)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

// TestManyFilesOneExtent: a small image that claims to hold more than fits.
func TestManyFilesOneExtent(t *testing.T) {
	path := planted(t)
	big := filepath.Join(t.TempDir(), "big")
	must(t, os.WriteFile(big, bytes.Repeat([]byte("x"), 8*mib), 0o600))
	debugfs(t, path, "write "+big+" big")
	commands := []string{}
	for i := range 8 { // files that have the blocks of the first
		commands = append(commands, fmt.Sprintf("write /etc/group copy%d", i))
	}
	debugfs(t, path, commands...)
	commands = commands[:0]
	for i := range 8 {
		for _, field := range []string{"size", "block[0]", "block[1]", "block[2]", "block[3]", "block[4]", "block[5]", "block[6]", "block[7]", "block[8]"} {
			commands = append(commands, fmt.Sprintf("sif copy%d %s 0x%x", i, field, fieldOf(t, path, "big", field)))
		}
	}
	debugfs(t, path, commands...)
	_, err := sanitize.New(filesystem.NewTools(), t.TempDir()).Copy(t.Context(), path, filesystem.Ext4, blank(t, 32*mib))
	if !errors.Is(err, filesystem.ErrUnfit) {
		t.Errorf("%v", err)
	}
}

// fieldOf reads a field of an inode from debugfs's dump of it.
func fieldOf(t *testing.T, path, file, field string) uint64 {
	t.Helper()
	var raw []byte
	for _, line := range strings.Split(command(t, "debugfs", "-R", "inode_dump "+file, path), "\n") {
		words := strings.Fields(line)
		if len(words) < 5 || len(words[0]) != 4 {
			continue
		}
		for _, w := range words[1:] {
			var b [2]byte
			if len(w) == 4 {
				if _, err := fmt.Sscanf(w, "%02x%02x", &b[0], &b[1]); err == nil && len(raw) < 256 {
					raw = append(raw, b[:]...)
				}
			}
		}
	}
	if field == "size" {
		return uint64(binary.LittleEndian.Uint32(raw[4:]))
	}
	var n int
	_, err := fmt.Sscanf(field, "block[%d]", &n)
	must(t, err)
	return uint64(binary.LittleEndian.Uint32(raw[0x28+4*n:]))
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := sanitize.New(filesystem.NewTools(), t.TempDir()).Copy(ctx, planted(t), filesystem.Ext4, blank(t, 32*mib))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestTooSmall(t *testing.T) {
	path := planted(t)
	big := filepath.Join(t.TempDir(), "big")
	must(t, os.WriteFile(big, bytes.Repeat([]byte("x"), 8*mib), 0o600))
	debugfs(t, path, "write "+big+" big")
	_, err := sanitize.New(filesystem.NewTools(), t.TempDir()).Copy(t.Context(), path, filesystem.Ext4, blank(t, 4*mib))
	if !errors.Is(err, filesystem.ErrUnfit) || errors.Is(err, ext4fill.ErrInvalid) {
		t.Errorf("%v", err)
	}
}
