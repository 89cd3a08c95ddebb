package qemu_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/blockdevtest"
)

const (
	patience = time.Minute
	id       = blockdev.ID("vol-06c8qk4g1h6s9tj2m0a4n7v001")
)

// attacher waits for whatever takes its time, for as long as a test may.
func attacher(t *testing.T, prefixes ...string) *qemu.Attacher {
	t.Helper()
	return with(t, qemu.Options{Wait: patience, Answer: patience, Command: patience}, prefixes...)
}

// hasty does not wait for guests.
func hasty(t *testing.T, prefixes ...string) *qemu.Attacher {
	t.Helper()
	return with(t, qemu.Options{Wait: 100 * time.Millisecond, Answer: patience, Command: patience}, prefixes...)
}

// rash waits for nobody.
func rash(t *testing.T, prefixes ...string) *qemu.Attacher {
	t.Helper()
	return with(t, qemu.Options{Wait: 100 * time.Millisecond, Answer: 300 * time.Millisecond, Command: 300 * time.Millisecond}, prefixes...)
}

func with(t *testing.T, o qemu.Options, prefixes ...string) *qemu.Attacher {
	t.Helper()
	door, err := vmsocket.New(prefixes, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	o.Door = door
	return qemu.New(o)
}

// process starts a QEMU without a machine, stopped.
func process(t *testing.T, socket string) *exec.Cmd {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Qemu)
	cmd := exec.Command("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "unix:"+socket+",server=on,wait=off")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
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

// TestWrongMonitors: what a socket must be is vmsocket's; what listens there is this
// package's.
func TestWrongMonitors(t *testing.T) {
	dir := t.TempDir()
	process(t, filepath.Join(dir, "bare"))
	for name, greet := range map[string]string{"http": "HTTP/1.1 400 Bad Request\r\n\r\n", "silent": ""} {
		relay(t, filepath.Join(dir, name), func(c net.Conn) { fmt.Fprint(c, greet) })
	}
	taken, err := net.Dial("unix", filepath.Join(dir, "bare"))
	if err != nil {
		t.Fatal(err)
	}
	a := attacher(t, dir)
	resolve := func(name string, want error, text string) {
		t.Helper()
		_, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: filepath.Join(dir, name)}, "")
		if !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	resolve("http", blockdev.ErrInvalid, "not a monitor")
	resolve("none", blockdev.ErrGone, "no such socket")
	a = rash(t, dir)
	resolve("silent", blockdev.ErrBusy, "another client")
	resolve("bare", blockdev.ErrBusy, "")
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; { // until QEMU has noticed
		_, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: filepath.Join(dir, "bare")}, "")
		if errors.Is(err, blockdev.ErrBusy) && strings.Contains(err.Error(), "pcie-root-port") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// relayed tells a copy of this program where to listen and where to.
const relayed = "HOLDFAST_TEST_RELAY"

func TestMain(m *testing.M) {
	if from, to, found := strings.Cut(os.Getenv(relayed), "|"); found {
		relays(from, to)
		return
	}
	os.Exit(m.Run())
}

// relays passes every connection on, until this process is killed.
func relays(from, to string) {
	l, err := net.Listen("unix", from)
	if err != nil {
		return
	}
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer in.Close()
			out, err := net.Dial("unix", to)
			if err != nil {
				return
			}
			defer out.Close()
			go func() { _, _ = io.Copy(out, in); out.Close() }() // the daemon has hung up
			_, _ = io.Copy(in, out)
		}()
	}
}

// relay serves a socket that another process listens on: as a machine's, whose
// process is never this one. hangUp ends that process.
func relay(t *testing.T, socket string, serve func(net.Conn)) (hangUp func()) {
	t.Helper()
	inner := filepath.Join(t.TempDir(), "inner")
	l, err := net.Listen("unix", inner)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), relayed+"="+socket+"|"+inner)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	hangUp = sync.OnceFunc(func() { _ = cmd.Process.Kill(); _ = cmd.Wait(); l.Close() })
	t.Cleanup(hangUp)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	listens(t, socket)
	return hangUp
}

// fake is a monitor that answers what a real one cannot be made to.
type fake struct {
	mu      sync.Mutex
	nodes   []string
	devices []string
	said    []string                                 // commands
	refuse  func(command string, args string) string // words of the refusal, "" for none; "hang up" ends the connection
	refuses bool                                     // the guest, to let a device go
	deaf    bool                                     // the guest: it does not answer
	status  string                                   // of the machine
}

// set says what is refused from now on; nil for nothing.
func (f *fake) set(refuse func(command, args string) string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if refuse == nil {
		refuse = func(string, string) string { return "" }
	}
	f.refuse = refuse
}

// left tells the nodes and devices that are there.
func (f *fake) left() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(append(slices.Clone(f.nodes), f.devices...), " ")
}

func fakeMonitor(t *testing.T, socket string) *fake {
	t.Helper()
	f := &fake{refuse: func(string, string) string { return "" }}
	relay(t, socket, f.serve)
	return f
}

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
			class, text, found := strings.Cut(words, "|")
			if !found {
				class, text = "GenericError", words
			}
			fmt.Fprintf(c, `{"error":{"class":%q,"desc":%q},"id":%d}`+"\r\n", class, text, q.ID)
		}
	}
}

func (f *fake) do(command string, text json.RawMessage) (answer any, event string) {
	var args struct {
		ID   string `json:"id"`
		Path string `json:"path"`
		Node string `json:"node-name"`
	}
	_ = json.Unmarshal(text, &args)
	all := []map[string]any{}
	switch command {
	case "qom-list":
		if args.Path != "/machine/peripheral" {
			break
		}
		all = append(all, map[string]any{"name": "rp0", "type": "child<pcie-root-port>"}, map[string]any{"name": "rp1", "type": "child<pcie-root-port>"})
		for _, d := range f.devices {
			all = append(all, map[string]any{"name": d, "type": "child<virtio-blk-pci>"})
		}
	case "query-memdev", "query-chardev":
	case "query-named-block-nodes":
		for _, n := range f.nodes {
			all = append(all, map[string]any{"node-name": n, "ro": false})
		}
	case "blockdev-add":
		f.nodes = append(f.nodes, args.Node)
	case "blockdev-del":
		f.nodes = slices.DeleteFunc(f.nodes, func(n string) bool { return n == args.Node })
	case "device_add":
		f.devices = append(f.devices, args.ID)
	case "query-status":
		return map[string]any{"running": f.status == "", "status": f.status}, ""
	case "device_del":
		if f.deaf {
			return struct{}{}, ""
		}
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
	a := hasty(t, dir)
	target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: socket}, "")
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := attach.Request{Volume: id, Endpoint: blockdev.Endpoint{Kind: blockdev.File, Path: image, Size: 1 << 20}, Target: target}
	set, left := f.set, f.left
	for name, c := range map[string]struct{ command, words, want string }{
		"blockdev-add": {"blockdev-add", "Could not open '/pool/image': Input/output error", "refused blockdev-add: Could not open '(path)': Input/output error"},
		"device_add":   {"device_add", "Bus 'rp0' does not support hotplugging", "needs a pcie-root-port"},
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
