package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// starter is an attacher whose sandboxes start after the attachment: the kernel tells
// which of them run.
type starter struct{ machine }

func (s starter) pid(t attach.Target) int {
	k := s.w.kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.running[t.Container]
}

func (s starter) Resolve(_ context.Context, t attach.Target, _ string) (attach.Target, error) {
	return t, nil
}

func (s starter) Find(_ context.Context, r attach.Request) (attach.Target, error) {
	if pid := s.pid(r.Target); pid != 0 {
		r.Target.Pid = pid
	}
	return r.Target, nil
}

func (s starter) Attach(ctx context.Context, r attach.Request) error {
	r.Target.Pid = 0 // who was found is not asked
	return s.machine.Attach(ctx, r)
}

func (s starter) Probe(_ context.Context, r attach.Request) (attach.State, error) {
	if r.Target.Pid != 0 && s.pid(r.Target) != r.Target.Pid {
		return attach.StateGone, nil
	}
	k := s.w.kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.visible[place(r)] == r.Volume {
		return attach.StateAttached, nil
	}
	return attach.StateMissing, nil
}

func (s starter) Detach(_ context.Context, r attach.Request) error {
	k := s.w.kernel
	err := s.w.effect("unlink", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.visible, place(r))
	})
	if pid := s.pid(r.Target); err == nil && pid != 0 {
		err = fmt.Errorf("%w: process %d has it open", blockdev.ErrBusy, pid)
	}
	return err
}

func (s starter) Fence(ctx context.Context, r attach.Request) error {
	err := s.machine.Fence(ctx, r)
	if err == nil {
		s.w.kernel.end(r.Target.Container)
	}
	return err
}

func (k *kernel) end(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.running, name)
}

// runOp starts what waits for it, and lets the engine look.
func runOp(where string) op {
	return op{
		name: "run " + where,
		do: func(w *world) error {
			k := w.kernel
			k.mu.Lock()
			if _, there := k.visible["|"+where+"|"]; there && k.running[where] == 0 {
				k.started++
				k.running[where] = 5000 + k.started
			}
			k.mu.Unlock()
			return w.engine.tend(context.Background())
		},
		want: func(*model) {},
	}
}

// endOp ends it, and lets the engine look.
func endOp(name, where string) op {
	o := detachOp(name, where)
	o.name = "end " + where
	o.do = func(w *world) error {
		w.kernel.end(where)
		if err := w.engine.tend(context.Background()); err != nil {
			return err
		}
		v, err := w.engine.Volume(space, name)
		if err == nil && slices.ContainsFunc(v.Attachments, func(a Attachment) bool { return a.Holder == "sandbox:"+where && a.Target.Pid != 0 }) {
			return fmt.Errorf("%s has ended and volume %s is not released: %+v", where, name, v.Attachments)
		}
		return nil
	}
	return o
}

func ephemeralOp(name, where string) op {
	return op{
		name: "ephemeral " + name + " for " + where,
		do: func(w *world) error {
			_, err := w.engine.Attach(context.Background(), space, name, AttachVolume{
				Holder: "sandbox:" + where, Target: attach.Target{Type: "start", Container: where}, Ephemeral: &EphemeralVolume{SizeMiB: 8},
			})
			return err
		},
		want: func(*model) {}, // it goes with the power
	}
}

// dropOp detaches an ephemeral volume, if it is still there.
func dropOp(name, where string) op {
	o := detachOp(name, where)
	detach := o.do
	o.do = func(w *world) error {
		if err := detach(w); !errors.Is(err, ErrNotFound) {
			return err
		}
		return nil
	}
	return o
}

// startLife is what is done with volumes of machines that start later. What the power
// takes away is not expected of the rest.
func startLife() []op {
	return []op{
		createOp("v", "", "ext4", 16),
		attachOp("v", "start", "first", false), runOp("first"), resizeOp("v", 32), endOp("v", "first"),
		detachOp("v", "first"),                                           // it may not have been seen running
		attachOp("v", "start", "second", false), detachOp("v", "second"), // never started
		attachOp("v", "start", "third", false), runOp("third"), forceOp("v", "third"),
		ephemeralOp("e", "fourth"), runOp("fourth"), endOp("e", "fourth"), dropOp("e", "fourth"),
		ephemeralOp("f", "fifth"), dropOp("f", "fifth"),
		deleteOp("v"),
		createOp("b2", "", "ext4", 16),
	}
}

// TestNotStartedYet: it stays, over a restart too, whoever starts it is found, and
// until that is ended it is not detached.
func TestNotStartedYet(t *testing.T) {
	w := newWorld(t)
	do1(t, w, createOp("v", "", "ext4", 16))
	a := attachTo(t, w, "v", "start", "box", false)
	w.restart(true)
	v, err := w.engine.Volume(space, "v")
	if err != nil || len(v.Attachments) != 1 || v.Attachments[0].Phase != Attached || !v.Tainted {
		t.Fatalf("%+v, %v", v, err)
	}
	do1(t, w, runOp("box"))
	v, _ = w.engine.Volume(space, "v")
	if v.Attachments[0].Target.Pid == 0 || !slices.ContainsFunc(v.Events, func(e Event) bool { return strings.Contains(e.Message, "sandbox:box runs: process ") }) {
		t.Fatalf("%+v", v)
	}
	_, err = w.engine.Detach(t.Context(), space, "v", a.ID, "")
	wants(t, err, ErrConflict, fmt.Sprintf("process %d has it open", v.Attachments[0].Target.Pid))
	do1(t, w, endOp("v", "box"))
	if v, _ := w.engine.Volume(space, "v"); len(v.Attachments) != 0 {
		t.Errorf("%+v", v.Attachments)
	}
	w.verifyConsistent(t)
}

// TestEphemeralVolume: it is the attachment's, from its making to its end.
func TestEphemeralVolume(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	gone := func(when string) {
		t.Helper()
		if v, err := w.engine.Volume(space, "e"); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %+v, %v", when, v, err)
		}
		w.verifyConsistent(t)
	}
	do1(t, w, ephemeralOp("e", "box"), ephemeralOp("e", "box"))
	wants(t, ephemeralOp("e", "other").do(w), ErrExists, "exists")
	do1(t, w, detachOp("e", "box"))
	gone("detached")

	r := AttachVolume{Holder: "sandbox:box", Target: attach.Target{Type: "runc", Container: "dead"}, MountPath: "/x", Ephemeral: &EphemeralVolume{SizeMiB: 8}}
	w.kernel.mu.Lock()
	w.kernel.dead["dead"] = true
	w.kernel.mu.Unlock()
	_, err := w.engine.Attach(ctx, space, "e", r)
	wants(t, err, ErrConflict, "not running")
	gone("attaching failed")

	size := int64(8)
	if _, err := w.engine.CreateVolume(ctx, CreateVolume{Workspace: space, Name: "e", SizeMiB: &size, Ephemeral: true}); err != nil {
		t.Fatal(err)
	}
	w.restart(false) // between its making and its attachment
	gone("orphaned")

	do1(t, w, createOp("v", "", "ext4", 16))
	wants(t, ephemeralOp("v", "box").do(w), ErrExists, "exists")
	if v, err := w.engine.Volume(space, "v"); err != nil || v.Ephemeral {
		t.Errorf("%+v, %v", v, err)
	}
}
