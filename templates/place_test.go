package templates

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev/extent"
	"holdfast/blockdev/tree"
)

// stored makes a tree of random files, some of chunks that base has too, and puts
// its contents into a store.
func stored(t *testing.T, random *rand.Rand, pool [][]byte) (tree.Tree, *os.File) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	s := tree.NewStore(f)
	defer s.Close()
	b := tree.NewBuilder()
	for i := range 40 {
		var body []byte
		for range random.IntN(4) {
			body = append(body, pool[random.IntN(len(pool))]...)
		}
		body = body[:random.IntN(len(body)+1)]
		c, err := s.Add(t.Context(), bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if err := b.File(fmt.Sprintf("%02d", (i*7)%40), tree.Attributes{}, c); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.Tree(), f
}

// whole puts all contents of a tree behind each other.
func whole(t *testing.T, v tree.Tree, f *os.File) []byte {
	t.Helper()
	var all []byte
	for _, n := range v.Nodes {
		for _, r := range n.Runs {
			part := make([]byte, roundUp(r.Length, tree.Block))
			if _, err := f.ReadAt(part, r.At); err != nil {
				t.Fatal(err)
			}
			all = append(all, part...)
		}
	}
	return all
}

// Whatever is shared, from wherever, and whatever the records say of it: the
// image has the bytes that came, and its digest is that of its bytes.
func TestPlacing(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	pool := make([][]byte, 12)
	for i := range pool {
		pool[i] = make([]byte, tree.Chunk) // equal chunks can only be found at multiples of a chunk
		for at := 0; at < len(pool[i]); at += tree.Block {
			if random.IntN(4) > 0 {
				for k := at; k < at+tree.Block; k++ {
					pool[i][k] = byte(random.UintN(256))
				}
			}
		}
	}
	for round := range 6 {
		base, baseFile := stored(t, random, pool)
		fresh, freshFile := stored(t, random, pool)
		shares := sharesWith(fresh, base, 1)
		var shared int64
		for _, s := range shares {
			shared += s.length
		}
		if shared == 0 {
			t.Fatal("nothing is shared")
		}
		if round%3 == 2 { // the base is not what its manifest says
			if _, err := baseFile.WriteAt([]byte("damage"), shares[0].from+100); err != nil {
				t.Fatal(err)
			}
		}
		want := whole(t, fresh, freshFile)
		image, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer image.Close()
		if err := image.Truncate(int64(len(want)) + 3*tree.Chunk); err != nil {
			t.Fatal(err)
		}
		c := placing{shares: shares}
		at := int64(tree.Block)
		for _, n := range fresh.Nodes {
			for _, r := range n.Runs {
				r.Length = roundUp(r.Length, tree.Block)
				if err := c.Place(t.Context(), image, at, r); err != nil {
					t.Fatal(err)
				}
				at += r.Length
			}
		}
		// As if the pool could reflink: what cannot be cloned here is copied.
		c.choose([2]int64{2, 20}, [2]int64{tree.Block, tree.Block})
		if err := c.move(t.Context(), image, []*os.File{freshFile, baseFile}, round%2 == 0); err != nil {
			t.Fatal(err)
		}
		have := make([]byte, len(want))
		if _, err := image.ReadAt(have, tree.Block); err != nil || !bytes.Equal(have, want) {
			t.Fatalf("round %d: the contents differ (%v)", round, err)
		}
		direct, err := extent.Digest(context.Background(), image, int64(len(want))+3*tree.Chunk)
		if err != nil {
			t.Fatal(err)
		}
		// Read from where it came, all of it, as of clones.
		for i := range c.pieces {
			c.pieces[i].clone = true
		}
		made, err := digestMade(t.Context(), image, view{image: image, files: []*os.File{freshFile, baseFile}, pieces: c.pieces})
		if err != nil || made != direct {
			t.Errorf("round %d: digest %s, of its bytes %s (%v)", round, made, direct, err)
		}
	}
}
