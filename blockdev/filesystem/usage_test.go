package filesystem

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// TestUsageReadsWhatTheKernelSays compares what the readers find in the image
// with what statfs said before the unmount. ext4 agrees to the byte, also before
// its first mount.
func TestUsageReadsWhatTheKernelSays(t *testing.T) {
	for _, c := range []struct {
		typ         Type
		size, slack int64 // bytes by which the free space may differ
	}{
		{Ext4, 8 * MiB, 0}, {Ext4, 200 * MiB, 0}, {Ext4, 3000 * MiB, 0}, {XFS, 512 * MiB, 32 * MiB}, {Btrfs, 512 * MiB, 16 * MiB},
	} {
		t.Run(fmt.Sprintf("%s/%d", c.typ, c.size/MiB), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			x, path := NewTools(), blank(t, c.size)
			check(t, x.Make(t.Context(), path, c.typ, MakeOptions{}))
			fresh, err := x.Usage(t.Context(), path, c.typ)
			check(t, err)
			dir, unmount := mounted(t, path, c.typ)
			now, err := x.UsageMounted(t.Context(), dir, c.typ)
			check(t, err)
			near(t, "fresh", fresh, now, c.slack)
			for i := range 100 {
				writeFile(t, filepath.Join(dir, fmt.Sprint(i)), bytes.Repeat([]byte{byte(i)}, 5000))
			}
			check(t, x.SyncMounted(t.Context(), dir, c.typ))
			before, err := x.UsageMounted(t.Context(), dir, c.typ)
			check(t, err)
			if before.Used < now.Used+100*4096 || c.typ != Btrfs && before.UsedInodes != now.UsedInodes+100 {
				t.Errorf("100 files: %+v, before %+v", before, now)
			}
			unmount()
			after, err := x.Usage(t.Context(), path, c.typ)
			check(t, err)
			near(t, "used", after, before, c.slack)
		})
	}
}

func near(t *testing.T, what string, have, want Usage, slack int64) {
	t.Helper()
	off := have.Free - want.Free
	if off < -slack || off > slack || have.Total != want.Total || have.Unclean || have.UsedInodes != want.UsedInodes {
		t.Errorf("%s: read %+v, the kernel says %+v", what, have, want)
	}
	if have.Used+have.Free != have.Total || have.UsedInodes+have.FreeInodes != have.Inodes {
		t.Errorf("%s: %+v does not add up", what, have)
	}
}

func TestUsageOfWhatIsNoFilesystem(t *testing.T) {
	path := blank(t, MiB)
	for _, typ := range []Type{Ext4, XFS, Btrfs} {
		if _, err := NewTools().Usage(t.Context(), path, typ); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", typ, err)
		}
	}
}

// TestTrimGivesSpaceBack writes a file, removes it and trims in ranges: the image
// shrinks to about what it was.
func TestTrimGivesSpaceBack(t *testing.T) {
	for _, typ := range []Type{Ext4, XFS, Btrfs} {
		t.Run(string(typ), func(t *testing.T) {
			blockdevtest.LeakCheck(t)
			x, path := NewTools(), blank(t, 512*MiB)
			check(t, x.Make(t.Context(), path, typ, MakeOptions{}))
			dir, unmount := mounted(t, path, typ)
			defer unmount()
			check(t, x.SyncMounted(t.Context(), dir, typ))
			fresh := occupied(t, path)
			file := filepath.Join(dir, "large")
			writeFile(t, file, bytes.Repeat([]byte("x"), 64*MiB))
			check(t, x.SyncMounted(t.Context(), dir, typ))
			if full := occupied(t, path); full < fresh+60*MiB {
				t.Fatalf("%d bytes after writing 64 MiB to %d", full, fresh)
			}
			check(t, os.Remove(file))
			check(t, x.SyncMounted(t.Context(), dir, typ))
			calls, discarded := 0, int64(0)
			for from := int64(0); ; calls++ {
				r, err := x.TrimMounted(t.Context(), dir, typ, from, 100*MiB)
				check(t, err)
				discarded += r.Discarded
				if r.Done {
					break
				}
				from = r.Next
			}
			if typ != Btrfs && calls != 5 {
				t.Errorf("%d calls before the last", calls)
			}
			if left := occupied(t, path); discarded < 64*MiB || left > fresh+20*MiB {
				t.Errorf("%d bytes discarded, %d occupied; %d at first", discarded, left, fresh)
			}
		})
	}
}

func occupied(t *testing.T, path string) int64 {
	t.Helper()
	var blocks int64
	_, err := fmt.Sscan(string(command(t, "stat", "-c", "%b", path)), &blocks)
	check(t, err)
	return blocks * 512
}
