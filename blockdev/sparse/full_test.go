package sparse

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/envelope"
	"holdfast/internal/run"
)

// fill writes to a file until its filesystem has no byte left.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := int64(0)
	for size := 1 << 20; size >= 512; size /= 2 {
		for err = nil; err == nil; at += int64(size) {
			_, err = f.WriteAt(make([]byte, size), at)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		at -= int64(size)
		at -= at % 512
		_ = f.Sync() // what was only reserved is allocated; a full pool may well refuse
	}
}

// await polls until done says so.
func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

func TestFullPool(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.ReflinkPool, blockdevtest.Ext4)
	for name, dir := range map[string]func() string{
		"ext4": func() string { return blockdevtest.Ext4Dir(t, blockdevtest.Size(32<<20)) },
		"xfs":  func() string { return blockdevtest.ReflinkDir(t, blockdevtest.Size(300<<20)) },
	} {
		t.Run(name, func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			p := keep(t, filepath.Join(dir(), "pool")).open(t)
			ctx := t.Context()
			full, small := blockdevtest.NewID("vol"), blockdevtest.NewID("vol")
			for _, id := range []blockdev.ID{full, small} {
				if err := errors.Join(p.Create(ctx, id, 1<<30), p.Publish(ctx, id, []byte("before"))); err != nil {
					t.Fatal(err)
				}
			}
			fill(t, filepath.Join(p.image(full), imageFile))
			draft := blockdevtest.NewID("vol")
			err := p.Create(ctx, draft, 1<<20)
			for i := 0; err == nil && i < 10_000; i++ { // names need little room
				if err = p.Publish(ctx, draft, make([]byte, 1<<18)); err == nil {
					draft = blockdevtest.NewID("vol")
					err = p.Create(ctx, draft, 1<<20)
				}
			}
			if !errors.Is(err, blockdev.ErrNoSpace) || errors.Is(err, blockdev.ErrFailed) {
				t.Errorf("create in a full pool: %v, want ErrNoSpace", err)
			}
			if err := p.Describe(ctx, small, make([]byte, envelope.MaxPayload)); !errors.Is(err, blockdev.ErrNoSpace) {
				t.Errorf("describe in a full pool: %v", err)
			}
			if info, err := p.Stat(ctx, small); err != nil || string(info.Description) != "before" {
				t.Errorf("after a refused Describe: %+v, %v", info, err)
			}
			if err := p.Remove(ctx, draft); err != nil {
				t.Errorf("remove of a draft in a full pool: %v", err)
			}
			if err := p.Remove(ctx, full); err != nil {
				t.Errorf("remove in a full pool: %v", err)
			}
			await(t, "space is reclaimed", func() bool {
				c, err := p.Capacity(ctx)
				return err == nil && c.Trash == 0 && c.Free > 8<<20
			})
			if err := errors.Join(p.Create(ctx, full, 1<<20), p.Publish(ctx, full, nil), p.Describe(ctx, small, []byte("after"))); err != nil {
				t.Errorf("after the removal: %v", err)
			}
		})
	}
}

// TestFailedFlush has a disk that takes no more writes: a pool in an image that
// is sparse, on a filesystem that is full.
func TestFailedFlush(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	blockdevtest.LeakCheck(t)
	outer := blockdevtest.Ext4Dir(t, blockdevtest.Size(64<<20))
	image, dir := filepath.Join(outer, "disk"), filepath.Join(outer, "mounted")
	for _, err := range []error{os.WriteFile(image, nil, 0o600), os.Truncate(image, 128<<20)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := run.Run(t.Context(), run.Cmd{Args: []string{"mkfs.ext4", "-q", "-F", "-O", "^has_journal", image}}); err != nil {
		t.Fatal(err)
	}
	if err := MountImage(t.Context(), image, dir, "ext4"); err != nil {
		t.Fatal(err)
	}
	k := keep(t, filepath.Join(dir, "pool"))
	t.Cleanup(func() {
		k.pool.Shutdown()
		_ = os.Remove(filepath.Join(outer, "filler"))
		if err := UnmountImage(context.Background(), image, dir); err != nil && !errors.Is(err, blockdev.ErrFailed) {
			t.Error(err)
		}
		detachBelow(t, outer)
	})
	p, id := k.open(t), blockdevtest.NewID("vol")
	if err := p.Create(t.Context(), id, 16<<20); err != nil {
		t.Fatal(err)
	}
	fill(t, filepath.Join(outer, "filler"))
	if err := os.WriteFile(filepath.Join(p.draft(id), imageFile), make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	err := p.Publish(t.Context(), id, nil)
	if !errors.Is(err, blockdev.ErrFailed) || errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("publish to a disk that fails: %v, want ErrFailed", err)
	}
	// A second flush could succeed although the bytes are lost: there must be none.
	if err := p.Publish(t.Context(), id, nil); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("publish again: %v, want that the draft is gone", err)
	}
}
