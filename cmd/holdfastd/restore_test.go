package main_test

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
)

// TestRebuildFromBackup: a backup gives back what no image tells, and what came
// after the backup is told by the images.
func TestRebuildFromBackup(t *testing.T) {
	n := newNode(t, "--backup-interval", "1s")
	asked := client.Volume{Metadata: client.VolumeMetadata{Name: "keyed"}, Spec: client.VolumeSpec{Size: 16}}
	first, err := n.CreateVolume(t.Context(), asked, "key-1")
	must(t, err)
	backup := n.awaitBackup(time.Now())
	n.create("later", client.VolumeSpec{Size: 16})
	size := int64(32)
	_, err = n.UpdateVolume(t.Context(), "keyed", client.VolumeChange{SizeMiB: &size})
	must(t, err)
	before := n.listing()
	n.asksDoctor("metadata and volumes are on different file systems")
	n.stop()
	must(t, os.RemoveAll(filepath.Join(n.state, "meta", "store")))
	code, out := command(t, holdfastd, append([]string{"rebuild", "--yes", "--backup", backup}, n.args...)...)
	if code != 0 {
		t.Fatalf("rebuild: exit code %d\n%s", code, out)
	}
	n.start()
	if after := n.listing(); after != before {
		t.Errorf("after the rebuild:\n%s\nbefore:\n%s", after, before)
	}
	again, err := n.CreateVolume(t.Context(), asked, "key-1")
	if err != nil || again.Metadata.CreatedAt != first.Metadata.CreatedAt {
		t.Errorf("the key of the backup made %+v, %v", again.Metadata, err)
	}
}

// TestDamagedSideLog: neither a start nor a rebuild goes past a damaged side log,
// both say what to do, the rebuild leaves the records where they are, and what
// it says is true: without the side log the keys come from the records.
func TestDamagedSideLog(t *testing.T) {
	n := newNode(t)
	_, err := n.CreateKey(t.Context(), client.NewKey{Name: "kept", Role: "reader"})
	must(t, err)
	n.create("v", client.VolumeSpec{Size: 16})
	before, err := n.Keys(t.Context())
	must(t, err)
	n.stop()
	path := filepath.Join(n.state, "sidelog")
	text, err := os.ReadFile(path)
	must(t, err)
	text[len(text)/2] ^= 0x20
	must(t, os.WriteFile(path, text, 0o600))

	for _, args := range [][]string{n.args, append([]string{"rebuild", "--yes"}, n.args...)} {
		code, out := command(t, holdfastd, args...)
		if code != 1 || !strings.Contains(out, "sidelog") || !strings.Contains(out, "move it away") {
			t.Errorf("%v: exit code %d\n%s", args[:2], code, out)
		}
	}
	if aside, _ := filepath.Glob(filepath.Join(n.state, "*.before-rebuild-*")); len(aside) > 0 {
		t.Errorf("a rebuild that cannot go on has moved %v", aside)
	}
	must(t, os.Rename(path, path+".damaged"))
	n.start()
	after, err := n.Keys(t.Context())
	must(t, err)
	if !reflect.DeepEqual(after, before) {
		t.Errorf("keys without the side log:\n%+v\nbefore:\n%+v", after, before)
	}
}

// awaitBackup waits for a backup that was begun after a moment, and copies it
// away from the daemon's own clean-up.
func (n *node) awaitBackup(after time.Time) string {
	n.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for time.Now().Before(deadline) {
		paths, err := filepath.Glob(filepath.Join(n.state, "backups", "records-*.backup"))
		must(n.t, err)
		for _, path := range paths {
			info, err := os.Stat(path)
			if err != nil || !info.ModTime().After(after.Add(time.Second)) {
				continue
			}
			b, err := os.ReadFile(path)
			must(n.t, err)
			kept := filepath.Join(n.t.TempDir(), "backup")
			must(n.t, os.WriteFile(kept, b, 0o600))
			return kept
		}
		time.Sleep(50 * time.Millisecond)
	}
	n.t.Fatal("there is no backup after a minute")
	return ""
}
