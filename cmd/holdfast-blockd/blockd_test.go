package main_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/vhost/frontend"
)

const (
	volumeID = blockdev.ID("vol-06c8qk4g1h6s9tj2m0a4n7v5b0")
	size     = 8 << 20
	block    = 4096
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// program is the worker as it is delivered: without C, which cannot set all threads'
// privileges. It is built once.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "blockd")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "holdfast-blockd")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.Join(err, errors.New(string(out)))
	}
	return path, nil
})

func TestMain(m *testing.M) {
	if words := os.Getenv(asDaemon); words != "" {
		beDaemon(words)
	}
	if path := os.Getenv(asStranger); path != "" {
		beStranger(path)
	}
	code := m.Run()
	if path, err := program(); err == nil {
		_ = os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// starter starts workers in a directory of their own, and sees that nothing is left.
func starter(t testing.TB, change func(*control.Options)) *control.Starter {
	t.Helper()
	path, err := program()
	must(t, err)
	dir, err := os.MkdirTemp("/tmp", "w") // a socket's address is short
	must(t, err)
	o := control.Options{Program: path, Dir: dir, Cgroup: "holdfast-test-" + filepath.Base(dir), Log: os.Stderr, DieWithParent: true}
	if change != nil {
		change(&o)
	}
	s, err := control.New(o)
	must(t, err)
	t.Cleanup(func() {
		ids, err := s.List(context.Background())
		must(t, err)
		for _, id := range ids {
			if err := s.Kill(context.Background(), id); err != nil { // also one that stands still
				t.Error(err)
			}
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		must(t, os.RemoveAll(dir))
	})
	return s
}

// image is a sparse file opened as pools do.
func image(t testing.TB, bytes int64) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "image"), os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	must(t, f.Truncate(bytes))
	return f
}

func flat(t testing.TB, kind blockdev.Kind) control.Spec {
	return control.Spec{ID: volumeID, Kind: kind, Size: size, Flat: image(t, size)}
}

// guest is a virtual machine's disk.
type guest struct {
	t testing.TB
	f *frontend.Frontend
}

func newGuest(t testing.TB, o frontend.Options) *guest {
	t.Helper()
	f, err := frontend.New(o)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return &guest{t, f}
}

// do makes one request and gives its status.
func (g *guest) do(kind uint32, sector uint64, length int) byte {
	g.t.Helper()
	q := g.f.Queues[0]
	q.Put(0, kind, sector, length)
	must(g.t, errors.Join(q.Show(), q.Wait()))
	_, status, ok := q.Take()
	if !ok {
		g.t.Fatal("no answer")
	}
	return status
}

func (g *guest) good(kind uint32, sector uint64, length int) {
	g.t.Helper()
	if s := g.do(kind, sector, length); s != 0 {
		g.t.Fatalf("request %d at sector %d: status %d", kind, sector, s)
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

// asUser runs this test program as another user, who cannot reach it by its path.
func asUser(id int, env string) (string, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return "", err
	}
	defer self.Close()
	cmd := exec.Command("/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{self}
	cmd.Env, cmd.Dir = append(os.Environ(), env), "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(id), Gid: uint32(id)}, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// procStatus reads a line of /proc/PID/status.
func procStatus(t testing.TB, pid int, key string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// TestAFlatVolumesLife: it is served, found by another starter, does not serve in
// another way meanwhile, grows, is bounded, and ends with nothing left behind.
func TestAFlatVolumesLife(t *testing.T) {
	ctx := t.Context()
	var options control.Options
	s := starter(t, func(o *control.Options) { o.Users, o.User, o.Group = 2, 70000, 70000; options = *o })
	spec := flat(t, blockdev.VhostUser)
	if _, err := s.Find(ctx, volumeID); !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatalf("found before it was started: %v", err)
	}
	w, err := s.Serve(ctx, spec)
	must(t, err)
	options.Users, options.User, options.Group = 2, 70000, 70000
	again, err := control.New(options)
	must(t, err)
	same, err := again.Find(ctx, volumeID)
	must(t, err)
	if same.Pid() != w.Pid() || same.Kind() != blockdev.VhostUser {
		t.Errorf("found %d, %s; started %d", same.Pid(), same.Kind(), w.Pid())
	}
	spec.Kind = blockdev.NBD
	if _, err := s.Serve(ctx, spec); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("served in another way: %v", err)
	}
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	g.f.Queues[0].Data(0)[0] = 7
	g.good(frontend.Write, 8, block)
	g.good(frontend.Flush, 0, 0)
	must(t, spec.Flat.Truncate(2*size))
	must(t, w.Grow(ctx, 2*size))
	g.good(frontend.Read, 2*size/512-8, block)
	must(t, w.Throttle(ctx, blockdev.Limits{ReadIOPS: 1e6}))
	st, err := w.Status(ctx)
	must(t, err)
	if st.Clients != 1 || st.Pid != w.Pid() || st.Failed != "" || st.Limits.ReadIOPS != 1e6 || st.Meter.Kinds[1].Bytes != block {
		t.Errorf("status %+v", st)
	}
	for key, want := range map[string]string{"Uid": "70000", "Gid": "70000", "NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0000000000000000", "CapBnd": ""} {
		if got := procStatus(t, w.Pid(), key); !strings.HasPrefix(got, want) {
			t.Errorf("%s is %q, not %q", key, got, want)
		}
	}
	t.Logf("resident: anonymous %s, files %s", procStatus(t, w.Pid(), "RssAnon"), procStatus(t, w.Pid(), "RssFile"))
	must(t, w.Stop(ctx))
	must(t, w.Stop(ctx)) // again is success
	if _, err := s.Find(ctx, volumeID); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("found after its end: %v", err)
	}
	b := make([]byte, 1)
	f, err := os.Open(spec.Flat.Name())
	must(t, err)
	defer f.Close()
	if _, err := f.ReadAt(b, block); err != nil || b[0] != 7 {
		t.Errorf("the image has %v, %v", b, err)
	}
}
