package metadata

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// Far more is written than level 0 takes: it is compacted, and what was
// overwritten is dropped.
func TestCompaction(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	const rounds = 200 // 160 MB, 20 log files
	for i := range rounds {
		err := s.Update(t.Context(), func(tx *Tx) error {
			for j := range 8 {
				if err := things.Put(tx, fmt.Sprint(i%2, "-", j), thing{strings.Repeat("x", 100_000), i}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	s = openStore(t, dir, Options{})
	deadline := time.Now().Add(2 * time.Minute)
	for {
		st, err := s.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if s.db.Levels()[0].NumTables < compactAt && st.TableBytes < 60<<20 {
			t.Logf("%d MB in tables", st.TableBytes>>20)
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d tables in level 0, %d bytes in tables", s.db.Levels()[0].NumTables, st.TableBytes)
		}
		time.Sleep(10 * time.Millisecond)
	}
	for k, n := range all(t, s) {
		if want := rounds - 2 + int(k[0]-'0'); n != want {
			t.Fatalf("%s is %d, want %d", k, n, want)
		}
	}
}

// A node that is killed over and over leaves a table each time; they do not pile up.
func TestManyRestarts(t *testing.T) {
	dir := t.TempDir()
	for i := range 25 {
		s := openStore(t, dir, Options{})
		put(t, s, fmt.Sprint(i), i)
		if n := s.db.Levels()[0].NumTables; n > compactAt+1 {
			t.Fatalf("%d tables in level 0 after %d restarts", n, i)
		}
		s.Close()
	}
	if got := all(t, openStore(t, dir, Options{})); len(got) != 25 {
		t.Fatalf("%d records", len(got))
	}
}
