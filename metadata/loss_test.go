package metadata

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// filled makes a store with tables of several generations and a log, and gives
// its directory: as Close leaves it, or as a kill would.
func filled(t *testing.T, killed bool) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	for round := range 3 {
		s := openStore(t, dir, Options{})
		for i := range 20 {
			put(t, s, fmt.Sprintf("%d-%02d", round, i), i)
		}
		if round == 2 && killed {
			s.floor.saveLater()
			return copyDir(t, dir)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func copyDir(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

// largest finds the largest file that matches, by what it holds before its zeroes.
func largest(t *testing.T, dir, pattern string) (path string, size int) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, recordsDir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(strings.TrimRight(string(text), "\x00")); n > size {
			path, size = f, n
		}
	}
	if path == "" {
		t.Fatalf("no %s in %s", pattern, dir)
	}
	return path, size
}

func truncate(t *testing.T, path string, size int) {
	t.Helper()
	if err := os.Truncate(path, int64(size)); err != nil {
		t.Fatal(err)
	}
}

func flip(t *testing.T, path string, at int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, int64(at)); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, int64(at)); err != nil {
		t.Fatal(err)
	}
}

func TestLossIsNoticed(t *testing.T) {
	for _, c := range []struct {
		name   string
		killed bool
		harm   func(t *testing.T, dir string)
	}{
		{"manifest cut by 3 bytes", false, func(t *testing.T, dir string) {
			path, size := largest(t, dir, "MANIFEST")
			truncate(t, path, size-3)
		}},
		{"manifest cut by 3 bytes, then more commits", true, func(t *testing.T, dir string) {
			path, size := largest(t, dir, "MANIFEST")
			truncate(t, path, size-3)
		}},
		{"manifest emptied", false, func(t *testing.T, dir string) {
			path, _ := largest(t, dir, "MANIFEST")
			truncate(t, path, 0)
		}},
		{"manifest removed", false, func(t *testing.T, dir string) { remove(t, filepath.Join(dir, recordsDir, "MANIFEST")) }},
		{"log cut in the middle", true, func(t *testing.T, dir string) {
			path, size := largest(t, dir, "*.mem")
			truncate(t, path, size/2)
		}},
		{"log cut in its last entry", true, func(t *testing.T, dir string) {
			path, size := largest(t, dir, "*.mem")
			truncate(t, path, size-2)
		}},
		{"log emptied", true, func(t *testing.T, dir string) {
			path, _ := largest(t, dir, "*.mem")
			truncate(t, path, 0)
		}},
		{"log removed", true, func(t *testing.T, dir string) {
			path, _ := largest(t, dir, "*.mem")
			remove(t, path)
		}},
		{"bit flipped in the log", true, func(t *testing.T, dir string) {
			path, size := largest(t, dir, "*.mem")
			flip(t, path, size/3)
		}},
		{"bit flipped in a table", false, func(t *testing.T, dir string) {
			path, size := largest(t, dir, "*.sst")
			flip(t, path, size/3)
		}},
		{"table cut", false, func(t *testing.T, dir string) {
			path, size := largest(t, dir, "*.sst")
			truncate(t, path, size/2)
		}},
		{"table removed", false, func(t *testing.T, dir string) {
			path, _ := largest(t, dir, "*.sst")
			remove(t, path)
		}},
		{"all of Badger's files removed", false, func(t *testing.T, dir string) { remove(t, filepath.Join(dir, recordsDir)) }},
		{"sequence damaged", false, func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "sequence"), 12) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filled(t, c.killed)
			c.harm(t, dir)
			s, err := Open(dir, Options{})
			if err == nil {
				s.Close()
			}
			if !errors.Is(err, ErrRolledBack) && !errors.Is(err, ErrDamaged) {
				t.Fatalf("Open: %v", err)
			}
			t.Log(err)
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

// The crash images of the test above open when they are not harmed.
func TestKilledStoreIsWhole(t *testing.T) {
	s := openStore(t, filled(t, true), Options{})
	if got := all(t, s); len(got) != 60 {
		t.Fatalf("%d records, want 60", len(got))
	}
}

// A store whose own filesystem is not there looks new, but for the sequence elsewhere.
func TestSequenceElsewhere(t *testing.T) {
	o := Options{SequenceFile: filepath.Join(t.TempDir(), "sequence")}
	dir := t.TempDir()
	s := openStore(t, dir, o)
	put(t, s, "a", 1)
	s.Close()
	if _, err := os.Stat(filepath.Join(dir, "sequence")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if _, err := Open(t.TempDir(), o); !errors.Is(err, ErrRolledBack) {
		t.Fatalf("an empty directory in the store's place: %v", err)
	}
	s = openStore(t, dir, o)
	if got := all(t, s); !maps.Equal(got, map[string]int{"a": 1}) {
		t.Fatal(got)
	}
}
