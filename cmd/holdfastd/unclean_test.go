package main_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/api/client"
)

// TestUncleanStop flips a byte of a template image while the daemon is not there.
// After an orderly stop the next scrub would find it; after SIGKILL it is found
// before the image is used, and no volume gets it.
func TestUncleanStop(t *testing.T) {
	n := newNode(t)
	ctx := t.Context()
	mark := filepath.Join(n.state, "clean")
	marked := func(want bool) {
		t.Helper()
		if _, err := os.Stat(mark); errors.Is(err, fs.ErrNotExist) == want {
			t.Errorf("the mark of an orderly stop: %v", err)
		}
	}
	tree := sampleTree(t)
	n.push("app", tree)
	must(t, os.WriteFile(filepath.Join(tree, "hello.txt"), []byte("not hurt\n"), 0o644))
	n.push("other", tree)
	n.create("before", client.VolumeSpec{Template: "app", Size: 32})
	marked(false)
	n.stop()
	marked(true)
	n.start()
	marked(false)
	if unverified := n.metric("holdfast_template_versions_unverified"); unverified != "0" {
		t.Errorf("after an orderly stop %s versions are to be verified", unverified)
	}
	n.kill()
	marked(false)
	flipInPool(t, n, "from the template\n")
	n.start()
	if unverified := n.metric("holdfast_template_versions_unverified"); unverified != "2" {
		t.Errorf("after SIGKILL %s versions are to be verified, not 2", unverified)
	}
	_, err := n.CreateVolume(ctx, client.Volume{Metadata: client.VolumeMetadata{Name: "hurt"}, Spec: client.VolumeSpec{Template: "app", Size: 32}}, "")
	var refused *client.Error
	if !errors.As(err, &refused) || refused.Code != "VERSION_DAMAGED" || refused.Status != 409 {
		t.Fatalf("a volume from a damaged image: %v", err)
	}
	if _, err := n.Volume(ctx, "hurt"); !client.IsNotFound(err) {
		t.Errorf("left behind: %v", err)
	}
	n.create("whole", client.VolumeSpec{Template: "other", Size: 32})
	app, err := n.Template(ctx, "app")
	must(t, err)
	if v := app.Versions[0]; v.Status != "FAILED" || !v.Damaged || app.State.LatestVersion != "" {
		t.Errorf("%+v, %+v", v, app.State)
	}
	if damaged := n.metric(`holdfast_template_versions{state="damaged"}`); damaged != "1" {
		t.Errorf("%s versions are damaged in the metrics", damaged)
	}
	if told := n.metric(`holdfast_template_events_total{type="damaged"}`); told != "1" {
		t.Errorf("%s events in the metrics", told)
	}
	checks, err := n.Doctor(ctx)
	must(t, err)
	found := false
	for _, c := range checks {
		found = found || c.Name == "template images" && c.Status == "warn" && strings.Contains(c.Found, "main/app:1")
	}
	if !found {
		t.Errorf("the doctor does not name it: %+v", checks)
	}
	h, err := n.TemplateHistory(ctx, "app")
	must(t, err)
	if len(h.Events) != 1 || h.Events[0].Type != "damaged" || h.Versions[0].Volumes.Count != 1 {
		t.Errorf("%+v", h)
	}
}

// flipInPool changes a byte of some text in the one template image that has it.
func flipInPool(t *testing.T, n *node, text string) {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(n.state, "pool", "images", "rev-*", "image"))
	must(t, err)
	for _, path := range images {
		b, err := os.ReadFile(path)
		must(t, err)
		if at := bytes.Index(b, []byte(text)); at >= 0 {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte{b[at] ^ 1}, int64(at))
			must(t, errors.Join(err, f.Sync(), f.Close()))
			return
		}
	}
	t.Fatalf("no template image of %d holds %q", len(images), text)
}

// metric is the value of a metric, by its name with labels.
func (n *node) metric(name string) string {
	n.t.Helper()
	address, err := os.ReadFile(filepath.Join(n.state, "listen"))
	must(n.t, err)
	resp, err := http.Get("http://" + strings.TrimSpace(string(address)) + "/metrics")
	must(n.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(n.t, err)
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	n.t.Errorf("there is no metric %s", name)
	return ""
}
