package ext4fill_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// nowhere takes contents without moving them: for what only e2fsck looks at.
type nowhere struct{}

func (nowhere) Place(context.Context, *os.File, int64, tree.Run) error { return nil }

// crowd gives count names of one file each of which has length bytes.
func crowd(x *forest, dir string, count, length int) {
	x.t.Helper()
	x.dir(dir)
	for done := 0; done < count; {
		n := tree.Node{Kind: tree.Regular, Mode: 0o600}
		for ; done < count && len(n.Links) < 64999; done++ {
			name := dir + "/" + strings.Repeat("n", length-7) + fmt.Sprintf("%07d", done)
			if n.Path == "" {
				n.Path = name
			} else {
				n.Links = append(n.Links, name)
			}
		}
		x.add(n)
	}
}

// TestDirectorySizes goes around each size at which a directory changes its form.
// Blocks of 4 KiB have room for 4060 bytes of names in a directory of one block,
// for 4084 in a leaf, and for 507 leaves in the root of an index; those of 1 KiB
// for 988, 1012 and 123.
func TestDirectorySizes(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	for _, c := range []struct {
		size   int64
		length int
		counts []int
	}{
		{64 * MiB, 12, []int{1, 202, 203, 204, 407, 408, 409}}, // 20 bytes each
		{64 * MiB, 255, []int{15, 16, 30, 31, 7604, 7605, 7606, 8000}},
		{15 * MiB, 255, []int{3, 4, 368, 369, 370, 400}},
	} {
		for _, count := range c.counts {
			t.Run(fmt.Sprintf("%dx%d in %d", count, c.length, c.size/MiB), func(t *testing.T) {
				dir := t.TempDir()
				x := newForest(t, dir)
				crowd(x, "crowd", count, c.length)
				x.filled(dir, c.size)
			})
		}
	}
}

// TestMillionNames has two levels of index, and hashes that several names share.
func TestMillionNames(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	dir := t.TempDir()
	x := newForest(t, dir)
	const count = 1_000_000
	crowd(x, "crowd", count, 9) // of which two share a hash at the edge of a block
	tr := x.tree()
	f := empty(t, dir, 128*MiB, 100)
	_, err := ext4fill.Fill(t.Context(), f, tr, nowhere{})
	check(t, err)
	clean(t, f.Name())
	mnt := mount(t, f.Name(), "loop,ro")
	names, err := os.ReadDir(filepath.Join(mnt, "crowd"))
	check(t, err)
	if len(names) != count {
		t.Errorf("%d names, want %d", len(names), count)
	}
	look := make([]string, count)
	for i := range look {
		look[i] = fmt.Sprintf("nn%07d", i)
	}
	shared, blocks := ext4fill.SharedHashes(look, hashSeed(t, f), 4096)
	if len(shared) == 0 || blocks <= 507 {
		t.Errorf("nothing that is rare: %d blocks, %d names share a hash over two blocks", blocks, len(shared))
	}
	for i := 0; i < count; i += 101 {
		shared = append(shared, look[i])
	}
	for _, name := range shared {
		if _, err := os.Lstat(filepath.Join(mnt, "crowd", name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(filepath.Join(mnt, "crowd", "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func hashSeed(t tb, f *os.File) (seed [4]uint32) {
	t.Helper()
	b := make([]byte, 16)
	_, err := f.ReadAt(b, 1024+0xEC)
	check(t, err)
	for i := range seed {
		seed[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return seed
}

func TestTooManyNames(t *testing.T) {
	dir := t.TempDir()
	x := newForest(t, dir)
	crowd(x, "crowd", 47_000, 255)
	if _, err := ext4fill.Need(t.Context(), x.tree(), 1024); !errors.Is(err, ext4fill.ErrTooLarge) || !strings.Contains(err.Error(), "crowd") {
		t.Error(err)
	}
	f := empty(t, dir, 15*MiB, 100)
	if _, err := ext4fill.Fill(t.Context(), f, x.tree(), nowhere{}); !errors.Is(err, ext4fill.ErrTooLarge) || !strings.Contains(err.Error(), "crowd") {
		t.Error(err)
	}
}

// TestManySubdirectories: a directory of more than 65,000 counts one link.
func TestManySubdirectories(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	for _, count := range []int{64998, 64999} {
		dir := t.TempDir()
		x := newForest(t, dir)
		x.dir("many")
		for i := range count {
			x.dir(fmt.Sprintf("many/%d", i))
		}
		f := empty(t, dir, 512*MiB, int64(count)+10)
		_, err := ext4fill.Fill(t.Context(), f, x.tree(), nowhere{})
		check(t, err)
		clean(t, f.Name())
	}
}

// TestKernelGoesOn lets the kernel work on what was filled: full leaves are
// split, names vanish, files grow, and all is in order afterwards.
func TestKernelGoesOn(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	dir := t.TempDir()
	x := newForest(t, dir)
	crowd(x, "crowd", 8000, 255)
	crowd(x, "one", 203, 12)
	x.file("file", 20*4096, [2]int64{0, 4096}, [2]int64{8192, 4096}, [2]int64{16384, 4096}, [2]int64{24576, 4096}, [2]int64{32768, 4096})
	f, _ := x.filled(dir, 64*MiB)
	mnt := mount(t, f.Name(), "loop")
	for i := range 500 {
		check(t, os.WriteFile(filepath.Join(mnt, "crowd", fmt.Sprintf("new-%d", i)), []byte("x"), 0o600))
		check(t, os.WriteFile(filepath.Join(mnt, "one", fmt.Sprintf("new-%d", i)), []byte("x"), 0o600))
	}
	for i := 0; i < 8000; i += 3 {
		check(t, os.Remove(filepath.Join(mnt, "crowd", strings.Repeat("n", 248)+fmt.Sprintf("%07d", i))))
	}
	check(t, os.WriteFile(filepath.Join(mnt, "file"), pattern(20*4096, 1), 0o600))
	check(t, os.Truncate(filepath.Join(mnt, "file"), 5000))
	check(t, os.Mkdir(filepath.Join(mnt, "lost+found", "sub"), 0o700))
	unmount(t, mnt)
	clean(t, f.Name())
}

// TestUnsignedHash is for filesystems made where char is unsigned, such as arm64.
func TestUnsignedHash(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	for _, flags := range []string{"1", "2"} {
		dir := t.TempDir()
		x := newForest(t, dir)
		x.dir("many")
		for i := range 500 {
			x.file(fmt.Sprintf("many/\xff\xfe-\x80%d-caf\u00e9-%s", i, strings.Repeat("\xc3", i%70)), 0)
		}
		f := empty(t, dir, 64*MiB, 600)
		command(t, "debugfs", "-w", "-R", "set_super_value flags "+flags, f.Name())
		tr := x.tree()
		_, err := ext4fill.Fill(t.Context(), f, tr, nowhere{})
		check(t, err)
		clean(t, f.Name())
		same(t, show(t, f.Name()), x.want(tr))
	}
}

// TestOwnLostFound: the tree's own lost+found takes the place of mkfs's.
func TestOwnLostFound(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	for _, size := range []int64{64 * MiB, 15 * MiB} {
		for _, count := range []int{1, 20, 100} {
			dir := t.TempDir()
			x := newForest(t, dir)
			x.file("before", 5000, [2]int64{0, 5000})
			crowd(x, "lost+found", count, 200)
			x.dir("lost+found/sub")
			x.file("lost+found/sub/file", 5000, [2]int64{0, 5000})
			x.file("z", 5000, [2]int64{0, 5000})
			x.filled(dir, size)
		}
	}
}

// TestLostFoundIsNoDirectory: the name is free for whatever the tree has.
func TestLostFoundIsNoDirectory(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	for _, n := range []tree.Node{
		{Path: "lost+found", Kind: tree.Regular, Mode: 0o600},
		{Path: "lost+found", Kind: tree.Symlink, Mode: 0o777, Target: "x"},
		{Path: "a", Links: []string{"lost+found", "z"}, Kind: tree.Regular, Mode: 0o600},
	} {
		for _, size := range []int64{64 * MiB, 15 * MiB} {
			dir := t.TempDir()
			x := newForest(t, dir)
			if size > 16*MiB { // else it is all that there is
				x.file("file", 50_000, [2]int64{0, 50_000})
				x.dir("dir")
			}
			if n.Kind == tree.Regular {
				n = x.contents(n, 10, [2]int64{0, 10})
			}
			x.add(n)
			x.filled(dir, size)
			n.Runs = nil
		}
	}
}

func mount(t testing.TB, image, options string) string {
	t.Helper()
	dir := t.TempDir()
	command(t, "mount", "-o", options, image, dir)
	t.Cleanup(func() {
		if blockdevtest.MountsUnder(t, filepath.Dir(dir)) != nil {
			unmount(t, dir)
		}
	})
	return dir
}

func unmount(t testing.TB, dir string) {
	t.Helper()
	command(t, "umount", dir)
}
