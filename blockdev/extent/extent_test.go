package extent_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/extent"
	"holdfast/internal/sys"
)

// places are directories on filesystems that differ in how they keep holes and
// whether they can share bytes.
func places(t *testing.T) map[string]string {
	return map[string]string{"temp": t.TempDir(), "ext4": blockdevtest.Ext4Dir(t), "xfs": blockdevtest.ReflinkDir(t)}
}

func create(t *testing.T, dir, name string, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func write(t *testing.T, f *os.File, at int64, data []byte) {
	t.Helper()
	if _, err := f.WriteAt(data, at); err != nil {
		t.Fatal(err)
	}
}

func allocated(t *testing.T, f *os.File) int64 {
	t.Helper()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	s, err := sys.StatusOf(f)
	if err != nil {
		t.Fatal(err)
	}
	return s.Allocated
}

func content(t *testing.T, f *os.File) []byte {
	t.Helper()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// scatter writes blocks of random bytes at random places of f.
func scatter(t *testing.T, f *os.File, size int64, seed uint64) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 1))
	for range 20 {
		data := make([]byte, 1+random.IntN(3*extent.Block))
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		write(t, f, random.Int64N(size-int64(len(data))), data)
	}
	write(t, f, size-1, []byte{1}) // the last byte, in a partial block
}

func TestMap(t *testing.T) {
	blockdevtest.LeakCheck(t)
	for name, dir := range places(t) {
		t.Run(name, func(t *testing.T) {
			f := create(t, dir, "a", 1<<20)
			if got, err := extent.Map(t.Context(), f); err != nil || len(got) != 0 {
				t.Errorf("a file of holes: %v, %v", got, err)
			}
			write(t, f, 128<<10, make([]byte, 8192))
			write(t, f, 1<<20-100, []byte("x"))
			got, err := extent.Map(t.Context(), f)
			want := []extent.Range{{Offset: 128 << 10, Length: 8192}, {Offset: 1<<20 - 4096, Length: 4096}}
			if err != nil || len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
				t.Errorf("map %v, %v; want %v", got, err, want)
			}
		})
	}
}

func TestCopyTakesDataOnly(t *testing.T) {
	blockdevtest.LeakCheck(t)
	const size = 40<<20 + 777
	dirs := places(t)
	for from := range dirs {
		for to := range dirs {
			t.Run(from+" to "+to, func(t *testing.T) {
				src, dst := create(t, dirs[from], "src"+to, size), create(t, dirs[to], "dst"+from, 0)
				scatter(t, src, size, 7)
				copied, err := extent.Copy(t.Context(), dst, src)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(content(t, src), content(t, dst)) {
					t.Error("the copy differs")
				}
				if copied == 0 || copied > 1<<20 || allocated(t, dst) > 2<<20 {
					t.Errorf("copied %d bytes into %d, of some 200 KiB of data", copied, allocated(t, dst))
				}
				if equal, _, err := extent.Equal(t.Context(), src, dst); err != nil || !equal {
					t.Errorf("equal: %v, %v", equal, err)
				}
			})
		}
	}
}

func TestCopyOntoAFullFilesystem(t *testing.T) {
	blockdevtest.LeakCheck(t)
	src := create(t, t.TempDir(), "src", 0)
	write(t, src, 0, bytes.Repeat([]byte("full"), 6<<20))
	dst := create(t, blockdevtest.Ext4Dir(t, blockdevtest.Size(16<<20)), "dst", 0)
	if _, err := extent.Copy(t.Context(), dst, src); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("copy: %v, want ErrNoSpace", err)
	}
}

func TestCopyStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	src, dst := create(t, t.TempDir(), "src", 0), create(t, t.TempDir(), "dst", 0)
	write(t, src, 0, []byte("x"))
	if _, err := extent.Copy(ctx, dst, src); !errors.Is(err, context.Canceled) {
		t.Errorf("copy with a dead context: %v", err)
	}
}

func TestEqualFindsTheFirstDifference(t *testing.T) {
	dir := t.TempDir()
	const size = 10 << 20
	a, b := create(t, dir, "a", size), create(t, dir, "b", size)
	write(t, a, 5<<20, make([]byte, 4096)) // zeroes against a hole are equal
	check := func(wantEqual bool, wantAt int64) {
		t.Helper()
		for _, pair := range [][2]*os.File{{a, b}, {b, a}} {
			equal, at, err := extent.Equal(t.Context(), pair[0], pair[1])
			if err != nil || equal != wantEqual || at != wantAt {
				t.Errorf("equal %v at %d, %v; want %v at %d", equal, at, err, wantEqual, wantAt)
			}
		}
	}
	check(true, 0)
	write(t, b, 8<<20+5, []byte{1})
	check(false, 8<<20+5)
	write(t, a, 3<<20+1, []byte{1})
	check(false, 3<<20+1)
	if err := b.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	check(false, 1<<20)
	write(t, a, 0, []byte{9})
	check(false, 0)
}

func TestTrimFreesZeroes(t *testing.T) {
	blockdevtest.LeakCheck(t)
	for name, dir := range places(t) {
		t.Run(name, func(t *testing.T) {
			const size = 4<<20 + 5000
			f := create(t, dir, "a", size)
			write(t, f, 0, make([]byte, size))
			write(t, f, 1<<20, []byte("data"))
			write(t, f, 3<<20-1, bytes.Repeat([]byte{7}, extent.Block+2))
			write(t, f, size-1, []byte{1})
			before, want := allocated(t, f), content(t, f)
			freed, err := extent.Trim(t.Context(), f)
			if err != nil {
				t.Fatal(err)
			}
			after := allocated(t, f)
			if !bytes.Equal(content(t, f), want) {
				t.Error("trimming changed the content")
			}
			if freed != before-after || after > 64<<10 {
				t.Errorf("freed %d: %d bytes before, %d after, of 5 blocks of data", freed, before, after)
			}
			if freed, err := extent.Trim(t.Context(), f); err != nil || freed != 0 {
				t.Errorf("once more: %d, %v", freed, err)
			}
		})
	}
}
