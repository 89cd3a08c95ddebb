package filesystem

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
)

// loopOf tells the loop device that is mounted at dir.
func loopOf(t *testing.T, dir string) string {
	t.Helper()
	return strings.TrimSpace(string(command(t, "findmnt", "-n", "-o", "SOURCE", dir)))
}

func TestGrowMounted(t *testing.T) {
	for _, typ := range []Type{XFS, Btrfs} {
		t.Run(string(typ), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			x := NewTools()
			check(t, x.CanGrowMounted(typ))
			path := blank(t, 512*MiB)
			check(t, x.Make(t.Context(), path, typ, MakeOptions{}))
			dir, unmount := mounted(t, path, typ)
			writeFile(t, filepath.Join(dir, "file"), []byte("kept"))
			check(t, x.GrowMounted(t.Context(), dir, typ)) // nothing to do
			for _, to := range []int64{512*MiB + MiB, 10 << 30} {
				check(t, os.Truncate(path, to))
				command(t, "losetup", "-c", loopOf(t, dir))
				check(t, x.GrowMounted(t.Context(), dir, typ))
				check(t, x.GrowMounted(t.Context(), dir, typ))
			}
			size, err := x.SizeMounted(t.Context(), dir, typ)
			check(t, err)
			if size < 10<<30-growthUnit || size > 10<<30 {
				t.Errorf("grown to %d bytes", size)
			}
			unmount()
			if offline, err := x.Size(t.Context(), path, typ); err != nil || offline != size {
				t.Errorf("size %d mounted, %d after (%v)", size, offline, err)
			}
			check(t, x.Check(t.Context(), path, typ, false))
			check(t, x.Grow(t.Context(), path, typ)) // nothing to do
			check(t, os.Truncate(path, 11<<30))
			dir, unmount = mounted(t, path, typ, "ro")
			if err := x.GrowMounted(t.Context(), dir, typ); !errors.Is(err, ErrReadOnly) {
				t.Errorf("grow while mounted read-only: %v", err)
			}
			unmount()
			if err := x.Grow(t.Context(), path, typ); !errors.Is(err, ErrNeedsMount) {
				t.Errorf("grow without a mount: %v", err)
			}
		})
	}
}

// TestGrowMountedExt4 holds the answer against the capability: the kernel must
// refuse without it and grow with it.
func TestGrowMountedExt4(t *testing.T) {
	blockdevtest.LeakCheck(t)
	x := NewTools()
	path := blank(t, 64*MiB)
	check(t, x.Make(t.Context(), path, Ext4, MakeOptions{}))
	dir, unmount := mounted(t, path, Ext4, MountOptions(Ext4)...)
	check(t, x.GrowMounted(t.Context(), dir, Ext4)) // nothing to do
	check(t, os.Truncate(path, 1<<30))
	command(t, "losetup", "-c", loopOf(t, dir))
	want := int64(1 << 30)
	err := x.GrowMounted(t.Context(), dir, Ext4)
	if cannot := x.CanGrowMounted(Ext4); cannot != nil {
		want = 64 * MiB
		if !errors.Is(err, ErrCannotGrowMounted) || !strings.Contains(err.Error(), "CAP_SYS_RESOURCE") {
			t.Errorf("grown without the capability: %v", err)
		}
	} else {
		check(t, err)
	}
	if size, err := x.SizeMounted(t.Context(), dir, Ext4); err != nil || size != want {
		t.Errorf("size %d, want %d (%v)", size, want, err)
	}
	unmount()
	check(t, x.Grow(t.Context(), path, Ext4))
	if size, err := x.Size(t.Context(), path, Ext4); err != nil || size != 1<<30 {
		t.Errorf("size %d offline (%v)", size, err)
	}
}

func TestMountedRefusesAnotherType(t *testing.T) {
	x := NewTools()
	dir := t.TempDir()
	if _, err := x.SizeMounted(t.Context(), dir, XFS); err == nil {
		t.Error("a directory that is no XFS has a size")
	}
	if err := x.GrowMounted(t.Context(), dir, Btrfs); err == nil {
		t.Error("a directory that is no btrfs grew")
	}
}

// TestGrowAfterKill kills resize2fs at many moments; the next Grow must finish
// and every file be as it was.
func TestGrowAfterKill(t *testing.T) {
	blockdevtest.LeakCheck(t)
	x := NewTools()
	// Without room in the descriptors most of the work is moving blocks.
	original := blank(t, 8*MiB)
	check(t, x.Make(t.Context(), original, Ext4, MakeOptions{}))
	dir, unmount := mounted(t, original, Ext4)
	content := bytes.Repeat([]byte("holdfast"), 100<<10/8)
	for i := range 50 {
		writeFile(t, filepath.Join(dir, strconv.Itoa(i)), content)
	}
	unmount()
	const to = 20 << 30
	cut := 0
	for i := range 12 {
		path := copyImage(t, original)
		check(t, os.Truncate(path, to))
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i*i+1)*time.Millisecond)
		if err := x.Grow(ctx, path, Ext4); err != nil {
			cut++
		}
		cancel()
		check(t, x.Grow(t.Context(), path, Ext4))
		s, err := readExt4Super(path)
		check(t, err)
		if s.size() != to || !s.hasJournal() || !s.clean() {
			t.Errorf("cut %d: %d bytes, journal %v, state %#x", i, s.size(), s.hasJournal(), s.state)
		}
		check(t, x.Check(t.Context(), path, Ext4, false))
		var got bytes.Buffer
		check(t, x.ReadFile(t.Context(), path, Ext4, "49", &got))
		if !bytes.Equal(got.Bytes(), content) {
			t.Errorf("cut %d: file changed", i)
		}
	}
	if cut == 0 {
		t.Error("no growth was cut off")
	}
}

func TestGrowFindsNothingToDo(t *testing.T) {
	x := NewTools()
	path := blank(t, 512*MiB)
	check(t, x.Make(t.Context(), path, Ext4, MakeOptions{}))
	before, err := os.Stat(path)
	check(t, err)
	check(t, x.Grow(t.Context(), path, Ext4))
	after, err := os.Stat(path)
	check(t, err)
	if before.Sys().(*syscall.Stat_t).Ctim != after.Sys().(*syscall.Stat_t).Ctim {
		t.Error("Grow wrote although there was nothing to do")
	}
}
