package guesttest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// build makes the programs, beside each other.
func build(t *testing.T) (holdfast string) {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.VM, blockdevtest.Loop)
	blockdevtest.LeakCheck(t)
	dir := t.TempDir()
	for _, name := range []string{"holdfast", "holdfastd", "holdfast-blockd"} {
		c := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, name), "holdfast/cmd/"+name)
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	return filepath.Join(dir, "holdfast")
}

// TestQuickBenches takes every measure once: the benches must not rot. What they
// measure is not looked at, but that they do.
func TestQuickBenches(t *testing.T) {
	holdfast := build(t)
	for name, b := range map[string]struct {
		args []string
		rows int
	}{
		"vm":       {[]string{"vm"}, 20},
		"lvm":      {[]string{"lvm"}, 6},
		"io-guest": {[]string{"io", "--guest"}, 8},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			args := slices.Concat([]string{"bench"}, b.args, []string{"--quick", "--dir", dir, "--out", dir})
			out, err := exec.CommandContext(t.Context(), holdfast, args...).CombinedOutput()
			if err != nil && !strings.Contains(string(out), "goals are missed") {
				t.Fatalf("%v\n%s", err, out)
			}
			text, err := os.ReadFile(filepath.Join(dir, name+"-bench.json"))
			if err != nil {
				t.Fatal(err)
			}
			var report struct {
				Rows []struct {
					Measure string
					P50     float64
				}
			}
			if err := json.Unmarshal(text, &report); err != nil || len(report.Rows) < b.rows {
				t.Errorf("%d rows, %v", len(report.Rows), err)
			}
			for _, row := range report.Rows {
				if row.P50 <= 0 {
					t.Errorf("nothing was measured for %q", row.Measure)
				}
			}
		})
	}
}

// TestDemo shows a volume in two virtual machines, as `make demo-vm` does, from a
// small tree.
func TestDemo(t *testing.T) {
	holdfast := build(t)
	out, err := exec.CommandContext(t.Context(), holdfast, "demo", "--vm", "--source", ".").CombinedOutput()
	for _, said := range []string{"the guest has the disk", "ext4 has grown in the guest", "cat /data/note: written in the first machine", "is refused: ", "Done in"} {
		if err == nil && !strings.Contains(string(out), said) {
			t.Errorf("the demo does not say %q", said)
		}
	}
	if err != nil || t.Failed() {
		t.Fatalf("%v\n%s", err, out)
	}
}
