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

func runcAttach(where string, readOnly bool) AttachVolume {
	return AttachVolume{Holder: "sandbox:" + where, Target: attach.Target{Type: "runc", Container: where}, MountPath: "/data", ReadOnly: readOnly}
}

func (w *world) make(name string, fs filesystem.Type) {
	w.t.Helper()
	size := int64(400)
	if _, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Name: name, Filesystem: string(fs), SizeMiB: &size}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) attach(name string, r AttachVolume) Attachment {
	w.t.Helper()
	a, err := w.engine.Attach(context.Background(), space, name, r)
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

// TestForce: which way is taken from a holder that keeps a file open.
func TestForce(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		fs      filesystem.Type
		r       AttachVolume
		counted string
		refused bool
	}{
		"ext4, container":   {filesystem.Ext4, runcAttach("box", false), countSevered, false},
		"xfs, host":         {filesystem.XFS, hostAttach("/w", false), countSevered, false},
		"btrfs, container":  {filesystem.Btrfs, runcAttach("box", false), countKilled, false},
		"btrfs, host":       {filesystem.Btrfs, hostAttach("/w", false), "", true},
		"ext4, last reader": {filesystem.Ext4, runcAttach("box", true), countSevered, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.make("a", c.fs)
			a := w.attach("a", c.r)
			p := place(attach.Request{Target: a.Target, MountPath: a.MountPath})
			w.kernel.hold(p)
			if _, err := w.engine.Detach(ctx, space, "a", a.ID, ""); !errors.Is(err, ErrConflict) {
				t.Fatalf("an ordinary detach: %v", err)
			}
			_, err := w.engine.ForceDetach(ctx, space, "a", a.ID, "me")
			now := w.volume("a")
			if c.refused {
				if !errors.Is(err, ErrCannotFence) || len(now.Attachments) != 1 || now.Attachments[0].Phase != Attached || now.Attachments[0].Forced || !w.sees("a", p) {
					t.Fatalf("%v; %+v", err, now.Attachments)
				}
				return
			}
			if err != nil || len(now.Attachments) != 0 || w.sees("a", p) {
				t.Fatalf("%v; %+v", err, now.Attachments)
			}
			if n := w.engine.Counters(); n[c.counted] != 1 || n[countForced] != 1 {
				t.Errorf("counted %v", n)
			}
			if w.kernel.dead["box"] != (c.counted == countKilled) {
				t.Errorf("the container is dead: %t", w.kernel.dead["box"])
			}
			w.verifyConsistent(t)
			w.attach("a", hostAttach("/elsewhere", false))
			w.verifyConsistent(t)
		})
	}
}

// TestForceOfWhoLetsGoLosesNothing: an ordinary detach does, and nothing is shut down.
func TestForceOfWhoLetsGoLosesNothing(t *testing.T) {
	w := newWorld(t)
	w.make("a", filesystem.Ext4)
	a := w.attach("a", runcAttach("box", false))
	if _, err := w.engine.ForceDetach(context.Background(), space, "a", a.ID, ""); err != nil {
		t.Fatal(err)
	}
	if n := w.engine.Counters(); n[countShutdown]+n[countSevered]+n[countKilled] != 0 {
		t.Errorf("counted %v", n)
	}
	w.verifyConsistent(t)
}

// TestForcedReaderLeavesTheOthers alone.
func TestForcedReaderLeavesTheOthers(t *testing.T) {
	w := newWorld(t)
	w.make("a", filesystem.Ext4)
	one, two := w.attach("a", hostAttach("/1", true)), w.attach("a", hostAttach("/2", true))
	w.kernel.hold("/1||")
	if _, err := w.engine.ForceDetach(context.Background(), space, "a", one.ID, ""); err != nil {
		t.Fatal(err)
	}
	v := w.volume("a")
	if len(v.Attachments) != 1 || v.Attachments[0].ID != two.ID || !w.sees("a", "/2||") || w.kernel.shut[v.ID] {
		t.Errorf("%+v", v.Attachments)
	}
}

// TestTakeover: an attach by force takes the volume from a writer that keeps a
// file open; one that cannot work takes it from nobody.
func TestTakeover(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.make("a", filesystem.XFS)
	old := w.attach("a", runcAttach("old", false))
	w.kernel.hold("|old|/data")
	r := runcAttach("new", false)
	if _, err := w.engine.Attach(ctx, space, "a", r); !errors.Is(err, ErrAttached) {
		t.Fatalf("without force: %v", err)
	}
	r.Force = true
	w.kernel.dead["new"] = true
	if _, err := w.engine.Attach(ctx, space, "a", r); !errors.Is(err, ErrConflict) || !w.sees("a", "|old|/data") {
		t.Fatalf("to a dead container: %v", err)
	}
	delete(w.kernel.dead, "new")
	a := w.attach("a", r)
	v := w.volume("a")
	if len(v.Attachments) != 1 || v.Attachments[0].ID != a.ID || a.Epoch <= old.Epoch || !w.sees("a", "|new|/data") || w.sees("a", "|old|/data") {
		t.Fatalf("%+v", v.Attachments)
	}
	w.verifyConsistent(t)
}

// gate lets calls hang: those of a name wait until it is opened.
type gate struct {
	mu   sync.Mutex
	shut map[string]chan struct{}
	in   map[string]chan struct{} // told when a call waits
}

func newGate(names ...string) *gate {
	g := &gate{shut: map[string]chan struct{}{}, in: map[string]chan struct{}{}}
	for _, name := range names {
		g.shut[name], g.in[name] = make(chan struct{}), make(chan struct{}, 64)
	}
	return g
}

func (g *gate) pass(name string) {
	g.mu.Lock()
	shut, in := g.shut[name], g.in[name]
	g.mu.Unlock()
	if shut != nil {
		in <- struct{}{}
		<-shut // whatever the context says: a system call that cannot be interrupted
	}
}

func (g *gate) open(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut[name] != nil {
		close(g.shut[name])
		delete(g.shut, name)
	}
}

// hangingAttacher hangs in calls for one volume or path.
type hangingAttacher struct {
	attacher
	gate *gate
	only blockdev.ID
}

func (h hangingAttacher) Attach(ctx context.Context, r attach.Request) error {
	if r.Volume == h.only {
		h.gate.pass("attach")
	}
	return h.attacher.Attach(ctx, r)
}

func (h hangingAttacher) Detach(ctx context.Context, r attach.Request) error {
	if r.Volume == h.only {
		h.gate.pass("detach")
	}
	return h.attacher.Detach(ctx, r)
}

func (h hangingAttacher) Fence(ctx context.Context, r attach.Request) error {
	err := h.attacher.Fence(ctx, r)
	h.gate.open("detach") // what the sandbox itself served goes with it
	return err
}

func (h hangingAttacher) Resolve(ctx context.Context, t attach.Target, p string) (attach.Target, error) {
	if t.Container == "frozen" {
		h.gate.pass("resolve")
	}
	return h.attacher.Resolve(ctx, t, p)
}

// hangingStage hangs in the flush of one volume.
type hangingStage struct {
	*kernel
	gate *gate
	only blockdev.ID
}

func (h hangingStage) Unmount(ctx context.Context, id blockdev.ID) error {
	if id == h.only {
		h.gate.pass("unmount")
	}
	return h.kernel.Unmount(ctx, id)
}

// hangLimit is what a step may take: little, for those that hang take all of it, and
// enough for the others on a busy machine.
const hangLimit = 500 * time.Millisecond

// hangingWorld has volumes a and b; what is named hangs for a.
func hangingWorld(t *testing.T, names ...string) (*world, *gate) {
	w := newWorld(t)
	w.make("a", filesystem.Ext4)
	w.make("b", filesystem.Ext4)
	g := newGate(names...)
	t.Cleanup(func() {
		for _, name := range names {
			g.open(name)
		}
		if !w.engine.locks.calm(context.Background(), w.volume("b").ID) {
			t.Error("it still hangs")
		}
	})
	id := w.volume("a").ID
	w.engine.o.StepLimit = hangLimit
	w.engine.o.Attachers["runc"] = hangingAttacher{attacher{w, false}, g, id}
	w.engine.o.Stage = hangingStage{w.kernel, g, id}
	return w, g
}

func (w *world) untilCalm(name string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if v := w.volume(name); !w.engine.locks.calm(ctx, v.ID) {
		w.t.Fatal("it still hangs")
	}
	for ctx.Err() == nil {
		if release, free := w.engine.locks.try(w.volume(name).ID); free {
			release()
			return
		}
		time.Sleep(time.Millisecond)
	}
	w.t.Fatal("the lock is not given back")
}

// TestAHangingAttachIsSaidAndTakenBack: bounded answers, nobody else waits, and it
// does not come true later.
func TestAHangingAttachIsSaidAndTakenBack(t *testing.T) {
	w, g := hangingWorld(t, "attach")
	ctx := context.Background()
	if _, err := w.engine.Attach(ctx, space, "a", runcAttach("box", false)); !errors.Is(err, ErrHanging) {
		t.Fatalf("got %v", err)
	}
	a := w.volume("a").Attachments[0]
	if a.Phase != Detaching || !strings.Contains(a.Failure, stepAttach+" has not ended since 2026-11-23T12:") {
		t.Errorf("the record says %q, %q", a.Phase, a.Failure)
	}
	for name, call := range map[string]func() error{
		"attach": func() error { _, err := w.engine.Attach(ctx, space, "a", runcAttach("box", false)); return err },
		"detach": func() error { _, err := w.engine.Detach(ctx, space, "a", a.ID, ""); return err },
		"resize": func() error {
			_, err := w.engine.ChangeVolume(ctx, space, "a", ChangeVolume{SizeMiB: mib(500)})
			return err
		},
		"delete": func() error { _, err := w.engine.DeleteVolume(ctx, space, "a", ""); return err },
	} {
		if err := call(); !errors.Is(err, ErrHanging) || !strings.Contains(err.Error(), stepAttach) {
			t.Errorf("%s meanwhile: %v", name, err)
		}
	}
	if w.engine.Hanging() != 1 || w.engine.Counters()[countHung] != 1 {
		t.Errorf("%d hang, counted %v", w.engine.Hanging(), w.engine.Counters())
	}
	b := w.attach("b", runcAttach("box", false))
	if _, err := w.engine.Detach(ctx, space, "b", b.ID, ""); err != nil {
		t.Errorf("another volume: %v", err)
	}
	if err := w.engine.tend(ctx); err != nil {
		t.Errorf("the background: %v", err)
	}
	g.open("attach")
	w.untilCalm("a")
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	if v := w.volume("a"); len(v.Attachments) != 0 || w.sees("a", "|box|/data") || w.engine.Hanging() != 0 {
		t.Errorf("%+v", v.Attachments)
	}
	w.verifyConsistent(t)
}

// TestAHangingDetachGoesOnByItself once what hangs ends.
func TestAHangingDetachGoesOnByItself(t *testing.T) {
	for _, step := range []string{"detach", "unmount"} {
		t.Run(step, func(t *testing.T) {
			w, g := hangingWorld(t, step)
			ctx := context.Background()
			g2 := w.engine.o.Stage
			w.engine.o.Stage = w.kernel // preparing closes, too
			a := w.attach("a", runcAttach("box", false))
			w.engine.o.Stage = g2
			if _, err := w.engine.Detach(ctx, space, "a", a.ID, ""); !errors.Is(err, ErrHanging) {
				t.Fatalf("got %v", err)
			}
			if a := w.volume("a").Attachments[0]; a.Phase != Detaching || !strings.Contains(a.Failure, "goes on as soon as that ends") {
				t.Errorf("%+v", a)
			}
			g.open(step)
			w.untilCalm("a")
			if err := w.engine.tend(ctx); err != nil {
				t.Fatal(err)
			}
			if v := w.volume("a"); len(v.Attachments) != 0 {
				t.Errorf("%+v", v.Attachments)
			}
			w.verifyConsistent(t)
		})
	}
}

// TestAHangingSandboxIsNotAttachedTo: finding it hangs; nothing was recorded.
func TestAHangingSandboxIsNotAttachedTo(t *testing.T) {
	w, g := hangingWorld(t, "resolve")
	if _, err := w.engine.Attach(context.Background(), space, "a", runcAttach("frozen", false)); !errors.Is(err, ErrHanging) {
		t.Fatalf("got %v", err)
	}
	if v := w.volume("a"); len(v.Attachments) != 0 {
		t.Errorf("%+v", v.Attachments)
	}
	g.open("resolve")
	w.untilCalm("a")
	w.attach("a", runcAttach("box", false))
}

// TestForceEndsASandboxInWhichAStepHangs, and the step ends with it.
func TestForceEndsASandboxInWhichAStepHangs(t *testing.T) {
	w, _ := hangingWorld(t, "detach")
	ctx := context.Background()
	a := w.attach("a", runcAttach("box", false))
	if _, err := w.engine.Detach(ctx, space, "a", a.ID, ""); !errors.Is(err, ErrHanging) {
		t.Fatalf("got %v", err)
	}
	if _, err := w.engine.ForceDetach(ctx, space, "a", a.ID, ""); err != nil {
		t.Fatal(err)
	}
	if v := w.volume("a"); len(v.Attachments) != 0 || !w.kernel.dead["box"] {
		t.Errorf("%+v", v.Attachments)
	}
	w.attach("a", hostAttach("/elsewhere", false))
	w.verifyConsistent(t)
}

// TestForceIsRefusedWhileTheDeviceHangs: never a time-out alone, and nothing is lost.
func TestForceIsRefusedWhileTheDeviceHangs(t *testing.T) {
	w, g := hangingWorld(t, "unmount")
	ctx := context.Background()
	stage := w.engine.o.Stage
	w.engine.o.Stage = w.kernel
	a := w.attach("a", runcAttach("box", false))
	w.engine.o.Stage = stage
	if _, err := w.engine.ForceDetach(ctx, space, "a", a.ID, ""); !errors.Is(err, ErrCannotFence) || !strings.Contains(err.Error(), stepClose) {
		t.Fatalf("got %v", err)
	}
	if got := w.volume("a"); got.Attachments[0].Forced || got.Attachments[0].Phase != Detaching || w.kernel.shut[got.ID] {
		t.Errorf("%+v", got)
	}
	r := hostAttach("/elsewhere", false)
	r.Force = true
	if _, err := w.engine.Attach(ctx, space, "a", r); !errors.Is(err, ErrCannotFence) {
		t.Errorf("a takeover: %v", err)
	}
	g.open("unmount")
	w.untilCalm("a")
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	if v := w.volume("a"); len(v.Attachments) != 0 || w.engine.Healthy() != nil {
		t.Errorf("%+v, %v", v.Attachments, w.engine.Healthy())
	}
	w.verifyConsistent(t)
}

// TestCloseDoesNotWaitForWhatHangs.
func TestCloseDoesNotWaitForWhatHangs(t *testing.T) {
	w, g := hangingWorld(t, "attach")
	w.engine.o.StepLimit = time.Hour
	answered := make(chan error, 1)
	go func() {
		_, err := w.engine.Attach(context.Background(), space, "a", runcAttach("box", false))
		answered <- err
	}()
	<-g.in["attach"]
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := w.engine.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("close: %v", err)
	}
	if err := <-answered; !errors.Is(err, ErrHanging) {
		t.Errorf("the attach: %v", err)
	}
}

// sentinel is an attacher that tells of the end of its containers.
type sentinel struct {
	attacher
	ended chan struct{}
}

func (s sentinel) AwaitEnd(ctx context.Context, _ attach.Target) error {
	select {
	case <-s.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestTheEndOfASandboxIsAnEvent: no look from time to time is needed.
func TestTheEndOfASandboxIsAnEvent(t *testing.T) {
	w := newWorld(t)
	s := sentinel{attacher{w, false}, make(chan struct{})}
	w.engine.o.Attachers["runc"] = s
	w.engine.o.ProbeInterval = time.Hour
	for _, name := range []string{"a", "b"} {
		w.make(name, filesystem.Ext4)
		w.attach(name, AttachVolume{Holder: "sandbox:box", Target: attach.Target{Type: "runc", Container: "box"}, MountPath: "/" + name})
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- w.engine.Run(ctx) }()
	w.kernel.mu.Lock()
	w.kernel.dead["box"] = true
	w.kernel.mu.Unlock()
	close(s.ended)
	deadline := time.Now().Add(time.Minute)
	for len(w.volume("a").Attachments)+len(w.volume("b").Attachments) > 0 {
		if time.Now().After(deadline) {
			t.Fatal("nobody noticed")
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	if n := w.engine.Counters()[countLost]; n != 2 {
		t.Errorf("%d lost", n)
	}
	w.engine.mu.Lock()
	defer w.engine.mu.Unlock()
	if len(w.engine.sentries) != 0 {
		t.Errorf("%d sentries are left", len(w.engine.sentries))
	}
}
