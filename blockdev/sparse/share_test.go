package sparse

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/control"
)

// occupied tells how many bytes of a filesystem are in use.
func occupied(t *testing.T, dir string) int64 {
	t.Helper()
	fd, err := syscall.Open(dir, syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	var s unix.Statfs_t
	if err := errors.Join(unix.Syncfs(fd), unix.Fstatfs(fd, &s)); err != nil {
		t.Fatal(err)
	}
	return int64(s.Blocks-s.Bfree) * s.Bsize //nolint:gosec // far below
}

func bytesOf(t *testing.T, p *Pool, id blockdev.ID) []byte {
	t.Helper()
	b, err := p.Access(t.Context(), id, true)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, b.Size())
	_, err = b.ReadAt(got, 0)
	if err = errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
	return got
}

// layeredOver makes a source of 32 MiB with holes, and a volume of two layers over it.
func layeredOver(t *testing.T, p *Pool) (vol, snap blockdev.ID) {
	t.Helper()
	ctx, r := t.Context(), rand.New(rand.NewPCG(5, 5))
	src, vol, snap := blockdevtest.NewID(blockdev.PrefixSource), blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixSnapshot)
	put := func(id blockdev.ID, n int, offs ...int64) error {
		b, err := p.Access(ctx, id, false)
		if err != nil {
			return err
		}
		for _, off := range offs {
			text := make([]byte, n)
			for i := range text {
				text[i] = byte(r.Uint32())
			}
			_, failed := b.WriteAt(text, off)
			err = errors.Join(err, failed)
		}
		return errors.Join(err, b.Sync(), b.Close())
	}
	const size = 32 << 20
	err := errors.Join(p.Create(ctx, src, size-512), put(src, 10<<20, 0, 20<<20), put(src, 512, size-1024), p.Publish(ctx, src, nil),
		p.Clone(ctx, vol, src, size), p.Publish(ctx, vol, nil), put(vol, 8<<20, 4096, 18<<20))
	if err == nil {
		_, err = p.Snapshot(ctx, snap, vol)
	}
	if err = errors.Join(err, p.Publish(ctx, snap, nil), put(vol, 4096, 0, 1<<20, 19<<20, size-4096)); err != nil {
		t.Fatal(err)
	}
	if info, err := p.Stat(ctx, vol); err != nil || info.Layers != 2 {
		t.Fatalf("%+v, %v", info, err)
	}
	return vol, snap
}

// TestFlatByReflink: where files can share bytes a layered volume becomes flat without
// a copy and without space, closed as well as at a worker.
func TestFlatByReflink(t *testing.T) {
	blockdevtest.LeakCheck(t)
	workers := workersFor(t)
	for name, dir := range map[string]string{"xfs": blockdevtest.ReflinkDir(t), "btrfs": blockdevtest.BtrfsDir(t)} {
		for how, flatten := range map[string]func(t *testing.T, p *Pool, vol blockdev.ID) error{
			"closed": func(t *testing.T, p *Pool, vol blockdev.ID) error { return p.Flatten(t.Context(), vol) },
			"served": flattenServed,
		} {
			t.Run(name+"/"+how, func(t *testing.T) {
				k := keep(t, filepath.Join(dir, how))
				p, err := Open(t.Context(), k.dir, Options{Workers: workers, Rate: -1})
				if err != nil {
					t.Fatal(err)
				}
				p.reflinks = false // else the clones would be flat
				k.pool = p
				vol, snap := layeredOver(t, p)
				want, wantSnap := bytesOf(t, p, vol), bytesOf(t, p, snap)
				before := occupied(t, dir)
				if err := flatten(t, p, vol); err != nil {
					t.Fatal(err)
				}
				if grown := occupied(t, dir) - before; grown > 2<<20 {
					t.Errorf("it took %d bytes", grown)
				}
				if info, err := p.Stat(t.Context(), vol); err != nil || info.Layers != 0 || info.Shared < 16<<20 {
					t.Errorf("%+v, %v", info, err)
				}
				if !bytes.Equal(bytesOf(t, p, vol), want) || !bytes.Equal(bytesOf(t, p, snap), wantSnap) {
					t.Error("the bytes have changed")
				}
			})
		}
	}
}

// flattenServed has a worker do it.
func flattenServed(t *testing.T, p *Pool, vol blockdev.ID) error {
	ctx := t.Context()
	e, err := p.Open(ctx, vol, blockdev.Want{Kinds: []blockdev.Kind{blockdev.NBD}})
	if err != nil {
		return err
	}
	w, err := p.worker(ctx, vol)
	if err == nil {
		_, err = w.Merge(ctx, control.Merge{}, func() error {
			c, err := readChain(vol, p.image(vol))
			return errors.Join(err, p.dropLayer(vol, p.image(vol), c, 1))
		})
	}
	if err != nil {
		return err
	}
	await(t, "all is in the top", func() bool {
		s, err := p.Observe(context.WithoutCancel(ctx), vol)
		return err == nil && s.Layers.Held == s.Layers.Size
	})
	if s, err := p.Observe(ctx, vol); err != nil || s.Layers.Copied > 1<<20 {
		t.Errorf("%d bytes were copied, %v", s.Layers.Copied, err)
	}
	return p.Close(ctx, vol, e.Lease)
}
