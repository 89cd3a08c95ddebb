package sparse

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/loop"
)

func openPool(t *testing.T, dir string) *Pool {
	t.Helper()
	p, err := Open(t.Context(), dir, Options{Host: "test", Rate: -1, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// keptPool gives pools on one directory, one after the other as processes would,
// and takes all devices away at the end.
type keptPool struct {
	dir  string
	pool *Pool
}

func keep(t *testing.T, dir string) *keptPool {
	k := &keptPool{dir: dir}
	t.Cleanup(func() {
		k.close()
		detachBelow(t, dir)
	})
	return k
}

func (k *keptPool) close() {
	if k.pool != nil {
		k.pool.Shutdown()
	}
	k.pool = nil
}

func (k *keptPool) open(t *testing.T) *Pool {
	t.Helper()
	k.close()
	k.pool = openPool(t, k.dir)
	return k.pool
}

// detachBelow takes away the devices that a test leaves for a next process.
func detachBelow(t *testing.T, dir string) {
	for _, path := range blockdevtest.LoopsUnder(t, dir) {
		device, err := loop.Inspect(path)
		if err == nil {
			err = device.Detach(context.Background())
		}
		if err != nil {
			t.Error(err)
		}
	}
}

func TestBackend(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.ReflinkPool, blockdevtest.Ext4)
	for _, filesystem := range []struct {
		name   string
		dir    func(t testing.TB, o ...blockdevtest.DirOption) string
		clones bool
		layers bool
	}{{"ext4", blockdevtest.Ext4Dir, false, false}, {"xfs", blockdevtest.ReflinkDir, true, false}, {"layered", blockdevtest.Ext4Dir, true, true}} {
		for name, kinds := range map[string][]blockdev.Kind{
			"block": {blockdev.Block}, "file": {blockdev.File}, "both": {blockdev.Block, blockdev.File},
		} {
			if filesystem.layers && name != "both" {
				continue // which kind it is makes no difference to layers
			}
			t.Run(filesystem.name+" "+name, func(t *testing.T) {
				blockdevtest.LeakCheck(t)
				base := filesystem.dir(t)
				blockdevtest.TestBackend(t, func(t *testing.T) blockdevtest.Place {
					k := keep(t, filepath.Join(base, filepath.Base(t.Name())))
					return blockdevtest.Place{
						Open: func(t *testing.T) blockdev.Backend {
							p := k.open(t)
							p.layers = filesystem.layers
							return p
						},
						Damage: func(t *testing.T, id blockdev.ID) {
							path := filepath.Join(k.dir, imagesDir, string(id), descriptionFile)
							content, err := os.ReadFile(path)
							if err == nil {
								content[len(content)-2] ^= 1
								err = os.WriteFile(path, content, 0o600)
							}
							if err != nil {
								t.Fatal(err)
							}
						},
						Kinds: kinds, Clones: filesystem.clones, Snapshots: filesystem.clones, Layered: filesystem.layers,
					}
				})
			})
		}
	}
}

func TestOneProcessPerPool(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pool")
	p := openPool(t, dir)
	if _, err := Open(t.Context(), dir, Options{}); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("a second use of the pool: %v", err)
	}
	p.Shutdown()
	openPool(t, dir).Shutdown()
}

func TestPoolKnowsItself(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pool")
	p := openPool(t, dir)
	first, id := p.Identity(), blockdevtest.NewID("vol")
	if first.Version != 1 || first.Host != "test" || len(first.UUID) != 36 {
		t.Errorf("identity %+v", first)
	}
	if err := errors.Join(p.Create(t.Context(), id, 512), p.Publish(t.Context(), id, nil)); err != nil {
		t.Fatal(err)
	}
	p.Shutdown()
	p = openPool(t, dir)
	if again := p.Identity(); again != first {
		t.Errorf("reopened as %+v, was %+v", again, first)
	}
	p.Shutdown()

	path := filepath.Join(dir, poolFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string]string{"cut": string(whole[:20]), "empty": "", "of another kind": "{}\n\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), dir, Options{}); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("pool.json is %s: %v", what, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), dir, Options{}); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("images without pool.json: %v; a new pool must not be made over them", err)
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	openPool(t, dir).Shutdown()
}

func TestNobodyElseReadsAPool(t *testing.T) {
	p := keep(t, filepath.Join(t.TempDir(), "pool")).open(t)
	id := blockdevtest.NewID("vol")
	if err := errors.Join(p.Create(t.Context(), id, 512), p.Publish(t.Context(), id, nil), p.Create(t.Context(), blockdevtest.NewID("vol"), 512)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(p.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestStrangersAreQuarantined(t *testing.T) {
	p := keep(t, filepath.Join(t.TempDir(), "pool")).open(t)
	empty := blockdevtest.NewID("vol")
	for _, err := range []error{
		os.WriteFile(p.path(imagesDir, "notes.txt"), []byte("mine"), 0o600),
		os.Mkdir(p.path(draftsDir, "lost+found"), 0o700),
		os.Mkdir(p.image(empty), 0o700),
		os.Symlink("/etc", p.path(imagesDir, string(blockdevtest.NewID("vol")))),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	infos, err := p.List(t.Context())
	if err != nil || len(infos) != 0 {
		t.Errorf("listed %+v, %v", infos, err)
	}
	found, err := p.Quarantined(t.Context())
	if err != nil || len(found) != 4 {
		t.Fatalf("quarantined %+v, %v", found, err)
	}
	for _, q := range found {
		if q.Reason == "" {
			t.Errorf("no reason: %+v", q)
		}
	}
	kept, err := filepath.Glob(p.path(quarantineDir, "notes.txt.*", contentName))
	if err != nil || len(kept) != 1 {
		t.Fatalf("kept %v, %v", kept, err)
	}
	if content, err := os.ReadFile(kept[0]); err != nil || string(content) != "mine" {
		t.Errorf("the stranger's content: %q, %v", content, err)
	}
}

// TestForeignDevice: a device that somebody else made of an image keeps it from
// being opened twice or removed.
func TestForeignDevice(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop)
	blockdevtest.LeakCheck(t)
	p := keep(t, filepath.Join(t.TempDir(), "pool")).open(t)
	ctx, id := t.Context(), blockdevtest.NewID("vol")
	if err := errors.Join(p.Create(ctx, id, 1<<20), p.Publish(ctx, id, nil)); err != nil {
		t.Fatal(err)
	}
	var foreign []loop.Device
	for range 2 {
		f, err := os.OpenFile(filepath.Join(p.image(id), imageFile), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		device, err := loop.Attach(f, false)
		if err != nil {
			t.Fatal(err)
		}
		foreign = append(foreign, device)
	}
	want := blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}}
	if _, err := p.Open(ctx, id, want); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("open beside two foreign devices: %v", err)
	}
	if err := p.Remove(ctx, id); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("remove beside two foreign devices: %v", err)
	}
	if err := foreign[0].Detach(ctx); err != nil {
		t.Fatal(err)
	}
	e, err := p.Open(ctx, id, want) // the one that is left is taken over
	if err != nil || e.Path != foreign[1].Path {
		t.Fatalf("opened %+v, %v; want %s", e, err, foreign[1].Path)
	}
	if err := errors.Join(p.Close(ctx, id, e.Lease), p.Remove(ctx, id)); err != nil {
		t.Error(err)
	}
}

// TestTrashIsEmptiedAtOpen: space of what was removed before a crash comes back.
func TestTrashIsEmptiedAtOpen(t *testing.T) {
	k := keep(t, filepath.Join(t.TempDir(), "pool"))
	p := k.open(t)
	p.Shutdown() // its worker would be faster than we are
	left := p.path(trashDir, "left")
	if err := os.Mkdir(left, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(left, imageFile), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := p.Capacity(t.Context()); err != nil || c.Trash != 1<<20 {
		t.Errorf("capacity %+v, %v", c, err)
	}
	p = k.open(t)
	await(t, "the trash is empty", func() bool {
		c, err := p.Capacity(t.Context())
		return err == nil && c.Trash == 0
	})
}
