package ext4fill_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// forest makes trees and a store with their contents.
type forest struct {
	t     tb
	store *os.File
	end   int64
	nodes map[string]tree.Node
}

func newForest(t tb, dir string) *forest {
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
	nodes := slices.Collect(maps.Values(x.nodes))
	slices.SortFunc(nodes, func(a, b tree.Node) int { return tree.Compare(a.Path, b.Path) })
	return tree.Tree{Nodes: nodes}
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
	if !hasOwn(t) {
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

func hasOwn(t tree.Tree) bool {
	return slices.ContainsFunc(t.Nodes, func(n tree.Node) bool {
		return n.Path == "lost+found" || slices.Contains(n.Links, "lost+found")
	})
}

func (x *forest) sum(n tree.Node) (string, int64) {
	h, at, blocks := sha256.New(), int64(0), int64(0)
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
