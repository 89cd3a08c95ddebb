package daemon

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

func TestSecondHolderLearnsWhoHolds(t *testing.T) {
	dir := t.TempDir()
	first, err := LockState(dir, "serve")
	must(t, err)
	must(t, first.Listening("http://127.0.0.1:7433/v0"))
	_, err = LockState(dir, "rebuild")
	if !errors.Is(err, ErrHeld) {
		t.Fatalf("error is %v, want ErrHeld", err)
	}
	for _, want := range []string{strconv.Itoa(os.Getpid()), "serve", "http://127.0.0.1:7433/v0", dir} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	if ExitCode(err) != exitHeld {
		t.Errorf("exit code is %d", ExitCode(err))
	}
	must(t, first.Release())
	second, err := LockState(dir, "serve")
	must(t, err)
	must(t, second.Release())
}

// TestChildDoesNotKeepTheLock: a container that the daemon started must not
// keep the next daemon out.
func TestChildDoesNotKeepTheLock(t *testing.T) {
	dir := t.TempDir()
	l, err := LockState(dir, "serve")
	must(t, err)
	child := exec.CommandContext(t.Context(), "sleep", "600")
	must(t, child.Start())
	t.Cleanup(func() { _ = child.Process.Kill(); _ = child.Wait() })
	must(t, l.Release())
	again, err := LockState(dir, "serve")
	if err != nil {
		t.Fatalf("the lock outlived its process: %v", err)
	}
	must(t, again.Release())
}
