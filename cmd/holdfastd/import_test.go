package main_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	. "holdfast/templates/archivetest"

	"holdfast/api/client"
	"holdfast/templates/oci/registrytest"
)

// An image of a real registry becomes a template by way of the command line, and
// so does the same image as a layout; both fill volumes.
func TestImport(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	l := NewLayout(Gzipped(Holding("etc/motd", "old\n"), Holding("etc/gone", "x")), Zstandard(Holding("etc/motd", "hello\n"), Holding("etc/.wh.gone", ""), Symlink("motd", "etc/motd")))
	ref := s.Push("team/app:1.0", l, l.Index.Manifests[0])
	n := newNode(t, "--registries", "http://"+s.Host)
	run := func(want int, args ...string) string {
		t.Helper()
		cmd := exec.Command(holdfast, args...)
		cmd.Env = append(os.Environ(), "HOLDFAST_SOCKET="+filepath.Join(n.state, "holdfastd.sock"), "HOLDFAST_WORKSPACE=main")
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Fatalf("%v: exit code %d, %v: %s", args, code, err, out)
		}
		return string(out)
	}
	if out := run(0, "template", "import", "app", ref, "--platform", "linux/amd64"); !strings.HasPrefix(out, "app:1 ") {
		t.Errorf("%s", out)
	}
	layout := filepath.Join(t.TempDir(), "layout.tar")
	must(t, os.WriteFile(layout, l.Tar(), 0o600))
	if out := run(0, "template", "push", "app", layout, "--format", "oci"); !strings.HasPrefix(out, "app:2 ") {
		t.Errorf("%s", out)
	}
	dir := t.TempDir()
	for name, b := range l.Files {
		must(t, errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), b, 0o600)))
	}
	if out := run(0, "template", "push", "app", dir, "--format", "oci"); !strings.HasPrefix(out, "app:3 ") {
		t.Errorf("%s", out)
	}
	for _, template := range []string{"app:1", "app:2", "app:3"} {
		name := "of-" + strings.ReplaceAll(template, ":", "-")
		_, err := n.CreateVolume(t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Template: template, Size: 16}}, "")
		must(t, err)
		if out := run(0, "volume", "cat", name, "etc/motd"); out != "hello\n" {
			t.Errorf("%s: %q", template, out)
		}
		if out := run(0, "volume", "ls", name, "etc"); strings.Contains(out, "gone") || !strings.Contains(out, "motd") {
			t.Errorf("%s: %q", template, out)
		}
	}
	for _, c := range []struct {
		image string
		code  int
		says  string
	}{
		{s.Host + "/team/app:2", 6, "has no"}, {"registry.example/app", 5, "not allowed"}, {"app", 6, "is not a reference"},
	} {
		if out := run(c.code, "template", "import", "none", c.image); !strings.Contains(out, c.says) {
			t.Errorf("%s: %s", c.image, out)
		}
	}
	if _, err := n.Template(t.Context(), "none"); err == nil {
		t.Error("a template of an image that is not there")
	}
	entries, err := os.ReadDir(filepath.Join(n.state, "pool", "staging", "uploads"))
	if err == nil && len(entries) > 0 {
		t.Errorf("left in staging: %v", entries)
	}
}
