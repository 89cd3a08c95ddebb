package metadata

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
)

func openLog(t *testing.T, path string) *SideLog {
	t.Helper()
	l, err := OpenSideLog(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func contents(t *testing.T, l *SideLog, kind string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := l.Each(kind, func(key string, value []byte) error {
		got[key] = string(value)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func appendAll(t *testing.T, l *SideLog, n int) {
	t.Helper()
	for i := range n {
		if err := l.Append("key", fmt.Sprintf("k%d", i), map[string]int{"v": i}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSideLogKeepsTheLastValueOverReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openLog(t, path)
	appendAll(t, l, 3)
	if err := l.Append("key", "k1", "<changed> & \u2028"); err != nil {
		t.Fatal(err)
	}
	if err := l.Append("key", "k2", nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Append("other", "k0", 7); err != nil {
		t.Fatal(err)
	}
	changed, _ := json.Marshal("<changed> & \u2028")
	want := map[string]string{"k0": `{"v":0}`, "k1": string(changed)}
	if got := contents(t, l, "key"); !reflect.DeepEqual(got, want) {
		t.Fatalf("before closing: %v, want %v", got, want)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Append("key", "late", 1); !errors.Is(err, ErrFailed) {
		t.Fatalf("Append after Close: %v", err)
	}
	l = openLog(t, path)
	if got := contents(t, l, "key"); !reflect.DeepEqual(got, want) {
		t.Fatalf("after reopening: %v, want %v", got, want)
	}
	if got := contents(t, l, "other"); !reflect.DeepEqual(got, map[string]string{"k0": "7"}) {
		t.Fatalf("other kind: %v", got)
	}
}

func TestSideLogIsOpenOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	openLog(t, path)
	if _, err := OpenSideLog(path); !errors.Is(err, ErrLocked) {
		t.Fatalf("second open: %v, want ErrLocked", err)
	}
}

// Every possible cut of the file leaves exactly the entries whose lines are whole.
func TestSideLogCutAnywhere(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, filepath.Join(dir, "log"))
	appendAll(t, l, 4)
	l.Close()
	text, err := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(text) {
		path := filepath.Join(dir, "cut")
		if err := os.WriteFile(path, text[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := OpenSideLog(path)
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		whole := max(strings.Count(string(text[:cut]), "\n")-1, 0)
		if got := contents(t, l, "key"); len(got) != whole {
			t.Fatalf("cut at %d: %d entries, want %d", cut, len(got), whole)
		}
		if err := l.Append("key", "new", 1); err != nil {
			t.Fatal(err)
		}
		l.Close()
		l, err = OpenSideLog(path)
		if err != nil {
			t.Fatalf("cut at %d, appended, reopened: %v", cut, err)
		}
		if got := contents(t, l, "key"); len(got) != whole+1 {
			t.Fatalf("cut at %d, appended: %d entries, want %d", cut, len(got), whole+1)
		}
		l.Close()
	}
}

// Every flipped byte is noticed, and the error names the line.
func TestSideLogFlippedBytes(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, filepath.Join(dir, "log"))
	appendAll(t, l, 4)
	l.Close()
	text, err := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	line := 1
	for i := range len(text) - 1 {
		flipped := []byte(string(text))
		flipped[i] ^= 0x04
		path := filepath.Join(dir, "flipped")
		if err := os.WriteFile(path, flipped, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := OpenSideLog(path)
		if !errors.Is(err, ErrDamaged) && !strings.Contains(fmt.Sprint(err), "not known to this program") {
			t.Fatalf("byte %d of line %d: %v, want ErrDamaged", i, line, err)
		}
		if !strings.Contains(err.Error(), fmt.Sprintf("line %d:", line)) {
			t.Fatalf("byte %d: %q does not name line %d", i, err, line)
		}
		if text[i] == '\n' {
			line++
		}
	}
}

func TestSideLogLostLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openLog(t, path)
	appendAll(t, l, 4)
	l.Close()
	text, _ := os.ReadFile(path)
	lines := strings.SplitAfter(string(text), "\n")
	if err := os.WriteFile(path, []byte(lines[0]+lines[1]+lines[3]+lines[4]), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSideLog(path); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "line 3:") {
		t.Fatalf("a missing line: %v", err)
	}
}

// A crash can leave pages of the last write as zeroes, newline included or not.
func TestSideLogZeroedTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openLog(t, path)
	appendAll(t, l, 2)
	l.Close()
	text, _ := os.ReadFile(path)
	for _, tail := range []string{"\x00\x00\x00", "{\"sum\x00\x00\x00}}\n", "\x00\n"} {
		if err := os.WriteFile(path, append([]byte(string(text)), tail...), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := OpenSideLog(path)
		if err != nil {
			t.Fatalf("tail %q: %v", tail, err)
		}
		if got := contents(t, l, "key"); len(got) != 2 {
			t.Fatalf("tail %q: %v", tail, got)
		}
		l.Close()
	}
}

func TestSideLogCompacts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openLog(t, path)
	for i := range 2 * compactAbove {
		if err := l.Append("key", fmt.Sprintf("k%d", i%3), i); err != nil {
			t.Fatal(err)
		}
	}
	want := contents(t, l, "key")
	l.Close()
	before, _ := os.Stat(path)
	l = openLog(t, path)
	if got := contents(t, l, "key"); !reflect.DeepEqual(got, want) {
		t.Fatalf("after compaction: %v, want %v", got, want)
	}
	after, _ := os.Stat(path)
	if after.Size() >= before.Size()/10 {
		t.Fatalf("compacted from %d to %d bytes", before.Size(), after.Size())
	}
	if _, err := OpenSideLog(path); !errors.Is(err, ErrLocked) {
		t.Fatalf("the compacted log is not locked: %v", err)
	}
	if err := l.Append("key", "after", 1); err != nil {
		t.Fatal(err)
	}
	l.Close()
	l = openLog(t, path)
	want["after"] = "1"
	if got := contents(t, l, "key"); !reflect.DeepEqual(got, want) {
		t.Fatalf("after compaction, append and reopening: %v, want %v", got, want)
	}
	if _, err := os.Stat(path + ".new"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the temporary file stays: %v", err)
	}
}

func TestSideLogConcurrentAppends(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openLog(t, path)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 10 {
				if err := l.Append("key", fmt.Sprintf("%d-%d", g, i), i); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	l.Close()
	l = openLog(t, path)
	if got := contents(t, l, "key"); len(got) != 80 {
		t.Fatalf("%d entries, want 80", len(got))
	}
}

func TestSideLogRefusesWhatItCannotHold(t *testing.T) {
	l := openLog(t, filepath.Join(t.TempDir(), "log"))
	for _, c := range []struct {
		kind  string
		value any
	}{{"", 1}, {headerKind, 1}, {"key", func() {}}, {"key", strings.Repeat("x", maxLine)}} {
		if err := l.Append(c.kind, "k", c.value); err == nil {
			t.Errorf("Append(%q, %T) was accepted", c.kind, c.value)
		}
	}
	if err := l.Append("key", "k", 1); err != nil {
		t.Fatalf("a refused entry broke the log: %v", err)
	}
}

// After a sync fails nothing more is acknowledged, even if a later sync would succeed.
func TestSideLogStopsAtAFailedSync(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := openLog(t, path)
	appendAll(t, l, 1)
	good := l.file
	r, w, err := os.Pipe() // takes writes, cannot be synced
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	l.file = w
	if err := l.Append("key", "lost", 1); !errors.Is(err, ErrFailed) {
		t.Fatalf("Append with a failing sync: %v, want ErrFailed", err)
	}
	l.file = good
	if err := l.Append("key", "more", 1); !errors.Is(err, ErrFailed) {
		t.Fatalf("Append after a failed sync: %v, want ErrFailed", err)
	}
	if got := contents(t, l, "key"); len(got) != 1 {
		t.Fatalf("the entry that was not acknowledged shows: %v", got)
	}
}

func FuzzParseLine(f *testing.F) {
	for _, e := range []entry{{Kind: headerKind, Key: formatName}, {Number: 1, Kind: "key", Key: "k", Value: json.RawMessage(`{"a":[1,"<"]}`)}, {Number: 2, Kind: "key", Key: "k"}} {
		line, err := formatLine(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(line[:len(line)-1])
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := parseLine(line)
		if err != nil {
			return
		}
		again, err := formatLine(e)
		if err != nil {
			t.Fatalf("accepted %q, which cannot be written: %v", line, err)
		}
		e2, err := parseLine(again[:len(again)-1])
		if err != nil || e2.Number != e.Number || e2.Kind != e.Kind || e2.Key != e.Key {
			t.Fatalf("%q became %+v, then %+v, %v", line, e, e2, err)
		}
	})
}
