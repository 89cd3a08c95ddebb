package guesttest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
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
	for _, name := range []string{"holdfast", "holdfastd"} {
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
	for name, rows := range map[string]int{"vm": 20, "lvm": 6} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			out, err := exec.CommandContext(t.Context(), holdfast, "bench", name, "--quick", "--dir", dir, "--out", dir).CombinedOutput()
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
			if err := json.Unmarshal(text, &report); err != nil || len(report.Rows) < rows {
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
