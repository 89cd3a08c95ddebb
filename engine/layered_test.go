package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/blockdevtest"
)

// socketMachine is a machine that takes a worker's socket as well.
type socketMachine struct{ machine }

func (m socketMachine) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block, blockdev.VhostUser}, Raw: true}
}

// socketLife is that of volumes which are used while they are layered, and of one that
// becomes flat for it.
func socketLife() []op {
	return []op{
		createOp("v", "demo:1", "ext4", 20),
		limitedOp("v", "socket", "first"), // by a worker
		limitsOp("v", 200),
		resizeOp("v", 32),
		detachOp("v", "first"),
		attachOp("v", "vm", "second", false), // needs a file
		detachOp("v", "second"),
		attachOp("v", "socket", "third", false),
		forceOp("v", "third"),
		createOp("b2", "demo:1", "ext4", 16),
		attachOp("b2", "host", "dir", false),
		detachOp("b2", "dir"),
		createOp("far", "far:1", "ext4", 20),
		attachOp("far", "host", "dir", false), // all of it is brought here
		detachOp("far", "dir"),
		deleteOp("far"),
		deleteOp("v"),
	}
}

// TestLayeredIsUsedAtOnce: a volume over a template's image is ready though it is no
// file, its files are read, a machine gets it from a worker, and who needs a file waits
// and gets one.
func TestLayeredIsUsedAtOnce(t *testing.T) {
	w := newLayeredWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	v := layeredVolume(t, w, "v")
	if sizes := sizesOf(t, w, v); sizes.Filesystem != 20<<20 || sizes.Hydration == nil || sizes.Hydration.Absent == 0 || sizes.Hydration.Total != 20<<20 {
		t.Errorf("sizes are %+v, hydration %+v", sizes, sizes.Hydration)
	}
	entries, err := w.engine.ListDir(t.Context(), space, "v", "/")
	if err != nil || len(entries) != 1 {
		t.Errorf("its files: %v, %v", entries, err)
	}
	var b strings.Builder
	if err := w.engine.ReadFile(t.Context(), space, "v", "file", &b); err != nil || b.String() != "content" {
		t.Errorf("a file: %q, %v", b.String(), err)
	}
	if s, err := w.engine.Stats(t.Context(), space, "v"); err != nil || s.Filesystem == nil {
		t.Errorf("statistics: %+v, %v", s, err)
	}

	do1(t, w, createOp("other", "demo:1", "ext4", 20))
	a := attachTo(t, w, "other", "socket", "box", false)
	if at := w.engine.Socket(layeredVolume(t, w, "other"), a); a.Kind != blockdev.VhostUser || at == "" {
		t.Errorf("attached as %q at %q", a.Kind, at)
	}

	w.engine.o.FlattenWait = 1 // is over at once
	err = attachOp("v", "host", "dir", false).do(w)
	if !errors.Is(err, blockdev.ErrLayered) || !strings.Contains(err.Error(), "of 20 MB are left") {
		t.Fatalf("attach of what does not become flat in time: %v", err)
	}
	if v := layeredVolume(t, w, "v"); len(v.Attachments) != 0 {
		t.Errorf("an attachment that did not come about is left: %+v", v.Attachments)
	}
	away := fmt.Errorf("%w: http://store.internal/base: status 503 for a range", blockdev.ErrUnreachable)
	err = w.engine.hydrating(t.Context(), w.pool, v.ID, away)
	if p := (*Problem)(nil); !errors.As(err, &p) || !strings.Contains(p.Message, "does not answer: its operator finds the reason") || strings.Contains(p.Message, "store.internal") {
		t.Errorf("of a store that is away a user is told %v", err)
	}
	w.engine.o.FlattenWait = time.Minute
	if err := w.engine.tend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if info, err := w.pool.Stat(t.Context(), v.ID); err != nil || info.Layers != 0 {
		t.Errorf("it was not gone on with: %+v, %v", info, err)
	}
	do1(t, w, attachOp("v", "host", "dir", false), detachOp("v", "dir"))
	if a := attachTo(t, w, "v", "socket", "box", false); a.Kind != blockdev.File {
		t.Errorf("a flat volume is attached as %q", a.Kind)
	}
}

// TestWorkerDies: it is started again, with the limits that it had, and a volume that
// became flat meanwhile goes on being served.
func TestWorkerDies(t *testing.T) {
	w := newLayeredWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20), limitedOp("v", "socket", "box"))
	v := layeredVolume(t, w, "v")
	limits := v.Attachments[0].Limits
	workers := 0
	w.pool.Began = func(_ blockdev.ID, begin blockdev.Limits) {
		if workers++; begin != limits {
			t.Errorf("worker %d begins with %+v", workers, begin)
		}
	}
	if e := w.engine.Enforcement(v.Attachments[0]); e.Mechanism != "worker" {
		t.Errorf("limits are enforced by %+v", e)
	}
	for _, restart := range []bool{false, true} {
		if err := w.pool.Die(v.ID); err != nil {
			t.Fatal(err)
		}
		if restart {
			w.restart(false)
		}
		if err := w.engine.tend(t.Context()); err != nil {
			t.Fatal(err)
		}
		s, err := w.pool.Observe(t.Context(), v.ID)
		if err != nil || s.Kind != blockdev.VhostUser || s.Limits != limits {
			t.Errorf("restart %v: the worker is %+v, %v", restart, s, err)
		}
		if v := layeredVolume(t, w, "v"); len(v.Attachments) != 1 || v.Attachments[0].Phase != Attached {
			t.Errorf("restart %v: %+v", restart, v.Attachments)
		}
	}
	do1(t, w, limitsOp("v", 300))
	if s, err := w.pool.Observe(t.Context(), v.ID); err != nil || s.Limits == limits || s.Limits.None() {
		t.Errorf("changed limits: %+v, %v", s.Limits, err)
	}
	limits = layeredVolume(t, w, "v").Attachments[0].Limits
	if err := w.pool.Die(v.ID); err != nil { // the detach starts one, to end it
		t.Fatal(err)
	}
	do1(t, w, detachOp("v", "box"))
	if workers != 3 {
		t.Errorf("%d workers began", workers)
	}
	if _, err := w.pool.Observe(t.Context(), v.ID); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("after the detach: %v", err)
	}
}

// TestTheEndOfAWorkerIsAnEvent: no look from time to time is needed, and a worker that
// ends as soon as it has begun is left to one.
func TestTheEndOfAWorkerIsAnEvent(t *testing.T) {
	w := newLayeredWorld(t)
	w.engine.o.ProbeInterval = time.Hour
	w.engine.briefly = 0
	do1(t, w, createOp("v", "demo:1", "ext4", 20), limitedOp("v", "socket", "box"))
	v := layeredVolume(t, w, "v")
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- w.engine.Run(ctx) }()
	for range 3 { // the next one is waited for as well
		if err := w.pool.Die(v.ID); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(time.Minute)
		for {
			if _, err := w.pool.Observe(ctx, v.ID); err == nil && w.engine.keeps(v.ID) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("nobody noticed")
			}
			time.Sleep(time.Millisecond)
		}
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	do1(t, w, detachOp("v", "box"))
	if w.engine.keeps(v.ID) {
		t.Error("the worker of a volume that is detached is waited for")
	}
}

// keeps reports whether somebody waits for the end of a volume's worker.
func (e *Engine) keeps(id blockdev.ID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.keepers[id] != nil
}

func layeredVolume(t *testing.T, w *world, name string) Volume {
	t.Helper()
	v, err := w.engine.Volume(space, name)
	if err != nil || v.Status() != StatusDeployed {
		t.Fatalf("%+v, %v", v, err)
	}
	return v
}

func sizesOf(t *testing.T, w *world, v Volume) Sizes {
	t.Helper()
	s, err := w.engine.Sizes(t.Context(), v)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// noOpen is a pool whose workers do not start.
type noOpen struct{ *blockdevtest.Memory }

func (noOpen) Open(context.Context, blockdev.ID, blockdev.Want) (blockdev.Endpoint, error) {
	return blockdev.Endpoint{}, errors.New("the worker does not start")
}

// TestDetachWithoutWorker: an attachment whose worker cannot be started is taken back,
// and leaves nothing.
func TestDetachWithoutWorker(t *testing.T) {
	w := newLayeredWorld(t)
	do1(t, w, createOp("v", "demo:1", "ext4", 20))
	good := w.engine.o.Pool
	w.engine.o.Pool = noOpen{w.pool}
	if err := attachOp("v", "socket", "box", false).do(w); err == nil {
		t.Fatal("attached without a worker")
	}
	if v := layeredVolume(t, w, "v"); len(v.Attachments) != 0 {
		t.Errorf("%+v is left", v.Attachments)
	}
	w.engine.o.Pool = good
	do1(t, w, attachOp("v", "socket", "box", false), detachOp("v", "box"))
}
