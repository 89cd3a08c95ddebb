package loop_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/loop"
	"holdfast/internal/sys"
)

func setup(t *testing.T) {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop)
	blockdevtest.LeakCheck(t)
}

func file(t *testing.T, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func attach(t *testing.T, f *os.File, readOnly bool) loop.Device {
	t.Helper()
	d, err := loop.Attach(f, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Detach(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestAttachedDeviceShowsTheFile(t *testing.T) {
	setup(t)
	f := file(t, 1<<20)
	d := attach(t, f, false)
	if d.Size != 1<<20 || d.ReadOnly || !d.DirectIO || d.Autoclear || d.Partial {
		t.Errorf("device %+v", d)
	}
	node, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	text := []byte("hold fast")
	if _, err := node.WriteAt(text, 4096); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := f.ReadAt(got, 4096); err != nil || !bytes.Equal(got, text) {
		t.Errorf("file has %q, %v", got, err)
	}
	node.Close()
}

func detach(t *testing.T, d loop.Device) {
	t.Helper()
	if err := d.Detach(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestReadOnlyIsTheDevicesOwn(t *testing.T) {
	setup(t)
	d := attach(t, file(t, 1<<20), true)
	if !d.ReadOnly {
		t.Errorf("device %+v", d)
	}
	node, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err == nil {
		defer node.Close()
		if _, err = node.WriteAt(make([]byte, 512), 0); err == nil {
			err = node.Sync()
		}
	}
	if err == nil {
		t.Error("a read-only device was written")
	}
}

func TestFindGoesByInode(t *testing.T) {
	setup(t)
	f, other := file(t, 1<<20), file(t, 1<<20)
	d := attach(t, f, false)
	attach(t, other, false)
	// A name tells nothing: give each file the other's.
	for _, step := range [][2]string{{f.Name(), f.Name() + "x"}, {other.Name(), f.Name()}, {f.Name() + "x", other.Name()}} {
		if err := os.Rename(step[0], step[1]); err != nil {
			t.Fatal(err)
		}
	}
	found, err := loop.Find(f)
	if err != nil || len(found) != 1 || found[0] != d {
		t.Errorf("found %+v, %v; want %+v", found, err, d)
	}
	none := file(t, 1<<20)
	if found, err := loop.Find(none); err != nil || len(found) != 0 {
		t.Errorf("a file without device: %+v, %v", found, err)
	}
}

func TestGrowWhileOpen(t *testing.T) {
	setup(t)
	f := file(t, 1<<20)
	d := attach(t, f, false)
	node, err := os.Open(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := f.Truncate(3 << 20); err != nil {
		t.Fatal(err)
	}
	if size, err := d.Grow(); err != nil || size != 3<<20 {
		t.Fatalf("grown to %d, %v", size, err)
	}
	if size, err := sys.BlockDeviceSize(node); err != nil || size != 3<<20 {
		t.Errorf("an opening from before sees %d, %v", size, err)
	}
	node.Close()
}

func TestDetachRefusesWhatIsInUse(t *testing.T) {
	setup(t)
	blockdevtest.Require(t, blockdevtest.Ext4)
	f := file(t, 8<<20)
	d := attach(t, f, false)
	dir := t.TempDir()
	for _, args := range [][]string{{"mkfs.ext4", "-q", d.Path}, {"mount", d.Path, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	err := d.Detach(t.Context())
	if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), dir) {
		t.Errorf("detach of a mounted device: %v, want busy and %s", err, dir)
	}
	held, err := os.Create(dir + "/open")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := sys.UnmountLazy(dir); err != nil {
		t.Fatal(err)
	}
	if err := d.Detach(t.Context()); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("detach of a device whose filesystem lives on after a lazy unmount: %v, want busy", err)
	}
	same(t, f, d)
	held.Close()
}

// same makes sure that a refused detach has changed nothing.
func same(t *testing.T, f *os.File, want loop.Device) {
	t.Helper()
	found, err := loop.Find(f)
	if err != nil || len(found) != 1 || found[0] != want {
		t.Errorf("after a refused detach: %+v, %v; want %+v", found, err, want)
	}
}

func TestDetachRefusesAnOpenNode(t *testing.T) {
	setup(t)
	f := file(t, 1<<20)
	d := attach(t, f, false)
	node, err := os.Open(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := d.Detach(t.Context()); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("detach of an open device: %v, want busy", err)
	}
	same(t, f, d)
	node.Close()
	same(t, f, d) // the mark was taken back: the last close does not detach it
}

func TestDetachTouchesNobodyElsesDevice(t *testing.T) {
	setup(t)
	f := file(t, 1<<20)
	d := attach(t, f, false)
	detach(t, d)
	if _, err := os.Stat("/sys/block/" + filepath.Base(d.Path) + "/loop"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("%s still has a file: %v", d.Path, err)
	}
	if _, err := loop.Inspect(d.Path); !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatalf("inspect of a free device: %v", err)
	}
	// The same number, the same file, but another use of the device.
	again := attach(t, f, false)
	stale := again
	stale.Sequence--
	if err := stale.Detach(t.Context()); err != nil {
		t.Errorf("a stale device: %v, want success", err)
	}
	same(t, f, again)
	foreign := again
	foreign.File.Inode++
	if err := foreign.Detach(t.Context()); err != nil {
		t.Errorf("a device of another file: %v, want success", err)
	}
	if _, err := foreign.Grow(); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("growing a device of another file: %v", err)
	}
	same(t, f, again)
}

func TestManyAtOnce(t *testing.T) {
	setup(t)
	const n = 24
	files := make([]*os.File, n)
	for i := range files {
		files[i] = file(t, 1<<20)
	}
	var wg sync.WaitGroup
	for _, f := range files {
		wg.Go(func() {
			for range 5 {
				d, err := loop.Attach(f, false)
				if err != nil {
					t.Error(err)
					return
				}
				if found, err := loop.Find(f); err != nil || len(found) != 1 || found[0].Path != d.Path {
					t.Errorf("found %+v, %v; want %s", found, err, d.Path)
				}
				if err := d.Detach(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}
