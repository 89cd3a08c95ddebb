package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"holdfast/blockdev/filesystem"
)

// toySanitizer makes a toy filesystem of a toy filesystem.
type toySanitizer struct{ w *world }

func (s toySanitizer) Copy(_ context.Context, from string, _ filesystem.Type, to string) (c filesystem.Copied, err error) {
	if s.w.kernel.dirty[strings.TrimPrefix(from, "mem:")] {
		return c, filesystem.ErrDirty
	}
	if _, err := readToy(s.w.pool, from); err != nil {
		return c, err
	}
	image, err := s.w.pool.Image(to)
	if err != nil {
		return c, err
	}
	if image.Size() < 8<<20 {
		return c, fmt.Errorf("%w: too small", filesystem.ErrUnfit)
	}
	c.Entries, c.Left.Devices = 7, 1
	e := s.w.effect("copy files", func() { err = writeToy(s.w.pool, to, image.Size(), "", "") })
	return c, errors.Join(e, err)
}

func sanitizeOp(name, to string) op {
	return op{
		name: "sanitize " + name,
		do: func(w *world) error {
			_, err := w.engine.SanitizeVolume(context.Background(), space, name, SanitizeVolume{Name: to})
			if errors.Is(err, ErrExists) { // by the first try
				return nil
			}
			return err
		},
		want: func(m *model) { m.sizes[to] = m.sizes[name] },
	}
}

// sanitizeLife is the way out of a taint.
func sanitizeLife() []op {
	return []op{
		createOp("v", "", "ext4", 16),
		attachOp("v", "vm", "box", false), detachOp("v", "box"),
		sanitizeOp("v", "clean"),
		attachOp("clean", "host", "here", false), detachOp("clean", "here"),
		deleteOp("v"), deleteOp("clean"),
		createOp("b2", "", "ext4", 16),
	}
}

// TestSanitize: the new volume has no taint and the old one keeps its own.
func TestSanitize(t *testing.T) {
	w := newWorld(t)
	taint(t, w, "v", "xfs", 300)
	v, err := w.engine.SanitizeVolume(t.Context(), space, "v", SanitizeVolume{Name: "clean"})
	if err != nil || v.Tainted || v.Filesystem != filesystem.Ext4 || v.SizeMiB != 300 {
		t.Fatalf("%+v, %v", v, err)
	}
	if !slices.ContainsFunc(v.Events, func(e Event) bool {
		return e.Type == "sanitize" && strings.Contains(e.Message, "files of v (7 entries)") && strings.Contains(e.Message, "left out: 1 devices")
	}) {
		t.Errorf("events %+v", v.Events)
	}
	do1(t, w, attachOp("clean", "runc", "box", false))
	if old, _ := w.engine.Volume(space, "v"); !old.Tainted {
		t.Error("the old one has lost its taint")
	}
	wants(t, attachOp("v", "runc", "box", false).do(w), ErrUnsupported, "raw blocks")
	w.restart(false)
	w.verifyConsistent(t)
}

// TestSanitizeRefused: what cannot be copied is said, and nothing is left.
func TestSanitizeRefused(t *testing.T) {
	w := newWorld(t)
	id := taint(t, w, "v", "ext4", 16)
	do1(t, w, createOp("raw", "", "none", 4))
	ask := func(name string, r SanitizeVolume) error {
		t.Helper()
		r.Name = "clean"
		_, err := w.engine.SanitizeVolume(t.Context(), space, name, r)
		if _, found := w.engine.Volume(space, "clean"); !errors.Is(found, ErrNotFound) {
			t.Errorf("after %v: %v", err, found)
		}
		w.verifyConsistent(t)
		return err
	}
	wants(t, ask("none", SanitizeVolume{}), ErrNotFound, "not found")
	wants(t, ask("raw", SanitizeVolume{}), ErrUnsupported, "no filesystem")
	wants(t, ask("v", SanitizeVolume{SizeMiB: 4}), ErrConflict, "larger size")
	do1(t, w, attachOp("v", "vm", "box", true))
	wants(t, ask("v", SanitizeVolume{}), ErrAttached, "sandbox:box")
	do1(t, w, detachOp("v", "box"))
	w.kernel.dirty[string(id)] = true
	wants(t, ask("v", SanitizeVolume{}), ErrConflict, "unmount it there")
	delete(w.kernel.dirty, string(id))
	image, err := w.pool.Image("mem:" + string(id))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.WriteAt([]byte("QFI"), 0); err != nil {
		t.Fatal(err)
	}
	_, err = w.engine.SanitizeVolume(t.Context(), space, "v", SanitizeVolume{Name: "clean"})
	wants(t, err, ErrUnsupported, "damaged")
	if _, found := w.engine.Volume(space, "clean"); !errors.Is(found, ErrNotFound) {
		t.Errorf("left: %v", found)
	}
}
