package engine

import (
	"context"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

func limited(holder, container string, readOnly bool, l blockdev.Limits) AttachVolume {
	return AttachVolume{Holder: "sandbox:" + holder, Target: attach.Target{Type: "runc", Container: container}, MountPath: "/" + holder, ReadOnly: readOnly, Limits: l}
}

func TestLimitsOfAnAttachment(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	w.made("a", "ext4")
	first := blockdev.Limits{ReadIOPS: 100, WriteBytes: 1 << 20}
	a, err := w.engine.Attach(ctx, space, "a", limited("s", "box", false, first))
	if err != nil || a.Limits != first {
		t.Fatalf("%+v, %v", a, err)
	}
	w.verifyLimits(t, []Volume{w.volume("a")})
	if f := w.engine.Enforcement(a); f.Mechanism != "toy" || len(f.Gaps) != 1 {
		t.Errorf("%+v", f)
	}
	// The same request, with the same wish or none, is the same attachment.
	for _, l := range []blockdev.Limits{first, {}} {
		if again, err := w.engine.Attach(ctx, space, "a", limited("s", "box", false, l)); err != nil || again.ID != a.ID || again.Limits != first {
			t.Errorf("%+v, %v", again, err)
		}
	}
	_, err = w.engine.Attach(ctx, space, "a", limited("s", "box", false, blockdev.Limits{ReadIOPS: 7000}))
	wants(t, err, ErrConflict, "other limits")
	for _, next := range []blockdev.Limits{{WriteIOPS: 50}, {}, first} {
		if a, err = w.engine.SetLimits(ctx, space, "a", a.ID, next, ""); err != nil || a.Limits != next {
			t.Errorf("%+v, %v", a, err)
		}
		w.verifyLimits(t, []Volume{w.volume("a")})
		w.restart(false)
		w.verifyLimits(t, []Volume{w.volume("a")})
	}
	w.kernel.busy[place(attach.Request{Target: a.Target, MountPath: a.MountPath})] = true
	_, err = w.engine.Detach(ctx, space, "a", a.ID, "")
	wants(t, err, ErrConflict, "in use")
	w.verifyLimits(t, []Volume{w.volume("a")}) // they hold again
	clear(w.kernel.busy)
	if _, err := w.engine.Detach(ctx, space, "a", a.ID, ""); err != nil {
		t.Fatal(err)
	}
	w.verifyLimits(t, []Volume{w.volume("a")})
}

// TestBootLimitsAgain: a host attachment comes back after a power cut, with its limits.
func TestBootLimitsAgain(t *testing.T) {
	w := newWorld(t)
	w.made("a", "ext4")
	r := AttachVolume{Holder: "sandbox:s", Target: attach.Target{Type: "host", Path: "/x"}, Limits: blockdev.Limits{ReadIOPS: 100}}
	if _, err := w.engine.Attach(context.Background(), space, "a", r); err != nil {
		t.Fatal(err)
	}
	w.restart(true)
	if len(w.volume("a").Attachments) != 1 {
		t.Fatal("not attached")
	}
	w.verifyLimits(t, []Volume{w.volume("a")})
}

func TestLimitRefusals(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	w.made("a", "ext4")
	for part, l := range map[string]blockdev.Limits{
		"limits.readIops: must be 10 to": {ReadIOPS: 9}, "limits.writeIops: must": {WriteIOPS: 1 << 32},
		"limits.readBytesPerSecond: must": {ReadBytes: 1000}, "limits.writeBytesPerSecond: must": {WriteBytes: -1},
	} {
		_, err := w.engine.Attach(ctx, space, "a", limited("s", "box", false, l))
		wants(t, err, ErrInvalid, part)
	}
	_, err := w.engine.Attach(ctx, space, "a", AttachVolume{Holder: "sandbox:s", Target: attach.Target{Type: "host", Path: "/cannot"}, Limits: blockdev.Limits{ReadIOPS: 100}})
	wants(t, err, ErrUnsupported, "cannot be enforced here")
	if v := w.volume("a"); len(v.Attachments) != 0 {
		t.Errorf("%+v", v)
	}
	// Two places in one cgroup have one budget.
	one, err := w.engine.Attach(ctx, space, "a", limited("one", "box", true, blockdev.Limits{ReadIOPS: 100}))
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.engine.Attach(ctx, space, "a", limited("two", "box", true, blockdev.Limits{ReadIOPS: 200}))
	wants(t, err, ErrConflict, "one budget")
	if _, err = w.engine.Attach(ctx, space, "a", limited("two", "box", true, blockdev.Limits{ReadIOPS: 100})); err != nil {
		t.Fatal(err)
	}
	if _, err := w.engine.Detach(ctx, space, "a", one.ID, ""); err != nil {
		t.Fatal(err)
	}
	w.verifyLimits(t, []Volume{w.volume("a")}) // the other's hold on
	_, err = w.engine.SetLimits(ctx, space, "a", "att-x", blockdev.Limits{}, "")
	wants(t, err, ErrNotFound, "no attachment")
}
