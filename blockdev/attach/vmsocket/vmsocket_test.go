package vmsocket_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmmtest"
	"holdfast/blockdev/attach/vmsocket"
)

func TestMain(m *testing.M) {
	vmmtest.Main()
	os.Exit(m.Run())
}

func door(t *testing.T, prefixes ...string) *vmsocket.Door {
	t.Helper()
	d, err := vmsocket.New(prefixes, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func resolve(t *testing.T, d *vmsocket.Door, socket string) attach.Target {
	t.Helper()
	target, err := d.Resolve(context.Background(), "vm", attach.Target{Type: "vm", Socket: socket}, "")
	if err != nil {
		t.Fatal(err)
	}
	return target
}

func TestResolveRefuses(t *testing.T) {
	ctx := context.Background()
	socket := vmmtest.Socket(t)
	dir := filepath.Dir(socket)
	v := vmmtest.Start(t, vmmtest.Other, socket)
	d := door(t, dir)
	for name, make := range map[string]func(string) error{
		"link":  func(p string) error { return os.Symlink(socket, p) },
		"above": func(p string) error { return os.Symlink(dir, p) },
		"file":  func(p string) error { return os.WriteFile(p, nil, 0o600) },
	} {
		if err := make(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	own, err := net.Listen("unix", filepath.Join(dir, "own"))
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	dead := vmmtest.Start(t, vmmtest.Other, filepath.Join(dir, "dead"))
	dead.Kill()

	for _, c := range []struct {
		name   string
		target attach.Target
		mount  string
		want   error
		text   string
	}{
		{"no socket", attach.Target{}, "", blockdev.ErrInvalid, "absolute"},
		{"relative", attach.Target{Socket: "api.sock"}, "", blockdev.ErrInvalid, "absolute"},
		{"not clean", attach.Target{Socket: dir + "/../x"}, "", blockdev.ErrInvalid, "clean"},
		{"control characters", attach.Target{Socket: dir + "/a\nb"}, "", blockdev.ErrInvalid, "control"},
		{"elsewhere", attach.Target{Socket: "/run/docker.sock"}, "", blockdev.ErrInvalid, "operator allows"},
		{"the directory itself", attach.Target{Socket: dir}, "", blockdev.ErrInvalid, "operator allows"},
		{"a neighbour by name", attach.Target{Socket: dir + "x/api.sock"}, "", blockdev.ErrInvalid, "operator allows"},
		{"a link", attach.Target{Socket: dir + "/link"}, "", blockdev.ErrInvalid, ""},
		{"through a link", attach.Target{Socket: dir + "/above/api.sock"}, "", blockdev.ErrInvalid, "symbolic link"},
		{"a file", attach.Target{Socket: dir + "/file"}, "", blockdev.ErrInvalid, "not a unix socket"},
		{"below a file", attach.Target{Socket: dir + "/file/x"}, "", blockdev.ErrInvalid, "not a directory"},
		{"nothing", attach.Target{Socket: dir + "/nothing"}, "", blockdev.ErrGone, "no such socket"},
		{"a dead socket", attach.Target{Socket: dir + "/dead"}, "", blockdev.ErrGone, "nobody listens"},
		{"this process's own", attach.Target{Socket: dir + "/own"}, "", blockdev.ErrInvalid, "not a VMM"},
		{"a container", attach.Target{Socket: socket, Container: "a"}, "", blockdev.ErrInvalid, "socket only"},
		{"a mount path", attach.Target{Socket: socket}, "/data", blockdev.ErrInvalid, "the guest mounts"},
	} {
		_, err := d.Resolve(ctx, "vm", c.target, c.mount)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err != nil && strings.Contains(err.Error(), dir) {
			t.Errorf("%s: the message names a path: %v", c.name, err)
		}
	}
	if _, err := door(t).Resolve(ctx, "vm", attach.Target{Socket: socket}, ""); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("no directory is allowed: %v", err)
	}
	if got := resolve(t, d, socket); got.Pid != v.Pid || got.StartTime == 0 || got.Boot == "" || got.Socket != socket || got.Type != "vm" {
		t.Errorf("resolved: %+v", got)
	}
	for _, bad := range []string{"relative", "/", "/a/../b"} {
		if _, err := vmsocket.New([]string{bad}, nil); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("directory %q: %v", bad, err)
		}
	}
}

// A socket's path may be longer than an address.
func TestLongPath(t *testing.T) {
	dir := filepath.Dir(vmmtest.Socket(t))
	long := filepath.Join(dir, strings.Repeat("d", 200))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	short := filepath.Join(dir, "s")
	v := vmmtest.Start(t, vmmtest.Other, short)
	if err := os.Rename(short, filepath.Join(long, "s")); err != nil {
		t.Fatal(err)
	}
	defer os.Rename(filepath.Join(long, "s"), short) //nolint:errcheck // checked by what follows
	if got := resolve(t, door(t, dir), filepath.Join(long, "s")); got.Pid != v.Pid {
		t.Errorf("resolved: %+v", got)
	}
}

// Whoever binds the socket after the VMM is not the VMM, whether that lives or not.
func TestAnotherProcessBehindTheSocket(t *testing.T) {
	ctx := context.Background()
	socket := vmmtest.Socket(t)
	d := door(t, filepath.Dir(socket))
	first := vmmtest.Start(t, vmmtest.Other, socket)
	target := resolve(t, d, socket)
	var out map[string]any
	if err := d.Do(ctx, target, "GET", "/", nil, &out); err != nil || out["hello"] != "world" {
		t.Fatalf("%v %v", out, err)
	}

	moved := socket + ".moved"
	if err := os.Rename(socket, moved); err != nil {
		t.Fatal(err)
	}
	if err := d.Do(ctx, target, "GET", "/", nil, nil); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "lives") {
		t.Errorf("a VMM without its socket: %v", err)
	}
	if err := os.Rename(socket+".ctl", moved+".ctl"); err != nil {
		t.Fatal(err)
	}
	first.Socket = moved
	second := vmmtest.Start(t, vmmtest.Other, socket)
	if err := d.Do(ctx, target, "GET", "/", nil, nil); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "the VMM is process") {
		t.Errorf("another process while the VMM lives: %v", err)
	}
	first.Kill()
	if err := d.Do(ctx, target, "GET", "/", nil, nil); !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("another process after the VMM's end: %v", err)
	}
	if n := second.Count("GET /"); n != 0 {
		t.Errorf("%d requests went to a process that is not the VMM", n)
	}
}

func TestAnswersThatAreNone(t *testing.T) {
	socket := vmmtest.Socket(t)
	d := door(t, filepath.Dir(socket))
	v := vmmtest.Start(t, vmmtest.Other, socket)
	target := resolve(t, d, socket)
	for _, how := range []string{vmmtest.FaultHang, vmmtest.FaultHalf, vmmtest.FaultGarbage, vmmtest.FaultLost, vmmtest.FaultStatus} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		v.Fail(vmmtest.Fault{Request: "GET /", How: how, Status: 302, Times: 1})
		stop := func() {}
		if how == vmmtest.FaultHang { // nothing comes, however long it waits
			stop = v.When("GET /", cancel)
		}
		var out map[string]any
		err := d.Do(ctx, target, "GET", "/", nil, &out)
		stop()
		cancel()
		var refused *vmsocket.Refused
		if err == nil || errors.Is(err, blockdev.ErrGone) || errors.As(err, &refused) != (how == vmmtest.FaultStatus) {
			t.Errorf("%s: %v", how, err)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("the VMM's text is shown: %v", err)
		}
	}
	v.Fail(vmmtest.Fault{Request: "GET /", How: vmmtest.FaultDie})
	err := d.Do(context.Background(), target, "GET", "/", nil, nil)
	<-v.Ended()
	if err == nil {
		t.Error("an answer from a VMM that died")
	}
	if err := d.Do(context.Background(), target, "GET", "/", nil, nil); !errors.Is(err, blockdev.ErrGone) {
		t.Errorf("a VMM that has died: %v", err)
	}
}

func TestTheEndOfAVMM(t *testing.T) {
	ctx := context.Background()
	socket := vmmtest.Socket(t)
	d := door(t, filepath.Dir(socket))
	v := vmmtest.Start(t, vmmtest.Other, socket)
	target := resolve(t, d, socket)

	short, cancel := context.WithCancel(ctx)
	cancel()
	if err := d.AwaitEnd(short, target); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting for a VMM that lives: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- d.AwaitEnd(ctx, target) }()
	if err := d.Kill(ctx, target); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the end: %v", err)
	}
	<-v.Ended()
	if err := d.Kill(ctx, target); err != nil {
		t.Errorf("killed again: %v", err)
	}
	if err := d.AwaitEnd(ctx, target); err != nil {
		t.Errorf("the end, asked late: %v", err)
	}
}

// A pid alone never means a process.
func TestAnotherProcessWithThePid(t *testing.T) {
	ctx := context.Background()
	socket := vmmtest.Socket(t)
	d := door(t, filepath.Dir(socket))
	vmmtest.Start(t, vmmtest.Other, socket)
	target := resolve(t, d, socket)
	for name, change := range map[string]func(*attach.Target){
		"another start time": func(t *attach.Target) { t.StartTime++ },
		"another boot":       func(t *attach.Target) { t.Boot = "another" },
	} {
		other := target
		change(&other)
		if _, err := d.Open(other); !errors.Is(err, blockdev.ErrGone) {
			t.Errorf("%s: %v", name, err)
		}
		if err := d.Kill(ctx, other); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := d.Open(attach.Target{Pid: target.Pid}); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("never resolved: %v", err)
	}
	if err := d.Do(ctx, target, "GET", "/", nil, nil); err != nil {
		t.Errorf("the VMM was hit: %v", err)
	}
}

func TestWhatAProcessHolds(t *testing.T) {
	socket := vmmtest.Socket(t)
	d := door(t, filepath.Dir(socket))
	vmmtest.Start(t, vmmtest.Other, socket)
	target := resolve(t, d, socket)
	p, err := d.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if sees, err := p.Sees(file); err != nil || !sees {
		t.Errorf("sees: %v %v", sees, err)
	}
	if holds, err := p.Holds(file); err != nil || holds {
		t.Errorf("holds: %v %v", holds, err)
	}
	if holds, err := p.Holds(os.Args[0]); err != nil || holds {
		t.Errorf("holds what it runs: %v %v", holds, err)
	}
}
