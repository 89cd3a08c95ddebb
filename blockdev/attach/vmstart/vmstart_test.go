package vmstart_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/attach/vmstart"
	"holdfast/blockdev/filesystem"
)

const id = blockdev.ID("vol-06c8qk4g1h6s9tj2m0a4n7v001")

type bench struct {
	*vmstart.Attacher
	dir string
	r   attach.Request // of a writer
}

func newBench(t *testing.T) *bench {
	t.Helper()
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	door, err := vmsocket.New([]string{dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	a, err := vmstart.New(vmstart.Options{Dir: filepath.Join(dir, "vm"), Door: door, FirecrackerIO: "Sync"})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{Attacher: a, dir: dir}
	b.r = attach.Request{Volume: id, Endpoint: blockdev.Endpoint{Kind: blockdev.File, Path: image, Size: 1 << 20}}
	b.r.Target = b.resolve(t, "qemu")
	return b
}

func (b *bench) resolve(t *testing.T, vmm string) attach.Target {
	t.Helper()
	target, err := b.Resolve(t.Context(), attach.Target{Type: vmstart.Type, VMM: vmm}, "")
	if err != nil {
		t.Fatal(err)
	}
	return target
}

// machine is a process that has a file open, as a virtual machine has.
type machine struct {
	*exec.Cmd
	ended chan struct{}
}

func run(t *testing.T, path string) *machine {
	t.Helper()
	m := &machine{exec.Command("sh", "-c", `exec 3<>"$0" && echo && exec sleep 1000`, path), make(chan struct{})}
	out, err := m.StdoutPipe()
	if err == nil {
		err = m.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = out.Read(make([]byte, 1)) // it has opened it
	go func() { _ = m.Wait(); close(m.ended) }()
	t.Cleanup(func() { _ = m.Process.Kill(); <-m.ended })
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (b *bench) attach(t *testing.T, r attach.Request) {
	t.Helper()
	for range 2 {
		if err := b.Attach(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	b.expect(t, r, attach.StateAttached)
}

func (b *bench) detach(t *testing.T, r attach.Request) {
	t.Helper()
	for range 2 {
		if err := b.Detach(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(r.Target.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its path is left: %v", err)
	}
}

func (b *bench) expect(t *testing.T, r attach.Request, want attach.State) {
	t.Helper()
	if got, err := b.Probe(t.Context(), r); err != nil || got != want {
		t.Fatalf("%s, %v; want %s", got, err, want)
	}
}

func (b *bench) find(t *testing.T, r attach.Request) attach.Target {
	t.Helper()
	target, err := b.Find(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return target
}

// TestLife: attached, started, detached while it runs: refused by its pid; then its
// end.
func TestLife(t *testing.T) {
	b := newBench(t)
	b.expect(t, b.r, attach.StateMissing)
	b.attach(t, b.r)
	if got := b.find(t, b.r); got != b.r.Target {
		t.Fatalf("found %+v before the start", got)
	}

	m := run(t, b.r.Target.Path)
	found := b.find(t, b.r)
	if found.Pid != m.Process.Pid || found.StartTime == 0 || found.Boot == "" || found.Path != b.r.Target.Path {
		t.Fatalf("found %+v, it is %d", found, m.Process.Pid)
	}
	b.r.Target = found
	b.expect(t, b.r, attach.StateAttached)
	err := b.Detach(t.Context(), b.r)
	if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint("process ", m.Process.Pid, " has it open")) {
		t.Fatalf("detached while it is open: %v", err)
	}
	if _, err := os.Stat(b.r.Target.Path); !errors.Is(err, os.ErrNotExist) {
		t.Error("while it is being detached another machine could be started")
	}

	told := make(chan error, 1)
	go func() { told <- b.AwaitEnd(context.Background(), b.r.Target) }()
	if err := m.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-told; err != nil {
		t.Error(err)
	}
	<-m.ended
	b.expect(t, b.r, attach.StateGone)
	b.detach(t, b.r)
}

// TestNeverStarted: an attachment that nobody used is detached freely, and its
// arguments are of no use after that.
func TestNeverStarted(t *testing.T) {
	b := newBench(t)
	b.attach(t, b.r)
	b.detach(t, b.r)
	if _, err := os.OpenFile(b.r.Target.Path, os.O_RDWR, 0); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a machine that is started now gets it: %v", err)
	}
	if next := b.resolve(t, "qemu"); next.Path == b.r.Target.Path {
		t.Error("the next attachment has the path of this one")
	}
}

// TestStaleHolder: a process that has the image open already hinders a writer.
func TestStaleHolder(t *testing.T) {
	b := newBench(t)
	m := run(t, b.r.Endpoint.Path)
	err := b.Attach(t.Context(), b.r)
	if !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(m.Process.Pid)) {
		t.Fatalf("%v", err)
	}
	if _, err := os.Lstat(b.r.Target.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its path is there all the same: %v", err)
	}
}

// TestForce: the process that was found is killed, and nothing else.
func TestForce(t *testing.T) {
	b := newBench(t)
	b.attach(t, b.r)
	if err := b.Fence(t.Context(), b.r); err != nil {
		t.Fatalf("a machine that was never started: %v", err)
	}
	b.attach(t, b.r)
	m := run(t, b.r.Target.Path)
	b.r.Target = b.find(t, b.r)
	bystander := run(t, b.r.Endpoint.Path)
	err := b.Fence(t.Context(), b.r)
	if !errors.Is(err, attach.ErrCannotFence) || !strings.Contains(err.Error(), fmt.Sprint(bystander.Process.Pid)) {
		t.Errorf("another process has it open as well: %v", err)
	}
	<-m.ended
	if err := bystander.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a process that nobody knows was killed: %v", err)
	}
	stale := b.r
	stale.Target.Pid, stale.Target.StartTime = bystander.Process.Pid, 1 // the pid of another one now
	if err := b.Fence(t.Context(), stale); !errors.Is(err, attach.ErrCannotFence) {
		t.Errorf("by the pid of another process: %v", err)
	}
	if err := bystander.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a process was killed for its pid: %v", err)
	}
	_ = bystander.Process.Kill()
	<-bystander.ended
	b.detach(t, b.r)
}

// TestSeveralAndNoneKnown: nobody guesses which process is the machine.
func TestSeveralAndNoneKnown(t *testing.T) {
	b := newBench(t)
	b.attach(t, b.r)
	one, two := run(t, b.r.Target.Path), run(t, b.r.Target.Path)
	err := b.Fence(t.Context(), b.r)
	if !errors.Is(err, attach.ErrCannotFence) {
		t.Fatalf("%v", err)
	}
	for _, m := range []*machine{one, two} {
		if !strings.Contains(err.Error(), fmt.Sprint(m.Process.Pid)) || m.Process.Signal(syscall.Signal(0)) != nil {
			t.Errorf("process %d: %v", m.Process.Pid, err)
		}
	}
}

// TestReaders: a machine that another attachment of the volume has is not this one's.
func TestReaders(t *testing.T) {
	b := newBench(t)
	one, two := b.r, b.r
	one.ReadOnly, two.ReadOnly = true, true
	two.Target = b.resolve(t, "cloud-hypervisor")
	b.attach(t, one)
	b.attach(t, two)
	m := run(t, one.Target.Path)
	one.Target = b.find(t, one)
	if one.Target.Pid != m.Process.Pid {
		t.Fatalf("%+v", one.Target)
	}
	two.Others = []attach.Target{one.Target}
	if got := b.find(t, two); got != two.Target {
		t.Errorf("the other reader is taken to be %+v", got)
	}
	b.detach(t, two)
	_ = m.Process.Kill()
	<-m.ended
	b.detach(t, one)
}

// TestHandedOver: a program that hands the image to another process and ends is
// followed.
func TestHandedOver(t *testing.T) {
	b := newBench(t)
	b.attach(t, b.r)
	first := run(t, b.r.Target.Path)
	b.r.Target = b.find(t, b.r)
	second := run(t, b.r.Target.Path)
	_ = first.Process.Kill()
	<-first.ended
	if got := b.find(t, b.r); got.Pid != second.Process.Pid {
		t.Errorf("found %+v, it is %d", got, second.Process.Pid)
	}
}

func TestTargets(t *testing.T) {
	b := newBench(t)
	for want, target := range map[string]attach.Target{
		"must be one of: cloud-hypervisor, firecracker, kata, qemu": {VMM: "bhyve"},
		"must be one of":                   {},
		"vmm, and perhaps a socket, only":  {VMM: "qemu", Path: "/etc"},
		"is of no use here: a machine of ": {VMM: "kata", Socket: "/run/x"},
	} {
		target.Type = vmstart.Type
		if _, err := b.Resolve(t.Context(), target, ""); !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", target, err)
		}
	}
	if _, err := b.Resolve(t.Context(), attach.Target{Type: vmstart.Type, VMM: "qemu"}, "/data"); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("with a mount path: %v", err)
	}
	b.r.Target.Path = "/etc/passwd"
	if err := b.Attach(t.Context(), b.r); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a path that is not ours: %v", err)
	}
}

// TestLaunch: what each VMM is told. QEMU's arguments are proven by a real one, and
// Firecracker's drive by its published document, in cmd/holdfastd.
func TestLaunch(t *testing.T) {
	b := newBench(t)
	launch := func(vmm string, readOnly bool) attach.Launch {
		t.Helper()
		r := b.r
		r.Target, r.ReadOnly = b.resolve(t, vmm), readOnly
		b.attach(t, r)
		r.Target.Pid = 7
		l, err := b.Launch(t.Context(), r, filesystem.Ext4)
		if err != nil {
			t.Fatal(err)
		}
		if l.Path != r.Target.Path || l.Pid != 7 {
			t.Errorf("%+v", l)
		}
		return l
	}
	l := launch("qemu", true)
	all := strings.Join(l.Arguments, " ")
	for _, part := range []string{"driver=raw,", "read-only=on,", "file.filename=" + l.Path + ",", "file.cache.direct=on", "discard=unmap", "serial=" + b.Serial(id), "werror=enospc"} {
		if !strings.Contains(all, part) {
			t.Errorf("QEMU is not told %s: %s", part, all)
		}
	}
	l = launch("cloud-hypervisor", false)
	want := []string{"--disk", "path=" + l.Path + ",direct=on,readonly=off,image_type=raw,id=holdfast-" + string(id) + ",serial=" + b.Serial(id)}
	if !slices.Equal(l.Arguments, want) {
		t.Errorf("Cloud Hypervisor: %q", l.Arguments)
	}
	l = launch("firecracker", false)
	if !strings.Contains(string(l.Document), `"cache_type":"Writeback"`) || !strings.Contains(string(l.Document), `"path_on_host":"`+l.Path+`"`) {
		t.Errorf("Firecracker: %s", l.Document)
	}
	l = launch("kata", true)
	var info map[string]any
	if err := json.Unmarshal(l.Document, &info); err != nil || info["volume-type"] != "block" || info["device"] != l.Path || info["fstype"] != "ext4" || fmt.Sprint(info["options"]) != "[ro]" {
		t.Errorf("Kata: %s, %v", l.Document, err)
	}
	if dir := filepath.Base(filepath.Dir(l.File)); dir != base64.URLEncoding.EncodeToString([]byte(l.Path)) || filepath.Base(l.File) != "mountInfo.json" {
		t.Errorf("Kata: %s", l.File)
	}
	if _, err := b.Launch(t.Context(), b.r, filesystem.Ext4); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("of an attachment whose path is gone: %v", err)
	}
}

// TestAwaitsNobody: one that was not started has no end to be waited for.
func TestAwaitsNobody(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := b.AwaitEnd(ctx, b.r.Target); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("%v", err)
	}
}
