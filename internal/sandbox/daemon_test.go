package sandbox_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/api/apitest"
	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/localdaemon"
	"holdfast/internal/sandbox"
)

// patience bounds every wait for something that takes a moment on a quiet machine.
const patience = 2 * time.Minute

// rig is a daemon with sandboxes. Every raw request to it is held against the
// OpenAPI document.
type rig struct {
	*testing.T
	*localdaemon.Daemon
	ctx  context.Context
	bin  string
	http *http.Client
}

// program builds holdfastd, once for all tests.
var program = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(programs, "holdfastd")
	build := exec.Command("go", "build", "-o", bin, "holdfast/cmd/holdfastd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", build.Args, err, out)
	}
	return bin, nil
})

var programs string // directory

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "sandbox-test-")
	if err != nil {
		panic(err)
	}
	programs = dir
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

func start(t *testing.T, flags ...string) *rig {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS, blockdevtest.Runc)
	blockdevtest.LeakCheck(t)
	dir := t.TempDir()
	bin, err := program()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{T: t, bin: bin, http: &http.Client{Transport: apitest.RoundTripper(t, nil)}}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	r.ctx = ctx
	r.Daemon, err = localdaemon.Start(ctx, r.bin, filepath.Join(dir, "state"), append([]string{"--pool-mode", "image", "--pool-size", "1GiB"}, flags...)...)
	if r.Daemon != nil {
		t.Cleanup(r.remove)
	}
	r.must(err)
	return r
}

// remove takes everything away, and the test fails if something of a sandbox is left.
func (r *rig) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	left, err := r.Client.Sandboxes(ctx)
	if err != nil {
		r.Errorf("sandboxes: %v", err)
	}
	for _, s := range left {
		if _, err := r.Client.DeleteSandbox(ctx, s.Metadata.Name); err != nil {
			r.Error(err)
		}
		if err := r.Client.AwaitSandboxGone(ctx, s.Metadata.Name); err != nil {
			r.Error(err)
		}
	}
	boxes, groups := r.boxes(), r.groups()
	if len(boxes) > 0 || len(groups) > 0 {
		r.Errorf("left behind: %v %v", boxes, groups)
	}
	run := r.runDir()
	if err := r.Remove(ctx); err != nil {
		r.Errorf("take the daemon away: %v", err)
	}
	if _, err := os.Stat(run); !os.IsNotExist(err) {
		r.Errorf("%s is left: %v", run, err)
	}
	if r.Failed() {
		log, _ := os.ReadFile(filepath.Join(filepath.Dir(r.State), "holdfastd.log"))
		r.Logf("the daemon's log ends:\n%s", log[max(0, len(log)-6000):])
	}
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// runDir is where the daemon's running sandboxes are.
func (r *rig) runDir() string {
	id, err := os.ReadFile(filepath.Join(r.State, "host"))
	if err != nil {
		r.Error(err)
	}
	return filepath.Join("/run/holdfast", strings.TrimSpace(string(id)))
}

func (r *rig) boxes() (ids []string) {
	entries, err := os.ReadDir(filepath.Join(r.runDir(), "boxes"))
	if err != nil && !os.IsNotExist(err) {
		r.Error(err)
	}
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}

// groups are the control groups of this daemon's sandboxes.
func (r *rig) groups() (found []string) {
	for _, id := range r.boxes() {
		for _, pattern := range []string{"/sys/fs/cgroup/holdfast/", "/sys/fs/cgroup/*/holdfast/"} {
			some, err := filepath.Glob(pattern + id)
			r.must(err)
			found = append(found, some...)
		}
	}
	return found
}

// first is the host's pid of a sandbox's first process.
func (r *rig) first(id string) string {
	r.Helper()
	out, err := exec.Command("runc", "--root", sandbox.RuncRoot(r.runDir()), "state", id).Output()
	r.must(err)
	var state struct{ Pid int }
	r.must(json.Unmarshal(out, &state))
	return fmt.Sprint(state.Pid)
}

func (r *rig) volume(name string, mib int64) {
	r.Helper()
	_, err := r.Client.CreateVolume(r.ctx, client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: client.VolumeSpec{Size: mib}}, "")
	r.must(err)
}

func (r *rig) box(name string, mounts ...client.VolumeMount) client.Sandbox {
	r.Helper()
	s, err := r.Client.CreateSandbox(r.ctx, newBox(name, mounts...))
	r.must(err)
	return s
}

func newBox(name string, mounts ...client.VolumeMount) client.Sandbox {
	return client.Sandbox{
		Metadata: client.SandboxMetadata{VolumeMetadata: client.VolumeMetadata{Name: name}},
		Spec:     client.SandboxSpec{Runtime: client.SandboxRuntime{Memory: 128}, Volumes: mounts},
	}
}

func at(path, volume string) client.VolumeMount {
	return client.VolumeMount{Name: volume, MountPath: path}
}

func scratch(path string) client.VolumeMount {
	return client.VolumeMount{Name: "scratch", MountPath: path, Type: "ephemeral", SizeMB: 8}
}

// sh runs a command that must succeed and gives its output.
func (r *rig) sh(box, command string) string {
	r.Helper()
	p, err := r.Client.Exec(r.ctx, box, client.Exec{Command: command, Wait: true})
	r.must(err)
	if p.ExitCode != 0 {
		r.Fatalf("%s: exit code %d: %s%s", command, p.ExitCode, p.Stdout, p.Stderr)
	}
	return p.Stdout
}

// await asks until the answer is yes.
func (r *rig) await(what string, ask func() bool) {
	r.Helper()
	for deadline := time.Now().Add(patience); !ask(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.Fatalf("waited in vain for %s", what)
		}
	}
}

func (r *rig) attachedTo(volume string) string {
	r.Helper()
	v, err := r.Client.Volume(r.ctx, volume)
	r.must(err)
	return v.State.AttachedTo
}

// ephemerals are the workspace's volumes that were made for sandboxes.
func (r *rig) ephemerals() (names []string) {
	r.Helper()
	for v, err := range r.Client.Volumes(r.ctx, client.VolumeQuery{}) {
		r.must(err)
		if v.Metadata.Labels["holdfast-ephemeral"] != "" {
			names = append(names, v.Metadata.Name)
		}
	}
	return names
}

// raw makes a request without the client: "PUT /sandboxes/x", a body, headers.
func (r *rig) raw(line string, body any, headers ...string) (status int, answer map[string]any) {
	r.Helper()
	method, path, _ := strings.Cut(line, " ")
	var from io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		from = strings.NewReader(b)
	default:
		text, err := json.Marshal(b)
		r.must(err)
		from = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(r.ctx, method, r.URL+path, from)
	r.must(err)
	req.Header.Set("Authorization", "Bearer "+r.Key)
	req.Header.Set("Blaxel-Version", "2026-04-28")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	resp, err := r.http.Do(req)
	r.must(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	r.must(err)
	if json.Unmarshal(text, &answer) != nil {
		answer = map[string]any{"text": string(text)}
	}
	return resp.StatusCode, answer
}
