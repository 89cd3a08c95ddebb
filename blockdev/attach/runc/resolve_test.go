package runc_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
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
	if hint := runc.HintedPid(c.Root, c.ID); hint != c.Pid {
		t.Errorf("the hint is %d: this runc keeps its state in another form", hint)
	}
	for _, hint := range []int{c.Pid, 0, os.Getpid(), 1 << 30} {
		if pid, err := a.FindPid(ctx, c.Root, c.ID, hint); err != nil || pid != c.Pid {
			t.Errorf("with the hint %d: %d, %v", hint, pid, err)
		}
	}
	asked.Root = ""
	if _, err := a.Resolve(ctx, asked, "/data"); !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("in the default root: %v", err)
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
