package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// machine is an attacher whose sandboxes get the device itself. They know of its
// size only what they were told.
type machine struct{ attacher }

func (m machine) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}, Raw: true}
}

// Attach checks what must be durable by now: that of a writer the image says so.
func (m machine) Attach(ctx context.Context, r attach.Request) error {
	if m.gone(r.Target) {
		return blockdev.ErrGone
	}
	info, err := m.w.pool.Stat(ctx, r.Volume)
	if err != nil {
		return err
	}
	said, err := parseDescription(info.Description)
	if err != nil || !said.Tainted && !r.ReadOnly {
		m.w.t.Errorf("volume %s is exposed to a writer and its image does not say so (%v)", r.Volume, err)
	}
	if r.Endpoint.Path == "" || r.Endpoint.ReadOnly != r.ReadOnly || r.Mounted != "" && !r.ReadOnly {
		m.w.t.Errorf("volume %s comes as %+v, mounted at %q", r.Volume, r.Endpoint, r.Mounted)
	}
	k := m.w.kernel
	return m.w.effect("plug", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if _, there := k.visible[place(r)]; !there {
			k.visible[place(r)], k.told[place(r)] = r.Volume, r.Endpoint.Size
		}
		k.rule(r)
	})
}

func (m machine) Detach(ctx context.Context, r attach.Request) error {
	return m.without(m.attacher.Detach(ctx, r), r)
}

func (m machine) Fence(ctx context.Context, r attach.Request) error {
	return m.without(m.attacher.Fence(ctx, r), r)
}

// without takes the limits of a volume that has left away.
func (m machine) without(err error, r attach.Request) error {
	if err == nil {
		r.Limits = blockdev.Limits{}
		m.w.kernel.mu.Lock()
		defer m.w.kernel.mu.Unlock()
		m.w.kernel.rule(r)
	}
	return err
}

// rule keeps a machine's limits where limiter keeps the host's.
func (k *kernel) rule(r attach.Request) {
	key := "mem:" + string(r.Volume) + "|" + r.Target.Container
	if k.limits[key] = r.Limits; r.Limits.None() {
		delete(k.limits, key)
	}
}

// Explain and the others implement attach.Limiter: a machine "none" has no limits, and
// one "fixed" keeps those that it got.
func (m machine) Explain(t attach.Target, _ bool, _ blockdev.Limits) (blockdev.Enforcement, error) {
	if t.Container == "none" {
		return blockdev.Enforcement{}, errors.ErrUnsupported
	}
	return blockdev.Enforcement{Mechanism: "machine"}, nil
}

func (m machine) MayChange(t attach.Target) error {
	if t.Container == "fixed" {
		return errors.ErrUnsupported
	}
	return nil
}

// Counters implements attach.Meter.
func (m machine) Counters(_ context.Context, r attach.Request) (blockdev.Counters, error) {
	if m.gone(r.Target) {
		return blockdev.Counters{}, blockdev.ErrGone
	}
	return blockdev.Counters{Reads: 7}, nil
}

func (m machine) Limit(_ context.Context, r attach.Request) error {
	if m.gone(r.Target) {
		return blockdev.ErrGone
	}
	k := m.w.kernel
	return m.w.effect("limit inside", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.visible[place(r)] == r.Volume {
			k.rule(r)
		}
	})
}

func (m machine) Resized(_ context.Context, r attach.Request) error {
	k := m.w.kernel
	return m.w.effect("tell", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.told[place(r)] = r.Endpoint.Size
	})
}

// verifyMachines: those that have the volume know its size.
func (w *world) verifyMachines(t *testing.T, v Volume, info blockdev.Info) {
	t.Helper()
	w.kernel.mu.Lock()
	defer w.kernel.mu.Unlock()
	for _, a := range v.Attachments {
		p := place(attach.Request{Target: a.Target, MountPath: a.MountPath})
		if w.kernel.visible[p] == v.ID && w.kernel.told[p] != info.Size {
			t.Errorf("%s: %s knows of %d bytes, the device has %d", v.Name, a.Holder, w.kernel.told[p], info.Size)
		}
		if !a.ReadOnly && !v.Tainted {
			t.Errorf("%s: %s can write every block of it, and it is not tainted", v.Name, a.Holder)
		}
	}
}

// machineLife is what virtual machines do with volumes.
func machineLife() []op {
	return []op{
		createOp("v", "", "ext4", 16),
		limitedOp("v", "vm", "first"),
		limitsOp("v", 200),
		resizeOp("v", 32),
		detachOp("v", "first"),
		attachOp("v", "vm", "second", false),
		forceOp("v", "second"), // the machine is ended
		createOp("read", "", "ext4", 16),
		attachOp("read", "vm", "one", true),
		resizeOp("read", 24), // its filesystem grows when it is detached
		attachOp("read", "host", "two", true),
		detachOp("read", "one"),
		detachOp("read", "two"),
		deleteOp("v"), deleteOp("read"),
		createOp("b2", "", "ext4", 16),
	}
}

func attachTo(t *testing.T, w *world, name, kind, where string, readOnly bool) Attachment {
	t.Helper()
	if err := attachOp(name, kind, where, readOnly).do(w); err != nil {
		t.Fatal(err)
	}
	v, err := w.engine.Volume(space, name)
	if err != nil {
		t.Fatal(err)
	}
	return v.Attachments[len(v.Attachments)-1]
}

func do1(t *testing.T, w *world, ops ...op) {
	t.Helper()
	for _, o := range ops {
		if err := o.do(w); err != nil {
			t.Fatalf("%s: %v", o.name, err)
		}
	}
}

// TestTaintIsForEver: who was in a machine writable is never mounted by the host
// again, whatever is asked for, and can go to a machine again.
func TestTaintIsForEver(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	do1(t, w, createOp("v", "", "ext4", 16), attachOp("v", "vm", "box", true), detachOp("v", "box"))
	if v, _ := w.engine.Volume(space, "v"); v.Tainted {
		t.Fatal("a reader has tainted the volume")
	}
	do1(t, w, attachOp("v", "host", "here", false), detachOp("v", "here"), attachOp("v", "vm", "box", false))
	refused := func(when string) {
		t.Helper()
		_, freeze := w.engine.FreezeVolume(ctx, space, "v", 0, "")
		_, trim := w.engine.TrimVolume(ctx, space, "v")
		_, capture := w.engine.CaptureVolume(ctx, space, "v", CaptureVolume{Template: "t"})
		for what, err := range map[string]error{"freeze": freeze, "trim": trim, "capture": capture} {
			if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "raw blocks") {
				t.Errorf("%s, %s: %v", when, what, err)
			}
		}
	}
	refused("attached")
	if s, err := w.engine.Stats(ctx, space, "v"); err != nil || s.Filesystem != nil || !strings.Contains(s.Unknown, "virtual machine") {
		t.Errorf("stats %+v, %v", s, err)
	}
	s, err := w.engine.Stats(ctx, space, "v")
	if err != nil || s.IO == nil || s.IO.Reads != 7 || !s.IO.Since.Equal(w.volume("v").Attachments[0].CreatedAt) {
		t.Errorf("what the machine counts: %+v, %v", s.IO, err)
	}
	do1(t, w, detachOp("v", "box"))
	if s, err := w.engine.Stats(ctx, space, "v"); err != nil || s.IO != nil {
		t.Errorf("detached: %+v, %v", s.IO, err)
	}
	w.restart(true)
	refused("detached")
	for _, kind := range []string{"host", "runc"} {
		for _, readOnly := range []bool{false, true} {
			err := attachOp("v", kind, "here", readOnly).do(w)
			if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "Attach it to a virtual machine") {
				t.Errorf("%s: %v", kind, err)
			}
		}
	}
	w.kernel.mu.Lock()
	mounts := len(w.kernel.mounts)
	w.kernel.mu.Unlock()
	if mounts > 0 {
		t.Error("it is mounted")
	}
	do1(t, w, attachOp("v", "vm", "again", true), detachOp("v", "again"), attachOp("v", "vm", "again", false))
	if err := attachOp("v", "vm", "other", true).do(w); !errors.Is(err, ErrAttached) {
		t.Errorf("a reader beside the writer: %v", err)
	}
}

// TestGrowthInAMachine: the device grows and the machine knows, also when the
// daemon dies in between; the filesystem is said to be the guest's.
func TestGrowthInAMachine(t *testing.T) {
	w := newWorld(t)
	do1(t, w, createOp("v", "", "ext4", 16), attachOp("v", "vm", "box", false))
	pending := func() string {
		t.Helper()
		v, err := w.engine.Volume(space, "v")
		if err != nil {
			t.Fatal(err)
		}
		s, err := w.engine.Sizes(t.Context(), v)
		if err != nil || s.Filesystem != 0 || s.Device != v.bytes() {
			t.Fatalf("%+v, %v", s, err)
		}
		return s.Pending
	}
	if p := pending(); p != "" {
		t.Errorf("before: %q", p)
	}
	do1(t, w, resizeOp("v", 32))
	if p := pending(); !strings.Contains(p, "16 MB") || !strings.Contains(p, "in the guest") {
		t.Errorf("after: %q", p)
	}
	w.restart(false)
	w.verifyConsistent(t)
	if p := pending(); !strings.Contains(p, "in the guest") {
		t.Errorf("after a restart: %q", p)
	}
	do1(t, w, detachOp("v", "box"), resizeOp("v", 40))
	if p := pending(); p != "" { // an ext4 that nobody has: grown by this host
		t.Errorf("detached: %q", p)
	}
	do1(t, w, attachOp("v", "vm", "box", false))
	if p := pending(); p != "" {
		t.Errorf("attached anew: %q", p)
	}
}

// TestGuestThatDoesNotAnswer: the attachment stays detaching, says why, and ends
// as soon as the guest lets go.
func TestGuestThatDoesNotAnswer(t *testing.T) {
	w := newWorld(t)
	do1(t, w, createOp("v", "", "none", 4))
	a := attachTo(t, w, "v", "vm", "box", false)
	p := place(attach.Request{Target: a.Target})
	w.kernel.mu.Lock()
	w.kernel.busy[p] = true
	w.kernel.mu.Unlock()
	_, err := w.engine.Detach(t.Context(), space, "v", a.ID, "")
	if !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "goes on by itself") {
		t.Fatalf("%v", err)
	}
	if v, _ := w.engine.Volume(space, "v"); v.Attachments[0].Phase != Detaching || v.Attachments[0].RetryAt.IsZero() {
		t.Fatalf("%+v", v.Attachments[0])
	}
	w.restart(false)
	if v, _ := w.engine.Volume(space, "v"); len(v.Attachments) != 1 || v.Attachments[0].Phase != Detaching {
		t.Fatalf("after a restart: %+v", v.Attachments)
	}
	w.kernel.mu.Lock()
	delete(w.kernel.busy, p)
	w.kernel.mu.Unlock()
	if err := w.engine.tend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if v, _ := w.engine.Volume(space, "v"); len(v.Attachments) != 0 {
		t.Fatalf("%+v", v.Attachments)
	}
}

// TestMachineIsGone: what a machine that ended had is released, and said.
func TestMachineIsGone(t *testing.T) {
	w := newWorld(t)
	do1(t, w, createOp("v", "", "ext4", 16), attachOp("v", "vm", "box", false))
	w.kernel.mu.Lock()
	w.kernel.dead["box"] = true
	delete(w.kernel.visible, "|box|")
	w.kernel.mu.Unlock()
	if err := w.engine.tend(t.Context()); err != nil {
		t.Fatal(err)
	}
	v, err := w.engine.Volume(space, "v")
	if err != nil || len(v.Attachments) != 0 || !v.Tainted {
		t.Fatalf("%+v, %v", v, err)
	}
	if !slices.ContainsFunc(v.Events, func(e Event) bool { return e.Message == "sandbox:box is gone" }) {
		t.Errorf("%+v", v.Events)
	}
	w.verifyConsistent(t)
}

// TestLimitsOfMachines: they are made where the volume is, are there after a restart,
// and stay while a guest does not let go. What cannot be had changes nothing.
func TestLimitsOfMachines(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	do1(t, w, createOp("v", "", "ext4", 16))
	into := func(box string) (Attachment, error) {
		return w.engine.Attach(ctx, space, "v", AttachVolume{Holder: "sandbox:box", Target: attach.Target{Type: "vm", Container: box}, Limits: blockdev.Limits{ReadIOPS: 100}})
	}
	_, err := into("none")
	wants(t, err, ErrUnsupported, "limits")
	if v := w.volume("v"); v.Tainted || len(v.Attachments) != 0 {
		t.Errorf("what was refused has changed the volume: %+v", v)
	}
	a, err := into("box")
	if err != nil || w.engine.Enforcement(a).Mechanism != "machine" {
		t.Fatalf("%+v, %v", a, err)
	}
	if a, err = w.engine.SetLimits(ctx, space, "v", a.ID, blockdev.Limits{WriteIOPS: 50}, ""); err != nil {
		t.Fatal(err)
	}
	w.kernel.mu.Lock()
	clear(w.kernel.limits) // the daemon died between the wish and its making
	w.kernel.busy[place(attach.Request{Target: a.Target})] = true
	w.kernel.mu.Unlock()
	w.restart(false)
	w.verifyLimits(t, []Volume{w.volume("v")})
	_, err = w.engine.Detach(ctx, space, "v", a.ID, "")
	wants(t, err, ErrConflict, "goes on by itself")
	w.verifyLimits(t, []Volume{w.volume("v")}) // a guest is not rid of them by that
	w.kernel.mu.Lock()
	clear(w.kernel.busy)
	w.kernel.mu.Unlock()
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	w.verifyLimits(t, []Volume{w.volume("v")})

	a, err = into("fixed")
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.engine.SetLimits(ctx, space, "v", a.ID, blockdev.Limits{}, "")
	wants(t, err, ErrUnsupported, "cannot be enforced")
	if _, err = w.engine.SetLimits(ctx, space, "v", a.ID, a.Limits, ""); err != nil {
		t.Errorf("the same limits: %v", err)
	}
	w.verifyLimits(t, []Volume{w.volume("v")})
}
