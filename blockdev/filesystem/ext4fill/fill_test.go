package ext4fill_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/tree"
)

const (
	MiB  = filesystem.MiB
	uuid = "8d5a5c0b-6c3c-4f3c-9d0a-1f2e3d4c5b6a"
)

// tb is what *testing.T, *testing.B and *rapid.T have in common.
type tb interface {
	rapid.TB
	Context() context.Context
	Cleanup(func())
}

var zeroes = make([]byte, MiB)

var epoch = time.Unix(1_600_000_000, 0).UTC()

func check(t tb, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func command(t tb, args ...string) string {
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
func empty(t tb, dir string, size, inodes int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("image-%d", time.Now().UnixNano())))
	check(t, err)
	t.Cleanup(func() { f.Close() })
	check(t, f.Truncate(size))
	check(t, filesystem.NewTools().Make(t.Context(), f.Name(), filesystem.Ext4, filesystem.MakeOptions{UUID: uuid, Time: epoch, Inodes: inodes}))
	return f
}

// clean fails the test when e2fsck finds anything.
func clean(t tb, path string) {
	t.Helper()
	out := command(t, "e2fsck", "-fn", path)
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "e2fsck ") && !strings.HasPrefix(line, "Pass ") && !strings.HasPrefix(line, path+": ") {
			t.Fatalf("e2fsck: %s", out)
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
			deep := "deep"
			for range 60 {
				x.dir(deep)
				deep += "/" + strings.Repeat("d", 50)
			}
			x.file(deep, 5000, [2]int64{0, 5000})
			for _, name := range []string{"-rf", " ", "a b", "new\nline", "\xff\xfe", "café-日本語-🚀.txt", "...", strings.Repeat("é", 127), "~", "\x01"} {
				x.file("many/"+name, 1, [2]int64{0, 1})
				x.link(name, name)
			}
			for mode := uint32(0); mode <= 0o7777; mode += 73 {
				x.add(tree.Node{Path: fmt.Sprintf("mode-%o", mode), Kind: tree.Regular, Mode: mode})
				x.add(tree.Node{Path: fmt.Sprintf("many/dir-%o", mode), Kind: tree.Directory, Mode: mode, UID: mode * 1_000_000, GID: 1<<32 - 2 - mode})
			}
			x.filled(dir, size)
		})
	}
}
