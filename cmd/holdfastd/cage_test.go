package main_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
)

// cagesOf tells where a node's cages are, and the ids of those that runc knows.
func (n *node) cagesOf() (dir string, ids []string) {
	n.t.Helper()
	id, err := os.ReadFile(filepath.Join(n.state, "host"))
	must(n.t, err)
	dir = "/run/holdfast/cages-" + string(id[:12])
	entries, err := os.ReadDir(filepath.Join(dir, "state"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return dir, ids
}

// warmCages waits until as many cages wait as are told to.
func (n *node) warmCages(want int) []string {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		_, ids := n.cagesOf()
		if len(ids) == want {
			return ids
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("the cages are %v, want %d\n%s", ids, want, n.log)
		}
	}
}

// growDetached makes a volume larger that nobody uses, and gives what its
// filesystem has then, in bytes.
func (n *node) growDetached(name string, size int64) int64 {
	n.t.Helper()
	v, err := n.UpdateVolume(n.t.Context(), name, client.VolumeChange{SizeMiB: &size})
	must(n.t, err)
	return v.State.Sizes.Filesystem
}

// TestCages: a detached growth uses a cage up and another takes its place; a
// crash leaves some, which the next start removes; a stop leaves nothing.
func TestCages(t *testing.T) {
	n := newNode(t)
	before := n.warmCages(2)
	n.create("v", client.VolumeSpec{Size: 16})
	if got := n.growDetached("v", 64); got < 60<<20 {
		t.Errorf("the filesystem has %d bytes", got)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if now := n.warmCages(2); strings.Join(now, " ") != strings.Join(before, " ") {
			before = now
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("cages %v are not used up\n%s", before, n.log)
		}
	}
	n.kill()
	if _, left := n.cagesOf(); len(left) == 0 {
		t.Error("the crash left nothing, so the test proves nothing")
	}
	n.start()
	for _, id := range n.warmCages(2) {
		if strings.Contains(strings.Join(before, " "), id) {
			t.Errorf("cage %s of the former process is still there", id)
		}
	}
	dir, _ := n.cagesOf()
	n.stop()
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after the stop %s is there: %v", dir, err)
	}
	name := "holdfast-cage-" + strings.TrimPrefix(filepath.Base(dir), "cages-")
	if out, err := exec.Command("find", "/sys/fs/cgroup", "-name", name+"*").Output(); err != nil || len(out) > 0 {
		t.Errorf("control groups after the stop: %s, %v", out, err)
	}
}

// TestNoCageIsRefused: where cages cannot be, the daemon does not start, says what
// to do, and works without them only when it is told to.
func TestNoCageIsRefused(t *testing.T) {
	n := newNode(t)
	n.stop()
	runc, err := exec.LookPath("runc")
	must(t, err)
	// Without runc: nothing that can be executed has its name.
	cmd := exec.Command("unshare", append([]string{"--mount", "sh", "-ec", `mount --bind /dev/null "$0"; exec "$@"`, runc, holdfastd}, n.args...)...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 4 {
		t.Errorf("without runc the daemon ended with %v, want exit code 4\n%s", err, out)
	}
	for _, word := range []string{"runc is not installed", "install the package runc", `cage = \"off\"`} {
		if !strings.Contains(string(out), word) && !strings.Contains(string(out), strings.ReplaceAll(word, `\`, "")) {
			t.Errorf("it does not say %q:\n%s", word, out)
		}
	}
	n.args = append(n.args, "--cage", "off")
	n.start()
	if !n.log.has("without a cage") {
		t.Error("the log does not warn")
	}
	n.create("v", client.VolumeSpec{Size: 16})
	if got := n.growDetached("v", 64); got < 60<<20 {
		t.Errorf("the filesystem has %d bytes", got)
	}
	if _, ids := n.cagesOf(); len(ids) > 0 {
		t.Errorf("there are cages: %v", ids)
	}
}
