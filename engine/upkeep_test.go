package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// attached makes a volume of 64 MiB with a writer.
func (w *world) attached(name, fs string) Volume {
	w.t.Helper()
	w.made(name, fs)
	if err := attachOp(name, "host", "at-"+name, false).do(w); err != nil {
		w.t.Fatal(err)
	}
	return w.volume(name)
}

func (w *world) made(name, fs string) Volume {
	w.t.Helper()
	size := int64(64)
	if fs == "xfs" {
		size = 300
	}
	if err := createOp(name, "", fs, size).do(w); err != nil {
		w.t.Fatal(err)
	}
	return w.volume(name)
}

func (w *world) volume(name string) Volume {
	w.t.Helper()
	v, err := w.engine.Volume(space, name)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) freeze(name string) Freeze {
	w.t.Helper()
	f, err := w.engine.FreezeVolume(context.Background(), space, name, time.Minute, "ann")
	if err != nil {
		w.t.Fatal(err)
	}
	return f
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock = w.clock.Add(d)
}

// wants fails unless err is of the kind and says the part.
func wants(t *testing.T, err, kind error, part string) {
	t.Helper()
	if !errors.Is(err, kind) || !strings.Contains(err.Error(), part) {
		t.Errorf("%v, want %v with %q", err, kind, part)
	}
}

func TestFreezeHoldsAndThaws(t *testing.T) {
	w := newWorld(t)
	v := w.attached("a", "ext4")
	f := w.freeze("a")
	if !w.kernel.isFrozen(string(v.ID)) || !w.volume("a").frozenAt(w.now()) || f.By != "ann" {
		t.Fatalf("not frozen: %+v", f)
	}
	s, err := w.engine.Stats(context.Background(), space, "a")
	if err != nil || s.State != Frozen || s.Freeze == nil || s.Filesystem == nil {
		t.Errorf("%+v, %v", s, err)
	}
	_, err = w.engine.FreezeVolume(context.Background(), space, "a", time.Second, "")
	wants(t, err, ErrConflict, "frozen until")
	_, err = w.engine.TrimVolume(context.Background(), space, "a")
	wants(t, err, ErrConflict, "frozen until")
	for range 2 { // again is success
		if _, err := w.engine.ThawVolume(context.Background(), space, "a", ""); err != nil {
			t.Fatal(err)
		}
	}
	if w.kernel.isFrozen(string(v.ID)) || w.volume("a").Frozen != nil {
		t.Error("still frozen")
	}
	w.freeze("a")
}

func TestFreezeRefusals(t *testing.T) {
	w := newWorld(t)
	w.made("loose", "ext4")
	w.made("raw", "none")
	w.made("read", "ext4")
	if err := attachOp("read", "host", "r", true).do(w); err != nil {
		t.Fatal(err)
	}
	w.attached("busy", "ext4")
	ctx := context.Background()
	for name, part := range map[string]string{"loose": "detached", "raw": "no filesystem", "read": "read-only"} {
		_, err := w.engine.FreezeVolume(ctx, space, name, time.Second, "")
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v, want %q", name, err, part)
		}
	}
	for _, bad := range []time.Duration{-1, DefaultMaxFreeze + 1} {
		_, err := w.engine.FreezeVolume(ctx, space, "busy", bad, "")
		wants(t, err, ErrInvalid, "at most 1m0s")
	}
	w.kernel.setFrozen(string(w.volume("busy").ID), true) // by somebody else on the host
	v := w.volume("busy")
	w.engine.o.Filesystems = syncs{toyFS{w}}
	_, err := w.engine.FreezeVolume(ctx, space, "busy", time.Second, "")
	wants(t, err, ErrConflict, "something else")
	if !w.kernel.isFrozen(string(v.ID)) {
		t.Error("somebody else's freeze was ended")
	}
}

// syncs is a toy filesystem whose flush does not mind a freeze.
type syncs struct{ toyFS }

func (syncs) SyncMounted(context.Context, string, filesystem.Type) error { return nil }

// TestDeadlineThawsWhateverHoldsTheLock: the thaw itself waits for nobody, and the
// record follows when it can.
func TestDeadlineThawsWhateverHoldsTheLock(t *testing.T) {
	w := newWorld(t)
	v := w.attached("a", "xfs")
	if _, err := w.engine.FreezeVolume(context.Background(), space, "a", time.Nanosecond, ""); err != nil {
		t.Fatal(err)
	}
	w.eventually("the deadline thaws", func() bool { return !w.kernel.isFrozen(string(v.ID)) && w.volume("a").Frozen == nil })

	w.freeze("a")
	release, err := w.engine.locks.acquire(context.Background(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	f := w.engine.freezes.get(v.ID)
	done := make(chan struct{})
	go func() { w.engine.expire(v.ID, f); close(done) }()
	w.eventually("thawed under a lock that somebody holds", func() bool { return !w.kernel.isFrozen(string(v.ID)) })
	if w.volume("a").Frozen == nil {
		t.Error("the record changed without the lock")
	}
	release()
	<-done
	if v := w.volume("a"); v.Frozen != nil || v.Events[len(v.Events)-1].Message != "Thawed at its deadline" {
		t.Errorf("%+v", v)
	}
}

func (w *world) eventually(what string, is func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !is() {
		if time.Now().After(deadline) {
			w.t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestDeadlineTriesAgain: one failure does not leave a sandbox standing still.
func TestDeadlineTriesAgain(t *testing.T) {
	w := newWorld(t)
	v := w.attached("a", "ext4")
	w.freeze("a")
	w.mu.Lock()
	w.cut, w.crash = len(w.points)+1, false
	w.mu.Unlock()
	w.engine.expire(v.ID, w.engine.freezes.get(v.ID))
	if !w.kernel.isFrozen(string(v.ID)) {
		t.Fatal("the thaw did not fail")
	}
	w.eventually("the second try thaws", func() bool { return !w.kernel.isFrozen(string(v.ID)) })
}

func TestRestartAndCloseThaw(t *testing.T) {
	w := newWorld(t)
	v := w.attached("a", "ext4")
	w.freeze("a")
	w.restart(false) // killed
	if w.kernel.isFrozen(string(v.ID)) || w.volume("a").Frozen != nil {
		t.Fatal("the start did not thaw")
	}
	if events := w.volume("a").Events; events[len(events)-1].Message != "Thawed: the daemon was restarted" {
		t.Errorf("%+v", events)
	}
	w.freeze("a")
	if err := w.engine.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if w.kernel.isFrozen(string(v.ID)) {
		t.Error("frozen after an orderly stop")
	}
}

// TestFrozenMeetsOtherRequests is the table in docs/states.md.
func TestFrozenMeetsOtherRequests(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.attached("a", "xfs")
	w.freeze("a")
	_, err := w.engine.DeleteVolume(ctx, space, "a", "")
	wants(t, err, ErrAttached, "attached")
	grown, err := w.engine.ChangeVolume(ctx, space, "a", ChangeVolume{SizeMiB: mib(400)})
	if err != nil || grown.SizeMiB != 400 {
		t.Fatalf("%+v, %v", grown, err)
	}
	s, err := w.engine.Sizes(ctx, w.volume("a"))
	if err != nil || s.Device != 400<<20 || s.Filesystem != 300<<20 || !strings.Contains(s.Pending, "thawed") {
		t.Errorf("grown while frozen: %+v, %v", s, err)
	}
	if _, err := w.engine.ThawVolume(ctx, space, "a", ""); err != nil {
		t.Fatal(err)
	}
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	if s, err := w.engine.Sizes(ctx, w.volume("a")); err != nil || s.Filesystem != 400<<20 || s.Pending != "" {
		t.Errorf("after the thaw: %+v, %v", s, err)
	}
	w.freeze("a")
	if err := detachOp("a", "at-a").do(w); err != nil { // the world fails an unmount of what is frozen
		t.Fatal(err)
	}
	if now := w.volume("a"); now.Frozen != nil || len(now.Attachments) != 0 || w.kernel.isFrozen(string(v.ID)) {
		t.Errorf("%+v", now)
	}
}

// TestDeadSandboxIsThawed: a sandbox that dies while its volume is frozen lets go.
func TestDeadSandboxIsThawed(t *testing.T) {
	w := newWorld(t)
	w.made("a", "ext4")
	if err := attachOp("a", "runc", "box", false).do(w); err != nil {
		t.Fatal(err)
	}
	w.freeze("a")
	w.kernel.mu.Lock()
	w.kernel.dead["box"] = true
	w.kernel.mu.Unlock()
	if err := w.engine.tend(context.Background()); err != nil {
		t.Fatal(err)
	}
	if v := w.volume("a"); len(v.Attachments) != 0 || v.Frozen != nil || len(w.kernel.frozenNow()) != 0 {
		t.Errorf("%+v", v)
	}
}

// fill writes n bytes behind the toy's superblock: space that a trim gives back.
func (w *world) fill(v Volume, n int) {
	w.t.Helper()
	image, err := w.pool.Image("mem:" + string(v.ID))
	if err == nil {
		_, err = image.WriteAt(make([]byte, n), 4096)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func TestTrimFreesInThePool(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.attached("a", "ext4")
	w.fill(v, 1<<20)
	r, err := w.engine.TrimVolume(ctx, space, "a")
	if err != nil || r.Freed != 1<<20 || !r.Complete || r.Discarded < r.Freed {
		t.Errorf("attached: %+v, %v", r, err)
	}
	w.fill(v, 1<<20)
	if err := detachOp("a", "at-a").do(w); err != nil {
		t.Fatal(err)
	}
	r, err = w.engine.TrimVolume(ctx, space, "a")
	if err != nil || r.Freed != 1<<20 || !r.Complete {
		t.Errorf("detached: %+v, %v", r, err)
	}
	if mounts, _ := w.kernel.Volumes(ctx); len(mounts) != 0 {
		t.Errorf("mounted after the trim: %v", mounts)
	}
	if runs, freed := w.engine.Trimmed(); runs != 2 || freed != 2<<20 {
		t.Errorf("%d runs freed %d", runs, freed)
	}
}

func TestTrimRefusals(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	w.made("raw", "none")
	v := w.made("tainted", "ext4")
	v.Tainted = true
	if err := w.engine.save(ctx, &v); err != nil {
		t.Fatal(err)
	}
	w.made("read", "ext4")
	if err := attachOp("read", "host", "r", true).do(w); err != nil {
		t.Fatal(err)
	}
	for name, part := range map[string]string{"raw": "no filesystem", "tainted": "raw blocks", "read": "read-only to sandbox:r", "absent": "not found"} {
		if _, err := w.engine.TrimVolume(ctx, space, name); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v, want %q", name, err, part)
		}
	}
	if _, err := w.engine.FreezeVolume(ctx, space, "tainted", 0, ""); !errors.Is(err, ErrUnsupported) {
		t.Errorf("freeze of a tainted volume: %v", err)
	}
}

// TestTrimGivesWay: whoever wants the volume while it is being trimmed gets it
// between two pieces, and the trim goes on with what it finds then.
func TestTrimGivesWay(t *testing.T) {
	for name, c := range map[string]struct {
		during op
		reason string
	}{
		"detach": {detachOp("a", "at-a"), ""}, "grow": {resizeOp("a", 400), ""}, "freeze": {freezeOp("a", ""), "frozen until"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.trimPiece = 4 << 20
			v := w.attached("a", "xfs")
			w.fill(v, 1<<20)
			done, pieces := make(chan error, 1), 0
			w.betweenTrims = func() {
				if pieces++; pieces == 2 {
					go func() { done <- c.during.do(w) }()
					w.eventually("it waits", func() bool { return w.engine.locks.wanted(v.ID) })
				}
			}
			r, err := w.engine.TrimVolume(context.Background(), space, "a")
			if err := errors.Join(err, <-done); err != nil {
				t.Fatal(err)
			}
			if r.Complete != (c.reason == "") || !strings.Contains(r.Reason, c.reason) {
				t.Errorf("%+v", r)
			}
		})
	}
	t.Run("delete", func(t *testing.T) {
		w := newWorld(t)
		w.trimPiece = 4 << 20
		v, done, pieces := w.made("a", "ext4"), make(chan error, 1), 0
		w.betweenTrims = func() {
			if pieces++; pieces == 2 {
				go func() { done <- deleteOp("a").do(w) }()
				w.eventually("it waits", func() bool { return w.engine.locks.wanted(v.ID) })
			}
		}
		r, err := w.engine.TrimVolume(context.Background(), space, "a")
		if err := errors.Join(err, <-done); err != nil || r.Complete || !strings.Contains(r.Reason, "not found") {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

func TestTrimSchedule(t *testing.T) {
	ctx, day := context.Background(), 24*time.Hour
	w := newWorld(t)
	v := w.attached("a", "ext4")
	w.made("never-used", "ext4")
	runs := func() int64 {
		t.Helper()
		w.engine.trimDue(ctx, day)
		n, _ := w.engine.Trimmed()
		return n
	}
	w.pass(day)
	if n := runs(); n != 1 {
		t.Fatalf("%d trims after a day, want that of the volume that was used", n)
	}
	if n := runs(); n != 1 {
		t.Errorf("%d trims: again at once", n)
	}
	w.pass(day)
	if n := runs(); n != 1 {
		t.Errorf("%d trims: nothing was written since", n)
	}
	w.fill(v, 8192)
	if n := runs(); n != 2 {
		t.Errorf("%d trims after a write and a day", n)
	}
	if err := detachOp("a", "at-a").do(w); err != nil {
		t.Fatal(err)
	}
	w.pass(day)
	if n := runs(); n != 3 {
		t.Errorf("%d trims: detached since, and perhaps written before that", n)
	}
	w.pass(day)
	if n := runs(); n != 3 {
		t.Errorf("%d trims: nobody can have written", n)
	}
}

// TestTrimMomentsAreSpread: of a thousand volumes no large part is due at once.
func TestTrimMomentsAreSpread(t *testing.T) {
	const hours = 24
	start := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	var count [hours]int
	for i := range 1000 {
		id := newID(blockdev.PrefixVolume, start.Add(time.Duration(i)*time.Second))
		before := 0
		for hour := range hours {
			at := start.Add(time.Duration(hour) * time.Hour)
			if due(id, at, at.Add(time.Hour), hours*time.Hour) {
				count[hour]++
				before++
			}
		}
		if before != 1 {
			t.Fatalf("%s has %d moments in a day", id, before)
		}
	}
	for hour, n := range count {
		if n > 100 {
			t.Errorf("%d of 1000 in hour %d", n, hour)
		}
	}
}

func TestStatsOfWhatIsNotMounted(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	v := w.made("a", "ext4")
	s, err := w.engine.Stats(ctx, space, "a")
	if err != nil || s.State != Unmounted || s.Filesystem == nil || s.Filesystem.Total != 64<<20 || s.Device != 64<<20 || s.IO != nil {
		t.Errorf("%+v, %v", s, err)
	}
	for _, p := range w.points {
		if strings.Contains(p, "mount") {
			t.Errorf("something was mounted: %s", p)
		}
	}
	release, err := w.engine.locks.acquire(ctx, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := w.engine.Stats(ctx, space, "a"); err != nil || s.Filesystem != nil || s.Unknown == "" {
		t.Errorf("busy: %+v, %v", s, err)
	}
	release()
	w.made("raw", "none")
	if s, err := w.engine.Stats(ctx, space, "raw"); err != nil || s.Filesystem != nil || !strings.Contains(s.Unknown, "no filesystem") {
		t.Errorf("raw: %+v, %v", s, err)
	}
}

// TestIOIsSummedOverOpenings: the sum of all volumes never falls, whatever is
// detached, and a restart counts nothing twice.
func TestIOIsSummedOverOpenings(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	sum := func() int64 {
		t.Helper()
		u, err := w.engine.InUse(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return u.IO.WriteBytes
	}
	for i := range 3 {
		name := fmt.Sprint("v", i)
		v := w.attached(name, "ext4")
		w.fill(v, 4096)
		if i == 1 {
			sum() // asked in between or not, it is counted once
		}
		if err := detachOp(name, "at-"+name).do(w); err != nil {
			t.Fatal(err)
		}
		if n := sum(); n != int64(i+1)*4096 {
			t.Fatalf("%d bytes after %d volumes", n, i+1)
		}
	}
	v := w.attached("last", "ext4")
	w.fill(v, 4096)
	u, err := w.engine.InUse(ctx)
	if err != nil || u.Mounted != 1 || u.Usage.Total != 64<<20 || u.IO.WriteBytes != 4*4096 {
		t.Errorf("%+v, %v", u, err)
	}
	w.restart(false)
	if n := sum(); n != 0 {
		t.Errorf("%d bytes counted again after a restart", n)
	}
	w.fill(v, 8192)
	if n := sum(); n != 8192 {
		t.Errorf("%d bytes after a restart and a write of 8192", n)
	}
}
