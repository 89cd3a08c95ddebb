package guest

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// TestReproducible: the image of the same kernel and programs has the same bytes.
func TestReproducible(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.VM)
	root, err := repository()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := theImage(t.Context()); err != nil { // the kernel is in the cache then
		t.Fatal(err)
	}
	k, err := fetchKernel(t.Context(), filepath.Join(root, ".cache", "vm"))
	if err != nil {
		t.Fatal(err)
	}
	var made [2]string
	for n := range made {
		made[n] = t.TempDir()
		init := filepath.Join(made[n], "init")
		if err := buildInit(t.Context(), root, init); err != nil {
			t.Fatal(err)
		}
		if err := build(t.Context(), k, made[n], init); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"init", "initrd", "root"} {
		one, err1 := os.ReadFile(filepath.Join(made[0], name))
		two, err2 := os.ReadFile(filepath.Join(made[1], name))
		if err1 != nil || err2 != nil || len(one) == 0 || !bytes.Equal(one, two) {
			t.Errorf("%s: %d and %d bytes, equal %t, %v, %v", name, len(one), len(two), bytes.Equal(one, two), err1, err2)
		}
	}
}
