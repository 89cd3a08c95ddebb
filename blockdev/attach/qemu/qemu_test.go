package qemu_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
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
	"holdfast/blockdev/blockdevtest"
)

const (
	patience = 30 * time.Second
	id       = blockdev.ID("vol-06c8qk4g1h6s9tj2m0a4n7v001")
)

func attacher(t *testing.T, prefixes ...string) *qemu.Attacher {
	t.Helper()
	a, err := qemu.New(qemu.Options{Prefixes: prefixes, Wait: 200 * time.Millisecond, Answer: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// process starts a QEMU without a machine, stopped.
func process(t *testing.T, socket string) *exec.Cmd {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Qemu)
	cmd := exec.Command("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "unix:"+socket+",server=on,wait=off")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			return cmd
		}
		if time.Now().After(deadline) {
			t.Fatal("QEMU opens no monitor")
		}
	}
}

func TestTargets(t *testing.T) {
	dir := t.TempDir()
	good, other := filepath.Join(dir, "allowed"), filepath.Join(dir, "other")
	for _, d := range []string{good, other} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	listen := func(path string, greet string) {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprint(c, greet)
				t.Cleanup(func() { c.Close() })
			}
		}()
	}
	listen(filepath.Join(other, "q"), "hello\n")
	listen(filepath.Join(good, "http"), "HTTP/1.1 400 Bad Request\r\n\r\n")
	listen(filepath.Join(good, "silent"), "")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(good, "dead")})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	err = errors.Join(dead.Close(), os.WriteFile(filepath.Join(good, "file"), nil, 0o600),
		os.Symlink(filepath.Join(other, "q"), filepath.Join(good, "link")), os.Symlink(other, filepath.Join(good, "dir")))
	if err != nil {
		t.Fatal(err)
	}
	process(t, filepath.Join(good, "bare"))
	a := attacher(t, good)
	for name, c := range map[string]struct {
		target    attach.Target
		mountPath string
		want      error
		text      string
	}{
		"relative":      {attach.Target{Socket: "q"}, "", blockdev.ErrInvalid, "absolute"},
		"unclean":       {attach.Target{Socket: good + "/../other/q"}, "", blockdev.ErrInvalid, "clean"},
		"elsewhere":     {attach.Target{Socket: other + "/q"}, "", blockdev.ErrInvalid, "operator allows"},
		"the prefix":    {attach.Target{Socket: good}, "", blockdev.ErrInvalid, "operator allows"},
		"empty":         {attach.Target{}, "", blockdev.ErrInvalid, "absolute"},
		"control":       {attach.Target{Socket: good + "/a\nb"}, "", blockdev.ErrInvalid, "control"},
		"long":          {attach.Target{Socket: good + strings.Repeat("/a", 2100)}, "", blockdev.ErrInvalid, "longer"},
		"link":          {attach.Target{Socket: good + "/link"}, "", blockdev.ErrInvalid, "not a socket"},
		"through link":  {attach.Target{Socket: good + "/dir/q"}, "", blockdev.ErrInvalid, "not a directory"},
		"file":          {attach.Target{Socket: good + "/file"}, "", blockdev.ErrInvalid, "not a socket"},
		"missing":       {attach.Target{Socket: good + "/none"}, "", blockdev.ErrGone, "no such socket"},
		"dead":          {attach.Target{Socket: good + "/dead"}, "", blockdev.ErrGone, "nobody listens"},
		"not QMP":       {attach.Target{Socket: good + "/http"}, "", blockdev.ErrInvalid, "not a monitor"},
		"silent":        {attach.Target{Socket: good + "/silent"}, "", blockdev.ErrBusy, "another client"},
		"no room":       {attach.Target{Socket: good + "/bare"}, "", blockdev.ErrBusy, "pcie-root-port"},
		"a mount path":  {attach.Target{Socket: good + "/bare"}, "/data", blockdev.ErrInvalid, "mountPath"},
		"another field": {attach.Target{Socket: good + "/bare", Container: "c"}, "", blockdev.ErrInvalid, "do not apply"},
	} {
		c.target.Type = qemu.Type
		_, err := a.Resolve(t.Context(), c.target, c.mountPath)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, bad := range []string{"relative", "/", "/a/../b", "/a/"} {
		if _, err := qemu.New(qemu.Options{Prefixes: []string{bad}}); !errors.Is(err, blockdev.ErrInvalid) {
			t.Errorf("prefix %q: %v", bad, err)
		}
	}
}

// TestAnotherMachineOnTheSocket: a machine that was started again is not the one
// that has the volume, and neither is spoken to for the other.
func TestAnotherMachineOnTheSocket(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "q")
	f := fakeMonitor(t, socket)
	a := attacher(t, dir)
	target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: socket}, "")
	if err != nil {
		t.Fatal(err)
	}
	f.close()
	cmd := process(t, socket)
	r := attach.Request{Volume: id, Target: target}
	if state, err := a.Probe(t.Context(), r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "another process") {
		t.Errorf("%s, %v", state, err)
	}
	if err := a.Detach(t.Context(), r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("%v", err)
	}
	target.Pid = cmd.Process.Pid // with the start time of another
	if err := a.Fence(t.Context(), attach.Request{Volume: id, Target: target}); err != nil {
		t.Error(err)
	}
	if state, err := a.Probe(t.Context(), attach.Request{Volume: id, Target: target}); err != nil || state != attach.StateGone {
		t.Errorf("%s, %v", state, err)
	}
	m, err := qmp.Dial(t.Context(), socket)
	if err != nil {
		t.Fatalf("the wrong machine was killed: %v", err)
	}
	m.Close()
	target.Boot = "another"
	if state, err := a.Probe(t.Context(), attach.Request{Volume: id, Target: target}); err != nil || state != attach.StateGone {
		t.Errorf("of another boot: %s, %v", state, err)
	}
	if _, err := a.Probe(t.Context(), attach.Request{Volume: id, Target: attach.Target{Type: qemu.Type, Socket: socket}}); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("never resolved: %v", err)
	}
}

// fake is a monitor that answers what a real one cannot be made to: this process
// is its machine.
type fake struct {
	l       net.Listener
	mu      sync.Mutex
	nodes   []string
	devices []string
	said    []string                                 // commands
	refuse  func(command string, args string) string // words of the refusal, "" for none; "hang up" ends the connection
	refuses bool                                     // the guest, to let a device go
}

func fakeMonitor(t *testing.T, socket string) *fake {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{l: l, refuse: func(string, string) string { return "" }}
	t.Cleanup(f.close)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(c)
		}
	}()
	return f
}

func (f *fake) close() { f.l.Close() }

func (f *fake) serve(c net.Conn) {
	defer c.Close()
	fmt.Fprint(c, `{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0}}}}`+"\r\n")
	for lines := bufio.NewScanner(c); lines.Scan(); {
		var q struct {
			Execute   string
			ID        uint64
			Arguments json.RawMessage
		}
		if json.Unmarshal(lines.Bytes(), &q) != nil {
			return
		}
		f.mu.Lock()
		f.said = append(f.said, q.Execute)
		words := f.refuse(q.Execute, string(q.Arguments))
		answer, event := any(struct{}{}), ""
		if words == "" {
			answer, event = f.do(q.Execute, q.Arguments)
		}
		f.mu.Unlock()
		switch words {
		case "":
			b, _ := json.Marshal(map[string]any{"return": answer, "id": q.ID})
			fmt.Fprintf(c, "%s\r\n%s", b, event)
		case "hang up":
			return
		default:
			fmt.Fprintf(c, `{"error":{"class":"GenericError","desc":%q},"id":%d}`+"\r\n", words, q.ID)
		}
	}
}

func (f *fake) do(command string, text json.RawMessage) (answer any, event string) {
	var args struct {
		ID   string `json:"id"`
		Node string `json:"node-name"`
	}
	_ = json.Unmarshal(text, &args)
	all := []map[string]any{}
	switch command {
	case "qom-list":
		all = append(all, map[string]any{"name": "rp0", "type": "child<pcie-root-port>"}, map[string]any{"name": "rp1", "type": "child<pcie-root-port>"})
		for _, d := range f.devices {
			all = append(all, map[string]any{"name": d, "type": "child<virtio-blk-pci>"})
		}
	case "query-named-block-nodes":
		for _, n := range f.nodes {
			all = append(all, map[string]any{"node-name": n, "ro": false})
		}
	case "query-pci":
	case "blockdev-add":
		f.nodes = append(f.nodes, args.Node)
	case "blockdev-del":
		f.nodes = slices.DeleteFunc(f.nodes, func(n string) bool { return n == args.Node })
	case "device_add":
		f.devices = append(f.devices, args.ID)
	case "device_del":
		name := "DEVICE_DELETED"
		if f.refuses {
			name = "DEVICE_UNPLUG_GUEST_ERROR"
		} else {
			f.devices = slices.DeleteFunc(f.devices, func(d string) bool { return d == args.ID })
		}
		return struct{}{}, fmt.Sprintf(`{"event":%q,"data":{"device":%q,"path":"/machine"},"timestamp":{"seconds":1,"microseconds":0}}`+"\r\n", name, args.ID)
	default:
		return struct{}{}, ""
	}
	if strings.HasPrefix(command, "q") {
		return all, ""
	}
	return struct{}{}, ""
}

// TestRefusedCommands: each refusal is told, without paths of the host, and leaves
// nothing in the machine; what ends in the middle is taken on by the next try.
func TestRefusedCommands(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "q")
	f := fakeMonitor(t, socket)
	a := attacher(t, dir)
	target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: socket}, "")
	if err != nil {
		t.Fatal(err)
	}
	r := attach.Request{Volume: id, Endpoint: blockdev.Endpoint{Kind: blockdev.File, Path: "/pool/image", Size: 1 << 20}, Target: target}
	set := func(refuse func(command, args string) string) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.refuse = refuse
	}
	left := func() string {
		f.mu.Lock()
		defer f.mu.Unlock()
		return strings.Join(append(slices.Clone(f.nodes), f.devices...), " ")
	}
	for name, c := range map[string]struct{ command, words, want string }{
		"blockdev-add": {"blockdev-add", "Could not open '/pool/image': Input/output error", "refused blockdev-add: Could not open '(path)': Input/output error"},
		"device_add":   {"device_add", "Bus 'rp0' does not support hotplugging", "does not support hotplugging"},
		"locked":       {"device_add", `Failed to get "write" lock`, "locked"},
		"forbidden":    {"blockdev-add", "Could not open '/pool/image': Permission denied", "may not open"},
		"qom-list":     {"qom-list", "what", "what"},
	} {
		set(func(command, _ string) string {
			if command == c.command {
				return c.words
			}
			return ""
		})
		if err := a.Attach(t.Context(), r); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "/pool") {
			t.Errorf("%s: %v", name, err)
		}
		if got := left(); got != "" {
			t.Errorf("%s: left %s", name, got)
		}
	}

	// No io_uring: threads. A port that was taken meanwhile: the next one.
	set(func(command, args string) string {
		switch {
		case command == "blockdev-add" && strings.Contains(args, "io_uring"):
			return "aio=io_uring was specified, but is not supported in this build."
		case command == "device_add" && strings.Contains(args, "rp0"):
			return "PCI: slot 0 function 0 not available for virtio-blk-pci, in use by other"
		}
		return ""
	})
	if err := a.Attach(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	f.refuses = true
	f.mu.Unlock()
	set(func(string, string) string { return "" })
	if err := a.Detach(t.Context(), r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "guest refuses") {
		t.Errorf("%v", err)
	}
	f.mu.Lock()
	f.refuses = false
	f.mu.Unlock()
	set(func(command, _ string) string {
		if command == "blockdev-del" {
			return "Node hf is in use"
		}
		return ""
	})
	if err := a.Detach(t.Context(), r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "keeps the image open") {
		t.Errorf("%v", err)
	}
	set(func(string, string) string { return "" })
	if err := a.Detach(t.Context(), r); err != nil || left() != "" {
		t.Errorf("%v, left %s", err, left())
	}

	set(func(command, _ string) string {
		if command == "device_add" {
			return "hang up"
		}
		return ""
	})
	if err := a.Attach(t.Context(), r); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("%v", err)
	}
	set(func(string, string) string { return "" })
	for range 2 {
		if err := a.Attach(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if got := left(); len(strings.Fields(got)) != 2 {
		t.Errorf("the machine has %s", got)
	}
}

func TestNames(t *testing.T) {
	if s := qemu.Serial(id); len(s) != 20 || !strings.HasSuffix(string(id), s) {
		t.Errorf("serial %q", s)
	}
}

// TestCancelled: a caller that gives up is not told that the monitor is at fault.
func TestCancelled(t *testing.T) {
	dir := t.TempDir()
	fakeMonitor(t, filepath.Join(dir, "q"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := attacher(t, dir).Resolve(ctx, attach.Target{Type: qemu.Type, Socket: filepath.Join(dir, "q")}, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
