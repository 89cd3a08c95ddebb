package ext4fill_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// freeBlocks reads the superblock's count.
func freeBlocks(t tb, f *os.File) int64 {
	t.Helper()
	b := make([]byte, 1024)
	_, err := f.ReadAt(b, 1024)
	check(t, err)
	return int64(binary.LittleEndian.Uint32(b[0xC:]))
}

// offering makes an image with exactly so many free blocks of 4 KiB.
func offering(t tb, dir string, blocks, inodes int64) *os.File {
	t.Helper()
	for size := max(16*MiB, blocks*4096) / 4096 * 4096; ; {
		o := filesystem.OfferExt4(size, inodes)
		if o.Blocks == blocks {
			f := empty(t, dir, size, inodes)
			if have := freeBlocks(t, f); have != blocks {
				t.Fatalf("%d free blocks, want %d", have, blocks)
			}
			return f
		}
		if o.Blocks > blocks {
			t.Fatalf("no size offers %d blocks", blocks)
		}
		size += 4096
	}
}

// TestNeedIsEnough fills images that offer exactly what Need says, and those that
// offer what was really used and one block less.
func TestNeedIsEnough(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4)
	for name, make := range map[string]func(x *forest){
		"files": func(x *forest) {
			for i := range 5000 {
				x.file(fmt.Sprint(i), int64(1+i*3), [2]int64{0, int64(1 + i*3)})
			}
		},
		"cut": func(x *forest) { // by many runs, and by the filesystem's blocks
			check(x.t, x.store.Truncate(700*MiB))
			x.add(tree.Node{Path: "a", Kind: tree.Regular, Size: 300 * MiB, Runs: []tree.Run{{Length: 300 * MiB}}})
			x.pieces("b", 1361)
			x.pieces("c", 4)
			x.add(tree.Node{Path: "d", Kind: tree.Regular, Size: 700 * MiB, Runs: []tree.Run{{Length: 700 * MiB}}})
		},
		"names": func(x *forest) {
			for i := range 60 {
				crowd(x, fmt.Sprintf("d%d", i), 100+i*17, 12+i*4)
			}
			x.dir("mixed")
			for i := range 3000 {
				x.link(fmt.Sprintf("mixed/%d%s", i, strings.Repeat("m", i*i%240)), strings.Repeat("t", 1+i%100))
			}
		},
		"inodes": func(x *forest) {
			for i := range 20000 {
				x.file(fmt.Sprint(i), 0)
			}
		},
		"attributes": func(x *forest) {
			for i := range 4000 {
				x.add(tree.Node{Path: fmt.Sprint(i), Kind: tree.Regular, Xattrs: []tree.Xattr{{Name: "user.a", Value: pattern(int64(i%100), 1)}}})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			x := newForest(t, dir)
			make(x)
			tr := x.tree()
			l, err := ext4fill.Need(t.Context(), tr, 4096)
			check(t, err)
			fill := func(blocks int64) (*os.File, error) {
				f := offering(t, dir, blocks, l.Inodes)
				_, err := ext4fill.Fill(t.Context(), f, tr, nowhere{})
				return f, err
			}
			enough := max(l.Blocks, filesystem.OfferExt4(16*MiB, l.Inodes).Blocks)
			f, err := fill(enough)
			check(t, err)
			clean(t, f.Name())
			used := enough - freeBlocks(t, f)
			t.Logf("needs %d blocks, uses %d", l.Blocks, used)
			if l.Blocks-used > 12+l.Blocks/200 || used > l.Blocks {
				t.Errorf("needs %d blocks, uses %d", l.Blocks, used)
			}
			if used <= filesystem.OfferExt4(16*MiB, l.Inodes).Blocks {
				return
			}
			f, err = fill(used)
			check(t, err)
			clean(t, f.Name())
			if free := freeBlocks(t, f); free != 0 {
				t.Errorf("%d blocks are left", free)
			}
			if _, err = fill(used - 1); !errors.Is(err, ext4fill.ErrFull) {
				t.Errorf("one block less: %v", err)
			}
		})
	}
}

func TestTooFewInodes(t *testing.T) {
	dir := t.TempDir()
	x := newForest(t, dir)
	f := empty(t, dir, 16*MiB, 100)
	offer := filesystem.OfferExt4(16*MiB, 100)
	for i := range offer.Inodes {
		x.file(fmt.Sprint(i), 0)
	}
	_, err := ext4fill.Fill(t.Context(), f, x.tree(), nowhere{})
	check(t, err)
	clean(t, f.Name())
	x.file("one more", 0)
	if _, err := ext4fill.Fill(t.Context(), empty(t, dir, 16*MiB, 100), x.tree(), nowhere{}); !errors.Is(err, ext4fill.ErrFull) {
		t.Error(err)
	}
}

// TestSize looks at whole images: they fit, and are hardly larger than needed.
func TestSize(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4)
	for _, c := range []struct {
		files int
		bytes int64
		least int64
		want  int64
	}{
		{0, 0, 0, MiB}, {0, 0, 16 * MiB, 16 * MiB}, {100, 1000, 0, MiB}, {1000, 10_000, 0, 12 * MiB}, {1000, 10_000, 1 << 30, 1 << 30},
		{20_000, 0, 0, 80 * MiB}, {10_000, 10_000, 0, 135 * MiB}, {3, 300_000_000, 0, 902 * MiB},
	} {
		dir := t.TempDir()
		x := newForest(t, dir)
		for i := range c.files {
			n := tree.Node{Path: fmt.Sprint(i), Kind: tree.Regular, Size: c.bytes}
			if c.bytes > 0 {
				n.Runs = []tree.Run{{Length: c.bytes, At: int64(i) * 1 << 30}}
			}
			x.add(n)
		}
		size, l, err := ext4fill.Size(t.Context(), x.tree(), c.least)
		check(t, err)
		if size > c.want {
			t.Errorf("%d files of %d bytes: %d MiB, want at most %d", c.files, c.bytes, size/MiB, c.want/MiB)
		}
		f := empty(t, dir, size, l.Inodes)
		_, err = ext4fill.Fill(t.Context(), f, x.tree(), nowhere{})
		check(t, err)
		clean(t, f.Name())
	}
}

// TestGrowth: what was filled grows as what mkfs made does.
func TestGrowth(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	for _, least := range []int64{0, 16 * MiB, 200 * MiB} {
		dir := t.TempDir()
		x := newForest(t, dir)
		crowd(x, "crowd", 1000, 40)
		for i := range 300 {
			x.file(fmt.Sprintf("file-%d", i), int64(i*100+1), [2]int64{0, int64(i*100 + 1)})
		}
		if least > 0 {
			x.file("large", 40*MiB, [2]int64{0, 40 * MiB})
		}
		tr := x.tree()
		size, l, err := ext4fill.Size(t.Context(), tr, least)
		check(t, err)
		f := empty(t, dir, size, l.Inodes)
		_, err = ext4fill.Fill(t.Context(), f, tr, ext4fill.Files{x.store})
		check(t, err)
		check(t, f.Truncate(10*size))
		check(t, filesystem.NewTools().Grow(t.Context(), f.Name(), filesystem.Ext4))
		clean(t, f.Name())
		if have, err := filesystem.NewTools().Size(t.Context(), f.Name(), filesystem.Ext4); err != nil || have < 10*size-MiB {
			t.Errorf("grown to %d bytes of %d: %v", have, 10*size, err)
		}
		same(t, show(t, f.Name()), x.want(tr))
	}
}
