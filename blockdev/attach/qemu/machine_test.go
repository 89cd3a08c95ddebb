package qemu_test

import (
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
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/blockdevtest"
)

// machine is a QEMU with a machine and without a guest: its processor never runs.
type machine struct {
	t      *testing.T
	dir    string
	socket string
	cmd    *exec.Cmd
	kill   func()
	served bool // volumes come by workers
}

// controller is a place for disks that are let go without a guest.
var controller = []string{"-device", "virtio-scsi-pci,id=scsi0"}

// port gives a root port; with the firmware's way of hot-plug it needs a guest to let
// a device go.
func port(n int) []string {
	return []string{"-device", fmt.Sprintf("pcie-root-port,id=rp%d,chassis=%d,slot=%d", n, n+1, n+1)}
}

func startMachine(t *testing.T, args ...string) *machine {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Qemu)
	m := &machine{t: t, dir: t.TempDir()}
	m.socket = filepath.Join(m.dir, "q")
	m.cmd = exec.Command("qemu-system-x86_64", slices.Concat([]string{"-accel", "tcg", "-machine", "q35", "-m", "64", "-nodefaults", "-display", "none", "-S", //nolint:gosec // a test's
		"-qmp", "unix:" + m.socket + ",server=on,wait=off"}, args)...)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.kill = sync.OnceFunc(func() { _ = m.cmd.Process.Kill(); _ = m.cmd.Wait() })
	t.Cleanup(m.kill)
	listens(t, m.socket)
	return m
}

func listens(t *testing.T, socket string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("nobody listens: %v", err)
		}
	}
}

// monitor runs a test's own commands.
func (m *machine) monitor(do func(*qmp.Monitor)) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	q, err := qmp.Dial(ctx, m.socket)
	if err != nil {
		m.t.Fatal(err)
	}
	defer q.Close()
	do(q)
}

func (m *machine) ask(command string, args qmp.Args, into any) {
	m.t.Helper()
	m.monitor(func(q *qmp.Monitor) {
		answer, err := q.Do(context.Background(), command, args)
		if err == nil && into != nil {
			err = json.Unmarshal(answer, into)
		}
		if err != nil {
			m.t.Fatal(err)
		}
	})
}

// image makes one, and the request to attach it to the machine.
func (m *machine) image(a *qemu.Attacher, n int) attach.Request {
	m.t.Helper()
	target, err := a.Resolve(context.Background(), attach.Target{Type: qemu.Type, Socket: m.socket}, "")
	if err != nil {
		m.t.Fatal(err)
	}
	return m.requestFor(target, n)
}

func (m *machine) requestFor(target attach.Target, n int) attach.Request {
	m.t.Helper()
	volume := blockdev.ID(fmt.Sprintf("vol-06c8qk4g1h6s9tj2m0a4n7v%03d", n))
	path := filepath.Join(m.dir, string(volume))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		m.t.Fatal(err)
	}
	if m.served {
		socket, _ := serve(m.t, path, 2)
		return attach.Request{Volume: volume, Target: target, Endpoint: blockdev.Endpoint{Kind: blockdev.VhostUser, Path: socket, Size: 1 << 20}}
	}
	return attach.Request{Volume: volume, Target: target, Endpoint: blockdev.Endpoint{Kind: blockdev.File, Path: path, Size: 1 << 20}}
}

// left tells what of volumes is in the machine: devices, nodes, throttle groups, open
// images.
func (m *machine) left() (all []string) {
	m.t.Helper()
	type named struct {
		Name  string
		Label string
		Node  string `json:"node-name"`
	}
	for command, args := range map[string]qmp.Args{
		"qom-list /machine/peripheral": {"path": "/machine/peripheral"}, "qom-list /objects": {"path": "/objects"}, "query-named-block-nodes": {"flat": true}, "query-chardev": nil,
	} {
		command, _, _ = strings.Cut(command, " ")
		var found []named
		m.ask(command, args, &found)
		for _, n := range found {
			if strings.HasPrefix(n.Name+n.Label, "holdfast-") || n.Node != "" {
				all = append(all, n.Name+n.Label+n.Node)
			}
		}
	}
	for path, n := range m.open() {
		all = append(all, fmt.Sprintf("%s %dx", filepath.Base(path), n))
	}
	slices.Sort(all)
	return all
}

// open tells the images that QEMU has open.
func (m *machine) open() map[string]int {
	m.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", m.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		m.t.Fatal(err)
	}
	all := map[string]int{}
	for _, e := range entries {
		if at, _ := os.Readlink(filepath.Join(dir, e.Name())); strings.HasPrefix(at, filepath.Join(m.dir, "vol-")) {
			all[at]++
		}
	}
	return all
}

func (m *machine) empty(when string) {
	m.t.Helper()
	if left := m.left(); len(left) > 0 {
		m.t.Errorf("%s: left in the machine: %v", when, left)
	}
}

func is(t *testing.T, what string, err, want error, words string) {
	t.Helper()
	if !errors.Is(err, want) || !strings.Contains(err.Error(), words) {
		t.Errorf("%s: %v; want %v with %q", what, err, want, words)
	}
}

func good(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// limits tells those that QEMU has for a volume.
func (m *machine) limits(volume blockdev.ID) (l blockdev.Limits) {
	m.t.Helper()
	var found map[string]int64
	m.ask("qom-get", qmp.Args{"path": "/objects/holdfast-limits-" + string(volume), "property": "limits"}, &found)
	if found["iops-total"] != 0 || found["bps-total"] != 0 {
		m.t.Errorf("the throttle group bounds the total: %v", found)
	}
	return blockdev.Limits{ReadIOPS: found["iops-read"], WriteIOPS: found["iops-write"], ReadBytes: found["bps-read"], WriteBytes: found["bps-write"]}
}

// TestLimits: QEMU has them from the first moment, changes them while the volume is
// there, and keeps nothing of them.
func TestLimits(t *testing.T) {
	m := startMachine(t, controller...)
	a := attacher(t, m.dir)
	r := m.image(a, 1)
	ctx := t.Context()
	r.Limits = blockdev.Limits{ReadIOPS: 100, WriteBytes: 1 << 20}
	good(t, a.Limit(ctx, r)) // it is not there: no limits, no mistake
	m.empty("limits of what is not there")
	good(t, a.Attach(ctx, r))
	for _, l := range []blockdev.Limits{r.Limits, {WriteIOPS: 50}, {}, {ReadIOPS: 1, WriteIOPS: 2, ReadBytes: 3 << 20, WriteBytes: 4 << 20}} {
		r.Limits = l
		good(t, a.Limit(ctx, r), a.Limit(ctx, r))
		if got := m.limits(r.Volume); got != l {
			t.Errorf("QEMU has %+v, wanted %+v", got, l)
		}
	}
	r.Limits = blockdev.Limits{ReadIOPS: 7}
	good(t, a.Attach(ctx, r)) // another life of the daemon
	if got := m.limits(r.Volume); got != r.Limits {
		t.Errorf("attached again: %+v", got)
	}
	good(t, a.Detach(ctx, r))
	m.empty("detached")

	// A volume that came in by other means has no group to change.
	m.ask("blockdev-add", qmp.Args{"driver": "raw", "node-name": "hf-" + strings.TrimPrefix(string(r.Volume), "vol-"), "file": qmp.Args{"driver": "file", "filename": r.Endpoint.Path}}, nil)
	is(t, "without a group", a.Limit(ctx, r), errors.ErrUnsupported, "detach and attach")
	r.Limits = blockdev.Limits{}
	good(t, a.Attach(ctx, r), a.Limit(ctx, r), a.Detach(ctx, r))
	m.empty("detached")
}

// TestArguments: a machine that was started with a volume has its limits, and takes
// others and a growth as if it had been plugged in.
func TestArguments(t *testing.T) {
	for _, readOnly := range []bool{false, true} {
		first := &machine{t: t, dir: t.TempDir()}
		r := first.requestFor(attach.Target{}, 1)
		r.ReadOnly, r.Limits = readOnly, blockdev.Limits{ReadIOPS: 100, WriteBytes: 1 << 20}
		m := startMachine(t, qemu.Arguments(r)...)
		if got := m.limits(r.Volume); got != r.Limits {
			t.Errorf("limits %+v", got)
		}
		if m.opensForWriting(r.Endpoint.Path) == readOnly {
			t.Errorf("read-only %t, and open otherwise", readOnly)
		}
		a := attacher(t, m.dir)
		process, err := attacher(t, m.dir).Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: m.socket}, "")
		is(t, "resolve", err, blockdev.ErrBusy, "no room") // and it is resolved
		r.Target = process
		r.Limits = blockdev.Limits{}
		good(t, a.Limit(t.Context(), r), a.Resized(t.Context(), r))
		if got := m.limits(r.Volume); !got.None() {
			t.Errorf("lifted: %+v", got)
		}
		if _, err := a.Counters(t.Context(), r); err != nil {
			t.Error(err)
		}
	}
}

// TestCounters: what went through the device is QEMU's to tell, behind either kind.
func TestCounters(t *testing.T) {
	for _, args := range [][]string{controller, port(0)} {
		m := startMachine(t, args...)
		a := attacher(t, m.dir)
		r := m.image(a, 1)
		_, err := a.Counters(t.Context(), r)
		is(t, "of what is not there", err, blockdev.ErrNotFound, "")
		good(t, a.Attach(t.Context(), r))
		path := "/machine/peripheral/holdfast-" + string(r.Volume)
		if args[1] == port(0)[1] {
			path += "/virtio-backend"
		}
		for _, command := range []string{"aio_write 0 4k", "aio_write 8k 8k", "aio_flush", "aio_read 0 512"} {
			m.ask("human-monitor-command", qmp.Args{"command-line": fmt.Sprintf("qemu-io -d %s %q", path, command)}, nil)
		}
		m.ask("human-monitor-command", qmp.Args{"command-line": fmt.Sprintf(`qemu-io -d %s "aio_flush"`, path)}, nil)
		want := blockdev.Counters{Reads: 1, ReadBytes: 512, Writes: 2, WriteBytes: 12 << 10, Flushes: 2}
		if got, err := a.Counters(t.Context(), r); err != nil || got != want {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
	}
}

// TestLimitsHold: what QEMU itself writes through the node takes the time that its
// limit says, at least.
func TestLimitsHold(t *testing.T) {
	m := startMachine(t, controller...)
	a := attacher(t, m.dir)
	r := m.image(a, 1)
	r.Limits = blockdev.Limits{WriteIOPS: 20}
	good(t, a.Attach(t.Context(), r))
	write := qmp.Args{"command-line": fmt.Sprintf(`qemu-io -d holdfast-%s "write 0 4k"`, r.Volume)}
	const writes = 8
	begin := time.Now()
	for range writes {
		m.ask("human-monitor-command", write, nil)
	}
	// The first three pass at once: a tenth of a second's worth, and one that begins.
	if least := (writes - 3) * time.Second / 20; time.Since(begin) < least {
		t.Errorf("%d writes took %s at 20 a second", writes, time.Since(begin))
	}
	good(t, a.Detach(t.Context(), r))
}
