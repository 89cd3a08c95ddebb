package ext4fill_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

func digest(t tb, f *os.File) string {
	t.Helper()
	h := sha256.New()
	_, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<62))
	check(t, err)
	return fmt.Sprintf("%x", h.Sum(nil))
}

func allocated(t tb, f *os.File) int64 {
	t.Helper()
	var st syscall.Stat_t
	check(t, syscall.Fstat(int(f.Fd()), &st))
	return st.Blocks * 512
}

// TestSameTreeSameBytes: whatever the pool, whenever it is, wherever the contents
// come from.
func TestSameTreeSameBytes(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ext4, xfs := blockdevtest.Ext4Dir(t, blockdevtest.Size(512*MiB)), blockdevtest.ReflinkDir(t)
	digests, identities := map[string][]string{}, map[string][]string{}
	for i, dir := range []string{ext4, ext4, xfs, xfs} {
		for _, least := range []int64{0, 64 * MiB} {
			x := newForest(t, dir)
			order := rand.New(rand.NewPCG(uint64(i), 1)).Perm(200) // in which the store gets contents
			for _, n := range order {
				x.end = (x.end+tree.Block-1)/tree.Block*tree.Block + tree.Block*int64(n%2)
				x.add(tree.Node{Path: fmt.Sprint(n), Kind: tree.Regular, ModTime: epoch, Size: int64(n * 111)})
				if n > 0 {
					data := pattern(int64(n*111), int64(n))
					_, err := x.store.WriteAt(data, x.end)
					check(t, err)
					f := x.nodes[fmt.Sprint(n)]
					f.Runs = []tree.Run{{Length: f.Size, At: x.end}}
					x.nodes[f.Path] = f
					x.end += f.Size
				}
			}
			check(t, x.store.Truncate(x.end+8192))
			root := x.nodes["."]
			root.ModTime = epoch
			x.nodes["."] = root
			x.add(tree.Node{Path: "a", Kind: tree.Directory, ModTime: epoch, Xattrs: []tree.Xattr{{Name: "user.a", Value: pattern(500, 1)}}})
			x.add(tree.Node{Path: "link", Kind: tree.Symlink, ModTime: epoch, Target: strings.Repeat("x", 300)})
			size, l, err := ext4fill.Size(t.Context(), x.tree(), least)
			check(t, err)
			f := empty(t, dir, size, l.Inodes)
			lies, err := ext4fill.Fill(t.Context(), f, x.tree(), ext4fill.Files{x.store})
			check(t, err)
			clean(t, f.Name())
			key := fmt.Sprint(least)
			digests[key] = append(digests[key], digest(t, f))
			identities[key] = append(identities[key], fmt.Sprintf("%+v", lies))
			check(t, os.Remove(f.Name()))
		}
	}
	for least := range digests {
		if n := len(slices.Compact(digests[least])); n != 1 {
			t.Errorf("%s: %d different images: %v", least, n, digests[least])
		}
		if n := len(slices.Compact(identities[least])); n != 1 {
			t.Errorf("%s: %d different trees", least, n)
		}
	}
}

// counting counts what it passes on.
type counting struct {
	ext4fill.Contents
	calls int
	fail  func(calls int) error
}

func (c *counting) Place(ctx context.Context, image *os.File, at int64, r tree.Run) error {
	c.calls++
	if c.fail != nil {
		if err := c.fail(c.calls); err != nil {
			return err
		}
	}
	return c.Contents.Place(ctx, image, at, r)
}

// TestContentsAreShared: on a pool with reflink the image takes no space for
// contents, and what lies together goes together.
func TestContentsAreShared(t *testing.T) {
	blockdevtest.LeakCheck(t)
	dir := blockdevtest.ReflinkDir(t)
	x := newForest(t, dir)
	for i := range 1000 {
		x.file(fmt.Sprintf("%04d", i), 50_000, [2]int64{0, 50_000})
	}
	f := empty(t, dir, 128*MiB, 2000)
	before := poolUsed(t, dir)
	c := &counting{Contents: ext4fill.Files{x.store}}
	_, err := ext4fill.Fill(t.Context(), f, x.tree(), c)
	check(t, err)
	if c.calls > 5 {
		t.Errorf("%d calls for contents that lie together", c.calls)
	}
	if more := poolUsed(t, dir) - before; more > 2*MiB {
		t.Errorf("%d KiB more in use for 50 MB that are there", more>>10)
	}
	clean(t, f.Name())
	same(t, show(t, f.Name()), x.want(x.tree()))
}

// poolUsed is what is in use of a file system, in bytes, after everything is
// written.
func poolUsed(t tb, dir string) int64 {
	t.Helper()
	command(t, "sync", "-f", dir)
	var s syscall.Statfs_t
	check(t, syscall.Statfs(dir, &s))
	return int64(s.Blocks-s.Bfree) * s.Bsize
}

// TestImageStaysSparse: neither filling nor a mount occupies what nothing is in.
func TestImageStaysSparse(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	dir := t.TempDir()
	x := newForest(t, dir)
	for i := range 100 {
		x.file(fmt.Sprintf("%04d", i), 50_000, [2]int64{0, 50_000})
	}
	f := empty(t, dir, 20<<30, 2000)
	before := allocated(t, f)
	_, err := ext4fill.Fill(t.Context(), f, x.tree(), ext4fill.Files{x.store})
	check(t, err)
	check(t, f.Sync())
	filled := allocated(t, f)
	if filled-before > 100*53248+20*4096 {
		t.Errorf("%d bytes more for 100 files", filled-before)
	}
	mnt := mount(t, f.Name(), "loop")
	check(t, os.WriteFile(filepath.Join(mnt, "new"), []byte("x"), 0o600))
	unmount(t, mnt)
	check(t, f.Sync())
	if mounted := allocated(t, f); mounted-filled > MiB {
		t.Errorf("%d bytes more after a mount", mounted-filled)
	}
	clean(t, f.Name())
}

func TestCancelledAndFailing(t *testing.T) {
	dir := t.TempDir()
	x := newForest(t, dir)
	for i := range 50 {
		x.end += tree.Block // so that each goes alone
		x.file(fmt.Sprintf("%04d", i), 5000, [2]int64{0, 5000})
	}
	ctx, cancel := context.WithCancel(t.Context())
	c := &counting{Contents: ext4fill.Files{x.store}, fail: func(n int) error {
		if n == 3 {
			cancel()
		}
		return nil
	}}
	if _, err := ext4fill.Fill(ctx, empty(t, dir, 64*MiB, 100), x.tree(), c); !errors.Is(err, context.Canceled) || c.calls != 3 {
		t.Errorf("after %d calls: %v", c.calls, err)
	}
	if _, err := ext4fill.Fill(ctx, empty(t, dir, 64*MiB, 100), x.tree(), c); !errors.Is(err, context.Canceled) || c.calls != 3 {
		t.Errorf("after %d calls: %v", c.calls, err)
	}
	if _, err := ext4fill.Need(ctx, x.tree(), 4096); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	broken := errors.New("broken")
	c.fail = func(int) error { return broken }
	if _, err := ext4fill.Fill(t.Context(), empty(t, dir, 64*MiB, 100), x.tree(), c); !errors.Is(err, broken) {
		t.Error(err)
	}
}

// TestPoolIsFull fills an image in a pool without room for what goes into it.
func TestPoolIsFull(t *testing.T) {
	blockdevtest.LeakCheck(t)
	full := blockdevtest.Ext4Dir(t)
	x := newForest(t, t.TempDir())
	x.file("large", 100*MiB, [2]int64{0, 100 * MiB})
	f := empty(t, full, 512*MiB, 100)
	if _, err := ext4fill.Fill(t.Context(), f, x.tree(), ext4fill.Files{x.store}); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Error(err)
	}
	f.Close()
}

// TestTimes: what an inode cannot have becomes the nearest that it can.
func TestTimes(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	dir := t.TempDir()
	x := newForest(t, dir)
	first, last := time.Unix(-1<<31, 0).UTC(), time.Unix(10737418239, 0).UTC()
	want := map[string]time.Time{}
	for i, at := range []time.Time{first, last, last.Add(999_999_999), first.Add(1), time.Unix(-1, 999_999_999), time.Unix(1<<31-1, 1), time.Unix(1<<31, 1), time.Unix(1<<32, 5), time.Unix(3<<31, 7), time.Unix(0, 0).UTC()} {
		name := fmt.Sprint(i)
		x.add(tree.Node{Path: name, Kind: tree.Regular, ModTime: at.UTC()})
		want[name] = at.UTC()
	}
	for name, at := range map[string]time.Time{"early": first.Add(-1), "late": last.Add(time.Second), "year 9999": time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), "year 1": time.Date(1, 1, 1, 0, 0, 0, 1, time.UTC)} {
		x.add(tree.Node{Path: name, Kind: tree.Regular, ModTime: at})
		want[name] = last
		if at.Before(epoch) {
			want[name] = first
		}
	}
	f := empty(t, dir, 64*MiB, 100)
	lies, err := ext4fill.Fill(t.Context(), f, x.tree(), nowhere{})
	check(t, err)
	clean(t, f.Name())
	got := show(t, f.Name())
	for name, at := range want {
		if !got[name].ModTime.Equal(at) || !lies.Find(name).ModTime.Equal(at) {
			t.Errorf("%q: %v, said to be %v, want %v", name, got[name].ModTime, lies.Find(name).ModTime, at)
		}
	}
}
