package ext4fill_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

const (
	MiB  = filesystem.MiB
	uuid = "8d5a5c0b-6c3c-4f3c-9d0a-1f2e3d4c5b6a"
)

var epoch = time.Unix(1_600_000_000, 0).UTC()

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func command(t testing.TB, args ...string) string {
	t.Helper()
	c := exec.Command(args[0], args[1:]...)
	c.Env = append(os.Environ(), "LC_ALL=C")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// empty makes an empty ext4 of size bytes.
func empty(t testing.TB, dir string, size, inodes int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("image-%d", time.Now().UnixNano())))
	check(t, err)
	t.Cleanup(func() { f.Close() })
	check(t, f.Truncate(size))
	check(t, filesystem.NewTools().Make(t.Context(), f.Name(), filesystem.Ext4, filesystem.MakeOptions{UUID: uuid, Time: epoch, Inodes: inodes}))
	return f
}

// clean fails the test when e2fsck finds anything.
func clean(t testing.TB, path string) {
	t.Helper()
	out := command(t, "e2fsck", "-fn", path)
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "e2fsck ") && !strings.HasPrefix(line, "Pass ") && !strings.HasPrefix(line, path+": ") {
			t.Fatalf("e2fsck: %s", out)
		}
	}
}

// forest makes trees and a store with their contents.
type forest struct {
	t     testing.TB
	store *os.File
	end   int64
	nodes map[string]tree.Node
}

func newForest(t testing.TB, dir string) *forest {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("store-%d", time.Now().UnixNano())))
	check(t, err)
	t.Cleanup(func() { f.Close() })
	x := &forest{t: t, store: f, nodes: map[string]tree.Node{}}
	x.dir(".")
	return x
}

func (x *forest) add(n tree.Node) {
	x.t.Helper()
	if n.ModTime.IsZero() {
		n.ModTime = epoch.Add(time.Duration(len(x.nodes)) * 1_000_000_007)
	}
	if _, ok := x.nodes[n.Path]; ok && n.Path != "." {
		x.t.Fatalf("two nodes %q", n.Path)
	}
	x.nodes[n.Path] = n
}

func (x *forest) dir(path string) { x.add(tree.Node{Path: path, Kind: tree.Directory, Mode: 0o755}) }

func (x *forest) link(path, target string) {
	x.add(tree.Node{Path: path, Kind: tree.Symlink, Mode: 0o777, Target: target})
}

// file makes a file of size bytes with data in the given ranges (offset, length).
func (x *forest) file(path string, size int64, ranges ...[2]int64) {
	x.t.Helper()
	x.add(x.contents(tree.Node{Path: path, Kind: tree.Regular, Mode: 0o644}, size, ranges...))
}

func (x *forest) contents(n tree.Node, size int64, ranges ...[2]int64) tree.Node {
	x.t.Helper()
	n.Size = size
	for _, r := range ranges {
		data := pattern(r[1], x.end+r[0])
		_, err := x.store.WriteAt(data, x.end)
		check(x.t, err)
		n.Runs = append(n.Runs, tree.Run{Offset: r[0], Length: r[1], At: x.end})
		x.end += (r[1] + tree.Block - 1) / tree.Block * tree.Block
		check(x.t, x.store.Truncate(x.end))
	}
	return n
}

func pattern(length, seed int64) []byte {
	b := make([]byte, length)
	v := uint64(seed)*0x9E3779B97F4A7C15 + 1
	for i := range b {
		v ^= v << 13
		v ^= v >> 7
		v ^= v << 17
		b[i] = byte(v)
	}
	return b
}

func (x *forest) tree() tree.Tree {
	order := func(path string) string {
		if path == "." {
			return ""
		}
		return strings.ReplaceAll(path, "/", "\x00")
	}
	nodes := slices.Collect(maps.Values(x.nodes))
	slices.SortFunc(nodes, func(a, b tree.Node) int { return strings.Compare(order(a.Path), order(b.Path)) })
	return tree.Tree{Nodes: nodes}
}

// seen is a file as it is shown.
type seen struct {
	Kind       fs.FileMode
	Mode       uint32
	UID, GID   uint32
	Size       int64
	ModTime    time.Time
	Target     string
	Sum        string
	Links      int
	Inode      string // the first of its names
	Xattrs     string
	Accessed   time.Time
	Changed    time.Time
	HoleBlocks int64 // 4 KiB blocks of data, of a file
}

// want is what must be seen of a tree, by name.
func (x *forest) want(t tree.Tree) map[string]seen {
	x.t.Helper()
	subdirs := map[string]int{}
	for _, n := range t.Nodes {
		if n.Kind == tree.Directory && n.Path != "." {
			subdirs[filepath.Dir(n.Path)]++
		}
	}
	if _, ok := x.nodes["lost+found"]; !ok {
		subdirs["."]++
	}
	want := map[string]seen{}
	for _, n := range t.Nodes {
		w := seen{Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Size, ModTime: n.ModTime, Accessed: n.ModTime, Changed: n.ModTime, Target: n.Target, Links: 1 + len(n.Links), Inode: n.Path}
		switch n.Kind {
		case tree.Directory:
			w.Kind, w.Size = fs.ModeDir, 0
			if w.Links = 2 + subdirs[n.Path]; w.Links > 65000 {
				w.Links = 1
			}
		case tree.Symlink:
			w.Kind, w.Size = fs.ModeSymlink, int64(len(n.Target))
		default:
			w.Sum, w.HoleBlocks = x.sum(n)
		}
		for _, a := range n.Xattrs {
			w.Xattrs += fmt.Sprintf("%s=%x ", a.Name, a.Value)
		}
		for _, name := range append([]string{n.Path}, n.Links...) {
			want[name] = w
		}
	}
	return want
}

func (x *forest) sum(n tree.Node) (string, int64) {
	h, at, blocks := sha256.New(), int64(0), int64(0)
	zeroes := make([]byte, MiB)
	skip := func(to int64) {
		for at < to {
			k := min(to-at, MiB)
			h.Write(zeroes[:k])
			at += k
		}
	}
	for _, r := range n.Runs {
		skip(r.Offset)
		b := make([]byte, r.Length)
		_, err := x.store.ReadAt(b, r.At)
		check(x.t, err)
		h.Write(b)
		at += r.Length
		blocks += (r.Length + tree.Block - 1) / tree.Block
	}
	skip(n.Size)
	return hex.EncodeToString(h.Sum(nil)), blocks
}

// show reads what the kernel shows of an image mounted read-only.
func show(t testing.TB, image string) map[string]seen {
	t.Helper()
	dir := t.TempDir()
	command(t, "mount", "-o", "loop,ro,noatime", image, dir)
	defer command(t, "umount", dir)
	got := map[string]seen{}
	first := map[uint64]string{}
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		got[name] = look(t, path, name, first)
		return nil
	}))
	return got
}

func look(t testing.TB, path, name string, first map[uint64]string) seen {
	t.Helper()
	info, err := os.Lstat(path)
	check(t, err)
	st := info.Sys().(*syscall.Stat_t)
	if _, ok := first[st.Ino]; !ok {
		first[st.Ino] = name
	}
	s := seen{
		Kind: info.Mode().Type(), Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Size: st.Size, ModTime: info.ModTime().UTC(),
		Accessed: time.Unix(st.Atim.Unix()).UTC(), Changed: time.Unix(st.Ctim.Unix()).UTC(), Links: int(st.Nlink), Inode: first[st.Ino],
	}
	switch s.Kind {
	case fs.ModeDir:
		s.Size = 0
	case fs.ModeSymlink:
		s.Target, err = os.Readlink(path)
		check(t, err)
	default:
		s.Sum, s.HoleBlocks = readSparse(t, path, st.Size)
	}
	s.Xattrs = xattrs(t, path)
	return s
}

func readSparse(t testing.TB, path string, size int64) (string, int64) {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	h, at, blocks := sha256.New(), int64(0), int64(0)
	zeroes := make([]byte, MiB)
	skip := func(to int64) {
		for at < to {
			k := min(to-at, MiB)
			h.Write(zeroes[:k])
			at += k
		}
	}
	for at < size {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err != nil {
			break
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		check(t, err)
		skip(start)
		b := make([]byte, end-start)
		_, err = f.ReadAt(b, start)
		check(t, err)
		h.Write(b)
		at = end
		blocks += (end - start + tree.Block - 1) / tree.Block
	}
	skip(size)
	return hex.EncodeToString(h.Sum(nil)), blocks
}

func xattrs(t testing.TB, path string) string {
	t.Helper()
	list := make([]byte, 65536)
	n, err := unix.Llistxattr(path, list)
	check(t, err)
	var names []string
	for name := range bytes.SplitSeq(list[:n], []byte{0}) {
		if len(name) > 0 {
			names = append(names, string(name))
		}
	}
	slices.Sort(names)
	var out strings.Builder
	value := make([]byte, 65536)
	for _, name := range names {
		n, err := unix.Lgetxattr(path, name, value)
		check(t, err)
		fmt.Fprintf(&out, "%s=%x ", name, value[:n])
	}
	return out.String()
}

// same compares what is seen with what must be.
func same(t testing.TB, got, want map[string]seen) {
	t.Helper()
	if _, ok := want["lost+found"]; !ok {
		if got["lost+found"].Kind != fs.ModeDir {
			t.Errorf("lost+found is %+v", got["lost+found"])
		}
		delete(got, "lost+found")
	}
	bad := 0
	for name, w := range want {
		if g := got[name]; g != w && bad < 10 {
			bad++
			t.Errorf("%q:\nhave %+v\nwant %+v", name, g, w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d names, want %d", len(got), len(want))
	}
}

// filled fills an image with the forest's tree, and has it looked at from all
// sides.
func (x *forest) filled(dir string, size int64) (*os.File, tree.Tree) {
	x.t.Helper()
	tr := x.tree()
	l, err := ext4fill.Need(x.t.Context(), tr, 4096)
	check(x.t, err)
	f := empty(x.t, dir, size, l.Inodes)
	lies, err := ext4fill.Fill(x.t.Context(), f, tr, ext4fill.Files{x.store})
	check(x.t, err)
	clean(x.t, f.Name())
	same(x.t, show(x.t, f.Name()), x.want(tr))
	x.lies(f, tr, lies)
	clean(x.t, f.Name())
	return f, lies
}

// lies checks that the bytes of a filled tree are where it says.
func (x *forest) lies(f *os.File, tr, lies tree.Tree) {
	x.t.Helper()
	in := &forest{t: x.t, store: f}
	for i, n := range lies.Nodes {
		if n.Kind != tree.Regular {
			continue
		}
		have, _ := in.sum(n)
		if want, _ := x.sum(tr.Nodes[i]); have != want {
			x.t.Errorf("%q lies elsewhere", n.Path)
		}
	}
}

func TestFillSmallTree(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	for _, size := range []int64{512 * MiB, 15 * MiB} {
		t.Run(fmt.Sprint(size/MiB), func(t *testing.T) {
			dir := t.TempDir()
			x := newForest(t, dir)
			x.dir("a")
			x.dir("a/b")
			x.file("a/b/c", 10000, [2]int64{0, 10000})
			x.file("a/hole", 64<<20, [2]int64{0, 4096}, [2]int64{1 << 20, 8192})
			x.file("empty", 0)
			x.link("fast", "a/b/c")
			x.link("slow", strings.Repeat("x", 100))
			x.link("59", strings.Repeat("x", 59))
			x.link("60", strings.Repeat("x", 60))
			x.add(tree.Node{Path: "a/hard", Links: []string{"hard", "z"}, Kind: tree.Regular, Mode: 0o4711, UID: 1 << 31, GID: 70000})
			x.add(tree.Node{Path: "xattr", Kind: tree.Regular, Mode: 0, Xattrs: []tree.Xattr{{Name: "user.a", Value: []byte("b")}, {Name: "user.large", Value: pattern(900, 1)}}})
			x.dir("many")
			for i := range 1000 {
				x.file(fmt.Sprintf("many/%d", i), 10, [2]int64{0, 10})
			}
			x.filled(dir, size)
		})
	}
}
