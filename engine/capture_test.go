package engine

import (
	"context"
	"errors"
	"slices"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
)

func (w *world) capture(name string) CaptureResult {
	w.t.Helper()
	r, err := w.engine.CaptureVolume(context.Background(), space, name, CaptureVolume{Template: "made", Actor: "ann"})
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// plain is a pool that cannot share bytes.
type plain struct{ *blockdevtest.Memory }

func (plain) Clone(context.Context, blockdev.ID, blockdev.ID, int64) error {
	return errors.ErrUnsupported
}

// TestCaptureWithAJournalNeedsNoFreeze: all is flushed, then the bytes are shared.
func TestCaptureWithAJournalNeedsNoFreeze(t *testing.T) {
	w := newWorld(t)
	w.journal = true
	w.attached("a", "ext4")
	w.points = nil
	r := w.capture("a")
	if !r.Online || r.Frozen <= 0 {
		t.Errorf("%+v", r)
	}
	sync, clone := slices.Index(w.points, "sync"), slices.Index(w.points, "before clone")
	if sync < 0 || clone < sync || slices.Contains(w.points, "before freeze") {
		t.Errorf("%v", w.points)
	}
}

// TestCaptureFreezesForTheCloneOnly: without a journal the writers are held while the bytes are
// shared, and go on before anything is read.
func TestCaptureFreezesForTheCloneOnly(t *testing.T) {
	w := newWorld(t)
	v := w.attached("a", "ext4")
	w.captured = func(draft blockdev.ID) {
		if w.kernel.isFrozen(string(v.ID)) {
			t.Error("frozen while the clone is read")
		}
		if s, err := readToy(w.pool, "mem:"+string(draft)); err != nil || s.uuid != v.UUID {
			t.Errorf("the clone holds %+v, %v", s, err)
		}
		if release, free := w.engine.locks.try(v.ID); free {
			release()
		} else {
			t.Error("the volume is locked while the clone is read")
		}
	}
	w.points = nil
	r := w.capture("a")
	if !r.Online || r.Frozen <= 0 || r.Revision.Template != "made" {
		t.Errorf("%+v", r)
	}
	order := []string{}
	for _, p := range w.points {
		switch p {
		case "after freeze", "after clone", "after thaw":
			order = append(order, p)
		}
	}
	if len(order) != 3 || order[0] != "after freeze" || order[1] != "after clone" || order[2] != "after thaw" {
		t.Errorf("%v", order)
	}
	now := w.volume("a")
	if now.Frozen != nil || now.Events[len(now.Events)-1].Message != "Captured as made:1" {
		t.Errorf("%+v", now)
	}
	w.verifyConsistent(t)
}

func TestCaptureInEachState(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	w.made("loose", "ext4")
	if r := w.capture("loose"); r.Online || r.Frozen != 0 {
		t.Errorf("detached: %+v", r)
	}
	w.made("read", "ext4")
	if err := attachOp("read", "host", "r", true).do(w); err != nil {
		t.Fatal(err)
	}
	if r := w.capture("read"); !r.Online || r.Frozen != 0 {
		t.Errorf("readers: %+v", r)
	}
	v := w.attached("busy", "ext4")
	w.freeze("busy")
	if r := w.capture("busy"); !r.Online || r.Frozen != 0 || !w.kernel.isFrozen(string(v.ID)) {
		t.Errorf("frozen by somebody: %+v, and frozen afterwards: %v", r, w.kernel.isFrozen(string(v.ID)))
	}
	w.made("raw", "none")
	_, err := w.engine.CaptureVolume(ctx, space, "raw", CaptureVolume{Template: "made"})
	wants(t, err, ErrUnsupported, "no filesystem")
	tainted := w.made("tainted", "ext4")
	tainted.Tainted = true
	if err := w.engine.save(ctx, &tainted); err != nil {
		t.Fatal(err)
	}
	_, err = w.engine.CaptureVolume(ctx, space, "tainted", CaptureVolume{Template: "made"})
	wants(t, err, ErrUnsupported, "raw blocks")
	_, err = w.engine.CaptureVolume(ctx, space, "absent", CaptureVolume{Template: "made"})
	wants(t, err, ErrNotFound, "absent")
}

// TestCaptureWithoutSharedBytes: detached it is copied, attached it is refused,
// and the writers go on at once.
func TestCaptureWithoutSharedBytes(t *testing.T) {
	w := newWorld(t)
	w.made("loose", "ext4")
	v := w.attached("busy", "ext4")
	w.engine.o.Pool = plain{w.pool}
	if r := w.capture("loose"); r.Online || r.Revision.Name != "1" {
		t.Errorf("%+v", r)
	}
	_, err := w.engine.CaptureVolume(context.Background(), space, "busy", CaptureVolume{Template: "made"})
	wants(t, err, ErrUnsupported, "cannot share bytes")
	if w.kernel.isFrozen(string(v.ID)) || w.volume("busy").Frozen != nil {
		t.Error("still frozen")
	}
	w.verifyConsistent(t)
}
