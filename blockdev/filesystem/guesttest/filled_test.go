package guesttest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// TestGrowMountedFilled grows a mounted ext4 that was filled, not written to,
// tenfold, uses what it grew by, and looks at the files and the filesystem.
func TestGrowMountedFilled(t *testing.T) {
	x := filesystem.NewTools()
	path := image(t, 1<<20)
	store, err := os.Create(filepath.Join(filepath.Dir(path), "store"))
	must(t, err)
	defer store.Close()
	nodes := []tree.Node{{Path: ".", Kind: tree.Directory, Mode: 0o755}, {Path: "dir", Kind: tree.Directory, Mode: 0o755}}
	want := map[string][]byte{}
	for i := range 2000 {
		n := tree.Node{Path: fmt.Sprintf("dir/%04d", i), Kind: tree.Regular, Mode: 0o644, ModTime: time.Unix(1e9, 5).UTC()}
		want[n.Path] = []byte(strings.Repeat(n.Path, 1+i%900))
		n.Size = int64(len(want[n.Path]))
		n.Runs = []tree.Run{{Length: n.Size, At: int64(i) * 2 * tree.Block}}
		_, err := store.WriteAt(want[n.Path], n.Runs[0].At)
		must(t, err)
		nodes = append(nodes, n)
	}
	must(t, store.Truncate(2000*2*tree.Block))
	slices.SortFunc(nodes, func(a, b tree.Node) int { return tree.Compare(a.Path, b.Path) })
	tr := tree.Tree{Nodes: nodes}
	size, l, err := ext4fill.Size(t.Context(), tr, 16*filesystem.MiB)
	must(t, err)
	must(t, os.Truncate(path, size))
	must(t, x.Make(t.Context(), path, filesystem.Ext4, filesystem.MakeOptions{Inodes: l.Inodes}))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	_, err = ext4fill.Fill(t.Context(), f, tr, ext4fill.Files{store})
	must(t, err)
	must(t, f.Sync())
	must(t, f.Close())

	device := command(t, "losetup", "--find", "--show", "--direct-io=on", path)
	dir := t.TempDir()
	must(t, syscall.Mount(device, dir, "ext4", 0, strings.Join(filesystem.MountOptions(filesystem.Ext4), ",")))
	must(t, os.Truncate(path, 10*size))
	command(t, "losetup", "-c", device)
	must(t, x.GrowMounted(t.Context(), dir, filesystem.Ext4))
	more := bytes.Repeat([]byte("more"), int(size))
	must(t, os.WriteFile(filepath.Join(dir, "more"), more, 0o600))
	for i := range 500 {
		must(t, os.WriteFile(filepath.Join(dir, "dir", fmt.Sprintf("new-%d", i)), nil, 0o600))
	}
	for name, b := range want {
		if have, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(have, b) {
			t.Errorf("%s is not what it was: %v", name, err)
		}
	}
	must(t, syscall.Unmount(dir, 0))
	command(t, "losetup", "-d", device)
	must(t, x.Check(t.Context(), path, filesystem.Ext4, false))
}
