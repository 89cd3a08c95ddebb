package ext4fill_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// TestRandomTrees fills images of the least size with random trees: e2fsck finds
// nothing, and the kernel and our own reader show what the tree says.
func TestRandomTrees(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		check(t, f.Value.Set("40")) // each takes a mount and an e2fsck
	}
	rapid.Check(t, func(r *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		check(r, err)
		x := newForest(r, dir)
		x.grow(r)
		tr := x.tree()
		size, l, err := ext4fill.Size(r.Context(), tr, rapid.SampledFrom([]int64{0, 16 * MiB}).Draw(r, "least"))
		check(r, err)
		f := empty(r, dir, size, l.Inodes)
		lies, err := ext4fill.Fill(r.Context(), f, tr, ext4fill.Files{x.store})
		check(r, err)
		clean(r, f.Name())
		same(r, show(r, f.Name()), x.want(tr))
		x.lies(f, tr, lies)
		readBack(r, f.Name(), tr)
		check(r, os.RemoveAll(dir))
	})
}

// grow adds random nodes.
func (x *forest) grow(r *rapid.T) {
	dirs := []string{"."}
	claimed := map[string]bool{}
	byteOf := rapid.OneOf(rapid.ByteRange('a', 'c'), rapid.Byte())
	names := rapid.OneOf(
		rapid.SliceOfN(byteOf, 1, 3), rapid.SliceOfN(byteOf, 1, 255),
		rapid.SampledFrom([][]byte{[]byte("-rf"), []byte("café-日本語-🚀.txt"), []byte("a b"), []byte("lost+found"), []byte(strings.Repeat("n", 255))}))
	fresh := func() string {
		b := slices.Clone(names.Draw(r, "name"))
		for i := range b {
			if b[i] == '/' || b[i] == 0 {
				b[i] = '_'
			}
		}
		name := string(b)
		if name == "." || name == ".." {
			name = "dot"
		}
		path := rapid.SampledFrom(dirs).Draw(r, "dir") + "/" + name
		path = strings.TrimPrefix(path, "./")
		for n := len(claimed); claimed[path]; n++ {
			path = path[:max(strings.LastIndexByte(path, '/')+1, len(path)-9)] + fmt.Sprintf("%09d", n)
		}
		claimed[path] = true
		return path
	}
	for range rapid.IntRange(0, 60).Draw(r, "nodes") {
		n := tree.Node{
			Path: fresh(), Kind: rapid.SampledFrom([]tree.Kind{tree.Directory, tree.Regular, tree.Regular, tree.Symlink}).Draw(r, "kind"),
			Mode: rapid.Uint32Range(0, 0o7777).Draw(r, "mode"), UID: rapid.Uint32().Draw(r, "uid"), GID: rapid.Uint32().Draw(r, "gid"),
			ModTime: time.Unix(rapid.Int64Range(-1<<31, 10737418239).Draw(r, "mtime"), rapid.Int64Range(0, 999_999_999).Draw(r, "ns")).UTC(),
		}
		n.UID, n.GID = min(n.UID, 1<<32-2), min(n.GID, 1<<32-2)
		switch n.Kind {
		case tree.Directory:
			dirs = append(dirs, n.Path)
			if rapid.IntRange(0, 9).Draw(r, "crowded") == 0 {
				for i := range rapid.IntRange(1, 300).Draw(r, "crowd") {
					path := fmt.Sprintf("%s/%s%d", n.Path, strings.Repeat("c", i%90), i)
					claimed[path] = true
					x.add(tree.Node{Path: path, Kind: tree.Regular})
				}
			}
		case tree.Symlink:
			n.Target = strings.Repeat("t", rapid.IntRange(1, 1023).Draw(r, "target"))
		case tree.Regular:
			var ranges [][2]int64
			at := int64(0)
			for range rapid.IntRange(0, 8).Draw(r, "runs") {
				at += tree.Block * rapid.Int64Range(0, 300).Draw(r, "hole")
				length := tree.Block * rapid.Int64Range(1, 20).Draw(r, "data")
				ranges = append(ranges, [2]int64{at, length})
				at += length
			}
			if len(ranges) > 0 && rapid.Bool().Draw(r, "ends in data") {
				cut := rapid.Int64Range(0, tree.Block-1).Draw(r, "cut")
				ranges[len(ranges)-1][1] -= cut
				at -= cut
			} else {
				at += rapid.Int64Range(0, 1<<20).Draw(r, "tail")
			}
			n = x.contents(n, at, ranges...)
		}
		n.Xattrs = randomXattrs(r, n.Kind)
		if n.Kind != tree.Directory && rapid.IntRange(0, 3).Draw(r, "linked") == 0 {
			for range rapid.IntRange(1, 3).Draw(r, "links") {
				n.Links = append(n.Links, fresh())
			}
			all := append(n.Links, n.Path)
			slices.SortFunc(all, tree.Compare)
			n.Path, n.Links = all[0], all[1:]
		}
		x.add(n)
	}
}

// randomXattrs stay below what a block of 1 KiB holds.
func randomXattrs(r *rapid.T, k tree.Kind) (list []tree.Xattr) {
	if rapid.Bool().Draw(r, "plain") {
		return nil
	}
	all := map[string][]byte{}
	bytes := rapid.SliceOfN(rapid.Byte(), 0, 60)
	for _, name := range []string{"trusted.t", "security.other"} {
		if rapid.Bool().Draw(r, name) {
			all[name] = bytes.Draw(r, "value")
		}
	}
	if k != tree.Symlink {
		for range rapid.IntRange(0, 4).Draw(r, "user") {
			all["user."+rapid.StringMatching(`[a-z]{1,50}`).Draw(r, "attr")] = bytes.Draw(r, "value")
		}
		if rapid.Bool().Draw(r, "acl") {
			all["system.posix_acl_access"] = acl(uint32(rapid.IntRange(0, 5).Draw(r, "users")))
		}
	}
	if k == tree.Directory && rapid.Bool().Draw(r, "default") {
		all["system.posix_acl_default"] = acl(uint32(rapid.IntRange(0, 5).Draw(r, "users")))
	}
	if rapid.Bool().Draw(r, "cap") && k == tree.Regular {
		all["security.capability"] = capability
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		list = append(list, tree.Xattr{Name: name, Value: all[name]})
	}
	return list
}

// readBack compares names, attributes and sizes with what our reader finds.
func readBack(t tb, image string, tr tree.Tree) {
	t.Helper()
	x := filesystem.NewTools()
	entries := map[string]filesystem.Entry{}
	var read func(dir string)
	read = func(dir string) {
		list, err := x.ListDir(t.Context(), image, filesystem.Ext4, dir)
		check(t, err)
		for _, e := range list {
			path := e.Name
			if dir != "." {
				path = dir + "/" + e.Name
			}
			entries[path] = e
			if e.Mode.IsDir() {
				read(path)
			}
		}
	}
	read(".")
	count := 1
	for _, n := range tr.Nodes[1:] {
		for _, path := range append([]string{n.Path}, n.Links...) {
			count++
			e, ok := entries[path]
			if !ok || e.UID != int(n.UID) || e.GID != int(n.GID) || !e.ModTime.Equal(n.ModTime) || e.Target != n.Target ||
				uint32(e.Mode.Perm()) != n.Mode&0o777 || n.Kind == tree.Regular && e.Size != n.Size {
				t.Errorf("%q: read %+v, want %+v", path, e, n)
			}
		}
	}
	if _, own := entries["lost+found"]; own && !hasOwn(tr) {
		count++
	}
	if len(entries) != count-1 {
		t.Errorf("read %d names, want %d", len(entries), count-1)
	}
}
