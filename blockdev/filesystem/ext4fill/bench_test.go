package ext4fill_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// benchTree is 15,000 files of 270 MB, in 1,500 directories.
func benchTree(b *testing.B, dir string) (*forest, tree.Tree) {
	x := newForest(b, dir)
	for d := range 1500 {
		x.dir(fmt.Sprintf("d%d", d))
		for i := range 10 {
			size := int64(18_000 + (i-5)*3000)
			x.file(fmt.Sprintf("d%d/file-%d", d, i), size, [2]int64{0, size})
		}
	}
	return x, x.tree()
}

// BenchmarkFill fills an image, mkfs included; BenchmarkMkfs is its yardstick.
func BenchmarkFill(b *testing.B) {
	for _, c := range []struct {
		pool string
		dir  string
	}{{"copy", b.TempDir()}, {"reflink", blockdevtest.ReflinkDir(b, blockdevtest.Size(2<<30))}} {
		b.Run(c.pool, func(b *testing.B) {
			x, tr := benchTree(b, c.dir)
			check(b, x.store.Sync())
			for b.Loop() {
				size, l, err := ext4fill.Size(b.Context(), tr, 0)
				check(b, err)
				f := empty(b, c.dir, size, l.Inodes)
				_, err = ext4fill.Fill(b.Context(), f, tr, ext4fill.Files{x.store})
				check(b, err)
				f.Close()
				check(b, os.Remove(f.Name()))
			}
		})
	}
}

// BenchmarkMake is the part of it that makes the empty filesystem.
func BenchmarkMake(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		f := empty(b, dir, 400*MiB, 16_500)
		f.Close()
		check(b, os.Remove(f.Name()))
	}
}

// BenchmarkMkfs is mkfs.ext4 -d on the same tree.
func BenchmarkMkfs(b *testing.B) {
	dir := b.TempDir()
	x, tr := benchTree(b, dir)
	top := filepath.Join(dir, "tree")
	for _, n := range tr.Nodes {
		path := filepath.Join(top, n.Path)
		if n.Kind == tree.Directory {
			check(b, os.Mkdir(path, 0o755))
			continue
		}
		data := make([]byte, n.Size)
		_, err := x.store.ReadAt(data, n.Runs[0].At)
		check(b, err)
		check(b, os.WriteFile(path, data, 0o600))
	}
	command(b, "sync")
	for b.Loop() {
		image := filepath.Join(dir, "image")
		check(b, os.WriteFile(image, nil, 0o600))
		check(b, os.Truncate(image, 400*MiB))
		command(b, "mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,assume_storage_prezeroed=1", "-d", top, image)
		check(b, os.Remove(image))
	}
}

// BenchmarkMillion is a tree of a million files: what memory it takes is the
// tree's own, beside B/op.
func BenchmarkMillion(b *testing.B) {
	dir := b.TempDir()
	t := tree.Tree{Nodes: []tree.Node{{Path: ".", Kind: tree.Directory}}}
	for d := range 1000 {
		t.Nodes = append(t.Nodes, tree.Node{Path: fmt.Sprintf("%03d", d), Kind: tree.Directory})
		for i := range 1000 {
			n := tree.Node{Path: fmt.Sprintf("%03d/%04d", d, i), Kind: tree.Regular, Size: 4096}
			n.Runs = []tree.Run{{Length: 4096, At: int64(d*1000+i) * 8192}}
			t.Nodes = append(t.Nodes, n)
		}
	}
	size, l, err := ext4fill.Size(b.Context(), t, 0)
	check(b, err)
	runtime.GC()
	b.ReportAllocs()
	for b.Loop() {
		f := empty(b, dir, size, l.Inodes)
		_, err := ext4fill.Fill(b.Context(), f, t, nowhere{})
		check(b, err)
		f.Close()
		check(b, os.Remove(f.Name()))
	}
	b.ReportMetric(float64(size)/filesystem.MiB, "MiB/image")
}
