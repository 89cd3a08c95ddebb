package daemontest

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/localdaemon"
)

// patience bounds every wait for something that takes seconds on a quiet machine.
const patience = 2 * time.Minute

// Start builds holdfastd and starts it in development mode, with further
// arguments. The test fails when it cannot, and when the daemon leaves something
// behind.
func Start(t testing.TB, args ...string) *localdaemon.Daemon {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	blockdevtest.LeakCheck(t)
	dir := t.TempDir()
	program := filepath.Join(dir, "holdfastd")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "holdfast/cmd/holdfastd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, out)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	log := filepath.Join(dir, "holdfastd.log")
	d, err := localdaemon.Start(ctx, program, filepath.Join(dir, "state"), append([]string{"--pool-mode", "image", "--pool-size", "4GiB"}, args...)...)
	if d != nil {
		t.Cleanup(func() { remove(t, d, log) })
	}
	if err != nil {
		t.Fatalf("start the daemon: %v\n%s", err, tail(log))
	}
	return d
}

func remove(t testing.TB, d *localdaemon.Daemon, log string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := d.Remove(ctx); err != nil {
		t.Errorf("take the daemon away: %v", err)
	}
	if t.Failed() {
		t.Logf("the daemon's log ends:\n%s", tail(log))
	}
}

func tail(path string) []byte {
	const most = 4 << 10
	b, err := os.ReadFile(path)
	if err != nil {
		return []byte(err.Error())
	}
	return b[max(len(b)-most, 0):]
}
