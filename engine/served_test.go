package engine

import (
	"errors"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// TestOneFrontEnd: of the readers of a layered volume one has it by vhost-user, and the
// next is told so, or takes it by force. What is flat they share.
func TestOneFrontEnd(t *testing.T) {
	ctx, w := t.Context(), newLayeredWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20), attachOp("v", "socket", "writer", false), detachOp("v", "writer")) // no mount recovers it any more
	reader := func(box string, force bool) AttachVolume {
		return AttachVolume{Holder: "sandbox:" + box, Target: attach.Target{Type: "socket", Container: box}, ReadOnly: true, Force: force}
	}
	a, err := w.engine.Attach(ctx, space, "v", reader("one", false))
	if err != nil || a.Kind != blockdev.VhostUser {
		t.Fatalf("attached as %+v, %v", a, err)
	}
	if again, err := w.engine.Attach(ctx, space, "v", reader("one", false)); err != nil || again.ID != a.ID {
		t.Errorf("the same request: %+v, %v", again, err)
	}
	_, err = w.engine.Attach(ctx, space, "v", reader("two", false))
	wants(t, err, ErrAttached, "sandbox:one")
	wants(t, err, ErrAttached, "protocol nbd")
	b, err := w.engine.Attach(ctx, space, "v", reader("two", true))
	if v := w.volume("v"); err != nil || len(v.Attachments) != 1 || v.Attachments[0].ID != b.ID {
		t.Fatalf("by force: %+v, %v; %+v", b, err, v.Attachments)
	}
	do1(t, w, detachOp("v", "two"))
	if err := w.pool.Flatten(ctx, w.volume("v").ID); err != nil {
		t.Fatal(err)
	}
	for _, box := range []string{"one", "two"} {
		if a := attachTo(t, w, "v", "socket", box, true); a.Kind != blockdev.Block {
			t.Errorf("a reader of a flat volume has it as %q", a.Kind)
		}
	}
	w.verifyConsistent(t)
}

// TestForceEndsTheWorker: a machine that does not let go of a volume that a worker serves
// loses the worker and lives; what is done is told, and the volume goes elsewhere.
func TestForceEndsTheWorker(t *testing.T) {
	ctx, w := t.Context(), newLayeredWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	a := attachTo(t, w, "v", "socket", "stubborn", false)
	if !isSocket(a.Kind) {
		t.Fatalf("attached by %s", a.Kind)
	}
	w.kernel.hold(place(attach.Request{Target: a.Target}))
	if _, err := w.engine.Detach(ctx, space, "v", a.ID, ""); !errors.Is(err, ErrConflict) {
		t.Fatalf("an ordinary detach: %v", err)
	}
	gone, err := w.engine.ForceDetach(ctx, space, "v", a.ID, "me")
	if err != nil || gone.Fenced != FencedWorker {
		t.Fatalf("by force: %+v, %v", gone, err)
	}
	v := w.volume("v")
	if n := w.engine.Counters(); n[countSevered] != 1 || n[countKilled] != 0 || w.kernel.dead["stubborn"] || len(v.Attachments) != 0 {
		t.Errorf("counted %v; the machine is dead: %t; %+v", n, w.kernel.dead["stubborn"], v.Attachments)
	}
	if said := v.Events[len(v.Events)-1].Message; !strings.Contains(said, "its worker was ended") {
		t.Errorf("the event says %q", said)
	}
	w.verifyConsistent(t)
	b := attachTo(t, w, "v", "socket", "next", false)
	if b.Epoch <= a.Epoch {
		t.Errorf("epoch %d after %d", b.Epoch, a.Epoch)
	}
	w.verifyConsistent(t)
}
