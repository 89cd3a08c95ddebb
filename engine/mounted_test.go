package engine

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
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
	for range 2 { // the next one's, too
		if err := w.pool.Die(v.ID); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); !atWorker(t, w, v.ID); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("nobody noticed")
			}
		}
	}
	release()
	do1(t, w, detachOp("v", "dir"))
	if w.engine.keeps(v.ID) {
		t.Error("detached, its worker is waited for")
	}
}

// TestDeviceAndWorkerThatLiveApart: a device that its worker has lost, or that could not be
// connected to the next one, is connected again, also while somebody has the volume's lock.
func TestDeviceAndWorkerThatLiveApart(t *testing.T) {
	w := newServedWorld(t)
	w.engine.o.ProbeInterval = time.Hour
	w.engine.briefly, w.engine.apart = 0, time.Millisecond
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	attachTo(t, w, "v", "host", "dir", false)
	v := layeredVolume(t, w, "v")
	release, err := w.engine.locks.acquire(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	await := func(clients int) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			s, err := w.pool.Observe(t.Context(), v.ID)
			if err == nil && s.Clients == clients {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d clients, %v, and not %d", s.Clients, err, clients)
			}
		}
	}
	if err := w.pool.Part(v.ID); err != nil {
		t.Fatal(err)
	}
	await(1)
	w.pool.ConnectsDevices(false)
	if err := w.pool.Die(v.ID); err != nil {
		t.Fatal(err)
	}
	await(0)
	w.pool.ConnectsDevices(true)
	await(1)
	release()
	do1(t, w, detachOp("v", "dir"))
}

// withoutWorker has a volume that is mounted over a worker lose that for good, while somebody
// has a file of it open.
func withoutWorker(t *testing.T) (w *world, v Volume, a Attachment) {
	w = newServedWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	a = attachTo(t, w, "v", "host", "dir", false)
	v = layeredVolume(t, w, "v")
	w.kernel.hold(place(attach.Request{Target: a.Target}))
	w.pool.StartsWorkers(false)
	if err := w.pool.Die(v.ID); err != nil {
		t.Fatal(err)
	}
	return w, v, a
}

// livesOn checks that nothing is left of a volume's attachment, and that it is used again.
func livesOn(t *testing.T, w *world, v Volume) {
	t.Helper()
	if info, err := w.pool.Stat(t.Context(), v.ID); err != nil || info.Open || len(layeredVolume(t, w, "v").Attachments) != 0 {
		t.Errorf("cut off: %+v, %v", info, err)
	}
	w.verifyConsistent(t)
	w.pool.StartsWorkers(true)
	do1(t, w, attachOp("v", "host", "dir", false))
	w.verifyConsistent(t)
	do1(t, w, detachOp("v", "dir"))
	w.verifyConsistent(t)
}

// TestForceWithoutWorker: who waits for a device that nobody serves is not waited for: a
// detach goes on trying, and by force the volume is cut off, though somebody keeps the
// dead filesystem.
func TestForceWithoutWorker(t *testing.T) {
	w, v, a := withoutWorker(t)
	if _, err := w.engine.Detach(t.Context(), space, "v", a.ID, ""); !errors.Is(err, ErrHanging) || errors.Is(err, ErrNotFound) {
		t.Fatalf("detached, and nobody took what it had to write: %v", err)
	}
	if v := layeredVolume(t, w, "v"); len(v.Attachments) != 1 || v.Attachments[0].Phase != Detaching {
		t.Fatalf("%+v", v.Attachments)
	}
	gone, err := w.engine.ForceDetach(t.Context(), space, "v", a.ID, "")
	if err != nil || gone.Fenced != FencedFilesystem {
		t.Fatalf("%+v, %v", gone, err)
	}
	if n := w.engine.Counters(); n[countSevered] != 1 || n[countShutdown] != 1 || n[countKilled] != 0 {
		t.Errorf("counted %v", n)
	}
	livesOn(t, w, v)
}

// TestForceWithoutWorkerIsCut at every side effect, by a failure and by a crash, and comes
// to its end.
func TestForceWithoutWorkerIsCut(t *testing.T) {
	for _, crash := range []bool{false, true} {
		for cut, reached := 1, true; reached; cut++ {
			t.Run(fmt.Sprintf("crash=%v/%02d", crash, cut), func(t *testing.T) {
				w, v, a := withoutWorker(t)
				w.arm(cut, crash)
				_, err := w.engine.ForceDetach(t.Context(), space, "v", a.ID, "")
				if reached = len(w.points) >= cut; !reached && err != nil {
					t.Fatalf("without a cut: %v", err)
				}
				if crash && reached {
					w.restart(false)
				} else if info, err := w.pool.Stat(t.Context(), v.ID); err != nil || info.Open && !w.engine.keeps(v.ID) {
					t.Errorf("cut at %s, it is open, and nobody stands by its worker: %v", w.lastPoint(), err)
				}
				w.arm(0, false)
				if len(layeredVolume(t, w, "v").Attachments) > 0 {
					if _, err := w.engine.ForceDetach(t.Context(), space, "v", a.ID, ""); err != nil {
						t.Fatalf("cut at %s, and again: %v", w.lastPoint(), err)
					}
				}
				livesOn(t, w, v)
			})
		}
	}
}
