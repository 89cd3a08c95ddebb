package extent_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/blockdev/loop"
)

// deviceOf opens a loop device upon f.
func deviceOf(t *testing.T, f *os.File) *os.File {
	t.Helper()
	d, err := loop.Attach(f, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Detach(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	dev, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}

// holed makes a file of size bytes with data at its beginning, in every other block
// for a while, in its middle across two pieces of a copy, and at its end.
func holed(t *testing.T, dir, name string, size int64) *os.File {
	f := create(t, dir, name, size)
	write(t, f, 0, []byte("first"))
	for at := int64(2 << 20); at < 2<<20+8*extent.Block; at += 2 * extent.Block {
		write(t, f, at, []byte("alternate"))
	}
	write(t, f, 4<<20-5000, bytes.Repeat([]byte("middle"), 2000))
	write(t, f, size-4, []byte("last"))
	return f
}

func TestCopyDevices(t *testing.T) {
	const size = 9<<20 + 4096
	for name, run := range map[string]func(t *testing.T) (src, dst, image *os.File){
		"to a device": func(t *testing.T) (src, dst, image *os.File) {
			dir := t.TempDir()
			image = create(t, dir, "dst", size+4096) // devices may be larger, by their own grid
			return holed(t, dir, "src", size), deviceOf(t, image), image
		},
		"from a device": func(t *testing.T) (src, dst, image *os.File) {
			dir := t.TempDir()
			image = create(t, dir, "dst", 0)
			return deviceOf(t, holed(t, dir, "src", size)), image, image
		},
		"between devices": func(t *testing.T) (src, dst, image *os.File) {
			dir := t.TempDir()
			image = create(t, dir, "dst", size)
			return deviceOf(t, holed(t, dir, "src", size)), deviceOf(t, image), image
		},
	} {
		t.Run(name, func(t *testing.T) {
			src, dst, image := run(t)
			copied, err := extent.Copy(t.Context(), dst, src)
			if err != nil {
				t.Fatal(err)
			}
			if copied < 3*extent.Block || copied > 32*extent.Block {
				t.Errorf("%d bytes were copied: the data is 10 blocks or so", copied)
			}
			if err := dst.Sync(); err != nil {
				t.Fatal(err)
			}
			if held := allocated(t, image); held > 64*extent.Block {
				t.Errorf("the copy occupies %d bytes: holes were written", held)
			}
			want, got := content(t, src), content(t, dst)
			if !bytes.Equal(want, got[:len(want)]) || len(bytes.Trim(got[len(want):], "\x00")) > 0 {
				t.Error("the copy differs")
			}
			equal, at, err := extent.Equal(t.Context(), src, dst)
			if same := len(want) == len(got); err != nil || equal != same || !same && at != size {
				t.Errorf("Equal: %t at %d, %v", equal, at, err)
			}
			write(t, dst, 5<<20, []byte("other"))
			if equal, at, err := extent.Equal(t.Context(), src, dst); err != nil || equal || at != 5<<20 {
				t.Errorf("Equal after a change at %d: %t at %d, %v", 5<<20, equal, at, err)
			}
		})
	}
}

func TestCopyToSmallerDevice(t *testing.T) {
	dir := t.TempDir()
	src, dst := holed(t, dir, "src", 2<<20), deviceOf(t, create(t, dir, "dst", 1<<20))
	if _, err := extent.Copy(t.Context(), dst, src); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("Copy: %v, want ErrNoSpace", err)
	}
}

// TestCopyPart copies in pieces, each of them twice, as after a crash.
func TestCopyPart(t *testing.T) {
	const size, piece = 9<<20 + 4096, 8192
	dir := t.TempDir()
	image := create(t, dir, "dst", size)
	for name, pair := range map[string][2]*os.File{
		"file to file":     {holed(t, dir, "a", size), create(t, dir, "b", 0)},
		"file to device":   {holed(t, dir, "c", size), deviceOf(t, image)},
		"device to device": {deviceOf(t, holed(t, dir, "d", size)), deviceOf(t, create(t, dir, "e", size))},
	} {
		src, dst := pair[0], pair[1]
		var pieces int
		for at := int64(0); at < size; pieces++ {
			next, copied, err := extent.CopyPart(t.Context(), dst.Name(), src.Name(), at, piece)
			if err != nil || next <= at || copied > piece {
				t.Fatalf("%s: at %d: next %d, copied %d, %v", name, at, next, copied, err)
			}
			again, _, err := extent.CopyPart(t.Context(), dst.Name(), src.Name(), at, piece)
			if err != nil || again != next {
				t.Fatalf("%s: at %d, again: next %d instead of %d, %v", name, at, again, next, err)
			}
			at = next
		}
		if pieces < 3 {
			t.Errorf("%s: in %d pieces", name, pieces)
		}
		if equal, at, err := extent.Equal(t.Context(), src, dst); !equal {
			t.Errorf("%s: differs at %d, %v", name, at, err)
		}
	}
	if next, copied, err := extent.CopyPart(t.Context(), filepath.Join(dir, "b"), filepath.Join(dir, "a"), size, piece); next != size || copied != 0 || err != nil {
		t.Errorf("at the end: next %d, copied %d, %v", next, copied, err)
	}
}
