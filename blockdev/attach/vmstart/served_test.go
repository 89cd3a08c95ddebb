package vmstart_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmstart"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/vhost"
)

// serve gives the bench's image to a worker, and a target that wants one.
func (b *bench) serve(t *testing.T, vmm string) {
	t.Helper()
	target, err := b.Resolve(t.Context(), attach.Target{Type: vmstart.Type, VMM: vmm, Transport: "vhost-user", Shared: true}, "")
	if err != nil {
		t.Fatal(err)
	}
	if kinds := b.KindsFor(target); !slices.Equal(kinds, []blockdev.Kind{blockdev.VhostUser}) || target.Shared {
		t.Errorf("%+v: %v", target, kinds)
	}
	file, err := os.OpenFile(b.r.Endpoint.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := device.NewFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := vhost.New(f, vhost.Options{Serial: "served"})
	if err != nil {
		t.Fatal(err)
	}
	socket := b.r.Endpoint.Path + ".s"
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(l.Close(), s.Close(), <-done, file.Close()); err != nil {
			t.Error(err)
		}
	})
	b.r.Target, b.r.Endpoint = target, blockdev.Endpoint{Kind: blockdev.VhostUser, Path: socket, Size: 1 << 20}
}

// qemu starts one with the arguments of the attachment, and waits until it is connected.
func (b *bench) qemu(t *testing.T) *machine {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Qemu)
	l, err := b.Launch(t.Context(), b.r, filesystem.Ext4)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(l.Arguments, " "), "path="+b.r.Target.Path+",") {
		t.Errorf("the arguments name another path: %v", l.Arguments)
	}
	m := &machine{exec.Command("qemu-system-x86_64", append([]string{"-accel", "tcg", "-machine", "q35,memory-backend=mem", //nolint:gosec // a test's
		"-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-m", "64", "-nodefaults", "-display", "none", "-S"}, l.Arguments...)...), make(chan struct{})}
	m.Stderr = os.Stderr
	m.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = m.Wait(); close(m.ended) }()
	t.Cleanup(func() { _ = m.Process.Kill(); <-m.ended })
	for deadline := time.Now().Add(time.Minute); b.find(t, b.r).Pid != m.Process.Pid; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("QEMU is not connected")
		}
	}
	return m
}

// TestServed: a machine is started with a worker's socket; who is connected to it has
// the volume.
func TestServed(t *testing.T) {
	b := newBench(t)
	b.serve(t, "qemu")
	b.attach(t, b.r)
	m := b.qemu(t)
	other := b.r
	other.Target = b.resolve(t, "qemu")
	if err := b.Attach(t.Context(), other); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("beside a machine that nobody knows: %v", err)
	}
	b.r.Target = b.find(t, b.r)
	if err := b.Detach(t.Context(), b.r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "end the virtual machine first") {
		t.Errorf("while it runs: %v", err)
	}
	if err := b.Resized(t.Context(), b.r); err != nil {
		t.Error(err)
	}
	_ = m.Process.Kill()
	<-m.ended
	b.expect(t, b.r, attach.StateGone)
	b.detach(t, b.r)

	b.r.Target.Pid = 0
	b.attach(t, b.r)
	m = b.qemu(t)
	if err := b.Fence(t.Context(), b.r); err != nil {
		t.Fatal(err)
	}
	<-m.ended
	b.detach(t, b.r)
}

// TestTransports: what no machine of a VMM can use is told.
func TestTransports(t *testing.T) {
	b := newBench(t)
	for vmm, transport := range map[string]string{"kata": "vhost-user", "firecracker": "vhost-user", "qemu": "nbd"} {
		_, err := b.Resolve(t.Context(), attach.Target{Type: vmstart.Type, VMM: vmm, Transport: transport}, "")
		if !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "target.transport") {
			t.Errorf("%s: %v", vmm, err)
		}
	}
	if kinds := b.KindsFor(b.r.Target); kinds != nil {
		t.Errorf("%v without a wish", kinds)
	}
	b.serve(t, "cloud-hypervisor")
	b.attach(t, b.r)
	l, err := b.Launch(t.Context(), b.r, filesystem.Ext4)
	want := "vhost_user=on,socket=" + b.r.Target.Path + ",id=holdfast-" + string(id) + ",readonly=off"
	if err != nil || !slices.Equal(l.Arguments, []string{"--disk", want}) {
		t.Errorf("%v, %v", l.Arguments, err)
	}
	b.detach(t, b.r)
}
