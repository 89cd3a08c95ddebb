package extent_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev/extent"
)

func digestOf(t *testing.T, size int64, write map[int64][]byte) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for at, b := range write {
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	whole, err := extent.Digest(t.Context(), f, size)
	if err != nil {
		t.Fatal(err)
	}
	for _, most := range []int64{1, extent.Piece, 3 * extent.Piece} {
		d := extent.NewDigester(size)
		var read int64
		for done := false; !done; {
			var n int64
			if n, done, err = d.Next(t.Context(), f, most); err != nil {
				t.Fatal(err)
			}
			read += n
		}
		if d.Sum() != whole {
			t.Errorf("in parts of %d: %s, whole %s", most, d.Sum(), whole)
		}
		if most := int64(len(write)+1) * 2 * extent.Piece; read > most {
			t.Errorf("%d bytes were read of a file with %d pieces of data", read, len(write))
		}
	}
	return whole
}

func TestDigest(t *testing.T) {
	random := make([]byte, extent.Piece+5000)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(random)
	const size = 64*extent.Piece + 8192
	base := map[int64][]byte{0: random[:4096], 10*extent.Piece + 512: random, size - 512: random[:512]}
	want := digestOf(t, size, base)
	zeroed := map[int64][]byte{20 * extent.Piece: make([]byte, 3*extent.Piece)}
	for at, b := range base {
		zeroed[at] = b
	}
	if got := digestOf(t, size, zeroed); got != want {
		t.Error("written zeroes are not as holes")
	}
	for what, other := range map[string]string{
		"size":    digestOf(t, size+512, base),
		"a byte":  digestOf(t, size, map[int64][]byte{0: append([]byte{random[0] ^ 1}, random[1:4096]...), 10*extent.Piece + 512: random, size - 512: random[:512]}),
		"a place": digestOf(t, size, map[int64][]byte{extent.Piece: random[:4096], 10*extent.Piece + 512: random, size - 512: random[:512]}),
		"empty":   digestOf(t, size, nil),
	} {
		if other == want {
			t.Errorf("the same digest with another %s", what)
		}
	}
	if digestOf(t, 0, nil) == digestOf(t, 512, nil) {
		t.Error("two empty files of two sizes")
	}
	// A file that is shorter than it should be is an error or another digest.
	f, err := os.Create(filepath.Join(t.TempDir(), "short"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(bytes.Repeat([]byte{1}, 700)); err != nil {
		t.Fatal(err)
	}
	if got, err := extent.Digest(t.Context(), f, 4096); err == nil {
		t.Errorf("a short file: %s", got)
	}
}
