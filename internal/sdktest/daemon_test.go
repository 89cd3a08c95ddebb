package sdktest_test

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

// startDaemon builds holdfastd and starts it in development mode on a fresh state
// directory; the test's end takes it away again.
func startDaemon(t *testing.T) *localdaemon.Daemon {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS, blockdevtest.Runc)
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
	d, err := localdaemon.Start(ctx, program, filepath.Join(dir, "state"), "--pool-mode", "image", "--pool-size", "4GiB",
		"--sandbox-pids", "200")
	if d != nil {
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := d.Remove(ctx); err != nil {
				t.Errorf("take the daemon away: %v", err)
			}
			if t.Failed() {
				t.Logf("the daemon's log ends:\n%s", tail(filepath.Join(dir, "holdfastd.log")))
			}
		})
	}
	if err != nil {
		t.Fatalf("start the daemon: %v\n%s", err, tail(filepath.Join(dir, "holdfastd.log")))
	}
	return d
}

const tailBytes = 4 << 10

func tail(path string) []byte {
	b, err := os.ReadFile(path)
	if err != nil {
		return []byte(err.Error())
	}
	return b[max(len(b)-tailBytes, 0):]
}
