package engine

import (
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// toyOf is the filesystem in a volume's image.
func (w *world) toyOf(t *testing.T, name string) toySuper {
	t.Helper()
	v, err := w.engine.Volume(space, name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := readToy(w.pool, "mem:"+string(v.ID))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (w *world) pendingOf(t *testing.T, name string) string {
	t.Helper()
	v, err := w.engine.Volume(space, name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := w.engine.Sizes(t.Context(), v)
	if err != nil {
		t.Fatal(err)
	}
	return s.Pending
}

// taint puts a volume into a machine and takes it out again.
func taint(t *testing.T, w *world, name, fs string, size int64) blockdev.ID {
	t.Helper()
	do1(t, w, createOp(name, "", fs, size), attachOp(name, "vm", "box", false), detachOp(name, "box"))
	v, err := w.engine.Volume(space, name)
	if err != nil || !v.Tainted {
		t.Fatalf("%+v, %v", v, err)
	}
	return v.ID
}

// TestTaintedGrowth: an ext4 that a guest has written grows while nobody has it, and
// right after the machine has let it go; the others are grown in a guest.
func TestTaintedGrowth(t *testing.T) {
	w := newWorld(t)
	taint(t, w, "v", "ext4", 16)
	do1(t, w, resizeOp("v", 32))
	if s, p := w.toyOf(t, "v"), w.pendingOf(t, "v"); s.size != 32<<20 || p != "" {
		t.Errorf("grown to %d bytes, pending %q", s.size, p)
	}
	do1(t, w, attachOp("v", "vm", "box", false), resizeOp("v", 48), detachOp("v", "box"))
	if err := w.engine.tend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, p := w.toyOf(t, "v"), w.pendingOf(t, "v"); s.size != 48<<20 || p != "" {
		t.Errorf("after the machine: %d bytes, pending %q", s.size, p)
	}
	w.kernel.mu.Lock()
	mounts := len(w.kernel.mounts)
	w.kernel.mu.Unlock()
	if mounts > 0 {
		t.Error("it is mounted")
	}

	taint(t, w, "x", "xfs", 300)
	do1(t, w, resizeOp("x", 400))
	if p := w.pendingOf(t, "x"); !strings.Contains(p, "300 MB") || !strings.Contains(p, "in the guest") {
		t.Errorf("xfs: pending %q", p)
	}
}

// TestGuestHasGrownItself: what a guest did online leaves nothing pending.
func TestGuestHasGrownItself(t *testing.T) {
	w := newWorld(t)
	do1(t, w, createOp("v", "", "ext4", 16), attachOp("v", "vm", "box", false), resizeOp("v", 32))
	v, _ := w.engine.Volume(space, "v")
	if err := writeToy(w.pool, "mem:"+string(v.ID), 32<<20, v.UUID, ""); err != nil {
		t.Fatal(err)
	}
	do1(t, w, detachOp("v", "box"))
	w.arm(0, false)
	if err := w.engine.tend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p := w.pendingOf(t, "v"); p != "" {
		t.Errorf("pending %q", p)
	}
	for _, point := range w.points {
		if strings.Contains(point, "preen") || strings.Contains(point, "grow filesystem") {
			t.Errorf("%s, and there was nothing to grow", point)
		}
	}
}

// TestTaintedGrowthNeedsItsOwner: what the checker would ask about is not touched; it
// is said, and a machine gets the volume as before.
func TestTaintedGrowthNeedsItsOwner(t *testing.T) {
	w := newWorld(t)
	id := taint(t, w, "v", "ext4", 16)
	w.kernel.dirty[string(id)] = true
	do1(t, w, resizeOp("v", 32))
	want := func(why string) {
		t.Helper()
		p := w.pendingOf(t, "v")
		if !strings.Contains(p, why) || !strings.Contains(p, "16 MB") || !strings.Contains(p, "in a virtual machine") {
			t.Errorf("pending %q", p)
		}
		if v, _ := w.engine.Volume(space, "v"); v.CheckFirst {
			t.Error("it is marked as if this host had begun a growth")
		}
	}
	want(filesystem.ErrNeedsRepair.Error())
	if s := w.toyOf(t, "v"); s.size != 16<<20 {
		t.Errorf("it was grown: %d bytes", s.size)
	}
	w.restart(true)
	want(filesystem.ErrNeedsRepair.Error())

	image, err := w.pool.Image("mem:" + string(id))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.WriteAt([]byte("no filesystem"), 0); err != nil {
		t.Fatal(err)
	}
	do1(t, w, resizeOp("v", 40))
	want(filesystem.ErrDamaged.Error())
	do1(t, w, attachOp("v", "vm", "box", false))
	if err := w.engine.tend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p := w.pendingOf(t, "v"); p != "" {
		t.Errorf("in a machine: %q", p)
	}
	do1(t, w, detachOp("v", "box"), deleteOp("v"))
}
