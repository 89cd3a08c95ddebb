package runc_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/runc"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/run"
)

func TestResolve(t *testing.T) {
	blockdevtest.LeakCheck(t)
	ctx := context.Background()
	c := runctest.Start(t, runctest.Options{})
	elsewhere := t.TempDir()
	a, err := runc.New(runc.Options{Root: elsewhere, Roots: []string{c.Root}})
	if err != nil {
		t.Fatal(err)
	}
	asked := attach.Target{Type: runc.Type, Container: c.ID, Root: c.Root, Pid: 1, StartTime: 2, Boot: "x"}
	got, err := a.Resolve(ctx, asked, "/data")
	if err != nil {
		t.Fatal(err)
	}
	if got.Pid != c.Pid || got.StartTime <= 2 || len(got.Boot) != 36 || got.Container != c.ID || got.Root != c.Root {
		t.Errorf("resolved %+v", got)
	}
	if pid := runc.RecordedPid(c.Root, c.ID); pid != c.Pid {
		t.Errorf("the record says %d: this runc keeps its state in another form", pid)
	}
	for _, hint := range []int{c.Pid, 0, os.Getpid(), 1 << 30} {
		if pid, err := a.AskedPid(ctx, c.Root, c.ID, hint); err != nil || pid != c.Pid {
			t.Errorf("with the hint %d: %d, %v", hint, pid, err)
		}
	}
	asked.Root = ""
	_, err = a.Resolve(ctx, asked, "/data")
	if !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("in the default root: %v", err)
	}
	if err != nil && strings.ContainsAny(err.Error(), "/\n") { // tenants read it
		t.Errorf("it tells of the host: %q", err)
	}
	asked.Root = filepath.Dir(c.Root)
	if _, err := a.Resolve(ctx, asked, "/data"); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("in a root that is not allowed: %v", err)
	}
}

func TestResolveRefuses(t *testing.T) {
	ctx := context.Background()
	a, err := runc.New(runc.Options{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("a", 256)
	for _, id := range []string{"", ".", "..", "-a", "--help", "a/b", "../a", "a b", "a\x00", "ä", "a\n", long} {
		if _, err := a.Resolve(ctx, attach.Target{Type: runc.Type, Container: id}, "/data"); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("container %.40q: %v", id, err)
		}
	}
	for _, p := range []string{
		"", "data", "/", "/data/", "//data", "/a/../b", "/./a", "/a/..", "/proc", "/proc/self", "/sys", "/sys/fs/x", "/dev", "/dev/shm",
		"/a\x00b", "/a\nb", "/\xff", strings.Repeat("/aaaaaaa", 600),
	} {
		if _, err := a.Resolve(ctx, attach.Target{Type: runc.Type, Container: "c"}, p); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("mount path %.40q: %v", p, err)
		}
	}
	if _, err := a.Resolve(ctx, attach.Target{Type: runc.Type, Container: "c", Path: "/x"}, "/data"); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("with a path: %v", err)
	}
	for _, root := range []string{"relative", "/run/", "/run/../etc"} {
		if _, err := runc.New(runc.Options{Root: root}); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("root %q: %v", root, err)
		}
	}
}

func TestResolveWithoutContainerOrRunc(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Runc)
	ctx := context.Background()
	target := attach.Target{Type: runc.Type, Container: "no-such-container"}
	a, err := runc.New(runc.Options{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Resolve(ctx, target, "/dev-not"); !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("no such container: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := a.Resolve(cancelled, target, "/data"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	missing, err := runc.New(runc.Options{Root: t.TempDir(), Command: "no-such-runc"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := missing.Resolve(ctx, target, "/data"); !errors.Is(err, run.ErrNotFound) {
		t.Errorf("without runc: %v", err)
	}
}

// TestResolveAsksRuncOnlyInDoubt puts a program that must not be run in runc's place.
func TestResolveAsksRuncOnlyInDoubt(t *testing.T) {
	t.Parallel()
	c := runctest.Start(t, runctest.Options{})
	ctx := context.Background()
	target := attach.Target{Type: runc.Type, Container: c.ID}
	a, err := runc.New(runc.Options{Root: c.Root, Command: "/bin/false"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := a.Resolve(ctx, target, "/data")
	if err != nil || got.Pid != c.Pid {
		t.Fatalf("running: %+v, %v", got, err)
	}
	record := filepath.Join(c.Root, c.ID, "state.json")
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	start := []byte(strconv.FormatUint(got.StartTime, 10))
	for name, changed := range map[string][]byte{
		"another start time": bytes.ReplaceAll(text, start, append([]byte("1"), start...)),
		"no control group":   bytes.ReplaceAll(text, []byte("cgroup_paths"), []byte("cgroup_nowhere")),
		"half a record":      text[:len(text)/2],
		"nothing":            nil,
	} {
		if bytes.Equal(changed, text) {
			t.Fatalf("%s: the record is as it was", name)
		}
		if err := os.WriteFile(record, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := a.Resolve(ctx, target, "/data"); err == nil {
			t.Errorf("%s: runc was not asked: %+v", name, got)
		}
	}
	if err := os.WriteFile(record, text, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Pause()
	if got, err := a.Resolve(ctx, target, "/data"); err == nil {
		t.Errorf("paused: runc was not asked: %+v", got)
	}
	c.Resume()
	c.Kill()
	if got, err := a.Resolve(ctx, target, "/data"); err == nil {
		t.Errorf("killed: runc was not asked: %+v", got)
	}
}

func BenchmarkResolve(b *testing.B) {
	c := runctest.Start(b, runctest.Options{})
	a, err := runc.New(runc.Options{Root: c.Root})
	if err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	for b.Loop() {
		if _, err := a.Resolve(context.Background(), attach.Target{Type: runc.Type, Container: c.ID}, "/data"); err != nil {
			b.Fatal(err)
		}
	}
}
