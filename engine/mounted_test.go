package engine

import (
	"context"
	"errors"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

// newServedWorld is one whose pool shares no bytes between files, on a host that mounts
// over workers.
func newServedWorld(t *testing.T) *world {
	w := newLayeredWorld(t)
	w.pool.Devices = true
	return w
}

func atWorker(t *testing.T, w *world, id blockdev.ID) bool {
	t.Helper()
	_, err := w.pool.Observe(t.Context(), id)
	if err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

// TestLayeredIsMountedOverAWorker: a layered volume is mounted as it is, its worker is
// followed by another one whatever else happens, and a detach leaves none.
func TestLayeredIsMountedOverAWorker(t *testing.T) {
	w := newServedWorld(t)
	w.engine.o.FlattenWait = 1 // nobody waits for that
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	a := attachTo(t, w, "v", "host", "dir", false)
	v := layeredVolume(t, w, "v")
	if a.Kind != blockdev.Block || sizesOf(t, w, v).Hydration == nil || w.engine.Socket(v, a) != "" || !atWorker(t, w, v.ID) || !w.engine.keeps(v.ID) {
		t.Fatalf("attached: %+v, endpoint %+v", a, w.engine.endpointNow(v.ID))
	}
	do1(t, w, resizeOp("v", 32))
	for _, next := range []func() error{
		func() error { return w.engine.tend(t.Context()) },
		func() error { w.restart(false); return w.engine.tend(t.Context()) },
	} {
		if err := w.pool.Die(v.ID); err != nil {
			t.Fatal(err)
		}
		if err := next(); err != nil || !atWorker(t, w, v.ID) {
			t.Errorf("it is served: %v, %v", atWorker(t, w, v.ID), err)
		}
		if v := layeredVolume(t, w, "v"); len(v.Attachments) != 1 || v.Attachments[0].Phase != Attached {
			t.Errorf("it is attached: %+v", v.Attachments)
		}
	}
	if err := w.pool.Die(v.ID); err != nil {
		t.Fatal(err)
	}
	do1(t, w, detachOp("v", "dir"))
	if info, err := w.pool.Stat(t.Context(), v.ID); err != nil || info.Open || atWorker(t, w, v.ID) {
		t.Errorf("detached: %+v, %v", info, err)
	}
	w.engine.o.FlattenWait = time.Minute
	if a := attachTo(t, w, "v", "vm", "box", false); a.Kind != blockdev.File { // a machine needs a file all the same
		t.Errorf("a machine has it as %q", a.Kind)
	}
}

// TestTheEndOfADevicesWorkerIsAnEvent: it is followed at once, also while somebody has
// the volume's lock: he may be waiting for the device.
func TestTheEndOfADevicesWorkerIsAnEvent(t *testing.T) {
	w := newServedWorld(t)
	w.engine.o.ProbeInterval = time.Hour
	w.engine.briefly = 0
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	attachTo(t, w, "v", "host", "dir", false)
	v := layeredVolume(t, w, "v")
	release, err := w.engine.locks.acquire(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.pool.Die(v.ID); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); !atWorker(t, w, v.ID); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody noticed")
		}
	}
	release()
	do1(t, w, detachOp("v", "dir"))
}

// deadDevices is a pool whose workers are not followed by others.
type deadDevices struct{ *blockdevtest.Memory }

func (deadDevices) Revive(context.Context, blockdev.ID, string) error {
	return errors.New("the worker does not start")
}

// TestForceWithoutWorker: who waits for a device that nobody serves is not waited for: a
// detach goes on trying, and by force the volume is cut off.
func TestForceWithoutWorker(t *testing.T) {
	w := newServedWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	a := attachTo(t, w, "v", "host", "dir", false)
	v := layeredVolume(t, w, "v")
	good := w.engine.o.Pool
	w.engine.o.Pool = deadDevices{w.pool}
	if err := w.pool.Die(v.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := w.engine.Detach(t.Context(), space, "v", a.ID, ""); err == nil {
		t.Fatal("detached, and nobody took what it had to write")
	}
	if v := layeredVolume(t, w, "v"); len(v.Attachments) != 1 || v.Attachments[0].Phase != Detaching {
		t.Fatalf("%+v", v.Attachments)
	}
	if _, err := w.engine.ForceDetach(t.Context(), space, "v", a.ID, ""); err != nil {
		t.Fatal(err)
	}
	if info, err := w.pool.Stat(t.Context(), v.ID); err != nil || info.Open || len(layeredVolume(t, w, "v").Attachments) != 0 {
		t.Errorf("cut off: %+v, %v", info, err)
	}
	w.engine.o.Pool = good
	do1(t, w, attachOp("v", "host", "dir", false), detachOp("v", "dir"))
}
