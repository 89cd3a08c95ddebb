package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/blockdevtest"
)

// withoutGuests lets root ports give devices back by themselves while no guest has
// powered them.
var withoutGuests = []string{"-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"}

// TestLockedImages: what one machine has, another one gets in no mode, except readers
// beside readers; the same image by another disk of the machine neither.
func TestLockedImages(t *testing.T) {
	t.Parallel()
	one, two := startMachine(t, controller...), startMachine(t, controller...)
	ctx := t.Context()
	a, b := attacher(t, one.dir), attacher(t, two.dir)
	r := one.image(a, 1)
	other := two.image(b, 1)
	other.Endpoint = r.Endpoint
	good(t, a.Attach(ctx, r))
	for _, readOnly := range []bool{false, true} {
		other.ReadOnly = readOnly
		is(t, "beside a writer", b.Attach(ctx, other), blockdev.ErrBusy, "locked")
		two.empty("refused")
	}
	twice := r
	twice.Volume = "vol-06c8qk4g1h6s9tj2m0a4n7v002"
	is(t, "another disk of the machine", a.Attach(ctx, twice), blockdev.ErrBusy, "locked")
	good(t, a.Detach(ctx, r))
	one.empty("detached")
	r.ReadOnly = true
	good(t, a.Attach(ctx, r), b.Attach(ctx, other))
	other.ReadOnly = false
	is(t, "in the other mode", b.Attach(ctx, other), blockdev.ErrBusy, "another mode")
	good(t, a.Detach(ctx, r), b.Detach(ctx, other))
}

// TestManyVolumes: 32 go into one machine, ports first, then SCSI; a reader is one all
// the way down; all of them leave.
func TestManyVolumes(t *testing.T) {
	t.Parallel()
	m := startMachine(t, append(append(withoutGuests, controller...), append(port(0), port(1)...)...)...)
	a := attacher(t, m.dir)
	ctx := t.Context()
	target, err := a.Resolve(ctx, attach.Target{Type: qemu.Type, Socket: m.socket}, "")
	good(t, err)
	var all []attach.Request
	for n := range 32 {
		r := m.requestFor(target, n)
		r.ReadOnly = n%2 == 1
		good(t, a.Attach(ctx, r))
		all = append(all, r)
	}
	var nodes []struct {
		File     string
		ReadOnly bool `json:"ro"`
	}
	m.ask("query-named-block-nodes", qmp.Args{"flat": true}, &nodes)
	if len(nodes) != 3*len(all) {
		t.Errorf("%d nodes", len(nodes))
	}
	for _, r := range all {
		n := 0
		for _, node := range nodes {
			if strings.Contains(node.File, string(r.Volume)) {
				if n++; node.ReadOnly != r.ReadOnly {
					t.Errorf("%s: read-only %t, wanted %t", node.File, node.ReadOnly, r.ReadOnly)
				}
			}
		}
		if writable := m.opensForWriting(r.Endpoint.Path); n != 3 || writable == r.ReadOnly {
			t.Errorf("%s: %d nodes, open for writing: %t", r.Volume, n, writable)
		}
	}
	for _, r := range all {
		good(t, a.Detach(ctx, r))
	}
	m.empty("all detached")
}

// opensForWriting tells how QEMU has an image open.
func (m *machine) opensForWriting(path string) bool {
	m.t.Helper()
	dir := fmt.Sprintf("/proc/%d/", m.cmd.Process.Pid)
	entries, err := os.ReadDir(dir + "fd")
	if err != nil {
		m.t.Fatal(err)
	}
	for _, e := range entries {
		if at, _ := os.Readlink(dir + "fd/" + e.Name()); at != path {
			continue
		}
		info, err := os.ReadFile(dir + "fdinfo/" + e.Name())
		var pos, flags int
		if _, scan := fmt.Sscanf(string(info), "pos:\t%d\nflags:\t%o", &pos, &flags); err != nil || scan != nil {
			m.t.Fatal(err, scan)
		}
		if flags&(syscall.O_RDWR|syscall.O_WRONLY) != 0 {
			return true
		}
	}
	return false
}

// TestNoRoom: a machine without a place, or with all places taken, says so before
// anything is touched; a volume that is there is not hindered by that.
func TestNoRoom(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	for name, args := range map[string][]string{"no place": nil, "a port without a name": {"-device", "pcie-root-port,chassis=1"}, "a port in use": append(port(0), "-device", "virtio-rng-pci,bus=rp0")} {
		m := startMachine(t, args...)
		_, err := attacher(t, m.dir).Resolve(ctx, attach.Target{Type: qemu.Type, Socket: m.socket}, "")
		is(t, name, err, blockdev.ErrBusy, "-device pcie-root-port")
	}
	m := startMachine(t, append(withoutGuests, port(0)...)...)
	a := attacher(t, m.dir)
	r := m.image(a, 1)
	good(t, a.Attach(ctx, r))
	_, err := a.Resolve(ctx, attach.Target{Type: qemu.Type, Socket: m.socket}, "")
	is(t, "all taken", err, blockdev.ErrBusy, "no room")
	is(t, "all taken meanwhile", a.Attach(ctx, m.requestFor(r.Target, 2)), blockdev.ErrBusy, "no room")
	if left := m.left(); len(left) != 6 { // device, group, three nodes, image
		t.Errorf("in the machine: %v", left)
	}
	good(t, a.Attach(ctx, r), a.Resized(ctx, r), a.Detach(ctx, r), a.Attach(ctx, m.requestFor(r.Target, 2)))
}

// TestUnplugPending: a guest that does not run lets nothing go; what was asked of it is
// found by the next life, and done when it answers.
func TestUnplugPending(t *testing.T) {
	t.Parallel()
	m := startMachine(t, port(0)...)
	ctx := t.Context()
	a := attacher(t, m.dir)
	r := m.image(a, 1)
	r.Limits = blockdev.Limits{WriteIOPS: 10}
	good(t, a.Attach(ctx, r))
	for range 2 {
		is(t, "asked", hasty(t, m.dir).Detach(ctx, r), blockdev.ErrBusy, "not running (prelaunch)")
		if state, err := a.Probe(ctx, r); err != nil || state != attach.StateAttached || m.open()[r.Endpoint.Path] == 0 {
			t.Errorf("it is %s, %v", state, err)
		}
	}
	if l := m.limits(r.Volume); l != r.Limits { // a guest is not rid of them by that
		t.Errorf("limits %+v", l)
	}
	m.ask("system_reset", nil, nil) // lets go what was asked for
	for deadline := time.Now().Add(patience); ; {
		if state, err := a.Probe(ctx, r); err == nil && state == attach.StateMissing {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the device stays")
		}
	}
	good(t, a.Detach(ctx, r))
	m.empty("let go")
}

// TestStoppedProcess: a QEMU that does not run at all answers nothing, which is told
// in time.
func TestStoppedProcess(t *testing.T) {
	t.Parallel()
	m := startMachine(t, controller...)
	a := attacher(t, m.dir)
	r := m.image(a, 1)
	good(t, a.Attach(t.Context(), r))
	blockdevtest.StandStill(t, m.cmd.Process.Pid)
	rash := rash(t, m.dir)
	for what, err := range map[string]error{"grow": rash.Resized(t.Context(), r), "detach": rash.Detach(t.Context(), r), "limit": rash.Limit(t.Context(), r)} {
		is(t, what, err, blockdev.ErrBusy, "")
	}
	if state, err := rash.Probe(t.Context(), r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("probe: %s, %v", state, err)
	}
	good(t, m.cmd.Process.Signal(syscall.SIGCONT), a.Detach(t.Context(), r))
	m.empty("continued")
}

// TestAnswersThatAreNone: silence and garbage in the place of any answer end the step
// with a reason, and the next life finishes it.
func TestAnswersThatAreNone(t *testing.T) {
	t.Parallel()
	m := startMachine(t, controller...)
	l := lineTo(t, m)
	a, rash := attacher(t, m.dir), with(t, qemu.Options{Answer: patience, Command: 200 * time.Millisecond}, m.dir)
	ctx := t.Context()
	target, err := a.Resolve(ctx, attach.Target{Type: qemu.Type, Socket: l.socket}, "")
	good(t, err)
	r := m.requestFor(target, 1)
	for what, instead := range map[string]string{
		"silence": "", "garbage": "<html>\n", "half": `{"return": {`, "an array": "[1]\n", "a number": "7\n", "another's answer": `{"return": {}, "id": 4711}` + "\n",
		"no answer, an event": `{"event": "X", "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n", "too much": strings.Repeat("x", 17<<20) + "\n",
		"wrong types": `{"return": {}, "id": "one"}` + "\n",
	} {
		const add = 4 // the command
		for deadline := time.Now().Add(patience); ; {
			l.plan(add, cutInstead)
			l.instead = instead
			is(t, what, rash.Attach(ctx, r), blockdev.ErrBusy, "")
			if seen := l.seen(); len(seen) > add {
				if seen[add] != "blockdev-add" {
					t.Fatalf("cut at %s", seen[add])
				}
				break
			}
			if time.Now().After(deadline) { // one before it was not answered in time either
				t.Fatal("it is never cut")
			}
		}
		l.plan(-1, "")
		good(t, a.Attach(ctx, r), a.Detach(ctx, r))
		m.empty(what)
	}
	l.plan(0, cutSilence)
	if state, err := rash.Probe(ctx, r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "not answered") {
		t.Errorf("probe: %s, %v", state, err)
	}
}

// TestErrorClasses: each class of QEMU's errors, and each sentence that says what to
// do, becomes one of ours; nothing is left, and paths of the host are not told.
func TestErrorClasses(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "q")
	f := fakeMonitor(t, socket)
	a := hasty(t, dir)
	target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: socket}, "")
	good(t, err)
	image := filepath.Join(dir, "image")
	good(t, os.WriteFile(image, nil, 0o600))
	r := attach.Request{Volume: id, Endpoint: blockdev.Endpoint{Kind: blockdev.File, Path: image, Size: 1 << 20}, Target: target}
	for _, c := range []struct {
		command, answer string
		want            error
		words           string
	}{
		{"object-add", "CommandNotFound|The command object-add has not been found", blockdev.ErrInvalid, "version 6.0"},
		{"object-add", "attempt to add duplicate property 'x' to object (type 'container')", blockdev.ErrBusy, "try again"},
		{"blockdev-add", "DeviceNotActive|No balloon device has been activated", blockdev.ErrBusy, "(DeviceNotActive)"},
		{"blockdev-add", "KVMMissingCap|Using KVM without synchronous MMU, balloon unavailable", blockdev.ErrBusy, "(KVMMissingCap)"},
		{"blockdev-add", "DeviceNotFound|Device 'x' not found", blockdev.ErrBusy, "try again"},
		{"blockdev-add", "NewClass|something new about '/pool/image'", blockdev.ErrBusy, "something new about '(path)' (NewClass)"},
		{"blockdev-add", "Duplicate nodes with node-name='hf'", blockdev.ErrBusy, "try again"},
		{"blockdev-add", "Could not open '/pool/image': No such file or directory", blockdev.ErrBusy, "does not find the image"},
		{"blockdev-add", "Could not open '/pool/image': Read-only file system", blockdev.ErrBusy, "read-only for the virtual machine"},
		{"blockdev-add", "Failed to lock byte 100", blockdev.ErrBusy, "locked"},
		{"device_add", "Duplicate device ID 'holdfast'", blockdev.ErrBusy, "try again"},
		{"device_add", "Bus 'rp0' not found", blockdev.ErrBusy, "try again"},
		{"device_add", "PCI: slot 0 function 0 not available for virtio-blk-pci, in use by other", blockdev.ErrBusy, "no free slot"},
		{"device_add", "Permission conflict on node 'hf': permissions 'write' are both required by block device and unshared by block device", blockdev.ErrBusy, "something else"},
		{"device_add", "'virtio-blk-pci' is not a valid device model name", blockdev.ErrBusy, "not a valid device model"},
		{"qom-list", "CommandNotFound|x", blockdev.ErrInvalid, "no command qom-list"},
	} {
		f.set(func(command, _ string) string {
			if command == c.command {
				return c.answer
			}
			return ""
		})
		err := a.Attach(t.Context(), r)
		is(t, c.answer, err, c.want, c.words)
		if err != nil && strings.Contains(err.Error(), "/pool") {
			t.Errorf("%s: it tells a path: %v", c.answer, err)
		}
		if left := f.left(); left != "" {
			t.Errorf("%s: left %s", c.answer, left)
		}
	}
	f.set(func(command, _ string) string {
		if command == "block_resize" {
			return "Cannot find device='' nor node-name='hf'"
		}
		return ""
	})
	is(t, "grow", a.Resized(t.Context(), r), blockdev.ErrBusy, "does not have")
	for status, words := range map[string]string{"guest-panicked": "(guest-panicked)", "io-error": "(io-error)", "suspended": "(suspended)"} {
		f.set(nil)
		good(t, a.Attach(t.Context(), r))
		f.mu.Lock()
		f.deaf, f.status = true, status
		f.mu.Unlock()
		is(t, status, a.Detach(t.Context(), r), blockdev.ErrBusy, words)
		f.mu.Lock()
		f.deaf = false
		f.mu.Unlock()
		good(t, a.Detach(t.Context(), r))
	}
}

// TestAIO: the ways are tried in their order, and only for the want of one the next.
func TestAIO(t *testing.T) {
	dir := t.TempDir()
	f := fakeMonitor(t, filepath.Join(dir, "q"))
	image := filepath.Join(dir, "image")
	good(t, os.WriteFile(image, nil, 0o600))
	for _, c := range []struct {
		aio, answer, want string
	}{
		{"auto", "", "io_uring"},
		{"auto", "aio=%s was specified, but is not supported in this build.", "io_uring native threads"},
		{"auto", "Parameter 'aio' does not accept value '%s'", "io_uring native threads"},
		{"auto", "Could not open 'image': Permission denied", "io_uring"},
		{"native", "Parameter 'aio' does not accept value '%s'", "native"},
		{"threads", "", "threads"},
	} {
		a := with(t, qemu.Options{AIO: qemu.AIO(c.aio)}, dir)
		target, err := a.Resolve(t.Context(), attach.Target{Type: qemu.Type, Socket: filepath.Join(dir, "q")}, "")
		good(t, err)
		r := attach.Request{Volume: id, Endpoint: blockdev.Endpoint{Kind: blockdev.File, Path: image}, Target: target}
		var tried []string
		f.set(func(command, args string) string {
			if command != "blockdev-add" {
				return ""
			}
			_, rest, _ := strings.Cut(args, `"aio":"`)
			way, _, _ := strings.Cut(rest, `"`)
			tried = append(tried, way)
			if c.answer == "" || way == "threads" {
				return ""
			}
			return strings.Replace(c.answer, "%s", way, 1)
		})
		err = a.Attach(t.Context(), r)
		if got := strings.Join(tried, " "); got != c.want {
			t.Errorf("%s, %q: tried %s", c.aio, c.answer, got)
		}
		if works := c.answer == "" || strings.HasSuffix(c.want, " threads"); works != (err == nil) {
			t.Errorf("%s, %q: %v", c.aio, c.answer, err)
		}
		f.set(nil)
		good(t, a.Detach(context.Background(), r))
	}
}

// TestBusyMonitor: while another client has the monitor, no step is taken, and none is
// said to be; each is when that has gone.
func TestBusyMonitor(t *testing.T) {
	t.Parallel()
	m := startMachine(t, controller...)
	a, rash, ctx := attacher(t, m.dir), rash(t, m.dir), t.Context()
	r, other := m.image(a, 1), m.image(a, 2)
	good(t, a.Attach(ctx, r))
	m.monitor(func(*qmp.Monitor) {
		_, resolve := rash.Resolve(ctx, attach.Target{Type: qemu.Type, Socket: m.socket}, "")
		_, probe := rash.Probe(ctx, r)
		_, counters := rash.Counters(ctx, r)
		for what, err := range map[string]error{
			"resolve": resolve, "probe": probe, "counters": counters, "attach": rash.Attach(ctx, other),
			"grow": rash.Resized(ctx, r), "limit": rash.Limit(ctx, r), "detach": rash.Detach(ctx, r),
		} {
			is(t, what, err, blockdev.ErrBusy, "")
		}
		if len(m.open()) != 1 {
			t.Errorf("open: %v", m.open())
		}
	})
	good(t, a.Attach(ctx, other), a.Resized(ctx, r), a.Detach(ctx, r), a.Detach(ctx, other))
	m.empty("the other client has gone")
}

// TestAnotherBoot: what a machine of another boot had, it has no more, whoever has its
// pid and its socket now.
func TestAnotherBoot(t *testing.T) {
	m := startMachine(t, controller...)
	a, ctx := attacher(t, m.dir), t.Context()
	r := m.image(a, 1)
	good(t, a.Attach(ctx, r))
	before := r
	before.Target.Boot = "another"
	if state, err := a.Probe(ctx, before); err != nil || state != attach.StateGone {
		t.Errorf("%s, %v", state, err)
	}
	good(t, a.Detach(ctx, before), a.Fence(ctx, before))
	is(t, "attach", a.Attach(ctx, before), blockdev.ErrGone, "")
	is(t, "grow", a.Resized(ctx, before), blockdev.ErrGone, "")
	if state, err := a.Probe(ctx, r); err != nil || state != attach.StateAttached {
		t.Errorf("the machine of this boot: %s, %v", state, err)
	}
	good(t, a.Detach(ctx, r))
}
