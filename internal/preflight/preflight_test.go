package preflight

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func find(t *testing.T, checks []Check, name string) Check {
	t.Helper()
	for _, c := range checks {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("there is no check %q in %+v", name, checks)
	return Check{}
}

// TestHostTellsWhatItFinds against what the test can see by itself.
func TestHostTellsWhatItFinds(t *testing.T) {
	checks := Host(t.Context())
	for name, there := range map[string]bool{
		"loop-devices": opens("/dev/loop-control"),
		"root":         os.Geteuid() == 0,
		"nbd-client":   exists("/sys/module/nbd"),
	} {
		if got := find(t, checks, name).Status == OK; got != there {
			t.Errorf("%s: ok is %v, want %v", name, got, there)
		}
	}
	for _, c := range checks {
		if c.Found == "" || (c.Status != OK) != (c.Consequence != "") {
			t.Errorf("%+v: what is missing needs a consequence, and what is there has none", c)
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func opens(path string) bool {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false
	}
	return f.Close() == nil
}

func TestMissingTools(t *testing.T) {
	for status, want := range map[Status]int{Fail: 1, Warn: 0} {
		c := tool{"holdfast-no-such-tool", "e2fsprogs", "nothing works", status}.check()
		if c.Status != status || c.Consequence != "nothing works" || !strings.Contains(c.Fix, "e2fsprogs") || c.Found != "not installed" {
			t.Errorf("got %+v", c)
		}
		if n := len(Failed([]Check{c, {Status: OK}})); n != want {
			t.Errorf("%s: %d failed checks, want %d", status, n, want)
		}
	}
}

func TestPlace(t *testing.T) {
	dir := t.TempDir()
	checks := Place(dir, dir, dir)
	if c := find(t, checks, "metadata-apart"); c.Status != Warn || c.Consequence == "" || c.Fix == "" {
		t.Errorf("one file system for both: %+v", c)
	}
	if c := find(t, Place(dir, dir, "/proc"), "metadata-apart"); c.Status != OK {
		t.Errorf("two file systems: %+v", c)
	}
	if c := find(t, Place(dir, filepath.Join(dir, "none"), dir), "pool-space"); c.Status != Warn {
		t.Errorf("no such directory: %+v", c)
	}
}
