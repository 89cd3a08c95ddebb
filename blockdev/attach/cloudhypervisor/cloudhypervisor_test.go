package cloudhypervisor_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/cloudhypervisor"
	"holdfast/blockdev/attach/vmmtest"
	"holdfast/blockdev/attach/vmsocket"
)

const (
	id     = blockdev.ID("vol-0123456789abcdefghijklmnop")
	diskID = "holdfast-vol-0123456789abcdefghijklmnop"
)

func TestMain(m *testing.M) {
	vmmtest.Main()
	os.Exit(m.Run())
}

// bench is a VMM, an attacher, and a volume that is to go there.
type bench struct {
	*cloudhypervisor.Attacher
	vm *vmmtest.VMM
	r  attach.Request
}

// start makes a VM and leads it through states.
func start(t *testing.T, steps ...string) *bench {
	t.Helper()
	socket := vmmtest.Socket(t)
	b := &bench{vm: vmmtest.Start(t, vmmtest.CloudHypervisor, socket)}
	door, err := vmsocket.New([]string{filepath.Dir(socket)}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	b.Attacher = cloudhypervisor.New(door, cloudhypervisor.Options{Wait: 50 * time.Millisecond})
	for _, step := range append([]string{"create"}, steps...) {
		b.vm.Steer(step)
	}
	target, err := b.Resolve(context.Background(), attach.Target{Type: cloudhypervisor.Type, Socket: socket}, "")
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "image")
	b.r = attach.Request{Volume: id, Target: target, Endpoint: blockdev.Endpoint{Kind: blockdev.File, Path: image}}
	b.grow(t, 1<<20)
	return b
}

func (b *bench) grow(t *testing.T, size int64) {
	t.Helper()
	f, err := os.OpenFile(b.r.Endpoint.Path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	b.r.Endpoint.Size = size
}

func (b *bench) attach(t *testing.T) {
	t.Helper()
	if err := b.Attach(context.Background(), b.r); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) detach(t *testing.T) {
	t.Helper()
	if err := b.Detach(context.Background(), b.r); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) expect(t *testing.T, want attach.State) {
	t.Helper()
	if got, err := b.Probe(context.Background(), b.r); err != nil || got != want {
		t.Errorf("probe: %q, %v; want %q", got, err, want)
	}
}

func TestHotLife(t *testing.T) {
	for _, readOnly := range []bool{false, true} {
		b := start(t, "boot")
		b.r.ReadOnly = readOnly
		b.expect(t, attach.StateMissing)
		for range 2 {
			b.attach(t)
		}
		b.expect(t, attach.StateAttached)
		d := b.vm.Seen().Disks[diskID]
		if d.Path != b.r.Endpoint.Path || d.Size != 1<<20 || d.ReadOnly != readOnly {
			t.Errorf("the disk: %+v", d)
		}
		for _, text := range []string{`"image_type":"Raw"`, `"backing_files":false`, `"direct":true`, `"serial":"` + cloudhypervisor.Serial(id) + `"`} {
			if !strings.Contains(string(d.Config), text) {
				t.Errorf("the disk's %s lacks %s", d.Config, text)
			}
		}
		if n := b.vm.Count("PUT /api/v1/vm.add-disk"); n != 1 {
			t.Errorf("the disk was added %d times", n)
		}
		b.grow(t, 2<<20)
		for range 2 {
			if err := b.Resized(context.Background(), b.r); err != nil {
				t.Fatal(err)
			}
		}
		// A reader sees it when it is attached again: the VMM cannot resize its file.
		if got := b.vm.Seen().Disks[diskID].Size; got != 2<<20 && !readOnly {
			t.Errorf("grown: %d", got)
		}
		for range 2 {
			b.detach(t)
		}
		b.expect(t, attach.StateMissing)
		b.attach(t) // it may come back
		b.detach(t)
	}
}

// A VM that was created and not booted: the disk is in its configuration only.
func TestColdLife(t *testing.T) {
	b := start(t)
	b.attach(t)
	b.expect(t, attach.StateAttached)
	b.grow(t, 2<<20)
	if err := b.Resized(context.Background(), b.r); err != nil {
		t.Fatal(err)
	}
	b.detach(t)
	b.expect(t, attach.StateMissing)
	b.attach(t)
	b.vm.Steer("boot")
	b.attach(t) // the daemon was started again meanwhile
	if got := b.vm.Seen().Disks[diskID].Size; got != 2<<20 {
		t.Errorf("the guest sees %d bytes", got)
	}
	b.vm.Steer("shutdown")
	b.expect(t, attach.StateAttached) // it comes back with the next boot
	b.vm.Steer("boot")
	b.vm.Steer("delete")
	b.expect(t, attach.StateMissing)
	b.detach(t)
	if err := b.Attach(context.Background(), b.r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "no virtual machine") {
		t.Errorf("attach without a VM: %v", err)
	}
	if _, err := b.Resolve(context.Background(), attach.Target{Type: cloudhypervisor.Type, Socket: b.vm.Socket}, ""); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("resolve without a VM: %v", err)
	}
}

// A guest that does not let go has the volume, whatever the configuration says.
func TestDetachPending(t *testing.T) {
	for _, why := range []string{"deaf", "pause"} {
		b := start(t, "boot")
		b.attach(t)
		b.vm.Steer(why)
		for range 2 {
			if err := b.Detach(context.Background(), b.r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "guest") {
				t.Fatalf("%s: %v", why, err)
			}
			b.expect(t, attach.StateAttached)
			if _, holds := b.vm.Seen().Disks[diskID]; !holds {
				t.Fatal("the server has closed the disk")
			}
		}
		if err := b.Attach(context.Background(), b.r); !errors.Is(err, blockdev.ErrBusy) {
			t.Errorf("%s: attached while it leaves: %v", why, err)
		}
		b.vm.Steer(map[string]string{"deaf": "release", "pause": "resume"}[why])
		b.detach(t)
		b.expect(t, attach.StateMissing)
	}
}

func TestRefused(t *testing.T) {
	ctx := context.Background()
	b := start(t, "boot")
	b.attach(t)
	other := b.r
	other.ReadOnly = true
	if err := b.Attach(ctx, other); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("in another mode: %v", err)
	}
	other = b.r
	other.Volume = "vol-1123456789abcdefghijklmnop"
	if err := b.Attach(ctx, other); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "another disk") {
		t.Errorf("one image twice: %v", err)
	}
	b.detach(t)
	for _, status := range []int{400, 404, 409, 500} { // all that the document has for vm.add-disk
		b.vm.Fail(vmmtest.Fault{Request: "PUT /api/v1/vm.add-disk", How: vmmtest.FaultStatus, Status: status, Times: 1})
		if err := b.Attach(ctx, b.r); !errors.Is(err, blockdev.ErrBusy) || strings.Contains(err.Error(), "secret") {
			t.Errorf("refused with %d: %v", status, err)
		}
		b.expect(t, attach.StateMissing)
		b.detach(t)
	}
	b.attach(t)
	for _, status := range []int{404, 500} {
		b.vm.Fail(vmmtest.Fault{Request: "PUT /api/v1/vm.resize-disk", How: vmmtest.FaultStatus, Status: status, Times: 1})
		if err := b.Resized(ctx, b.r); !errors.Is(err, blockdev.ErrBusy) {
			t.Errorf("growth refused with %d: %v", status, err)
		}
	}
	b.vm.Fail(vmmtest.Fault{Request: "PUT /api/v1/vm.remove-device", How: vmmtest.FaultStatus, Status: 404, Times: 1})
	if err := b.Detach(ctx, b.r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("a removal that was not done: %v", err)
	}
	b.detach(t)
	b.vm.Steer("old")
	if _, err := b.Resolve(ctx, attach.Target{Type: cloudhypervisor.Type, Socket: b.vm.Socket}, ""); !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "guess") {
		t.Errorf("a version that probes formats: %v", err)
	}
}

// Whatever happens to an answer, what was done is found when the step is taken again.
func TestCutInTheMiddle(t *testing.T) {
	for _, how := range []string{vmmtest.FaultLost, vmmtest.FaultHalf, vmmtest.FaultHang} {
		b := start(t, "boot")
		cut := func(request string, step func(context.Context, attach.Request) error) {
			b.vm.Fail(vmmtest.Fault{Request: request, How: how, Times: 1})
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			stop := func() {}
			if how == vmmtest.FaultHang {
				stop = b.vm.When(request, cancel)
			}
			if err := step(ctx, b.r); err == nil || errors.Is(err, blockdev.ErrGone) {
				t.Errorf("%s, %s: %v", request, how, err)
			}
			stop()
		}
		cut("GET /api/v1/vm.info", b.Attach)
		cut("PUT /api/v1/vm.add-disk", b.Attach)
		b.attach(t)
		b.grow(t, 2<<20)
		cut("PUT /api/v1/vm.resize-disk", b.Resized)
		if err := b.Resized(context.Background(), b.r); err != nil {
			t.Error(err)
		}
		cut("GET /api/v1/vm.info", b.Detach)
		b.expect(t, attach.StateAttached)
		cut("PUT /api/v1/vm.remove-device", b.Detach)
		b.detach(t)
		b.expect(t, attach.StateMissing)
	}
}

func TestDeath(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		request string
		step    func(*bench) error
	}{
		{"PUT /api/v1/vm.add-disk", func(b *bench) error { return b.Attach(ctx, b.r) }},
		{"PUT /api/v1/vm.resize-disk", func(b *bench) error { return b.Resized(ctx, b.r) }},
		{"PUT /api/v1/vm.remove-device", func(b *bench) error { return b.Detach(ctx, b.r) }},
	} {
		b := start(t, "boot")
		if !strings.HasSuffix(c.request, "add-disk") {
			b.attach(t)
		}
		b.vm.Fail(vmmtest.Fault{Request: c.request, How: vmmtest.FaultDie})
		err := c.step(b)
		<-b.vm.Ended()
		if err == nil && !strings.HasSuffix(c.request, "remove-device") {
			t.Errorf("%s: success of a VMM that died", c.request)
		}
		b.expect(t, attach.StateGone)
		b.detach(t)
		if err := b.Attach(ctx, b.r); !errors.Is(err, blockdev.ErrGone) {
			t.Errorf("attach to a dead VMM: %v", err)
		}
	}
}

func TestFence(t *testing.T) {
	ctx := context.Background()
	b := start(t, "boot", "deaf")
	b.attach(t)
	ended := make(chan error, 1)
	go func() { ended <- b.AwaitEnd(ctx, b.r.Target) }()
	for range 2 {
		if err := b.Fence(ctx, b.r); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	b.expect(t, attach.StateGone)
	b.detach(t)
	<-b.vm.Ended()
}

func TestOtherVMMsBehindTheSocket(t *testing.T) {
	b := start(t)
	for _, kind := range []string{vmmtest.Firecracker, vmmtest.Other} {
		socket := filepath.Join(filepath.Dir(b.vm.Socket), kind)
		other := vmmtest.Start(t, kind, socket)
		_, err := b.Resolve(context.Background(), attach.Target{Type: cloudhypervisor.Type, Socket: socket}, "")
		if !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "Cloud Hypervisor") {
			t.Errorf("%s: %v", kind, err)
		}
		other.Forgive() // it was asked what its document does not have
	}
}
