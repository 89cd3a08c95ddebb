package vmtest_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/guest"
	"holdfast/internal/guest/agent"
	"holdfast/internal/vmtest"
)

// TestGoTestInside: what `go test` says in a guest comes back: output, exit code and
// coverage.
func TestGoTestInside(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.VM)
	profile := filepath.Join(t.TempDir(), "cover")
	run := func(env string) (string, error) {
		c := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "-coverpkg=holdfast/internal/bytesize", "-coverprofile="+profile, "holdfast/internal/vmtest/insidetest")
		c.Env = append(os.Environ(), env)
		out, err := c.CombinedOutput()
		return string(out), err
	}
	out, err := run("HOLDFAST_INSIDE=pass")
	if err != nil || !strings.Contains(out, "--- PASS: TestInside") || !regexp.MustCompile(`kernel .*-cloud-.*, 64 MiB`).MatchString(out) {
		t.Errorf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(profile)
	if err != nil || !regexp.MustCompile(`(?m)^holdfast/internal/bytesize/.* [1-9][0-9]*$`).Match(text) {
		t.Errorf("coverage, %v:\n%s", err, text)
	}
	out, err = run("HOLDFAST_INSIDE=fail")
	var failed *exec.ExitError
	if !errors.As(err, &failed) || failed.ExitCode() != 1 || !strings.Contains(out, "it was told to fail") || !strings.Contains(out, "--- FAIL: TestInside") {
		t.Errorf("a test that fails: %v\n%s", err, out)
	}
}

// gone fails the test if a guest has left something behind.
func gone(t *testing.T, dir string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(dir, "vm.*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestPanics: a guest whose kernel panics, running or booting, ends at once, and the
// error has what its console said.
func TestPanics(t *testing.T) {
	blockdevtest.LeakCheck(t)
	v := vmtest.Start(t, vmtest.Options{})
	err := v.Run(t.Context(), "sh", "-c", "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 1000")
	if !errors.Is(err, agent.ErrLost) || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("%v", err)
	}
	if err := v.Do(t.Context(), "query-status", nil); err == nil {
		t.Error("QEMU lives")
	}
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	_, err = guest.Open(t.Context(), guest.Options{Boot: true, Args: []string{"-append", "console=ttyS0 panic=-1 rdinit=/nothing"}})
	if !errors.Is(err, agent.ErrLost) || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("%v", err)
	}
	gone(t, dir)
}

// TestHangs: a guest that stands still, running or booting, is given up at the
// deadline.
func TestHangs(t *testing.T) {
	blockdevtest.LeakCheck(t)
	v := vmtest.Start(t, vmtest.Options{})
	if err := v.Do(t.Context(), "stop", nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := v.Run(ctx, "true"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "the guest's console ends") {
		t.Errorf("%v", err)
	}
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := guest.Open(ctx, guest.Options{Boot: true, Args: []string{"-S"}}) // never begins
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "the guest's console ends") {
		t.Errorf("%v", err)
	}
	gone(t, dir)
}
