package overlay_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// TestFullFilesystem: who writes to a full filesystem is told at the write. What was
// acknowledged can be flushed, also where its bits are in parts of the map that nothing
// was in before.
func TestFullFilesystem(t *testing.T) {
	for name, flag := range map[string]int{"direct": syscall.O_DIRECT, "cached": 0} {
		t.Run(name, func(t *testing.T) {
			dir := blockdevtest.Ext4Dir(t)
			const size, apart = 64 << 30, 128 << 20 // each write in another page of the map
			var made [2]*os.File
			for i, kind := range []string{"data", "map"} {
				f, err := os.OpenFile(filepath.Join(dir, kind), os.O_RDWR|os.O_CREATE|flag*(1-i), 0o600)
				must(t, err)
				defer f.Close()
				made[i] = f
			}
			stack := []overlay.Files{{Data: overlay.OSFile{File: made[0]}, Map: overlay.OSFile{File: made[1]}}}
			must(t, overlay.Create(stack[0], size))
			v, err := overlay.Open(stack, nil)
			must(t, err)
			leave(t, dir, 1<<20)
			p := directBuffer(block)
			p[0] = 1
			written, full := int64(0), false
			for ; !full && written*apart < size; written++ {
				_, err := v.WriteAt(p, written*apart)
				if full = errors.Is(err, blockdev.ErrNoSpace); full {
					break
				}
				must(t, err)
				if written%8 == 7 {
					must(t, v.Sync())
				}
			}
			if !full || written < 16 {
				t.Fatalf("the filesystem took %d writes, full: %v", written, full)
			}
			must(t, v.Sync())
			must(t, v.Close())
			v, err = overlay.Open(stack, nil)
			must(t, err)
			for n := range written {
				_, err := v.ReadAt(p, n*apart)
				must(t, err)
				if p[0] != 1 {
					t.Errorf("write %d of %d is not there", n, written)
				}
			}
		})
	}
}

// leave fills a filesystem up to so many bytes.
func leave(t *testing.T, dir string, free int64) {
	t.Helper()
	space, err := sys.SpaceOf(dir)
	must(t, err)
	f, err := os.Create(filepath.Join(dir, "filler"))
	must(t, err)
	must(t, errors.Join(sys.Allocate(f, 0, space.Free-free), f.Sync(), f.Close()))
}
