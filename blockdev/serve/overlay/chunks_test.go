package overlay_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

// same tells whether two bases consist of the same.
func same(a, b overlay.Chunks) bool {
	sums := func(c overlay.Chunks) []byte {
		p := make([]byte, (c.Size+c.Chunk-1)/c.Chunk*32)
		if _, err := c.Digests.ReadAt(p, 0); err != nil {
			return nil
		}
		return p
	}
	return a.Size == b.Size && a.Chunk == b.Chunk && sums(a) != nil && bytes.Equal(sums(a), sums(b))
}

// TestChunksFile: what a base consists of survives a file, and a file of which any
// byte has changed, or the end is missing, is told.
func TestChunksFile(t *testing.T) {
	m := remoteBase()
	c, err := overlay.Digest(m, chunk)
	must(t, err)
	if !same(c, chunksOf(m)) {
		t.Fatal("digested by holes it is not what it is byte by byte")
	}
	var file bytes.Buffer
	must(t, overlay.WriteChunks(&file, c))
	got, err := overlay.ReadChunks(bytes.NewReader(file.Bytes()))
	must(t, err)
	if !same(got, c) {
		t.Error("it does not read as written")
	}
	r := rand.New(rand.NewPCG(9, 1))
	for range 500 {
		spoilt := bytes.Clone(file.Bytes())
		at := r.IntN(len(spoilt))
		spoilt[at] ^= byte(1 << r.IntN(8))
		if _, err := overlay.ReadChunks(bytes.NewReader(spoilt)); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Fatalf("byte %d has changed: %v", at, err)
		}
		if _, err := overlay.ReadChunks(bytes.NewReader(file.Bytes()[:at])); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Fatalf("cut at %d: %v", at, err)
		}
	}
	for _, bad := range []int64{0, -chunk, 512, 3 * block, 1 << 30} {
		if _, err := overlay.Digest(m, bad); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("chunks of %d bytes: %v", bad, err)
		}
	}
	c.Digests = bytes.NewReader(make([]byte, (c.Size+chunk-1)/chunk*32-1))
	if err := overlay.WriteChunks(&file, c); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a digest less: %v", err)
	}
}
