package metadata

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// On a filesystem that something else fills, updates stop while there is still
// room, those that free something go on, and all is well when there is room again.
func TestFullFilesystem(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s := openStore(t, filepath.Join(dir, "store"), Options{Headroom: 24 << 20})
	for i := range 50 {
		put(t, s, fmt.Sprint(i), i)
	}
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	more := func(tx *Tx) error { return things.Put(tx, "more", thing{strings.Repeat("x", 2000), 1}) }
	if err := s.Update(t.Context(), more); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("Update below the headroom: %v", err)
	}
	for i := range 40 {
		if err := s.UpdateFreeing(t.Context(), func(tx *Tx) error { return things.Delete(tx, fmt.Sprint(i)) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), more); err != nil {
		t.Fatal(err)
	}
	want := all(t, s)
	if len(want) != 11 {
		t.Fatalf("%d records, want 11", len(want))
	}
	s.Close()
	s = openStore(t, filepath.Join(dir, "store"), Options{Headroom: 24 << 20})
	if got := all(t, s); !maps.Equal(got, want) {
		t.Fatal(got)
	}
	s.Close() // before the filesystem goes
}
