package ext4fill_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

func TestInvalidTrees(t *testing.T) {
	root := tree.Node{Path: ".", Kind: tree.Directory}
	file := func(path string, links ...string) tree.Node {
		return tree.Node{Path: path, Links: links, Kind: tree.Regular}
	}
	data := func(size int64, runs ...tree.Run) tree.Node {
		return tree.Node{Path: "f", Kind: tree.Regular, Size: size, Runs: runs}
	}
	dir := func(path string) tree.Node { return tree.Node{Path: path, Kind: tree.Directory} }
	f := empty(t, t.TempDir(), 64*MiB, 100)
	for what, nodes := range map[string][]tree.Node{
		"nothing":                 nil,
		"no root":                 {file("a")},
		"a file as root":          {file(".")},
		"two roots":               {root, root},
		"order":                   {root, file("b"), file("a")},
		"twice":                   {root, file("a"), file("a")},
		"order of '/'":            {root, dir("a"), file("a.b"), file("a/b")},
		"no directory":            {root, file("a/b")},
		"below a file":            {root, file("a"), file("a/b")},
		"below a link's name":     {root, file("a", "b"), file("b/c")},
		"link to nowhere":         {root, file("a", "x/b")},
		"link below a file":       {root, file("a", "b/c"), file("b")},
		"link on a file":          {root, file("a", "b"), file("b")},
		"link on a directory":     {root, file("a", "b"), dir("b")},
		"link twice":              {root, file("a", "b", "b")},
		"link to itself":          {root, file("a", "a")},
		"link to the root":        {root, file("a", ".")},
		"lost+found twice":        {root, file("a", "lost+found"), dir("lost+found")},
		"no owner":                {root, {Path: "a", Kind: tree.Regular, UID: 1<<32 - 1}},
		"no group":                {root, {Path: "a", Kind: tree.Regular, GID: 1<<32 - 1}},
		"absolute":                {root, file("/a")},
		"dots":                    {root, file("../a")},
		"dot":                     {root, dir("a"), file("a/.")},
		"ends in a slash":         {root, file("a/")},
		"empty":                   {root, file("")},
		"zero":                    {root, file("a\x00b")},
		"kind":                    {root, {Path: "a"}},
		"mode":                    {root, {Path: "a", Kind: tree.Regular, Mode: 0o10000}},
		"linked directory":        {root, {Path: "a", Kind: tree.Directory, Links: []string{"b"}}},
		"directory with contents": {root, {Path: "a", Kind: tree.Directory, Size: 1}},
		"link without target":     {root, {Path: "a", Kind: tree.Symlink}},
		"link to zero":            {root, {Path: "a", Kind: tree.Symlink, Target: "a\x00"}},
		"link with contents":      {root, {Path: "a", Kind: tree.Symlink, Target: "a", Runs: []tree.Run{{}}}},
		"size":                    {root, data(-1)},
		"run beyond the end":      {root, data(100, tree.Run{Length: 101})},
		"run far beyond":          {root, data(100, tree.Run{Offset: 4096, Length: 1<<63 - 1})},
		"run at no block":         {root, data(10000, tree.Run{Offset: 1, Length: 4096})},
		"run of no blocks":        {root, data(10000, tree.Run{Length: 100})},
		"run of nothing":          {root, data(10000, tree.Run{Length: 0})},
		"runs on each other":      {root, data(10000, tree.Run{Length: 8192}, tree.Run{Offset: 4096, Length: 4096})},
		"xattrs twice":            {root, {Path: "a", Kind: tree.Regular, Xattrs: []tree.Xattr{{Name: "user.a"}, {Name: "user.a"}}}},
	} {
		if _, err := ext4fill.Fill(t.Context(), f, tree.Tree{Nodes: nodes}, nowhere{}); !errors.Is(err, ext4fill.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := ext4fill.Need(t.Context(), tree.Tree{Nodes: nodes}, 4096); !errors.Is(err, ext4fill.ErrInvalid) {
			t.Errorf("%s: Need: %v", what, err)
		}
	}
}

// TestMoreThanAnything: sizes that add up to more than a number can hold.
func TestMoreThanAnything(t *testing.T) {
	nodes := []tree.Node{{Path: ".", Kind: tree.Directory}}
	const most = (1<<32 - 1) * 4096
	for i := range 1 << 20 {
		nodes = append(nodes, tree.Node{Path: fmt.Sprintf("%07d", i), Kind: tree.Regular, Size: most, Runs: []tree.Run{{Length: most}}})
	}
	if size, _, err := ext4fill.Size(t.Context(), tree.Tree{Nodes: nodes}, 0); !errors.Is(err, ext4fill.ErrTooLarge) {
		t.Errorf("%d bytes: %v", size, err)
	}
}

// TestOtherImages: only what Make has just made is filled.
func TestOtherImages(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4, blockdevtest.XFS)
	dir := t.TempDir()
	x := newForest(t, dir)
	x.file("a", 10, [2]int64{0, 10})
	for what, make := range map[string]func(f *os.File){
		"zeroes": func(*os.File) {},
		"short":  func(f *os.File) { check(t, f.Truncate(1000)) },
		"xfs":    func(f *os.File) { command(t, "mkfs.xfs", "-q", f.Name()) },
		"ext2":   func(f *os.File) { command(t, "mkfs.ext2", "-q", f.Name()) },
		"orphan file": func(f *os.File) {
			command(t, "mkfs.ext4", "-q", "-O", "orphan_file", f.Name())
		},
		"inodes of 512 bytes": func(f *os.File) { command(t, "mkfs.ext4", "-q", "-I", "512", f.Name()) },
		"filled": func(f *os.File) {
			made(t, f)
			_, err := ext4fill.Fill(t.Context(), f, x.tree(), ext4fill.Files{x.store})
			check(t, err)
		},
		"cut": func(f *os.File) {
			made(t, f)
			check(t, f.Truncate(300*MiB))
		},
		"damaged superblock":  func(f *os.File) { made(t, f); flip(t, f, 1024+0x20) },
		"damaged descriptors": func(f *os.File) { made(t, f); flip(t, f, 4096+8) },
		"damaged bitmap":      func(f *os.File) { made(t, f); flip(t, f, blockBitmapAt(t, f)+200) },
		"in use": func(f *os.File) {
			made(t, f)
			command(t, "debugfs", "-w", "-R", "mkdir x", f.Name())
		},
	} {
		f, err := os.Create(filepath.Join(dir, "image"))
		check(t, err)
		check(t, f.Truncate(512*MiB))
		make(f)
		if _, err := ext4fill.Fill(t.Context(), f, x.tree(), ext4fill.Files{x.store}); !errors.Is(err, ext4fill.ErrImage) {
			t.Errorf("%s: %v", what, err)
		}
		f.Close()
	}
}

func made(t tb, f *os.File) {
	t.Helper()
	check(t, filesystem.NewTools().Make(t.Context(), f.Name(), filesystem.Ext4, filesystem.MakeOptions{}))
}

func flip(t tb, f *os.File, at int64) {
	t.Helper()
	b := []byte{0}
	_, err := f.ReadAt(b, at)
	check(t, err)
	b[0] ^= 0x10
	_, err = f.WriteAt(b, at)
	check(t, err)
}

func blockBitmapAt(t tb, f *os.File) int64 {
	t.Helper()
	b := make([]byte, 4)
	_, err := f.ReadAt(b, 4096)
	check(t, err)
	return (int64(b[0]) | int64(b[1])<<8 | int64(b[2])<<16 | int64(b[3])<<24) * 4096
}
