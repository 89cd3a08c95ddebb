package filesystem

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// blank makes a sparse file of size bytes.
func blank(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExt4GrowsFromOneMiB(t *testing.T) {
	x := NewTools()
	for _, to := range []int64{2 * MiB, 15 * MiB, 16 * MiB, 17*MiB + 4096, 1 << 30, 1 << 40} {
		path := blank(t, MiB)
		if err := x.Make(t.Context(), path, Ext4, MakeOptions{}); err != nil {
			t.Fatal(err)
		}
		growTo(t, x, path, to)
		s, err := readExt4Super(path)
		if err != nil {
			t.Fatal(err)
		}
		if have := s.hasJournal(); have != (to >= ext4JournalFrom) {
			t.Errorf("grown to %d bytes: journal is %v", to, have)
		}
		if to/s.inodes > 64<<10 {
			t.Errorf("grown to %d bytes: an inode for each %d bytes", to, to/s.inodes)
		}
	}
}

func growTo(t *testing.T, x Tools, path string, to int64) {
	t.Helper()
	if err := os.Truncate(path, to); err != nil {
		t.Fatal(err)
	}
	if err := x.Grow(t.Context(), path, Ext4); err != nil {
		t.Fatal(err)
	}
	size, err := x.Size(t.Context(), path, Ext4)
	if err != nil {
		t.Fatal(err)
	}
	if to-size > MiB {
		t.Errorf("grown to %d bytes, device has %d", size, to)
	}
	if err := x.Check(t.Context(), path, Ext4, false); err != nil {
		t.Error(err)
	}
}

func TestExt4IdentifyIsClean(t *testing.T) {
	x := NewTools()
	path := blank(t, 512*MiB)
	if err := x.Make(t.Context(), path, Ext4, MakeOptions{}); err != nil {
		t.Fatal(err)
	}
	const uuid = "01234567-89ab-4cde-8f01-23456789abcd"
	if err := x.Identify(t.Context(), path, Ext4, uuid); err != nil {
		t.Fatal(err)
	}
	s, err := readExt4Super(path)
	if err != nil {
		t.Fatal(err)
	}
	if have := UUID(s.raw[0x68:0x78]).String(); have != uuid {
		t.Errorf("UUID %s", have)
	}
	if err := x.Check(t.Context(), path, Ext4, false); err != nil {
		t.Error(err)
	}
}

func TestTooSmallNamesTheMinimum(t *testing.T) {
	x := NewTools()
	for _, typ := range []Type{Ext4, XFS, Btrfs} {
		err := x.Make(t.Context(), blank(t, typ.Minimum()-MiB), typ, MakeOptions{})
		if !errors.Is(err, ErrTooSmall) {
			t.Errorf("%s: %v", typ, err)
		}
		path := blank(t, typ.Minimum())
		if err := x.Make(t.Context(), path, typ, MakeOptions{}); err != nil {
			t.Error(err)
		}
		if size, err := x.Size(t.Context(), path, typ); err != nil || size != typ.Minimum() {
			t.Errorf("%s: size %d, %v", typ, size, err)
		}
		if err := x.Check(t.Context(), path, typ, false); err != nil {
			t.Error(err)
		}
	}
}
