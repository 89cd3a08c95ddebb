package qemu_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/vhost"
)

// shared is memory that a worker can be given.
var shared = []string{"-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-machine", "memory-backend=mem"}

// startServed starts a machine whose volumes workers serve.
func startServed(t *testing.T) *machine {
	t.Helper()
	m := startMachine(t, slices.Concat(withoutGuests, shared, port(0))...)
	m.served = true
	return m
}

// serve is a worker for an image. stop ends it; another one may take its socket.
func serve(t *testing.T, image string, queues int) (socket string, stop func()) {
	t.Helper()
	socket = image + ".s"
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	good(t, err)
	f, err := device.NewFile(file)
	good(t, err)
	s, err := vhost.New(f, vhost.Options{Serial: "served", Queues: queues, Ended: func(error) {}})
	good(t, err)
	good(t, removed(socket))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	good(t, err)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	stop = sync.OnceFunc(func() {
		if err := errors.Join(l.Close(), s.Close(), <-done, file.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return socket, stop
}

func removed(path string) error {
	if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// TestServed: a machine with shared memory gets a volume by its worker's socket, with as
// many queues as that has; a worker may be replaced; limits, growth and counters are
// the worker's.
func TestServed(t *testing.T) {
	t.Parallel()
	m := startMachine(t, slices.Concat(withoutGuests, shared, port(0), port(1), []string{"-smp", "4"})...)
	m.served = true
	ctx, a := t.Context(), attacher(t, m.dir)
	r := m.image(a, 1)
	if !r.Target.Shared {
		t.Errorf("resolved to %+v", r.Target)
	}
	if kinds := a.KindsFor(r.Target); !slices.Equal(kinds, []blockdev.Kind{blockdev.File, blockdev.Block, blockdev.VhostUser}) {
		t.Errorf("kinds %v", kinds)
	}
	for range 2 {
		good(t, a.Attach(ctx, r))
	}
	if state, err := a.Probe(ctx, r); err != nil || state != attach.StateAttached {
		t.Errorf("it is %s, %v", state, err)
	}
	var queues int
	m.ask("qom-get", qmp.Args{"path": "/machine/peripheral/holdfast-" + string(r.Volume) + "/virtio-backend", "property": "num-queues"}, &queues)
	if queues != 2 {
		t.Errorf("%d queues", queues)
	}
	good(t, a.Resized(ctx, r), a.Limit(ctx, r))
	_, err := a.Counters(ctx, r)
	is(t, "counters", err, blockdev.ErrNotFound, "")
	file := r
	file.Endpoint.Kind, file.Endpoint.Path = blockdev.File, strings.TrimSuffix(r.Endpoint.Path, ".s")
	next := r // the volume was taken away by force, and is served again
	next.Endpoint.Path = strings.TrimSuffix(r.Endpoint.Path, ".s") + ".next"
	good(t, os.Rename(r.Endpoint.Path, next.Endpoint.Path))
	good(t, a.Attach(ctx, next))
	var line string
	m.ask("qom-get", qmp.Args{"path": "/machine/peripheral/holdfast-" + string(r.Volume), "property": "chardev"}, &line)
	if !strings.HasSuffix(line, ".next") {
		t.Errorf("the device is on line %s", line)
	}
	good(t, a.Attach(ctx, next), a.Detach(ctx, next), a.Detach(ctx, next))
	m.empty("detached")
	good(t, a.Attach(ctx, next), a.Attach(ctx, file)) // and the same as a file
	is(t, "as a file before", a.Attach(ctx, next), blockdev.ErrBusy, "as a file or device")
	good(t, a.Detach(ctx, file))
	m.empty("detached")
}

// TestWorkerAbsent: a worker that does not listen costs no machine its life, and leaves
// nothing in it; what a detach finds without a worker goes all the same.
func TestWorkerAbsent(t *testing.T) {
	t.Parallel()
	m := startServed(t)
	ctx, a := t.Context(), attacher(t, m.dir)
	target, err := a.Resolve(ctx, attach.Target{Type: qemu.Type, Socket: m.socket, Transport: "vhost-user"}, "")
	good(t, err)
	if kinds := a.KindsFor(target); !slices.Equal(kinds, []blockdev.Kind{blockdev.VhostUser}) {
		t.Errorf("kinds %v", kinds)
	}
	image := filepath.Join(m.dir, "vol-image")
	good(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	socket, stop := serve(t, image, 1)
	r := attach.Request{Volume: id, Target: target, Endpoint: blockdev.Endpoint{Kind: blockdev.VhostUser, Path: socket}}
	good(t, a.Attach(ctx, r))
	stop()
	good(t, a.Detach(ctx, r))
	m.empty("without a worker")

	good(t, os.WriteFile(socket, nil, 0o600)) // somebody's, who does not listen
	brief := with(t, qemu.Options{Answer: 3 * time.Second, Command: patience}, m.dir)
	is(t, "nobody listens", brief.Attach(ctx, r), blockdev.ErrBusy, "no connection to the volume's worker")
	m.empty("refused")
	good(t, removed(socket))
	if err := a.Attach(ctx, r); err == nil {
		t.Error("attached by a socket that is not there")
	}
	m.empty("no socket")
	serve(t, image, 1)
	good(t, a.Attach(ctx, r), a.Detach(ctx, r))
	m.empty("detached")
}

// TestPrivateMemory: what shares no memory, or not all of it, is told how it would, and
// gets files.
func TestPrivateMemory(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"plain": nil, "private": {"-object", "memory-backend-memfd,id=mem,size=64M,share=off", "-machine", "memory-backend=mem"},
		"without a file": {"-object", "memory-backend-ram,id=mem,size=64M,share=on", "-machine", "memory-backend=mem"},
		"a part":         append([]string{"-object", "memory-backend-ram,id=more,size=64M"}, shared...),
	} {
		m := startMachine(t, append(args, port(0)...)...)
		a := attacher(t, m.dir)
		_, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: m.socket, Transport: "vhost-user"}, "")
		is(t, name, err, blockdev.ErrInvalid, "memory-backend-memfd")
		target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: m.socket}, "")
		if err != nil || target.Shared || !slices.Equal(a.KindsFor(target), []blockdev.Kind{blockdev.File, blockdev.Block}) {
			t.Errorf("%s: %+v, %v", name, target, err)
		}
	}
	m := startMachine(t, append(shared, controller...)...)
	_, err := attacher(t, m.dir).Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: m.socket, Transport: "vhost-user"}, "")
	is(t, "no port", err, blockdev.ErrBusy, "-device pcie-root-port")
	for _, transport := range []string{"nbd", "file"} {
		_, err := attacher(t, m.dir).Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: m.socket, Transport: transport}, "")
		is(t, transport, err, blockdev.ErrInvalid, "transport")
	}
}

// TestNameOfALineIsFreeLater: QEMU may still try to connect a line that was taken away.
func TestNameOfALineIsFreeLater(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "q")
	f := fakeMonitor(t, socket)
	a := hasty(t, dir)
	target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: socket}, "")
	good(t, err)
	tries := 0
	f.set(func(command, args string) string {
		if command != "chardev-add" {
			return ""
		}
		if tries++; tries < 4 {
			return "Failed to add chardev 'holdfast-line': duplicate yank instance"
		}
		return "it is free"
	})
	image := filepath.Join(dir, "image")
	good(t, os.WriteFile(image, nil, 0o600))
	r := attach.Request{Volume: id, Target: target, Endpoint: blockdev.Endpoint{Kind: blockdev.VhostUser, Path: image}}
	if err := a.Attach(t.Context(), r); err == nil || !strings.Contains(fmt.Sprint(err), "it is free") {
		t.Error(err)
	}
}

// TestReconnectIsNamedOtherwise: a QEMU that has forgotten the old word is told the new
// one.
func TestReconnectIsNamedOtherwise(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "q")
	f := fakeMonitor(t, socket)
	a := hasty(t, dir)
	target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: socket}, "")
	good(t, err)
	f.set(func(command, args string) string {
		switch {
		case command == "chardev-add" && strings.Contains(args, `"reconnect":`):
			return "Parameter 'backend.data.reconnect' is unexpected"
		case command == "chardev-add" && strings.Contains(args, `"reconnect-ms":1000`):
			return "it is understood"
		}
		return ""
	})
	image := filepath.Join(dir, "image")
	good(t, os.WriteFile(image, nil, 0o600))
	r := attach.Request{Volume: id, Target: target, Endpoint: blockdev.Endpoint{Kind: blockdev.VhostUser, Path: image}}
	if err := a.Attach(t.Context(), r); err == nil || !strings.Contains(fmt.Sprint(err), "it is understood") {
		t.Error(err)
	}
}
