package main_test

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

// TestUninstallWithAStoppedWorker: a worker that does not answer is told of, and keeps
// nobody waiting; ended, it is in nobody's way.
func TestUninstallWithAStoppedWorker(t *testing.T) {
	x := newExports(t)
	x.layered("work", 16)
	a, err := x.export("work", "nbd", "work", nil)
	must(t, err)
	pid := workerAt(t, a.Socket)
	x.kill()
	blockdevtest.StandStill(t, pid)
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
	out, err := exec.CommandContext(t.Context(), holdfastd, append([]string{"uninstall", "--yes"}, x.args...)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "does not answer") || !strings.Contains(string(out), "kill -CONT") {
		t.Errorf("uninstall: %v\n%s", err, out)
	}
	must(t, syscall.Kill(pid, syscall.SIGCONT))
	x.start()
}
