package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// Freeze is what a volume's record says before its filesystem is frozen: a
// daemon that starts thaws whatever has one.
type Freeze struct {
	Until time.Time `json:"until"`
	By    string    `json:"by,omitempty"`
}

// How long a freeze may last: without a wish, and at most unless Options say
// otherwise. Everything that writes in the sandbox stands still for as long.
const (
	DefaultFreeze    = 10 * time.Second
	DefaultMaxFreeze = 60 * time.Second
	thawRetry        = time.Second
)

// frozenAt reports whether the volume is frozen at a time. A deadline that has
// passed counts as thawed, whatever the record still says.
func (v Volume) frozenAt(now time.Time) bool { return v.Frozen != nil && now.Before(v.Frozen.Until) }

// frozen is one freeze that this process made. Its end needs no lock of the
// volume: nothing that waits for the frozen filesystem can delay its thaw.
type frozen struct {
	mu    sync.Mutex
	ended bool
	timer *time.Timer
}

// freezes are the freezes that are not known to have ended.
type freezes struct {
	mu   sync.Mutex
	held map[blockdev.ID]*frozen
}

func (f *freezes) get(id blockdev.ID) *frozen {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.held[id]
}

func (f *freezes) set(id blockdev.ID, one *frozen) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if one == nil {
		delete(f.held, id)
		return
	}
	f.held[id] = one
}

func (f *freezes) ids() []blockdev.ID {
	f.mu.Lock()
	defer f.mu.Unlock()
	ids := make([]blockdev.ID, 0, len(f.held))
	for id := range f.held {
		ids = append(ids, id)
	}
	return ids
}

// FreezeVolume holds all writes to an attached volume until the deadline that it
// tells, or ThawVolume. Reads go on. What was written before is durable on
// return. The wish is durable before the filesystem is frozen, so that a daemon
// that dies in between is followed by one that thaws.
func (e *Engine) FreezeVolume(ctx context.Context, workspace, name string, timeout time.Duration, actor string) (Freeze, error) {
	if timeout == 0 {
		timeout = min(DefaultFreeze, e.o.MaxFreeze)
	}
	if timeout < 0 || timeout > e.o.MaxFreeze {
		return Freeze{}, problem(ErrInvalid, "timeout", "must be more than 0s and at most %s", e.o.MaxFreeze)
	}
	return do(ctx, e, func(ctx context.Context) (Freeze, error) {
		v, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Freeze{}, err
		}
		defer release()
		if v, err = e.current(ctx, v); err != nil {
			return Freeze{}, err
		}
		at, err := e.writable(ctx, v, "freeze")
		if err != nil {
			return Freeze{}, userError(err)
		}
		if err := e.flush(ctx, v, at); err != nil {
			return Freeze{}, userError(err)
		}
		v = v.clone()
		v.Frozen = &Freeze{Until: e.now().Add(timeout), By: actor}
		e.happened(&v, "freeze", "Frozen until %s", v.Frozen.Until.Format(time.RFC3339))
		if err := e.commit(ctx, v); err != nil {
			return Freeze{}, userError(err)
		}
		if err := e.hold(ctx, at, timeout); err != nil {
			e.clearFreeze(ctx, &v, "Freezing failed")
			return Freeze{}, freezeError(v, err)
		}
		return *v.Frozen, nil
	})
}

// flush writes what is dirty, at full speed, before a freeze: so that this holds
// the writers for as short as can be.
func (e *Engine) flush(ctx context.Context, v Volume, at mounted) error {
	err := e.lift(ctx, v, v.Attachments[0])
	if err == nil {
		err = at.sync(ctx)
	}
	limited := e.limitAgain(ctx, v)
	if limited != nil {
		limited = e.limitAgain(ctx, v)
	}
	return errors.Join(err, limited)
}

// writable finds where a volume is mounted writable, or says why it is not.
func (e *Engine) writable(ctx context.Context, v Volume, what string) (mounted, error) {
	if err := e.mayWork(v, what); err != nil {
		return mounted{}, err
	}
	switch {
	case v.frozenAt(e.o.Now()):
		return mounted{}, frozenProblem(v)
	case len(v.Attachments) == 0:
		return mounted{}, problem(ErrConflict, "", "volume %q is detached: nothing writes to it", v.Name)
	case v.Attachments[0].ReadOnly:
		return mounted{}, problem(ErrConflict, "", "volume %q is attached read-only: nothing writes to it", v.Name)
	case v.Attachments[0].Phase != Attached:
		return mounted{}, problem(ErrConflict, "", "volume %q is %s: try again", v.Name, v.Attachments[0].Phase)
	}
	return e.mountOf(ctx, v)
}

// hostMay refuses what needs the host to mount the volume, where it must not.
func (v Volume) hostMay(what string) error {
	switch {
	case v.Phase != Ready || v.Failure != "":
		return notReady(v)
	case v.moving():
		return movedProblem(v)
	case v.Filesystem == filesystem.None:
		return problem(ErrUnsupported, "", "volume %q has no filesystem to %s", v.Name, what)
	case v.Tainted:
		return problem(ErrUnsupported, "", "volume %q was writable as raw blocks, in a virtual machine or by a client of an export: this host never mounts it again, so it cannot %s it. Do that there", v.Name, what)
	}
	return nil
}

func frozenProblem(v Volume) error {
	return problem(ErrConflict, "", "volume %q is frozen until %s: thaw it first", v.Name, v.Frozen.Until.Format(time.RFC3339))
}

func freezeError(v Volume, err error) error {
	if errors.Is(err, filesystem.ErrFrozen) {
		return &Problem{Kind: ErrConflict, Message: fmt.Sprintf("something else on the host has frozen volume %q", v.Name), Err: err}
	}
	return userError(err)
}

// hold freezes, with the thaw arranged first. A freeze that takes longer than its
// time-out ends as soon as it begins.
func (e *Engine) hold(ctx context.Context, at mounted, timeout time.Duration) error {
	id, f := at.v.ID, &frozen{}
	f.mu.Lock()
	e.freezes.set(id, f) // before the timer: it looks here
	f.timer = time.AfterFunc(timeout, func() { e.expire(id, f) })
	err := at.freeze(ctx, timeout)
	f.mu.Unlock()
	if err == nil {
		return nil
	}
	if errors.Is(err, filesystem.ErrFrozen) { // by somebody else, who will thaw it
		f.end()
		e.freezes.set(id, nil)
		return err
	}
	return errors.Join(err, e.letRun(e.ctx, id))
}

// end marks a freeze as over; false if it was.
func (f *frozen) end() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.ended
	f.ended = true
	f.timer.Stop()
	return !was
}

// letRun thaws a volume that this process froze; any other is success. A guest that
// does not answer is no hindrance: its agent thaws at the freeze's end.
func (e *Engine) letRun(ctx context.Context, id blockdev.ID) error {
	return e.endFreeze(ctx, id, false)
}

// endFreeze is letRun; must: a guest has to say that it runs again.
func (e *Engine) endFreeze(ctx context.Context, id blockdev.ID, must bool) error {
	f := e.freezes.get(id)
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return nil
	}
	if err := e.thaw(ctx, id, must); err != nil {
		return err
	}
	f.ended = true
	f.timer.Stop()
	e.freezes.set(id, nil)
	return nil
}

// thaw asks the kernel, whatever is known here, or the guest; that one must answer, or
// need not.
func (e *Engine) thaw(ctx context.Context, id blockdev.ID, must bool) error {
	if v, ok := e.catalog.get(id); ok {
		for _, a := range v.Attachments {
			g := e.agentOf(a.Target)
			if g == nil {
				continue
			}
			err := e.thawInside(ctx, v, a, g)
			if err != nil && !must {
				e.o.Log.Warn("a guest was asked to thaw and does not answer: its agent does so by itself", "volume", id, "err", err)
				err = nil
			}
			return err
		}
	}
	dir, err := e.o.Stage.Mounted(ctx, id)
	if err != nil || dir == "" {
		return err
	}
	return e.o.Filesystems.Thaw(dir)
}

// expire thaws at the deadline, without waiting for the volume's lock, and then
// brings the record up to date. A thaw that fails is tried again for ever: a
// frozen filesystem holds its sandbox.
func (e *Engine) expire(id blockdev.ID, f *frozen) {
	if e.ctx.Err() != nil || e.freezes.get(id) != f {
		return
	}
	if err := e.letRun(e.ctx, id); err != nil {
		e.o.Log.Error("a frozen volume could not be thawed: it is tried again", "volume", id, "err", err)
		f.mu.Lock()
		f.timer.Reset(thawRetry)
		f.mu.Unlock()
		return
	}
	_, err := do(e.ctx, e, func(ctx context.Context) (struct{}, error) {
		release, err := e.locks.acquire(ctx, id)
		if err != nil {
			return struct{}{}, err
		}
		defer release()
		if v, ok := e.catalog.get(id); ok && v.Frozen != nil && e.freezes.get(id) == nil {
			v = v.clone()
			e.clearFreeze(ctx, &v, "Thawed at its deadline")
		}
		return struct{}{}, nil
	})
	if err != nil && !errors.Is(err, ErrUnavailable) {
		e.o.Log.Warn("a thawed volume's record is behind", "volume", id, "err", err)
	}
}

// ThawVolume ends a freeze; was is false when there was none any more.
func (e *Engine) ThawVolume(ctx context.Context, workspace, name, actor string) (was bool, err error) {
	return do(ctx, e, func(ctx context.Context) (bool, error) {
		v, err := e.Volume(workspace, name)
		if err != nil {
			return false, err
		}
		// Before the lock: who holds that may wait for the filesystem.
		was := e.freezes.get(v.ID) != nil
		if err := e.endFreeze(ctx, v.ID, true); err != nil {
			return false, userError(err)
		}
		release, err := e.locks.acquire(ctx, v.ID)
		if err != nil {
			return false, err
		}
		defer release()
		now, ok := e.catalog.get(v.ID)
		if ok && now.Frozen != nil && e.freezes.get(v.ID) == nil {
			now = now.clone()
			now.UpdatedBy = actor
			e.clearFreeze(ctx, &now, "Thawed")
		}
		return was, nil
	})
}

// clearFreeze records that a volume runs again. A record that cannot follow is
// no harm: its deadline passes.
func (e *Engine) clearFreeze(ctx context.Context, v *Volume, message string) {
	v.Frozen = nil
	e.happened(v, "thaw", "%s", message)
	if err := e.commitFreeing(ctx, *v); err != nil {
		e.o.Log.Warn("a thawed volume's record is behind", "volume", v.ID, "workspace", v.Workspace, "err", err)
		if lostWrite(err) {
			_ = e.inspect(err)
		}
	}
	e.watch(v.ID) // growth may have waited for this
	e.wake()
}

// thawFirst ends a freeze before a step that would wait for it: a detach, the end
// of a sandbox, an unmount. The caller records it with what it does. It asks the
// kernel even when only the record remembers.
func (e *Engine) thawFirst(ctx context.Context, v *Volume, why string) error {
	if v.Frozen == nil && e.freezes.get(v.ID) == nil {
		return nil
	}
	err := e.letRun(ctx, v.ID)
	if err == nil && v.Frozen != nil {
		err = e.thaw(ctx, v.ID, false)
	}
	if err != nil {
		return err
	}
	v.Frozen = nil
	e.happened(v, "thaw", "Thawed: %s", why)
	return nil
}

// thawFound ends the freeze that an earlier process left: nobody watched over it.
func (e *Engine) thawFound(ctx context.Context, v *Volume) error {
	if v.Frozen == nil {
		return nil
	}
	if err := e.thaw(ctx, v.ID, false); err != nil {
		return err
	}
	e.clearFreeze(ctx, v, "Thawed: the daemon was restarted")
	return nil
}

// thawAll ends every freeze of this process, for its own end.
func (e *Engine) thawAll(ctx context.Context) {
	for _, id := range e.freezes.ids() {
		if err := e.letRun(ctx, id); err != nil {
			e.o.Log.Error("a frozen volume could not be thawed: the next start does it", "volume", id, "err", err)
		}
	}
}
