package filesystem

import (
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
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
	for _, to := range []int64{2 * MiB, 15 * MiB, 16 * MiB, 17*MiB + 4096, 1 << 30, 100 << 30} {
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

// TestExt4GrowsAThousandfold also shows that the journal grows with the volume.
func TestExt4GrowsAThousandfold(t *testing.T) {
	x := NewTools()
	path := blank(t, 512*MiB)
	check(t, x.Make(t.Context(), path, Ext4, MakeOptions{}))
	for _, to := range []int64{513 * MiB, 1 << 30, 3 << 30, 1 << 40} {
		growTo(t, x, path, to)
		s, err := readExt4Super(path)
		check(t, err)
		if want := ext4JournalFor(to); s.journalSize*4 <= want {
			t.Errorf("grown to %d bytes: journal of %d, want %d", to, s.journalSize, want)
		}
	}
}

// TestExt4GrownStaysSparse grows and looks whether a kernel that knows nothing of
// us would find inode tables to zero.
func TestExt4GrownStaysSparse(t *testing.T) {
	x := NewTools()
	for _, from := range []int64{MiB, 512 * MiB} {
		path := blank(t, from)
		check(t, x.Make(t.Context(), path, Ext4, MakeOptions{}))
		growTo(t, x, path, 20<<30)
		out := string(command(t, "dumpe2fs", path))
		if groups, zeroed := strings.Count(out, ": (Blocks "), strings.Count(out, "ITABLE_ZEROED"); groups < 100 || zeroed != groups {
			t.Errorf("grown from %d MiB: %d of %d groups have zeroed inode tables", from/MiB, zeroed, groups)
		}
	}
}

func TestExt4CannotGrowATinyOnePast1TiB(t *testing.T) {
	x := NewTools()
	path := blank(t, MiB)
	check(t, x.Make(t.Context(), path, Ext4, MakeOptions{}))
	check(t, os.Truncate(path, 3<<40))
	if err := x.Grow(t.Context(), path, Ext4); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	check(t, os.Truncate(path, 2*MiB))
	check(t, x.Grow(t.Context(), path, Ext4))
}

// TestExt4OffersItsBytes is the promise about small volumes: of 512 MiB at least
// 95 % are for files, with an inode for each 64 KiB, also after growing to it.
func TestExt4OffersItsBytes(t *testing.T) {
	blockdevtest.LeakCheck(t)
	x := NewTools()
	for _, c := range []struct{ made, grown int64 }{{512 * MiB, 512 * MiB}, {1 << 30, 1 << 30}, {4 << 30, 4 << 30}, {100 << 30, 100 << 30}, {256 * MiB, 512 * MiB}, {16 * MiB, 512 * MiB}, {MiB, 512 * MiB}} {
		path := blank(t, c.made)
		check(t, x.Make(t.Context(), path, Ext4, MakeOptions{}))
		check(t, os.Truncate(path, c.grown))
		check(t, x.Grow(t.Context(), path, Ext4))
		dir, unmount := mounted(t, path, Ext4, MountOptions(Ext4)...)
		var st syscall.Statfs_t
		check(t, syscall.Statfs(dir, &st))
		offered := int64(st.Bavail) * st.Frsize
		t.Logf("%d MiB made as %d: offers %.2f %%, an inode for each %d bytes", c.grown/MiB, c.made/MiB, 100*float64(offered)/float64(c.grown), c.grown/int64(st.Files))
		if offered*100 < c.grown*95 {
			t.Errorf("%d MiB made as %d: offers %.2f %%", c.grown/MiB, c.made/MiB, 100*float64(offered)/float64(c.grown))
		}
		if int64(st.Ffree) < c.grown/(64<<10)-16 {
			t.Errorf("%d MiB made as %d: %d inodes", c.grown/MiB, c.made/MiB, st.Ffree)
		}
		if c.made == 512*MiB {
			fill(t, filepath.Join(dir, "all"), c.grown*95/100)
		}
		unmount()
		check(t, x.Check(t.Context(), path, Ext4, false))
	}
}

// fill writes a file of size bytes that occupies as many.
func fill(t *testing.T, name string, size int64) {
	t.Helper()
	f, err := os.Create(name)
	check(t, err)
	check(t, syscall.Fallocate(int(f.Fd()), 0, 0, size))
	check(t, f.Close())
}

// TestMakeIsDeterministic makes the same bytes from the same options.
func TestMakeIsDeterministic(t *testing.T) {
	x := NewTools()
	o := MakeOptions{UUID: "01234567-89ab-4cde-8f01-23456789abcd", Time: time.Unix(1700000000, 0), Inodes: 5000, Label: "demo"}
	var sums [2][32]byte
	for i := range sums {
		path := blank(t, 64*MiB)
		check(t, x.Make(t.Context(), path, Ext4, o))
		data, err := os.ReadFile(path)
		check(t, err)
		sums[i] = sha256.Sum256(data)
		s, err := readExt4Super(path)
		check(t, err)
		if s.freeInodes < o.Inodes {
			t.Errorf("%d inodes for files, want %d", s.freeInodes, o.Inodes)
		}
	}
	if sums[0] != sums[1] {
		t.Error("two images differ")
	}
}

func TestMakeRefusesBadOptions(t *testing.T) {
	x := NewTools()
	path := blank(t, 64*MiB)
	for _, o := range []MakeOptions{
		{UUID: "x"}, {UUID: "00000000-0000-0000-0000-000000000000"}, {UUID: "0123456789ab-4cde-8f01-23456789abcd--"},
		{Label: "-L"}, {Label: "with space"}, {Label: "longer than 12 b"}, {Inodes: -1}, {Inodes: 1 << 20},
	} {
		if err := x.Make(t.Context(), path, Ext4, o); err == nil {
			t.Errorf("made with %+v", o)
		}
	}
}

// TestRefusesWhatIsNoFilesystem gives every function bytes that are none.
func TestRefusesWhatIsNoFilesystem(t *testing.T) {
	x := NewTools()
	for _, typ := range []Type{Ext4, XFS, Btrfs} {
		for _, size := range []int64{0, 100, 512 * MiB} {
			path := blank(t, size)
			_, sizeErr := x.Size(t.Context(), path, typ)
			_, dirtyErr := x.Dirty(t.Context(), path, typ)
			for name, err := range map[string]error{
				"size": sizeErr, "dirty": dirtyErr,
				"identify": x.Identify(t.Context(), path, typ, "01234567-89ab-4cde-8f01-23456789abcd"),
				"check":    x.Check(t.Context(), path, typ, false),
				"grow":     x.Grow(t.Context(), path, typ),
			} {
				if !errors.Is(err, ErrDamaged) {
					t.Errorf("%s of %d empty bytes as %s: %v", name, size, typ, err)
				}
			}
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
