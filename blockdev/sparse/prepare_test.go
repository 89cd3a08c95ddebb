package sparse

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/loop"
	"holdfast/internal/sys"
)

func prepared(t *testing.T, dir string, mode Mode, size int64) Prepared {
	t.Helper()
	t.Cleanup(func() { unprepare(t, dir) })
	p, err := Prepare(t.Context(), dir, mode, size)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func unprepare(t *testing.T, dir string) {
	t.Helper()
	if err := Unprepare(context.Background(), dir); err != nil {
		t.Error(err)
	}
}

func needsImages(t *testing.T) {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.ReflinkPool, blockdevtest.Ext4)
	blockdevtest.LeakCheck(t)
}

func TestPrepareMakesAnImageWhereNothingCanBeShared(t *testing.T) {
	needsImages(t)
	dir := filepath.Join(blockdevtest.Ext4Dir(t, blockdevtest.Size(1<<30)), "state")
	p := prepared(t, dir, Auto, 0)
	if p.Mode != Image || p.Dir != filepath.Join(dir, "pool") || p.Image != filepath.Join(dir, "pool.img") || p.Size != minPoolBytes {
		t.Fatalf("prepared %+v", p)
	}
	image, err := os.Open(p.Image)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	if s, err := sys.StatusOf(image); err != nil || s.Allocated < s.Size {
		t.Errorf("%+v, %v: the image is not fully allocated", s, err)
	}
	if can, err := CanReflink(p.Dir); err != nil || !can {
		t.Errorf("the pool can share bytes: %v, %v", can, err)
	}
	devices, err := loop.Find(image)
	if err != nil || len(devices) != 1 || !devices[0].DirectIO {
		t.Errorf("devices %+v, %v", devices, err)
	}
	again := prepared(t, dir, Auto, 0)
	if now, err := loop.Find(image); err != nil || again != p || len(now) != 1 || now[0] != devices[0] {
		t.Errorf("prepared again: %+v with %+v, %v", again, now, err)
	}
	if n := len(blockdevtest.MountsUnder(t, dir)); n != 1 {
		t.Errorf("%d mounts", n)
	}
}

func TestPreparedPoolSurvives(t *testing.T) {
	needsImages(t)
	dir := blockdevtest.Ext4Dir(t, blockdevtest.Size(1<<30))
	p := prepared(t, dir, Image, 320<<20)
	pool := openPool(t, p.Dir)
	id := blockdevtest.NewID("vol")
	if err := errors.Join(pool.Create(t.Context(), id, 1<<20), pool.Publish(t.Context(), id, []byte("kept"))); err != nil {
		t.Fatal(err)
	}
	uuid := pool.Identity().UUID
	e, err := pool.Open(t.Context(), id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
	if err != nil {
		t.Fatal(err)
	}
	if device, err := loop.Inspect(e.Path); err != nil || !device.DirectIO {
		t.Errorf("a volume's device on a pool image: %+v, %v; want direct I/O", device, err)
	}
	if err := Unprepare(t.Context(), dir); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("unprepare of a pool in use: %v", err)
	}
	if err := pool.Close(t.Context(), id, e.Lease); err != nil {
		t.Fatal(err)
	}
	pool.Shutdown()
	unprepare(t, dir)
	unprepare(t, dir)
	if entries, err := os.ReadDir(p.Dir); err != nil || len(entries) != 0 {
		t.Fatalf("below the mount point: %v, %v", entries, err)
	}
	prepared(t, dir, Auto, 0)
	pool = openPool(t, p.Dir)
	defer pool.Shutdown()
	if info, err := pool.Stat(t.Context(), id); err != nil || string(info.Description) != "kept" || pool.Identity().UUID != uuid {
		t.Errorf("after a remount: %+v, %v, %+v", info, err, pool.Identity())
	}
}

func TestPrepareGrowsItsImage(t *testing.T) {
	needsImages(t)
	dir := blockdevtest.Ext4Dir(t, blockdevtest.Size(2<<30))
	p := prepared(t, dir, Image, 320<<20)
	before, err := sys.SpaceOf(p.Dir)
	if err != nil {
		t.Fatal(err)
	}
	// Growth that a crash cut short after the file: the next call goes on.
	f, err := os.OpenFile(p.Image, os.O_RDWR, 0)
	if err == nil {
		err = sys.Allocate(f, 0, 640<<20)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if p = prepared(t, dir, Image, 640<<20); p.Size != 640<<20 {
			t.Errorf("grown to %d", p.Size)
		}
		if after, err := sys.SpaceOf(p.Dir); err != nil || after.Total-before.Total < 300<<20 {
			t.Errorf("from %+v to %+v, %v", before, after, err)
		}
	}
	if p = prepared(t, dir, Image, 320<<20); p.Size != 640<<20 {
		t.Errorf("shrunk to %d", p.Size)
	}
}

func TestPrepareUsesWhatCanShare(t *testing.T) {
	needsImages(t)
	dir := blockdevtest.ReflinkDir(t)
	p := prepared(t, dir, Auto, 0)
	if p.Mode != Reflink || p.Image != "" || len(blockdevtest.MountsUnder(t, dir)) != 0 {
		t.Errorf("prepared %+v", p)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}
}

func TestPrepareByMode(t *testing.T) {
	needsImages(t)
	dir := blockdevtest.Ext4Dir(t)
	if _, err := Prepare(t.Context(), dir, Reflink, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("reflink on ext4: %v", err)
	}
	if _, err := Prepare(t.Context(), dir, "nonsense", 0); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("nonsense: %v", err)
	}
	if _, err := Prepare(t.Context(), dir, Auto, 0); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("an image that does not fit: %v", err)
	}
	if _, err := Prepare(t.Context(), dir, Image, 299<<20); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("an image too small for XFS: %v", err)
	}
	if entries, err := filepath.Glob(dir + "/pool.img*"); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	p := prepared(t, dir, Copy, 0)
	pool := openPool(t, p.Dir)
	pool.Shutdown()
	for _, mode := range []Mode{Auto, Copy} {
		if again, err := Prepare(t.Context(), dir, mode, 0); err != nil || again != p {
			t.Errorf("%s again: %+v, %v; want %+v", mode, again, err, p)
		}
	}
	if _, err := Prepare(t.Context(), dir, Image, 0); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("an image where a plain pool is: %v", err)
	}
}

func TestPrepareMakesAnewWhatACrashLeft(t *testing.T) {
	needsImages(t)
	dir := blockdevtest.Ext4Dir(t, blockdevtest.Size(1<<30))
	if err := os.WriteFile(filepath.Join(dir, "pool.img.new"), make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	p := prepared(t, dir, Image, 0)
	if can, err := CanReflink(p.Dir); err != nil || !can {
		t.Errorf("the pool can share bytes: %v, %v", can, err)
	}
	// A device that a crash left without its mount.
	if err := sys.Unmount(p.Dir); err != nil {
		t.Fatal(err)
	}
	if again := prepared(t, dir, Auto, 0); again != p || len(blockdevtest.LoopsUnder(t, dir)) != 1 {
		t.Errorf("prepared %+v with devices %v", again, blockdevtest.LoopsUnder(t, dir))
	}
}

func TestPrepareRefusesAForeignMount(t *testing.T) {
	needsImages(t)
	dir := blockdevtest.Ext4Dir(t, blockdevtest.Size(1<<30))
	p := prepared(t, dir, Image, 0)
	moved := filepath.Join(dir, "elsewhere.img")
	if err := os.Rename(p.Image, moved); err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(t.Context(), dir, Image, 0); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("another image is mounted: %v", err)
	}
	if err := os.Rename(moved, p.Image); err != nil {
		t.Fatal(err)
	}
}

func TestPrepareMetadata(t *testing.T) {
	needsImages(t)
	dir := blockdevtest.Ext4Dir(t, blockdevtest.Size(1<<30))
	t.Cleanup(func() { unprepare(t, dir) })
	pool := prepared(t, dir, Copy, 0)
	p, err := PrepareMetadata(t.Context(), dir, pool.Dir)
	if err != nil || p.Mode != Image || p.Dir != filepath.Join(dir, "meta") {
		t.Fatalf("beside a pool: %+v, %v", p, err)
	}
	s, err := sys.StatusAt(p.Image)
	if err != nil || s.Size != 256<<20 || s.Allocated < s.Size {
		t.Errorf("image %+v, %v: not fully allocated", s, err)
	}
	if shared, err := shareSpace(p.Dir, pool.Dir); err != nil || shared {
		t.Errorf("metadata and pool share space: %v, %v", shared, err)
	}
	if err := os.WriteFile(p.Dir+"/record", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	unprepare(t, dir)
	if again, err := PrepareMetadata(t.Context(), dir, pool.Dir); err != nil || again != p {
		t.Fatalf("again: %+v, %v", again, err)
	}
	if _, err := os.Stat(p.Dir + "/record"); err != nil {
		t.Error(err)
	}
}

func TestPrepareMetadataApart(t *testing.T) {
	needsImages(t)
	other, dir := blockdevtest.Ext4Dir(t), filepath.Join(t.TempDir(), "state")
	for range 2 {
		p, err := PrepareMetadata(t.Context(), dir, other)
		if err != nil || p.Mode != Copy || p.Image != "" {
			t.Errorf("apart from the pool: %+v, %v", p, err)
		}
		// Records that are there stay, whatever the pool does.
		if err := os.WriteFile(p.Dir+"/record", []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		other = dir
	}
}
