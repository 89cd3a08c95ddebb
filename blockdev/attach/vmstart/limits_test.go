package vmstart_test

import (
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/cloudhypervisor"
	"holdfast/blockdev/attach/firecracker"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/attach/vmstart"
	"holdfast/blockdev/filesystem"
)

// TestLimits: they are in what each VMM is told, where it has them; they change while a
// machine runs that can be asked, and are not said to otherwise.
func TestLimits(t *testing.T) {
	b := newBench(t)
	door, err := vmsocket.New([]string{b.dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	inFirecracker, err := firecracker.New(door, firecracker.Sync)
	if err != nil {
		t.Fatal(err)
	}
	b.Attacher, err = vmstart.New(vmstart.Options{Dir: filepath.Join(b.dir, "vm"), Door: door, FirecrackerIO: firecracker.Sync, Resizers: map[string]attach.Resizer{
		qemu.Type: qemu.New(qemu.Options{Door: door}), firecracker.Type: inFirecracker, cloudhypervisor.Type: cloudhypervisor.New(door, cloudhypervisor.Options{}),
	}})
	if err != nil {
		t.Fatal(err)
	}
	limits := blockdev.Limits{ReadIOPS: 100, WriteIOPS: 50, ReadBytes: 1 << 20, WriteBytes: 1 << 20}
	for vmm, want := range map[string]string{
		qemu.Type:            `"iops-read":100,"iops-total":0,"iops-write":50`,
		cloudhypervisor.Type: ",bw_size=2097152,bw_refill_time=1000,ops_size=150,ops_refill_time=1000",
		firecracker.Type:     `"rate_limiter":{"bandwidth":{"size":2097152,"refill_time":1000},"ops":{"size":150,"refill_time":1000}}`,
	} {
		r := b.r
		r.Target, r.Limits = b.resolve(t, vmm), limits
		b.attach(t, r)
		l, err := b.Launch(t.Context(), r, filesystem.Ext4)
		if told := strings.Join(l.Arguments, " ") + string(l.Document); err != nil || !strings.Contains(told, want) {
			t.Errorf("%s is told %s, %v", vmm, told, err)
		}
		if e, err := b.Explain(r.Target, false, limits); err != nil || !strings.Contains(strings.Join(e.Gaps, " "), "arguments given") {
			t.Errorf("%s: %+v, %v", vmm, e, err)
		}
		if err := b.MayChange(r.Target); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s, not started: %v", vmm, err)
		}
		if err := b.Limit(t.Context(), r); err != nil { // it has them
			t.Errorf("%s: %v", vmm, err)
		}
		r.Target.Pid, r.Target.Socket = 7, "/run/vm"
		if err := b.MayChange(r.Target); (err == nil) != (vmm != cloudhypervisor.Type) {
			t.Errorf("%s, running: %v", vmm, err)
		}
		b.detach(t, r)
	}
	for vmm, l := range map[string]blockdev.Limits{vmstart.Kata: limits, firecracker.Type: {ReadIOPS: 10}, cloudhypervisor.Type: {ReadIOPS: 10}} {
		if _, err := b.Explain(attach.Target{VMM: vmm}, false, l); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v", vmm, err)
		}
	}
}
