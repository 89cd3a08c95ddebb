package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/api"
)

func openLog(t testing.TB, path string, o Options) *Log {
	t.Helper()
	l, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func entry(workspace string, n int) api.Entry {
	return api.Entry{
		Time: time.Date(2026, 11, 23, 12, 0, n, 123456789, time.UTC), Request: fmt.Sprint("r", n), Workspace: workspace, KeyID: "k", Principal: "ann",
		Action: "volume.create", Resource: fmt.Sprintf("v%d \"<&>\u2028\n", n), Remote: "10.0.0.1:2", Status: 200, Error: "NO",
	}
}

func record(t testing.TB, l *Log, e api.Entry) {
	t.Helper()
	if err := l.Record(t.Context(), e); err != nil {
		t.Fatal(err)
	}
}

func list(t testing.TB, l *Log, workspace string, limit int) []api.Entry {
	t.Helper()
	got, err := l.Recent(t.Context(), workspace, limit)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestEntriesLiveOverReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path, Options{})
	for i := range 4 {
		record(t, l, entry([]string{"main", "other"}[i%2], i))
	}
	for range 2 {
		for _, c := range []struct {
			workspace string
			limit     int
			want      []api.Entry
		}{
			{"", 10, []api.Entry{entry("other", 3), entry("main", 2), entry("other", 1), entry("main", 0)}},
			{"", 2, []api.Entry{entry("other", 3), entry("main", 2)}},
			{"main", 10, []api.Entry{entry("main", 2), entry("main", 0)}},
			{"nowhere", 10, nil},
			{"main", 0, []api.Entry{}},
			{"main", -1, []api.Entry{}},
		} {
			if got := list(t, l, c.workspace, c.limit); len(got) != len(c.want) || len(got) > 0 && !reflect.DeepEqual(got, c.want) {
				t.Errorf("%q, %d: %v, want %v", c.workspace, c.limit, got, c.want)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if err := l.Record(t.Context(), entry("main", 9)); !errors.Is(err, fs.ErrClosed) {
			t.Fatal(err)
		}
		l = openLog(t, path, Options{})
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info.Mode(), err)
	}
	text, _ := os.ReadFile(path)
	if n := bytes.Count(text, []byte("\n")); n != 4 || !json.Valid(bytes.Split(text, []byte("\n"))[0]) {
		t.Fatalf("%d lines: %s", n, text)
	}
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, filepath.Join(dir, "audit.log"), Options{MaxBytes: 1000, Keep: 3})
	for i := range 60 {
		record(t, l, entry("main", i))
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 4 {
		t.Fatal(files, err)
	}
	var numbers []string
	for _, name := range []string{"audit.log.3", "audit.log.2", "audit.log.1", "audit.log"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || len(text) > 1000 || len(text) == 0 {
			t.Fatalf("%s: %d bytes, %v", name, len(text), err)
		}
		for row := range strings.Lines(string(text)) {
			var e line
			if err := json.Unmarshal([]byte(row), &e); err != nil {
				t.Fatalf("%s: %q: %v", name, row, err)
			}
			numbers = append(numbers, e.Request)
		}
	}
	for i, n := range numbers {
		if want := fmt.Sprint("r", 60-len(numbers)+i); n != want {
			t.Fatalf("%v: entry %d is %s, want %s", numbers, i, n, want)
		}
	}
	l.Close()
	l = openLog(t, filepath.Join(dir, "audit.log"), Options{MaxBytes: 1000, Keep: 3})
	if got := list(t, l, "main", 5); len(got) != 5 || got[0].Request != "r59" || got[4].Request != "r55" {
		t.Fatalf("after reopening: %v", got)
	}
}

// A torn end stays as it is, and the next entry is whole.
func TestTornAndForeignLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path, Options{})
	record(t, l, entry("main", 0))
	l.Close()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 3*maxLine)
	if _, err := f.WriteString("somebody was here\n{}\n" + long + "\n{\"time\":\"2026"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	l = openLog(t, path, Options{})
	record(t, l, entry("main", 1))
	for range 2 {
		if got := list(t, l, "main", 10); len(got) != 2 || got[0] != entry("main", 1) || got[1] != entry("main", 0) {
			t.Fatal(got)
		}
		l.Close()
		l = openLog(t, path, Options{})
	}
	text, _ := os.ReadFile(path)
	if !strings.Contains(string(text), "{\"time\":\"2026\n{") {
		t.Fatalf("%s", text[len(text)-300:])
	}
}

func TestABusyWorkspaceDoesNotPushOutTheOthers(t *testing.T) {
	l := openLog(t, filepath.Join(t.TempDir(), "audit.log"), Options{})
	record(t, l, entry("quiet", 0))
	for i := range 3 * keepRecent {
		record(t, l, entry("busy", i+1))
	}
	if got := list(t, l, "quiet", 10); len(got) != 1 || got[0] != entry("quiet", 0) {
		t.Fatal(got)
	}
	got := list(t, l, "busy", 10*keepRecent)
	if len(got) != keepRecent || got[0] != entry("busy", 3*keepRecent) || got[keepRecent-1] != entry("busy", 2*keepRecent+1) {
		t.Fatalf("%d entries, %v to %v", len(got), got[0].Request, got[len(got)-1].Request)
	}
	for i := range keepWorkspaces { // "quiet" has the oldest newest entry
		record(t, l, entry(fmt.Sprint("w", i), 10*keepRecent+i))
	}
	if n := len(l.recent.each); n != keepWorkspaces {
		t.Fatalf("%d workspaces in memory", n)
	}
	if got := list(t, l, "quiet", 10); len(got) != 0 {
		t.Fatal(got)
	}
	if got := list(t, l, "w0", 10); len(got) != 1 {
		t.Fatal(got)
	}
}

// On a full filesystem each lost entry is reported; the next is whole.
func TestFailuresAreReported(t *testing.T) {
	dir := t.TempDir()
	var told []error
	l := openLog(t, filepath.Join(dir, "audit.log"), Options{OnFailure: func(err error) { told = append(told, err) }})
	record(t, l, entry("main", 0))
	good := l.file
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	l.file = full
	if err := l.Record(t.Context(), entry("main", 1)); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if len(told) != 1 || !errors.Is(told[0], syscall.ENOSPC) {
		t.Fatal(told)
	}
	full.Close()
	l.file = good
	record(t, l, entry("main", 2))
	if got := list(t, l, "main", 10); len(got) != 3 {
		t.Fatal(got)
	}
	if len(told) != 1 {
		t.Fatal(told)
	}
}

// When the file cannot be rotated it goes on being written.
func TestRotationThatFails(t *testing.T) {
	dir := t.TempDir()
	failures := 0
	l := openLog(t, filepath.Join(dir, "audit.log"), Options{MaxBytes: 600, Keep: 2, OnFailure: func(error) { failures++ }})
	if err := os.MkdirAll(filepath.Join(dir, "audit.log.1", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "audit.log.2", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		_ = l.Record(t.Context(), entry("main", i))
	}
	text, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil || bytes.Count(text, []byte("\n")) != 10 || failures == 0 {
		t.Fatalf("%v, %d failures, %s", err, failures, text)
	}
}

func TestConcurrentRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path, Options{MaxBytes: 20_000, Keep: 100})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 100 {
				record(t, l, entry(fmt.Sprint("w", g), i))
				_, _ = l.Recent(t.Context(), "w0", 10)
			}
		})
	}
	wg.Wait()
	files, _ := filepath.Glob(path + "*")
	rows := 0
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for row := range strings.Lines(string(text)) {
			if _, ok := parse([]byte(row)); !ok {
				t.Fatalf("%s: %q", f, row)
			}
			rows++
		}
	}
	if rows != 800 || len(files) < 5 {
		t.Fatalf("%d entries in %d files", rows, len(files))
	}
}

func TestLongFieldsAreClipped(t *testing.T) {
	l := openLog(t, filepath.Join(t.TempDir(), "audit.log"), Options{})
	e := entry("main", 1)
	e.Resource = strings.Repeat("ä", 1<<20)
	record(t, l, e)
	if got := list(t, l, "main", 1)[0].Resource; len(got) > maxField+3 || !strings.HasSuffix(got, "ä...") {
		t.Fatalf("%d bytes", len(got))
	}
}

func FuzzParse(f *testing.F) {
	text, _ := json.Marshal(line(entry("main", 1)))
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		if e, ok := parse(text); ok && (e.Action == "" || len(e.Resource) > maxField+3) {
			t.Fatalf("%+v", e)
		}
	})
}
