package blockdevtest

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"holdfast/internal/run"
)

// recorder is a testing.TB that notes how a test would end.
type recorder struct {
	testing.TB
	text string
}

func (r *recorder) Helper() {}
func (r *recorder) Fatalf(format string, args ...any) {
	r.text = "FAIL " + fmt.Sprintf(format, args...)
	runtime.Goexit()
}
func (r *recorder) Skipf(format string, args ...any) {
	r.text = "SKIP " + fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func required(t *testing.T, needs ...Need) string {
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() { defer close(done); Require(r, needs...) }()
	<-done
	return r.text
}

func TestRequire(t *testing.T) {
	Require(t, Root)
	t.Setenv("PATH", "/nonexistent")
	t.Setenv(SkipVariable, "")
	if got := required(t, Root); got != "" {
		t.Errorf("a need that is there: %q", got)
	}
	if got := required(t, Need("unheard-of")); !strings.HasPrefix(got, "FAIL") {
		t.Errorf("an unknown need: %q, want a failure", got)
	}
	t.Setenv(SkipVariable, "xfs, unheard-of")
	if got := required(t, Need("unheard-of")); !strings.HasPrefix(got, "SKIP") || !strings.Contains(got, "unheard-of") {
		t.Errorf("a waived need: %q, want a skip that names it", got)
	}
	if got := required(t, ReflinkPool); !strings.HasPrefix(got, "SKIP") {
		t.Errorf("a need with a waived part: %q, want a skip", got)
	}
}

func TestReflinkDirIsXFSAndGoesAway(t *testing.T) {
	Require(t, ReflinkPool)
	LeakCheck(t)
	dir := ""
	t.Run("use", func(t *testing.T) {
		dir = ReflinkDir(t, Size(300<<20))
		if len(MountsUnder(t, filepath.Dir(dir))) != 1 || len(LoopsUnder(t, filepath.Dir(dir))) != 1 {
			t.Fatalf("%s is not a loop mount", dir)
		}
		if err := os.WriteFile(dir+"/a", []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := run.Run(t.Context(), run.Cmd{Args: []string{"cp", "--reflink=always", dir + "/a", dir + "/b"}}); err != nil {
			t.Fatal(err)
		}
	})
	if len(MountsUnder(t, filepath.Dir(dir))) != 0 {
		t.Fatalf("%s is still mounted", dir)
	}
}

func TestLeaksAreFound(t *testing.T) {
	Require(t, ReflinkPool)
	base := t.TempDir()
	f, err := os.Create(base + "/open")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := leaks(t, []string{base}); err == nil || !strings.Contains(err.Error(), "open files") {
		t.Errorf("an open file: %v", err)
	}
	dir := ReflinkDir(t)
	err = leaks(t, []string{filepath.Dir(dir)})
	if err == nil || !strings.Contains(err.Error(), "loop devices") || !strings.Contains(err.Error(), "mounts") {
		t.Errorf("a loop mount: %v", err)
	}
}
