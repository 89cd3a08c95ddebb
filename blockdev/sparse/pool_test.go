package sparse

import (
	"context"
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
	p, err := Open(t.Context(), dir, Options{Host: "test", Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
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
		if k.pool != nil {
			k.pool.Shutdown()
		}
		detachBelow(t, dir)
	})
	return k
}

func (k *keptPool) open(t *testing.T) *Pool {
	t.Helper()
	if k.pool != nil {
		k.pool.Shutdown()
	}
	k.pool = nil
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
	}{{"ext4", blockdevtest.Ext4Dir, false}, {"xfs", blockdevtest.ReflinkDir, true}} {
		for name, kinds := range map[string][]blockdev.Kind{
			"block": {blockdev.Block}, "file": {blockdev.File}, "both": {blockdev.Block, blockdev.File},
		} {
			t.Run(filesystem.name+" "+name, func(t *testing.T) {
				blockdevtest.LeakCheck(t)
				base := filesystem.dir(t)
				blockdevtest.TestBackend(t, func(t *testing.T) blockdevtest.Place {
					k := keep(t, filepath.Join(base, filepath.Base(t.Name())))
					return blockdevtest.Place{
						Open: func(t *testing.T) blockdev.Backend { return k.open(t) },
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
						Kinds: kinds, Clones: filesystem.clones,
					}
				})
			})
		}
	}
}
