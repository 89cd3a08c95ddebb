package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// Detach returns when the volume is no longer visible in the sandbox, what was
// written is durable and the device is released. While the sandbox has files
// open in it, ErrConflict, and nothing has changed. ErrHanging when a step does not
// end in its time: the record says detaching, and it goes on by itself.
func (e *Engine) Detach(ctx context.Context, workspace, name, id, actor string) (Attachment, error) {
	return do(ctx, e, func(ctx context.Context) (Attachment, error) {
		v, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Attachment{}, err
		}
		defer release()
		return e.detach(ctx, v, id, actor, e.releaseAs)
	})
}

// detach takes an attachment away by one of the ways to do that.
func (e *Engine) detach(ctx context.Context, v Volume, id, actor string, way func(context.Context, *Volume, string) (Fence, error)) (Attachment, error) {
	v = v.clone()
	a := v.attachment(id)
	if a == nil {
		return Attachment{}, problem(ErrNotFound, "", "volume %q has no attachment %.40q", v.Name, id)
	}
	gone := *a
	v.UpdatedBy = actor
	fence, err := way(ctx, &v, id)
	if err != nil {
		return Attachment{}, e.detachError(v, id, err)
	}
	gone.Fenced = fence
	if v.hasPendingGrowth(e) {
		e.watch(v.ID)
		e.wake()
	}
	gone.Phase, gone.Failure, gone.Deadline, gone.RetryAt = Detaching, "", time.Time{}, time.Time{}
	return gone, nil
}

func (v Volume) hasPendingGrowth(e *Engine) bool {
	return len(v.Attachments) == 0 && (v.CheckFirst || v.growsTainted() || e.pendingReason(v.ID) != "")
}

// release takes an attachment away: unmounted in the guest where an agent does that,
// out of the sandbox, and with the last one
// flush, unmount and close. On ErrBusy in the sandbox it stays attached (in a
// virtual machine that does not say that it is in use: detaching, for the guest was
// asked and may answer late); when
// only the host still holds the device it stays detaching, and Run tries again.
// What was begun by force goes on by force.
func (e *Engine) release(ctx context.Context, v *Volume, id string) error {
	_, err := e.releaseAs(ctx, v, id)
	return err
}

// releaseAs is release, and tells what force has done.
func (e *Engine) releaseAs(ctx context.Context, v *Volume, id string) (Fence, error) {
	if v.attachment(id).Forced {
		return e.releaseByForce(ctx, v, id)
	}
	return FencedNothing, e.releaseGently(ctx, v, id)
}

func (e *Engine) releaseGently(ctx context.Context, v *Volume, id string) error {
	a := v.attachment(id)
	before, fresh := a.Phase, a.Phase == Attaching
	if fresh { // its caller is told that it failed: it must not come true later
		before = Detaching
	}
	if err := e.beginDetaching(ctx, v, id); err != nil {
		return err
	}
	if err := e.keepServed(ctx, *v); err != nil { // to leave, it is written to
		return e.stay(ctx, v, id, Detaching, err)
	}
	err := e.lift(ctx, *v, *a)
	if err == nil {
		if err = e.leaveGuest(ctx, *v, *a, false); fresh && hangs(err) == nil {
			err = nil // nobody was promised anything of what it holds
		}
	}
	if err == nil {
		err = e.leaveSandbox(ctx, *v, *a, false)
	}
	if err != nil {
		if hangs(err) != nil || e.isRaw(a.Target) && !errors.Is(err, attach.ErrInUse) { // a guest that was asked may still let go
			before = Detaching
		}
		if before == Attached && !a.Limits.None() { // it goes on being used
			err = errors.Join(err, e.limit(ctx, *v, *a, a.Limits))
		}
		return e.stay(ctx, v, id, before, err)
	}
	if len(v.Attachments) == 1 {
		if err := e.closeDevice(ctx, *v); err != nil {
			return e.stay(ctx, v, id, Detaching, err)
		}
	}
	return e.forget(ctx, v, id, fmt.Sprintf("Detached from %s", a.Holder))
}

// beginDetaching makes durable that an attachment is being taken away. A freeze
// ends first.
func (e *Engine) beginDetaching(ctx context.Context, v *Volume, id string) error {
	if err := e.thawFirst(ctx, v, "the volume is being detached"); err != nil {
		return err
	}
	a, now := v.attachment(id), e.now()
	if a.Phase != Detaching {
		a.Since = now
	}
	a.Phase, a.Deadline, a.RetryAt = Detaching, e.deadline(now), time.Time{}
	return e.commitFreeing(ctx, v.clone())
}

// leaveSandbox takes the volume out of the sandbox; lazily: also while files of it
// are open.
func (e *Engine) leaveSandbox(ctx context.Context, v Volume, a Attachment, lazy bool) error {
	attacher := e.o.Attachers[a.Target.Type]
	if attacher == nil {
		return nil
	}
	return e.step(ctx, v.ID, stepDetach, func(ctx context.Context) error {
		request, err := e.request(ctx, v, a)
		if err != nil {
			if !e.isRaw(a.Target) || a.Kind != "" && !isSocket(a.Kind) || lostWrite(err) || ctx.Err() != nil {
				return err
			}
			// A worker that cannot be started keeps no volume where it is.
			e.o.Log.Warn("a volume is detached that cannot be opened", "volume", v.ID, "attachment", a.ID, "err", err)
			request = v.withoutOpening(a)
		}
		request.Lazy = lazy
		return attacher.Detach(ctx, request)
	})
}

// withoutOpening is an attachment in an Attacher's words whose endpoint is not there.
func (v Volume) withoutOpening(a Attachment) attach.Request {
	return attach.Request{
		Volume: v.ID, Endpoint: blockdev.Endpoint{Kind: a.Kind, ReadOnly: a.ReadOnly}, Target: a.Target, MountPath: a.MountPath,
		ReadOnly: a.ReadOnly, Filesystem: v.Filesystem, Others: v.others(a),
	}
}

func (e *Engine) closeDevice(ctx context.Context, v Volume) error {
	return e.step(ctx, v.ID, stepClose, func(ctx context.Context) error { return e.deactivate(ctx, v) })
}

// forget removes an attachment from the record, once nothing of it is left.
func (e *Engine) forget(ctx context.Context, v *Volume, id, message string) error {
	a := *v.attachment(id)
	changed := v.clone()
	changed.Attachments = slices.DeleteFunc(changed.Attachments, func(b Attachment) bool { return b.ID == id })
	changed.UpdatedAt = e.now()
	e.happened(&changed, "detach", "%s", message)
	saved, err := stepOf(ctx, e, v.ID, stepDescribe, func(ctx context.Context) (Volume, error) {
		c := changed.clone()
		if c.orphaned() { // it goes, in the same write
			return c, e.end(ctx, &c)
		}
		return c, e.saveFreeing(ctx, &c)
	})
	if err != nil {
		return err
	}
	*v = saved
	e.unguard(*v, a.Target)
	if len(v.Attachments) == 0 {
		e.rest(ctx, *v)
		return nil
	}
	return e.limitAgain(ctx, *v) // of readers that shared a cgroup with this one
}

// stay records how far a release, or an attachment that is made again, came, why
// it went no further, and what is next.
func (e *Engine) stay(ctx context.Context, v *Volume, id string, phase AttachmentPhase, cause error) error {
	changed := v.clone()
	a, now := changed.attachment(id), e.now()
	if a.Phase != phase {
		a.Since = now
	}
	a.Phase, a.Deadline, a.RetryAt = phase, time.Time{}, time.Time{}
	h := hangs(cause)
	switch {
	case h != nil:
		a.Failure = h.Error() + ": it goes on as soon as that ends"
	case (phase != Detaching || e.isRaw(a.Target)) && errors.Is(cause, blockdev.ErrBusy):
		a.Failure = innermost(cause) // which processes of the sandbox: for who has to close their files
	case phase != Detaching:
		a.Failure = "making it visible again failed and is tried again: the operator's log has the reason"
	default:
		a.Failure = "detaching is tried again: the operator's log has the reason"
	}
	switch {
	case h != nil: // watched again when it ends
	case phase == Detaching || !errors.Is(cause, blockdev.ErrBusy):
		a.RetryAt = e.nextTry(a.Since, now)
		e.watchFrom(v.ID, a.RetryAt)
	default:
		e.watch(v.ID)
	}
	if err := e.commitFreeing(ctx, changed); err != nil {
		return errors.Join(cause, err)
	}
	*v = changed
	return cause
}

// lastTry is the longest time between two tries to end an attachment.
const lastTry = 30 * time.Second

// nextTry doubles the time that a phase has lasted, within bounds.
func (e *Engine) nextTry(since, now time.Time) time.Time {
	return now.Add(min(max(now.Sub(since), e.o.ProbeInterval), lastTry)).Truncate(time.Millisecond)
}

func (e *Engine) detachError(v Volume, id string, err error) error {
	switch {
	case isProblem(err):
		return firstProblem(err)
	case hangs(err) != nil:
		return hangingProblem(v, err)
	case errors.Is(err, errUnserved):
		return &Problem{Kind: ErrHanging, Message: fmt.Sprintf("volume %q waits: the worker that serves it has ended, and the next one cannot be started yet. Detaching goes on by itself; by force it ends at once, without what was not written yet", v.Name), Err: err}
	}
	if !errors.Is(err, blockdev.ErrBusy) {
		return userError(err)
	}
	switch a := v.attachment(id); {
	case a != nil && a.Phase == Detaching && e.isRaw(a.Target):
		return &Problem{Kind: ErrConflict, Message: fmt.Sprintf("volume %q is still in the virtual machine: %s. Detaching goes on by itself", v.Name, innermost(err)), Err: err}
	case a != nil && a.Phase == Detaching:
		return &Problem{Kind: ErrConflict, Message: fmt.Sprintf("volume %q has left the sandbox, but something still holds it: detaching is tried again until it lets go", v.Name), Err: err}
	}
	return &Problem{Kind: ErrConflict, Message: fmt.Sprintf("volume %q is in use in the sandbox: close its files there first (%s)", v.Name, innermost(err)), Err: err}
}
