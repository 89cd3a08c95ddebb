package engine

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
)

// guests is a machine with an agent inside, which answers as a test wants it.
type guests struct {
	machine
	mu     sync.Mutex
	answer error // of everything; nil: it does what it is asked
	asked  []string
	size   int64 // that the filesystem was last grown to
	lazy   bool  // the last unmount was
}

func (g *guests) ask(what string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = append(g.asked, what)
	return g.answer
}

// answers sets what the agent answers, and gives what it was asked until now.
func (g *guests) answers(err error) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	before := strings.Join(g.asked, " ")
	g.answer, g.asked = err, nil
	return before
}

func (g *guests) HasAgent(attach.Target) bool                       { return true }
func (g *guests) MountInside(context.Context, attach.Request) error { return g.ask("mount") }
func (g *guests) SyncInside(context.Context, attach.Request) error  { return g.ask("sync") }
func (g *guests) ThawInside(context.Context, attach.Request) error  { return g.ask("thaw") }
func (g *guests) UnmountInside(_ context.Context, r attach.Request) error {
	g.lazy = r.Lazy
	return g.ask("unmount")
}

func (g *guests) GrowInside(_ context.Context, r attach.Request) error {
	g.size = r.Endpoint.Size
	return g.ask("grow")
}

func (g *guests) FreezeInside(context.Context, attach.Request, time.Duration) error {
	return g.ask("freeze")
}

func (g *guests) TrimInside(_ context.Context, r attach.Request, _, _ int64) (filesystem.Trimmed, error) {
	return filesystem.Trimmed{Discarded: 4096, Next: r.Endpoint.Size, Done: true}, g.ask("trim")
}

func (g *guests) StatInside(context.Context, attach.Request) (filesystem.Usage, bool, error) {
	return filesystem.Usage{Total: 10, Used: 4, Free: 6}, false, g.ask("stat")
}

// refusal is an agent's, as attachers tell it.
type refusal struct{ kind error }

func (r refusal) Error() string        { return "the guest says why" }
func (r refusal) Is(target error) bool { return target == r.kind || target == blockdev.ErrBusy }

func withGuests(t *testing.T) (*world, *guests) {
	t.Helper()
	w := newWorld(t)
	g := &guests{machine: machine{attacher{w, false}}}
	w.engine.o.Attachers["vm"] = g
	return w, g
}

// TestAgentWorks: what this host must not do to a tainted volume is asked of the
// agent, and growth that could not be done is done at the next attachment.
func TestAgentWorks(t *testing.T) {
	w, g := withGuests(t)
	ctx := t.Context()
	do1(t, w, createOp("v", "", "ext4", 16))
	a := attachTo(t, w, "v", "vm", "box", false)
	sizes := func() Sizes {
		t.Helper()
		v, err := w.engine.Volume(space, "v")
		if err != nil {
			t.Fatal(err)
		}
		s, err := w.engine.Sizes(ctx, v)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	g.answers(refusal{attach.ErrNotInside})
	do1(t, w, resizeOp("v", 32))
	if s := sizes(); s.Pending != "the filesystem grows when it is mounted in the guest" {
		t.Errorf("%+v", s)
	}
	g.answers(nil)
	do1(t, w, resizeOp("v", 40))
	if s := sizes(); s.Pending != "" || g.size != 40*filesystem.MiB {
		t.Errorf("%+v, grown to %d", s, g.size)
	}
	if r, err := w.engine.TrimVolume(ctx, space, "v"); err != nil || !r.Complete || r.Discarded != 4096 {
		t.Errorf("%+v, %v", r, err)
	}
	if s, err := w.engine.Stats(ctx, space, "v"); err != nil || s.State != Mounted || s.Filesystem == nil || s.Filesystem.Used != 4 {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := w.engine.FreezeVolume(ctx, space, "v", 0, ""); err != nil {
		t.Error(err)
	}
	if was, err := w.engine.ThawVolume(ctx, space, "v", ""); err != nil || !was {
		t.Errorf("%v, %v", was, err)
	}
	if _, err := w.engine.Detach(ctx, space, "v", a.ID, ""); err != nil {
		t.Fatal(err)
	}
	if asked := g.answers(nil); asked != "grow sync trim stat sync freeze thaw unmount" {
		t.Errorf("asked: %s", asked)
	}
}

// TestGuestInUse: a detach is refused and nothing has changed; by force the device
// goes, and the machine lives.
func TestGuestInUse(t *testing.T) {
	w, g := withGuests(t)
	do1(t, w, createOp("v", "", "ext4", 16))
	a := attachTo(t, w, "v", "vm", "box", false)
	g.answers(refusal{attach.ErrInUse})
	_, err := w.engine.Detach(t.Context(), space, "v", a.ID, "")
	if !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "the guest says why") {
		t.Fatalf("%v", err)
	}
	if v, _ := w.engine.Volume(space, "v"); v.Attachments[0].Phase != Attached {
		t.Fatalf("%+v", v.Attachments[0])
	}
	if _, err := w.engine.ForceDetach(t.Context(), space, "v", a.ID, ""); err != nil || !g.lazy {
		t.Fatalf("%v, lazily: %v", err, g.lazy)
	}
	if w.kernel.dead["box"] {
		t.Error("the machine was ended")
	}
}

// TestGuestIsSilent: a detach goes on when the agent is back; a freeze is nobody's
// hindrance; a trim and a thaw say so.
func TestGuestIsSilent(t *testing.T) {
	w, g := withGuests(t)
	ctx := t.Context()
	do1(t, w, createOp("v", "", "ext4", 16))
	a := attachTo(t, w, "v", "vm", "box", false)
	if _, err := w.engine.FreezeVolume(ctx, space, "v", 0, ""); err != nil {
		t.Fatal(err)
	}
	g.answers(refusal{attach.ErrGuestSilent})
	if _, err := w.engine.ThawVolume(ctx, space, "v", ""); !errors.Is(err, ErrConflict) {
		t.Errorf("%v", err)
	}
	_, err := w.engine.Detach(ctx, space, "v", a.ID, "")
	if !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "goes on by itself") {
		t.Fatalf("%v", err)
	}
	if v, _ := w.engine.Volume(space, "v"); v.Attachments[0].Phase != Detaching || v.Frozen != nil {
		t.Fatalf("%+v", v)
	}
	g.answers(nil)
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	if v, _ := w.engine.Volume(space, "v"); len(v.Attachments) != 0 {
		t.Fatalf("%+v", v.Attachments)
	}
}

// TestAgentWhereNoneIs: what names an agent in vain is refused before anything is
// touched.
func TestAgentWhereNoneIs(t *testing.T) {
	w, _ := withGuests(t)
	do1(t, w, createOp("v", "", "ext4", 16), createOp("bare", "", "none", 16))
	for name, r := range map[string]AttachVolume{
		"v":    {Holder: "sandbox:box", Target: attach.Target{Type: "runc", Container: "box", Agent: "/run/agent"}, MountPath: "/data"},
		"bare": {Holder: "sandbox:box", Target: attach.Target{Type: "vm", Container: "box", Agent: "/run/agent"}, MountPath: "/data"},
	} {
		if _, err := w.engine.Attach(t.Context(), space, name, r); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		if v, _ := w.engine.Volume(space, name); v.Tainted || len(v.Attachments) > 0 {
			t.Errorf("%+v", v)
		}
	}
}
