package main_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/internal/tarball"
)

// push makes a template of a directory.
func (n *node) push(name, dir string) client.Template {
	n.t.Helper()
	plan, err := tarball.New(n.t.Context(), dir)
	must(n.t, err)
	archive := plan.Reader()
	defer archive.Close()
	tpl, err := n.PushTemplate(n.t.Context(), client.Push{Name: name, Archive: archive, Length: plan.Length()})
	must(n.t, err)
	return tpl
}

func (n *node) create(name string, spec client.VolumeSpec) client.Volume {
	n.t.Helper()
	v, err := n.CreateVolume(n.t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: spec}, "")
	must(n.t, err)
	if v.Status != "DEPLOYED" {
		n.t.Fatalf("volume %s is %s, want DEPLOYED", name, v.Status)
	}
	return v
}

func (n *node) attachTo(c *runctest.Container, volume, mountPath string) client.Attachment {
	n.t.Helper()
	a, err := n.Attach(n.t.Context(), volume, client.Attachment{
		Holder: "sandbox:" + c.ID, MountPath: mountPath, Target: client.Target{Type: "runc", Container: c.ID, Root: c.Root},
	})
	must(n.t, err)
	return a
}

// sampleTree is a small tree with what templates must keep.
func sampleTree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "bin"), 0o755))
	must(t, os.Mkdir(filepath.Join(dir, "empty"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "hello.txt"), []byte("from the template\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "bin", "tool"), []byte("#!/bin/sh\n"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "café-日本語-🚀.txt"), []byte("odd"), 0o600))
	must(t, os.Symlink("hello.txt", filepath.Join(dir, "link")))
	must(t, os.Link(filepath.Join(dir, "hello.txt"), filepath.Join(dir, "hard")))
	return dir
}

// TestLife is the main job, once: a template, a volume of it, a container that
// writes, the daemon replaced under it, the container destroyed, the data in
// another one, growth while mounted, and the end.
func TestLife(t *testing.T) {
	first, second := runctest.Start(t, runctest.Options{}), runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", first.Root+","+second.Root)
	ctx := t.Context()

	if tpl := n.push("demo", sampleTree(t)); tpl.State.LatestVersion != "1" {
		t.Fatalf("latest version is %q", tpl.State.LatestVersion)
	}
	n.create("data", client.VolumeSpec{Size: 64, Template: "demo:1"})
	a := n.attachTo(first, "data", "/data")
	if got := first.Shell("cat /data/link && stat -c %h /data/hard"); got != "from the template\n2\n" {
		t.Fatalf("the container reads %q", got)
	}
	first.Shell("echo written > /data/new && sync")

	// The daemon goes and comes; the container's mount stays as it is.
	first.Background("while :; do date > /data/clock || exit 1; sleep 0.01; done")
	n.stop()
	first.Shell("echo 'without a daemon' >> /data/new && sync")
	n.start()
	if v, err := n.Volume(ctx, "data"); err != nil || v.State.AttachedTo != "sandbox:"+first.ID {
		t.Fatalf("after the restart: %+v, %v", v.State, err)
	}
	if again := n.attachTo(first, "data", "/data"); again.ID != a.ID {
		t.Errorf("the same request made another attachment: %s, %s", again.ID, a.ID)
	}
	if _, err := n.DeleteVolume(ctx, "data"); client.Status(err) != 409 {
		t.Errorf("delete of an attached volume: %v", err)
	}

	first.Delete()
	must(t, n.detachAll("data"))
	n.attachTo(second, "data", "/srv/work")
	if got := second.Shell("cat /srv/work/new"); got != "written\nwithout a daemon\n" {
		t.Errorf("the second container reads %q", got)
	}
	must(t, n.detachAll("data"))
	var b bytes.Buffer
	must(t, n.ReadFile(ctx, "data", "/new", &b))
	if b.String() != "written\nwithout a daemon\n" {
		t.Errorf("read from outside: %q", b.String())
	}
	_, err := n.DeleteVolume(ctx, "data")
	must(t, err)
	if _, err := n.Volume(ctx, "data"); !client.IsNotFound(err) {
		t.Errorf("after delete: %v", err)
	}
}

// detachAll takes a volume out of wherever it still is; a sandbox that died may
// have been noticed already.
func (n *node) detachAll(volume string) error {
	all, err := n.Attachments(n.t.Context(), volume)
	for _, a := range all {
		if _, err := n.Detach(n.t.Context(), volume, a.ID); err != nil && !client.IsNotFound(err) {
			return err
		}
	}
	return err
}

// TestGrowXFSWhileMounted: the container sees the room at once.
func TestGrowXFSWhileMounted(t *testing.T) {
	c := runctest.Start(t, runctest.Options{})
	n := newNode(t, "--runc-roots", c.Root, "--overprovision", "2")
	n.create("grows", client.VolumeSpec{Size: 320, Filesystem: "xfs"})
	n.attachTo(c, "grows", "/data")
	size := int64(640)
	v, err := n.UpdateVolume(t.Context(), "grows", client.VolumeChange{SizeMiB: &size})
	must(t, err)
	if s := v.State.Sizes; s == nil || s.Pending != "" || s.Device != size<<20 || s.Filesystem < 600<<20 {
		t.Errorf("sizes are %+v", v.State.Sizes)
	}
	if got := strings.Fields(c.Shell("df -m /data | tail -1")); len(got) < 2 || len(got[1]) != 3 || got[1] < "550" {
		t.Errorf("df in the container: %v", got)
	}
}

// TestDevKey: what --dev promises, over TCP with the key that it wrote.
func TestDevKey(t *testing.T) {
	n := newNode(t)
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(n.state, name))
		must(t, err)
		return strings.TrimSpace(string(b))
	}
	info, err := os.Stat(filepath.Join(n.state, "dev.key"))
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("dev.key has mode %v", info.Mode())
	}
	key := read("dev.key")
	over := func() *client.Client {
		cl, err := client.New(client.Options{URL: "http://" + read("listen") + "/v0", Key: key})
		must(t, err)
		t.Cleanup(cl.Close)
		return cl
	}
	_, err = over().CreateVolume(t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: "a"}, Spec: client.VolumeSpec{Size: 1}}, "")
	must(t, err)
	n.stop()
	n.start()
	if read("dev.key") != key {
		t.Error("the second start made another key")
	}
	if v, err := over().Volume(t.Context(), "a"); err != nil || v.Metadata.Workspace != "main" {
		t.Errorf("with the key after a restart: %+v, %v", v.Metadata, err)
	}
	if n.log.has(key) {
		t.Error("the log has the key")
	}
	wrong := key[:len(key)-1] + "x"
	if wrong == key {
		wrong = key[:len(key)-1] + "y"
	}
	bad, err := client.New(client.Options{URL: "http://" + read("listen") + "/v0", Key: wrong})
	must(t, err)
	if _, err := bad.Volume(t.Context(), "a"); client.Status(err) != 401 {
		t.Errorf("with a wrong key: %v", err)
	}
}

// TestSecondDaemonIsRefused, and is told who is there.
func TestSecondDaemonIsRefused(t *testing.T) {
	n := newNode(t)
	code, out := command(t, holdfastd, n.args...)
	if code != 3 || !strings.Contains(out, "is held by process") || !strings.Contains(out, "127.0.0.1:") {
		t.Errorf("exit code %d: %s", code, out)
	}
	code, out = command(t, holdfastd, "rebuild", "--yes", "--state-dir", n.state)
	if code != 3 {
		t.Errorf("rebuild beside the daemon: exit code %d: %s", code, out)
	}
}

// TestDrain: a request under way ends well, a new mutation does not begin.
func TestDrain(t *testing.T) {
	n := newNode(t)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "big"), make([]byte, 8<<20), 0o600))
	plan, err := tarball.New(t.Context(), dir)
	must(t, err)
	archive := plan.Reader()
	defer archive.Close()
	begun, goOn, pushed := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		first := true
		_, err := n.PushTemplate(t.Context(), client.Push{Name: "slow", Archive: archive, Length: plan.Length(), Progress: func(at int64) {
			if first && at > 1<<20 {
				first = false
				close(begun)
				<-goOn
			}
		}})
		pushed <- err
	}()
	<-begun
	must(t, n.cmd.Process.Signal(os.Interrupt))
	for !n.log.has("stopping: no new work") { // printed before the listener closes
		select {
		case err := <-n.ended:
			t.Fatalf("the daemon ended under an upload: %v\n%s", err, n.log)
		default:
		}
	}
	close(goOn)
	// The upload's own answer comes; the look at the template after it may find
	// the listener closed.
	if err := <-pushed; err != nil && client.Status(err) != 0 {
		t.Errorf("the upload under way failed: %v", err)
	}
	must(t, n.wait())
	n.start()
	if tpl, err := n.Template(t.Context(), "slow"); err != nil || tpl.State.Status != "ready" {
		t.Errorf("after the drain the template is %+v, %v", tpl.State, err)
	}
}

// TestRebuild: without the record store the same listing comes back, byte for byte.
func TestRebuild(t *testing.T) {
	n := newNode(t)
	n.push("tpl", sampleTree(t))
	n.create("blank", client.VolumeSpec{Size: 16})
	n.create("filled", client.VolumeSpec{Size: 64, Template: "tpl"})
	n.create("xfs", client.VolumeSpec{Size: 300, Filesystem: "xfs"})
	name := "named"
	_, err := n.UpdateVolume(t.Context(), "blank", client.VolumeChange{DisplayName: &name, Labels: map[string]string{"a": "b"}})
	must(t, err)
	n.create("attached", client.VolumeSpec{Size: 16})
	_, err = n.Attach(t.Context(), "attached", client.Attachment{
		Holder: "sandbox:s", Target: client.Target{Type: "host", Path: filepath.Join(n.state, "attach", "a")}})
	must(t, err)
	n.setTenancy()
	n.create("deleted", client.VolumeSpec{Size: 1})
	_, err = n.DeleteVolume(t.Context(), "deleted")
	must(t, err)
	before := n.listing()
	n.stop()
	must(t, os.RemoveAll(filepath.Join(n.state, "meta", "store")))
	code, out := command(t, holdfastd, append([]string{"rebuild", "--yes"}, n.args...)...)
	if code != 0 || !strings.Contains(out, "4 restored") {
		t.Fatalf("rebuild: exit code %d\n%s", code, out)
	}
	n.start()
	if after := n.listing(); after != before {
		t.Errorf("after the rebuild:\n%s\nbefore:\n%s", after, before)
	}
	if kept := glob(t, n.state, "meta/store.before-rebuild-*"); len(kept) != 0 {
		t.Errorf("there was no store to keep, and there is %v", kept)
	}
	must(t, n.detachAll("attached"))
}

// setTenancy makes a workspace with a quota, a key that is good and one that is not.
func (n *node) setTenancy() {
	n.t.Helper()
	ctx := n.t.Context()
	_, err := n.CreateWorkspace(ctx, "other")
	must(n.t, err)
	_, err = n.SetQuota(ctx, "other", client.Quota{Volumes: 3, MiB: 100})
	must(n.t, err)
	_, err = n.CreateKey(ctx, client.NewKey{Workspace: "other", Name: "good", Role: "writer"})
	must(n.t, err)
	k, err := n.CreateKey(ctx, client.NewKey{Workspace: "main", Name: "revoked", Role: "reader"})
	must(n.t, err)
	_, err = n.RevokeKey(ctx, k.ID)
	must(n.t, err)
}

// TestMetrics: what operators watch is there and counts.
func TestMetrics(t *testing.T) {
	n := newNode(t)
	n.create("a", client.VolumeSpec{Size: 8})
	_, err := n.CreateSnapshot(t.Context(), "a", client.NewSnapshot{Name: "s"}, "")
	must(t, err)
	_, err = n.DeleteSnapshot(t.Context(), "a", "s") // gives back what was promised to it
	must(t, err)
	_, err = n.Volume(t.Context(), "nothing")
	if !client.IsNotFound(err) {
		t.Fatal(err)
	}
	address, err := os.ReadFile(filepath.Join(n.state, "listen"))
	must(t, err)
	resp, err := http.Get("http://" + strings.TrimSpace(string(address)) + "/metrics")
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	for _, want := range []string{
		`holdfast_volumes{status="DEPLOYED"} 1`,
		`holdfast_pool_provisioned_bytes{pool="default"} 8.388608e+06`,
		`holdfast_action_duration_seconds_count{action="allocate",outcome="ok"} 1`,
		`holdfast_http_errors_total{error="NOT_FOUND"} 1`,
		`holdfast_snapshots 0`, `holdfast_snapshot_promised_bytes 0`, `holdfast_action_duration_seconds_count{action="snapshot",outcome="ok"} 1`,
		`holdfast_healthy 1`, `holdfast_scrape_errors 0`, `holdfast_attachments{type="runc"} 0`,
		`holdfast_metadata_commit_duration_seconds_count `, `holdfast_build_info{`, `process_resident_memory_bytes `, `go_goroutines `,
	} {
		if !strings.Contains(string(body), "\n"+want) {
			t.Errorf("there is no %s", want)
		}
	}
	if strings.Contains(string(body), `"a"`) {
		t.Error("a volume's name is a label")
	}
}

// listing is everything that the API shows, in canonical form.
func (n *node) listing() string {
	n.t.Helper()
	ctx := n.t.Context()
	all := map[string]any{}
	var volumes []client.Volume
	for v, err := range n.Volumes(ctx, client.VolumeQuery{Sort: "name:asc"}) {
		must(n.t, err)
		full, err := n.Volume(ctx, v.Metadata.Name)
		must(n.t, err)
		full.State.Sizes.Allocated, full.State.Sizes.Shared = 0, 0 // asked of the file system, not kept
		volumes = append(volumes, full)
	}
	all["volumes"] = volumes
	kept, err := n.Templates(ctx)
	must(n.t, err)
	for _, tpl := range kept {
		for i := range tpl.Versions {
			tpl.Versions[i].VerifiedAt = time.Time{} // goes on by itself
		}
	}
	all["templates"] = kept
	all["keys"], err = n.Keys(ctx)
	must(n.t, err)
	all["workspaces"], err = n.Workspaces(ctx)
	must(n.t, err)
	b, err := json.MarshalIndent(all, "", " ")
	must(n.t, err)
	return string(b)
}

// TestWithoutReflink: a directory pool on a filesystem that shares no bytes;
// the records then have a filesystem of their own.
func TestWithoutReflink(t *testing.T) {
	n := newNode(t, "--pool-mode", "copy")
	if images := glob(t, n.state, "*.img"); len(images) != 1 || filepath.Base(images[0]) != "meta.img" {
		t.Errorf("images are %v, want that of the records alone", images)
	}
	n.push("tpl", sampleTree(t))
	n.create("filled", client.VolumeSpec{Size: 32, Template: "tpl"})
	checks, err := n.Doctor(t.Context())
	must(t, err)
	for _, c := range checks {
		if c.Name == "metadata-apart" && c.Status != "ok" {
			t.Errorf("doctor: %+v", c)
		}
	}
	n.asksDoctor("metadata and volumes are on different file systems")
	before := n.listing()
	n.kill()
	n.start()
	if after := n.listing(); after != before {
		t.Errorf("after the restart:\n%s\nbefore:\n%s", after, before)
	}
	n.stop()
	n.uninstall() // as after a boot: nothing is mounted
	n.asksDoctor("before a daemon has mounted")
	code, out := command(t, holdfastd, append([]string{"rebuild", "--yes"}, n.args...)...)
	if code != 0 {
		t.Fatalf("rebuild: exit code %d\n%s", code, out)
	}
	n.start()
	if after := n.listing(); after != before {
		t.Errorf("after the rebuild:\n%s\nbefore:\n%s", after, before)
	}
	var b bytes.Buffer
	must(t, n.ReadFile(t.Context(), "filled", "/hello.txt", &b))
	if b.String() != "from the template\n" {
		t.Errorf("content is %q", b.String())
	}
}

// asksDoctor holds what the doctor says without a daemon against what there is.
func (n *node) asksDoctor(want string) {
	n.t.Helper()
	code, out := command(n.t, holdfastd, append([]string{"doctor"}, n.args...)...)
	if code != 0 || !strings.Contains(out, want) || strings.Contains(out, "share a file system") {
		n.t.Errorf("the doctor does not say %q, exit code %d:\n%s", want, code, out)
	}
}
