package ext4fill_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// pieces gives a file n extents, by holes between its blocks. All runs are of the
// same bytes of the store.
func (x *forest) pieces(path string, n int) {
	x.t.Helper()
	f := x.contents(tree.Node{Path: path, Kind: tree.Regular, Mode: 0o600}, tree.Block, [2]int64{0, tree.Block})
	at := f.Runs[0].At
	f.Runs = f.Runs[:0]
	for i := range int64(n) {
		f.Runs = append(f.Runs, tree.Run{Offset: 2 * i * tree.Block, Length: tree.Block, At: at})
	}
	f.Size = 2 * int64(n) * tree.Block
	x.add(f)
}

// TestExtentTrees goes around the sizes at which the tree changes its form: 4
// extents in the inode, 340 in a block of 4 KiB, 84 in one of 1 KiB.
func TestExtentTrees(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	for _, c := range []struct {
		size   int64
		counts []int
	}{
		{64 * MiB, []int{1, 4, 5, 339, 340, 341, 680, 1359, 1360, 1361, 2000}},
		{15 * MiB, []int{4, 5, 84, 85, 168, 335, 336, 337, 600}},
	} {
		dir := t.TempDir()
		x := newForest(t, dir)
		for _, n := range c.counts {
			x.pieces(fmt.Sprint(n), n)
		}
		x.filled(dir, c.size)
	}
}

// TestDeepExtentTree has three levels of blocks, which 462,401 extents need.
func TestDeepExtentTree(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4)
	dir := t.TempDir()
	x := newForest(t, dir)
	x.pieces("deep", 4*340*340+1)
	tr := x.tree()
	size, l, err := ext4fill.Size(t.Context(), tr, 0)
	check(t, err)
	f := empty(t, dir, size, l.Inodes)
	_, err = ext4fill.Fill(t.Context(), f, tr, nowhere{})
	check(t, err)
	clean(t, f.Name())
	if out := command(t, "debugfs", "-R", "ex /deep", f.Name()); !strings.Contains(out, " 3/ 3 ") {
		t.Errorf("not three levels deep:\n%.500s", out)
	}
}

// TestLargeFile crosses groups: the filesystem's own blocks cut it, and so does
// what one extent can hold.
func TestLargeFile(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4)
	dir := t.TempDir()
	x := newForest(t, dir)
	check(t, x.store.Truncate(5<<30))
	x.add(tree.Node{Path: "large", Kind: tree.Regular, Size: 5 << 30, Runs: []tree.Run{{Length: 5 << 30}}})
	x.add(tree.Node{Path: "sparse", Kind: tree.Regular, Size: (1<<32 - 1) * 4096, Runs: []tree.Run{{Offset: (1<<32 - 2) * 4096, Length: 4096}}})
	tr := x.tree()
	size, l, err := ext4fill.Size(t.Context(), tr, 0)
	check(t, err)
	f := empty(t, dir, size, l.Inodes)
	lies, err := ext4fill.Fill(t.Context(), f, tr, nowhere{})
	check(t, err)
	clean(t, f.Name())
	large := lies.Find("large")
	if n := len(large.Runs); n < 2 || n > 20 {
		t.Errorf("the file lies in %d pieces", n)
	}
	at := int64(0)
	for _, r := range large.Runs {
		if r.Offset != at {
			t.Fatalf("runs %+v", large.Runs)
		}
		at += r.Length
	}
	if at != 5<<30 {
		t.Errorf("%d bytes", at)
	}
}

func TestTooLargeForExt4(t *testing.T) {
	f := empty(t, t.TempDir(), 64*MiB, 10)
	many := make([]string, 65000)
	for i := range many {
		many[i] = fmt.Sprintf("link-%05d", i)
	}
	for _, n := range []tree.Node{
		{Path: "file", Kind: tree.Regular, Size: (1<<32-1)*4096 + 1},
		{Path: "link", Kind: tree.Symlink, Target: strings.Repeat("x", 4096)},
		{Path: "file", Links: many, Kind: tree.Regular},
		{Path: strings.Repeat("n", 256), Kind: tree.Regular},
	} {
		x := newForest(t, t.TempDir())
		x.add(n)
		if _, err := ext4fill.Fill(t.Context(), f, x.tree(), nowhere{}); !errors.Is(err, ext4fill.ErrTooLarge) || !strings.Contains(err.Error(), fmt.Sprintf("%q", n.Path)) {
			t.Error(err)
		}
		if _, _, err := ext4fill.Size(t.Context(), x.tree(), 0); !errors.Is(err, ext4fill.ErrTooLarge) {
			t.Error(err)
		}
	}
}
