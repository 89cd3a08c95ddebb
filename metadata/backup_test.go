package metadata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func backupOf(t *testing.T, s *Store) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.Backup(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func quiet(t *testing.T) Options { return Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil))} }

func TestBackupAndRestore(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	for i := range 40 { // more than one transaction takes
		key := fmt.Sprintf("odd <&>\u2028\"%d", i)
		err := s.Update(t.Context(), func(tx *Tx) error {
			return errors.Join(things.Put(tx, key, thing{strings.Repeat("<&>\x00é", 5000), i}), others.Put(tx, key, thing{}))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	backup := backupOf(t, s)
	want, before := all(t, s), s.head.Sequence
	put(t, s, "later", 1)

	dir := filepath.Join(t.TempDir(), "restored")
	if err := Restore(dir, bytes.NewReader(backup), quiet(t)); err != nil {
		t.Fatal(err)
	}
	r := openStore(t, dir, Options{})
	if got := all(t, r); !maps.Equal(got, want) {
		t.Fatalf("%d records, want %d", len(got), len(want))
	}
	if r.head.Sequence <= before {
		t.Fatalf("sequence %d, the backed-up store was at %d", r.head.Sequence, before)
	}
	if r.head.Sum == (digest{}) || r.head.Records != 80 {
		t.Fatalf("%+v", r.head)
	}
	if err := Restore(dir, bytes.NewReader(backup), quiet(t)); err == nil {
		t.Fatal("restored over a store")
	}
}

func TestRestoreRefusesADamagedBackup(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	put(t, s, "a", 1)
	put(t, s, "b", 2)
	backup := backupOf(t, s)
	dir := t.TempDir()
	try := func(what string, b []byte) {
		t.Helper()
		if err := Restore(dir, bytes.NewReader(b), quiet(t)); !errors.Is(err, ErrDamaged) && !strings.Contains(fmt.Sprint(err), "not known to this program") {
			t.Errorf("%s: %v, want ErrDamaged", what, err)
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left %v, %v", what, left, err)
		}
	}
	for cut := 0; cut < len(backup); cut += 17 {
		try(fmt.Sprint("cut at ", cut), backup[:cut])
	}
	for at := 10; at < len(backup); at += 17 { // a gzip header has no checksum
		flipped := bytes.Clone(backup)
		flipped[at] ^= 0x20
		try(fmt.Sprint("flipped at ", at), flipped)
	}
	try("with a tail", append(bytes.Clone(backup), "tail"...))
}

// After a restore the floor that the lost store had reached does not count.
func TestRestoreAfterALoss(t *testing.T) {
	dir, o := t.TempDir(), quiet(t)
	o.SequenceFile = filepath.Join(t.TempDir(), "sequence")
	s := openStore(t, dir, o)
	put(t, s, "a", 1)
	backup := backupOf(t, s)
	for i := range 5 {
		put(t, s, "b", i)
	}
	s.Close()
	path, size := largest(t, dir, "MANIFEST")
	truncate(t, path, size-3)
	if _, err := Open(dir, o); !errors.Is(err, ErrRolledBack) {
		t.Fatal(err)
	}
	if err := Restore(dir, bytes.NewReader(backup), o); err == nil {
		t.Fatal("restored over a store")
	}
	dir = t.TempDir()
	if err := Restore(dir, bytes.NewReader(backup), o); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir, o)
	if got := all(t, s); !maps.Equal(got, map[string]int{"a": 1}) {
		t.Fatal(got)
	}
}

func TestBackupWhileUpdatesGoOn(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				// Both or neither: a backup shows one moment.
				err := s.Update(t.Context(), func(tx *Tx) error {
					key := fmt.Sprint(g, "-", i)
					return errors.Join(things.Put(tx, key, thing{key, i}), others.Put(tx, key, thing{key, i}))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 5 {
		dir := filepath.Join(t.TempDir(), "restored")
		if err := Restore(dir, bytes.NewReader(backupOf(t, s)), quiet(t)); err != nil {
			t.Fatal(err)
		}
		r := openStore(t, dir, Options{})
		if r.head.Records%2 != 0 {
			t.Fatalf("%d records", r.head.Records)
		}
		r.Close()
	}
	stop()
	wg.Wait()
}
