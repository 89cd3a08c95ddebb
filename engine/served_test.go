package engine

import (
	"errors"
	"strings"
	"testing"

	"holdfast/blockdev/attach"
)

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
