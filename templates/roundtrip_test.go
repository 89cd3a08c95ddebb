package templates_test

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/tarball"
	"holdfast/templates"
	"holdfast/templates/treetest"
)

func TestRoundTrip(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Ext4, blockdevtest.Btrfs)
	r := reflinkRig(t, 6<<30, nil)
	root := t.TempDir()
	if err := syscall.Chmod(root, 0o1751); err != nil {
		t.Fatal(err)
	}
	treetest.Plant(t, root)
	want := treetest.Survey(t, root)
	archive := treetest.GNUTar(t, root, "--format=pax", "--sparse", "--xattrs", "--xattrs-include=*")
	r.put("tree")
	v := r.push("tree", archive)
	if v.Status != templates.Ready || v.Number != 1 || v.Name != "1" {
		t.Errorf("revision %+v", v)
	}
	if held := r.space.reserved(); held != 0 {
		t.Errorf("%d bytes are still set aside", held)
	}
	for _, spec := range []templates.SourceSpec{
		{Filesystem: filesystem.Ext4, Size: v.MinimumBytes},
		{Filesystem: filesystem.Ext4, Size: 1 << 30},
		{Filesystem: filesystem.XFS, Size: v.MinimumFor(filesystem.XFS)},
		{Filesystem: filesystem.Btrfs, Size: v.MinimumFor(filesystem.Btrfs)},
	} {
		spec.Revision = v.ID
		t.Run(fmt.Sprintf("%s %d", spec.Filesystem, spec.Size), func(t *testing.T) {
			at := *r
			at.t = t
			treetest.Compare(t, want, treetest.Survey(t, at.mounted(spec)))
		})
	}
}

// Archives of other tools: what their format can say arrives.
func TestFlavours(t *testing.T) {
	r := reflinkRig(t, 2<<30, nil)
	root := t.TempDir()
	treetest.Plant(t, root)
	// What only PAX can say, and names longer than ustar takes.
	for _, name := range []string{"link-long", strings.Repeat("l", 200), strings.Repeat("n", 255), "empty"} {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	want := treetest.Survey(t, root)
	r.put("tree")
	for name, c := range map[string]struct {
		archive []byte
		differs func(string, *treetest.Inode) // what the format loses
	}{
		"GNU": {treetest.GNUTar(t, root, "--format=gnu", "--sparse"), func(_ string, n *treetest.Inode) {
			n.MTime, n.Xattrs = n.MTime.Truncate(time.Second), ""
		}},
		"ustar": {treetest.GNUTar(t, root, "--format=ustar", "--sort=name"), func(_ string, n *treetest.Inode) {
			n.Xattrs = ""
			n.MTime = time.Unix(max(0, n.MTime.Unix()), 0).UTC() // before 1970 there is none
		}},
		"PAX 0.1": {treetest.GNUTar(t, root, "--format=pax", "--sparse", "--sparse-version=0.1", "--xattrs", "--xattrs-include=*"), func(string, *treetest.Inode) {}},
		"ours":    {ours(t, root), nil},
	} {
		t.Run(name, func(t *testing.T) {
			at := *r
			at.t = t
			v := at.push("tree", c.archive)
			have := treetest.Survey(t, at.mounted(templates.SourceSpec{Filesystem: filesystem.Ext4, Size: v.MinimumBytes, Revision: v.ID}))
			expected := maps.Clone(want)
			if c.differs == nil { // has no root, and leaves the host's own attributes out
				delete(expected, ".")
				delete(have, ".")
				c.differs = func(_ string, n *treetest.Inode) {
					n.Xattrs = trusted.ReplaceAllString(n.Xattrs, "")
				}
			}
			for _, tree := range []map[string]treetest.Inode{expected, have} {
				for path, n := range tree {
					c.differs(path, &n)
					tree[path] = n
				}
			}
			treetest.Compare(t, expected, have)
		})
	}
}

var trusted = regexp.MustCompile(`trusted\.[a-z.]+="[^"]*" ?`)

func ours(t *testing.T, root string) []byte {
	t.Helper()
	plan, err := tarball.New(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := plan.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A template of many tiny files fits into a small volume, keeps everything in
// one of every class, and leaves a large one its space.
func TestTinyFiles(t *testing.T) {
	r := reflinkRig(t, 4<<30, nil)
	root := t.TempDir()
	for i := range 5000 {
		dir := fmt.Sprintf("%s/%02d", root, i/100)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(fmt.Sprintf("%s/f%d", dir, i), []byte(strings.Repeat("z", i%300)), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	want := treetest.Survey(t, root)
	r.put("tiny")
	v := r.push("tiny", treetest.GNUTar(t, root, "--format=pax"))
	if v.MinimumBytes >= 12*mib || v.ImageBytes < 20*mib {
		t.Fatalf("this is about another case: %+v", v)
	}
	for _, size := range []int64{v.MinimumBytes, 15 * mib, 16 * mib, v.ImageBytes - mib, v.ImageBytes, 2 * v.ImageBytes, 1 << 30} {
		t.Run(fmt.Sprint(size/mib), func(t *testing.T) {
			at := *r
			at.t = t
			dir := at.mounted(templates.SourceSpec{Filesystem: filesystem.Ext4, Size: size, Revision: v.ID})
			treetest.Compare(t, want, treetest.Survey(t, dir))
			var fs unix.Statfs_t
			if err := unix.Statfs(dir, &fs); err != nil {
				t.Fatal(err)
			}
			if used := size - int64(fs.Bfree)*fs.Bsize; size == 1<<30 && used > 20*mib+size/25 {
				t.Errorf("of 1 GiB, %d MiB are used", used/mib)
			}
		})
	}
}
