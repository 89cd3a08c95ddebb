package cloudhypervisor_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/cloudhypervisor"
)

// serve listens where a worker would, and tells when a VMM has hung up.
func (b *bench) serve(t *testing.T) (gone <-chan struct{}) {
	t.Helper()
	socket := filepath.Join(filepath.Dir(b.vm.Socket), "data.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = conn.Read(make([]byte, 1))
	}()
	b.r.Endpoint = blockdev.Endpoint{Kind: blockdev.VhostUser, Path: socket, Size: 1 << 20}
	return ended
}

// TestServed: a VM whose memory is shared gets a volume by its worker's socket, and lets
// the socket go; limits and growth are the worker's.
func TestServed(t *testing.T) {
	for _, steps := range [][]string{{"share", "boot"}, {"share", "boot", "pause"}, {"share"}, {"share zones", "boot"}} {
		b := start(t, steps...)
		if !b.r.Target.Shared || !slices.Contains(b.KindsFor(b.r.Target), blockdev.VhostUser) {
			t.Errorf("resolved to %+v", b.r.Target)
		}
		gone := b.serve(t)
		b.r.Limits = blockdev.Limits{WriteIOPS: 100} // in one direction: the VMM could not
		b.expect(t, attach.StateMissing)
		for range 2 {
			b.attach(t)
		}
		b.expect(t, attach.StateAttached)
		if n := b.vm.Count("PUT /api/v1/vm.add-disk"); n != 1 {
			t.Errorf("the disk was added %d times", n)
		}
		if err := errors.Join(b.Resized(context.Background(), b.r), b.Limit(context.Background(), b.r)); err != nil {
			t.Error(err)
		}
		if d := string(b.vm.Seen().Disks[diskID].Config); steps[len(steps)-1] == "boot" && (!strings.Contains(d, `"vhost_user":true`) || strings.Contains(d, "rate_limiter") || strings.Contains(d, `"path"`)) {
			t.Errorf("the disk: %s", d)
		}
		other := b.r
		other.Volume = "vol-0123456789abcdefghijklmnoq"
		if err := b.Attach(context.Background(), other); !errors.Is(err, blockdev.ErrBusy) {
			t.Errorf("another disk of the same socket: %v", err)
		}
		other = b.r
		other.ReadOnly = true
		if err := b.Attach(context.Background(), other); !errors.Is(err, blockdev.ErrBusy) {
			t.Errorf("in another mode: %v", err)
		}
		if slices.Contains(steps, "pause") {
			if err := b.Detach(context.Background(), b.r); !errors.Is(err, blockdev.ErrBusy) {
				t.Errorf("a guest that stands still: %v", err)
			}
			b.vm.Steer("resume")
		}
		b.detach(t)
		b.expect(t, attach.StateMissing)
		if slices.Contains(steps, "boot") {
			<-gone
		}
	}
}

// TestPrivateMemory: a VM that shares no memory is told how it would, and gets files.
func TestPrivateMemory(t *testing.T) {
	b := start(t, "share a zone", "boot")
	if b.r.Target.Shared || slices.Contains(b.KindsFor(b.r.Target), blockdev.VhostUser) {
		t.Errorf("resolved to %+v", b.r.Target)
	}
	_, err := b.Resolve(context.Background(), attach.Target{Type: cloudhypervisor.Type, Socket: b.vm.Socket, Transport: "vhost-user"}, "")
	if !errors.Is(err, blockdev.ErrInvalid) || !strings.Contains(err.Error(), "shared=on") {
		t.Errorf("%v", err)
	}
	b.serve(t)
	if err := b.Attach(context.Background(), b.r); err == nil {
		t.Error("it took a socket")
	}
	b.expect(t, attach.StateMissing)
}
