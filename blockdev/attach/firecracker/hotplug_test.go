package firecracker_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/firecracker"
	"holdfast/blockdev/attach/vmmtest"
)

// A Firecracker with hot-plug takes a drive of a running microVM, grows it, and gives it
// back, again and again; before boot it takes none back either.
func TestHotLife(t *testing.T) {
	ctx := context.Background()
	b := start(t, vmmtest.EnablePCI)
	b.attach(t)
	if err := b.Detach(ctx, b.r); !errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), "takes no drive back") {
		t.Errorf("detach before boot: %v", err)
	}
	for _, state := range []string{"boot", "pause", "resume"} {
		b.vm.Steer(state)
		if _, err := b.Resolve(ctx, attach.Target{Type: firecracker.Type, Socket: b.vm.Socket}, ""); err != nil {
			t.Errorf("%s: %v", state, err)
		}
		for range 2 {
			b.attach(t)
		}
		b.expect(t, attach.StateAttached)
		b.grow(t, b.r.Endpoint.Size+1<<20)
		if err := b.Resized(ctx, b.r); err != nil {
			t.Error(err)
		}
		if got := b.vm.Seen().Disks[driveID].Size; got != b.r.Endpoint.Size {
			t.Errorf("%s: grown to %d", state, got)
		}
		for range 2 {
			if err := b.Detach(ctx, b.r); err != nil {
				t.Errorf("%s: %v", state, err)
			}
		}
		b.expect(t, attach.StateMissing)
	}
}

// Whatever becomes of the answer to a removal, what was done is found.
func TestHotRemovalCut(t *testing.T) {
	for _, how := range []string{vmmtest.FaultLost, vmmtest.FaultHalf, vmmtest.FaultHang, vmmtest.FaultStatus} {
		b := start(t, vmmtest.EnablePCI)
		b.attach(t)
		b.vm.Steer("boot")
		b.vm.Fail(vmmtest.Fault{Request: "DELETE /drives", How: how, Status: 400, Times: 1})
		ctx, cancel := context.WithCancel(context.Background())
		stop := func() {}
		if how == vmmtest.FaultHang {
			stop = b.vm.When("DELETE /drives", cancel)
		}
		if err := b.Detach(ctx, b.r); err == nil || how == vmmtest.FaultStatus && !errors.Is(err, blockdev.ErrBusy) {
			t.Errorf("%s: %v", how, err)
		}
		stop()
		cancel()
		if err := b.Detach(context.Background(), b.r); err != nil {
			t.Errorf("%s, again: %v", how, err)
		}
		b.expect(t, attach.StateMissing)
	}
	b := start(t, vmmtest.EnablePCI)
	b.attach(t)
	b.vm.Steer("boot")
	b.vm.Fail(vmmtest.Fault{Request: "DELETE /drives", How: vmmtest.FaultDie})
	err := b.Detach(context.Background(), b.r)
	<-b.vm.Ended()
	if err != nil && !errors.Is(err, blockdev.ErrGone) {
		if err := b.Detach(context.Background(), b.r); err != nil {
			t.Error(err)
		}
	}
}

// Older versions, versions that nobody can read, and one without the argument take no
// drive after the start.
func TestNoHotplug(t *testing.T) {
	ctx := context.Background()
	for version, hot := range map[string]bool{"1.15.9": false, "0.25.0": false, "1": false, "new": false, "v1.16.0": true, "1.17.0-dev": true, "2.0.0": true} {
		b := start(t, vmmtest.EnablePCI)
		b.vm.Steer("version " + version)
		b.vm.Steer("boot")
		_, err := b.Resolve(ctx, attach.Target{Type: firecracker.Type, Socket: b.vm.Socket}, "")
		if hot != (err == nil) || err != nil && (!errors.Is(err, blockdev.ErrBusy) || !strings.Contains(err.Error(), vmmtest.EnablePCI)) {
			t.Errorf("version %s: %v", version, err)
		}
	}
}
