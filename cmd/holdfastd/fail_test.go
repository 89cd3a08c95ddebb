package main_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/api/client"
)

// TestFailStop: when the pool's filesystem is cut off under the daemon, it
// acknowledges nothing more and ends with 70; mounted anew, everything that had
// been acknowledged is there.
func TestFailStop(t *testing.T) {
	n := newNode(t)
	n.create("kept", client.VolumeSpec{Size: 8})
	out, err := exec.Command("xfs_io", "-x", "-c", "shutdown", filepath.Join(n.state, "pool")).CombinedOutput()
	if err != nil {
		t.Fatalf("xfs_io: %v: %s", err, out)
	}
	v, err := n.CreateVolume(t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: "lost"}, Spec: client.VolumeSpec{Size: 8}}, "")
	if err == nil {
		t.Errorf("a create was acknowledged on a dead filesystem: %+v", v)
	}
	var exit *exec.ExitError
	if err := n.wait(); !errors.As(err, &exit) || exit.ExitCode() != 70 {
		t.Errorf("the daemon ended with %v, want exit code 70\n%s", err, n.log)
	}
	if !n.log.has("storage failed") {
		t.Error("the log does not say why")
	}
	n.start()
	if _, err := n.Volume(t.Context(), "kept"); err != nil {
		t.Errorf("the acknowledged volume: %v", err)
	}
	if _, err := n.Volume(t.Context(), "lost"); !client.IsNotFound(err) {
		t.Errorf("the volume that was refused: %v", err)
	}
}

// TestStartMendsDeadPool: a pool's filesystem that has shut down is mounted anew
// at the next start.
func TestStartMendsDeadPool(t *testing.T) {
	n := newNode(t)
	n.create("kept", client.VolumeSpec{Size: 8})
	before := n.listing()
	n.stop()
	out, err := exec.Command("xfs_io", "-x", "-c", "shutdown", filepath.Join(n.state, "pool")).CombinedOutput()
	if err != nil {
		t.Fatalf("xfs_io: %v: %s", err, out)
	}
	n.start()
	if after := n.listing(); after != before {
		t.Errorf("after the restart:\n%s\nbefore:\n%s", after, before)
	}
	n.create("new", client.VolumeSpec{Size: 8})
}

// TestDamagedRecordsAreNotServed: a store that was lost (its filesystem not
// mounted, say) is noticed and not taken for a new node's.
func TestDamagedRecordsAreNotServed(t *testing.T) {
	n := newNode(t)
	n.create("kept", client.VolumeSpec{Size: 8})
	before := n.listing()
	n.stop()
	must(t, os.Rename(filepath.Join(n.state, "meta", "store"), filepath.Join(n.state, "meta", "moved")))
	if err := n.tryStart(); err == nil {
		t.Fatal("the daemon serves an empty store in the place of one that is lost")
	}
	_ = n.wait()
	if !strings.Contains(n.log.String(), "rebuild") {
		t.Errorf("the error does not name the way out:\n%s", n.log)
	}
	must(t, os.RemoveAll(filepath.Join(n.state, "meta", "store")))
	must(t, os.Rename(filepath.Join(n.state, "meta", "moved"), filepath.Join(n.state, "meta", "store")))
	n.start()
	if after := n.listing(); after != before {
		t.Errorf("with the store back:\n%s\nbefore:\n%s", after, before)
	}
}
