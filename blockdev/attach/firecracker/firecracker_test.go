package firecracker_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/firecracker"
	"holdfast/blockdev/attach/vmmtest"
	"holdfast/blockdev/attach/vmsocket"
)

const (
	id      = blockdev.ID("vol-0123456789abcdefghijklmnop")
	driveID = "vol_0123456789abcdefghijklmnop"
)

func TestMain(m *testing.M) {
	vmmtest.Main()
	os.Exit(m.Run())
}

// bench is a VMM, an attacher, and a volume that is to go there.
type bench struct {
	*firecracker.Attacher
	vm *vmmtest.VMM
	r  attach.Request
}

func start(t *testing.T, arguments ...string) *bench {
	t.Helper()
	socket := vmmtest.Socket(t)
	b := &bench{vm: vmmtest.Start(t, vmmtest.Firecracker, socket, arguments...)}
	door, err := vmsocket.New([]string{filepath.Dir(socket)}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if b.Attacher, err = firecracker.New(door, firecracker.Async); err != nil {
		t.Fatal(err)
	}
	target, err := b.Resolve(context.Background(), attach.Target{Type: firecracker.Type, Socket: socket}, "")
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

func (b *bench) expect(t *testing.T, want attach.State) {
	t.Helper()
	if got, err := b.Probe(context.Background(), b.r); err != nil || got != want {
		t.Errorf("probe: %q, %v; want %q", got, err, want)
	}
}

// The whole life: given before boot, booted, grown, ended.
func TestLife(t *testing.T) {
	ctx := context.Background()
	for _, readOnly := range []bool{false, true} {
		b := start(t)
		b.r.ReadOnly = readOnly
		b.expect(t, attach.StateMissing)
		for range 2 {
			b.attach(t)
		}
		b.expect(t, attach.StateAttached)
		d := b.vm.Seen().Disks[driveID]
		if d.Path != b.r.Endpoint.Path || d.Size != 1<<20 || d.ReadOnly != readOnly {
			t.Errorf("the drive: %+v", d)
		}
		for _, text := range []string{`"cache_type":"Writeback"`, `"io_engine":"Async"`, `"is_root_device":false`} {
			if !strings.Contains(string(d.Config), text) {
				t.Errorf("the drive's %s lacks %s", d.Config, text)
			}
		}
		if n := b.vm.Count("PUT /drives"); n != 1 {
			t.Errorf("the drive was given %d times", n)
		}
		b.grow(t, 2<<20)
		if err := b.Resized(ctx, b.r); err != nil { // before boot
			t.Fatal(err)
		}
		if got := b.vm.Seen().Disks[driveID].Size; got != 2<<20 {
			t.Errorf("grown before boot: %d", got)
		}
		b.vm.Steer("boot")
		b.attach(t) // the daemon was started again meanwhile
		b.grow(t, 3<<20)
		for range 2 {
			if err := b.Resized(ctx, b.r); err != nil {
				t.Fatal(err)
			}
		}
		if got := b.vm.Seen().Disks[driveID].Size; got != 3<<20 {
			t.Errorf("grown: %d", got)
		}
		for _, state := range []string{"pause", "resume"} {
			b.vm.Steer(state)
			b.expect(t, attach.StateAttached)
			if err := b.Detach(ctx, b.r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "end the microVM") {
				t.Errorf("detach from a microVM that lives: %v", err)
			}
		}
		b.vm.Kill()
		b.expect(t, attach.StateGone)
		if err := b.Detach(ctx, b.r); err != nil {
			t.Errorf("detach from a microVM that has ended: %v", err)
		}
		if err := b.Attach(ctx, b.r); !errors.Is(err, blockdev.ErrGone) {
			t.Errorf("attach to a microVM that has ended: %v", err)
		}
		if err := b.Resized(ctx, b.r); !errors.Is(err, blockdev.ErrGone) {
			t.Errorf("resize of a microVM that has ended: %v", err)
		}
	}
}

func TestRefused(t *testing.T) {
	ctx := context.Background()
	b := start(t)
	if err := b.Detach(ctx, b.r); err != nil {
		t.Errorf("detach of what is not there: %v", err)
	}
	b.attach(t)
	other := b.r
	other.ReadOnly = true
	if err := b.Attach(ctx, other); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("in another mode: %v", err)
	}
	other = b.r
	other.Volume = "vol-1123456789abcdefghijklmnop"
	if err := b.Attach(ctx, other); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "another drive") {
		t.Errorf("one image twice: %v", err)
	}
	if err := b.Detach(ctx, b.r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("detach before boot: %v", err)
	}
	b.vm.Steer("boot")
	other.Endpoint.Path = filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other.Endpoint.Path, make([]byte, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.Attach(ctx, other); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "has been started") {
		t.Errorf("attach after boot: %v", err)
	}
	if _, err := b.Resolve(ctx, attach.Target{Type: firecracker.Type, Socket: b.vm.Socket}, ""); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "has been started") {
		t.Errorf("resolve after boot: %v", err)
	}
	if n := b.vm.Count("PUT /drives"); n != 1 {
		t.Errorf("%d drives were given", n)
	}
	if _, err := firecracker.New(nil, "Fast"); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("an I/O engine that is none: %v", err)
	}
}

// An image that the VMM cannot open, or refuses for any other reason, is told
// without the VMM's text, and nothing is left.
func TestRefusals(t *testing.T) {
	ctx := context.Background()
	b := start(t)
	for _, status := range []int{400, 500} {
		b.vm.Fail(vmmtest.Fault{Request: "PUT /drives", How: vmmtest.FaultStatus, Status: status, Times: 1})
		if err := b.Attach(ctx, b.r); !errors.Is(err, blockdev.ErrBusy) || strings.Contains(err.Error(), "secret") {
			t.Errorf("refused with %d: %v", status, err)
		}
		b.expect(t, attach.StateMissing)
		if err := b.Detach(ctx, b.r); err != nil {
			t.Errorf("taken back: %v", err)
		}
	}
	b.attach(t)
	b.vm.Steer("boot")
	b.vm.Fail(vmmtest.Fault{Request: "PATCH /drives", How: vmmtest.FaultStatus, Status: 400, Times: 1})
	if err := b.Resized(ctx, b.r); !errors.Is(err, blockdev.ErrBusy) {
		t.Errorf("growth refused: %v", err)
	}
	if err := b.Resized(ctx, b.r); err != nil {
		t.Error(err)
	}
}

// Whatever happens to an answer, what was done is found when the step is taken again.
func TestCutInTheMiddle(t *testing.T) {
	for _, how := range []string{vmmtest.FaultLost, vmmtest.FaultHalf, vmmtest.FaultGarbage, vmmtest.FaultHang} {
		for _, request := range []string{"GET /", "GET /vm/config", "PUT /drives"} {
			b := start(t)
			b.vm.Fail(vmmtest.Fault{Request: request, How: how, Times: 1})
			ctx, cancel := context.WithCancel(context.Background())
			stop := func() {}
			if how == vmmtest.FaultHang {
				stop = b.vm.When(request, cancel)
			}
			first := b.Attach(ctx, b.r)
			stop()
			cancel()
			if request != "PUT /drives" || how != vmmtest.FaultGarbage { // it looks at no body there
				if first == nil || errors.Is(first, blockdev.ErrGone) {
					t.Errorf("%s, %s: %v", request, how, first)
				}
			}
			b.attach(t)
			b.expect(t, attach.StateAttached)
			b.vm.Fail(vmmtest.Fault{})
			b.vm.Kill()
		}
	}
}

// A VMM that cannot be asked may have the volume: nobody says that it has not.
func TestUnknownIsNotMissing(t *testing.T) {
	b := start(t)
	b.attach(t)
	for _, how := range []string{vmmtest.FaultHalf, vmmtest.FaultGarbage, vmmtest.FaultStatus} {
		b.vm.Fail(vmmtest.Fault{Request: "GET /vm/config", How: how, Status: 500, Times: 2})
		if state, err := b.Probe(context.Background(), b.r); err == nil {
			t.Errorf("probe, %s: %s", how, state)
		}
		if err := b.Detach(context.Background(), b.r); err == nil {
			t.Errorf("detach, %s: success", how)
		}
	}
}

func TestDeathInTheMiddle(t *testing.T) {
	ctx := context.Background()
	b := start(t)
	b.vm.Fail(vmmtest.Fault{Request: "PUT /drives", How: vmmtest.FaultDie})
	if err := b.Attach(ctx, b.r); err == nil {
		t.Error("attached to a VMM that died")
	}
	<-b.vm.Ended()
	b.expect(t, attach.StateGone)
	if err := b.Detach(ctx, b.r); err != nil {
		t.Error(err)
	}
}

func TestFence(t *testing.T) {
	ctx := context.Background()
	b := start(t)
	b.attach(t)
	b.vm.Steer("boot")
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
	<-b.vm.Ended()
}

func TestOtherVMMsBehindTheSocket(t *testing.T) {
	b := start(t)
	for _, kind := range []string{vmmtest.CloudHypervisor, vmmtest.Other} {
		socket := filepath.Join(filepath.Dir(b.vm.Socket), kind)
		other := vmmtest.Start(t, kind, socket)
		_, err := b.Resolve(context.Background(), attach.Target{Type: firecracker.Type, Socket: socket}, "")
		if !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "Firecracker") {
			t.Errorf("%s: %v", kind, err)
		}
		other.Forgive() // it was asked what its document does not have
	}
	for _, how := range []string{vmmtest.FaultGarbage, vmmtest.FaultHalf} {
		b.vm.Fail(vmmtest.Fault{Request: "GET /", How: how, Times: 1})
		_, err := b.Resolve(context.Background(), attach.Target{Type: firecracker.Type, Socket: b.vm.Socket}, "")
		if want := map[string]error{vmmtest.FaultGarbage: blockdev.ErrInvalid, vmmtest.FaultHalf: blockdev.ErrBusy}[how]; !errors.Is(err, want) {
			t.Errorf("%s: %v", how, err)
		}
	}
}
