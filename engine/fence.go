package engine

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// ForceDetach takes a volume away from a holder that does not let go. It returns
// when the holder provably cannot write to the volume any more and the volume can
// be attached elsewhere; otherwise ErrCannotFence, with the reason. Each way is
// taken only where the one before did not do:
//
//  1. an ordinary detach: nothing is lost; of a virtual machine with an agent that
//     does not let go, then: what was written is flushed if the agent answers, and the
//     device is taken away under whoever uses it;
//  2. the filesystem is flushed and shut down, and the image cut off from the
//     device: the sandbox lives on, its open files answer EIO. What it had written
//     by then is kept. Where a worker serves the device and none can be started, what
//     had not reached the one before is lost;
//  3. of what a worker serves, that is ended: it is the only process that has the
//     image. A virtual machine lives on, and its disk fails every request until it is
//     unplugged; see releaseServed;
//  4. where the filesystem or the pool cannot (btrfs; a pool without reflinks; a
//     virtual machine that has the image itself), the
//     sandbox is ended and proven dead, then an ordinary detach. A target that is
//     no sandbox (a directory of the host) is refused, and nothing has changed.
//
// A step that hangs in the sandbox is answered by ending the sandbox; while one
// hangs in the device, ErrCannotFence, and nothing is thrown away.
func (e *Engine) ForceDetach(ctx context.Context, workspace, name, id, actor string) (Attachment, error) {
	return do(ctx, e, func(ctx context.Context) (Attachment, error) {
		v, release, err := e.lockForced(ctx, workspace, name, id)
		if err != nil {
			return Attachment{}, err
		}
		defer release()
		return e.detach(ctx, v, id, actor, e.expel)
	})
}

// Fence is what a detach by force had to do.
type Fence string

const (
	FencedNothing    Fence = ""           // the holder let go, or its guest's agent took the volume out
	FencedFilesystem Fence = "filesystem" // it was shut down
	FencedWorker     Fence = "worker"     // the holder's way to it was ended
	FencedSandbox    Fence = "sandbox"    // it was ended
)

// makeWay ends the attachments that are in the way of a forced one.
func (e *Engine) makeWay(ctx context.Context, v *Volume, r AttachVolume) error {
	if !r.Force {
		return nil
	}
	for {
		a := v.inTheWay(r)
		if a == nil {
			return nil
		}
		if _, err := e.expel(ctx, v, a.ID); err != nil {
			return e.detachError(*v, a.ID, err)
		}
	}
}

// expel detaches by force: ordinarily if that does, else as releaseByForce.
func (e *Engine) expel(ctx context.Context, v *Volume, id string) (Fence, error) {
	e.count(countForced)
	fence, err := e.releaseAs(ctx, v, id)
	switch {
	case err == nil, lostWrite(err), v.attachment(id) == nil:
		return fence, err
	case hangs(err) != nil:
		if err := e.unhang(ctx, v.ID, id); err != nil {
			return "", err
		}
		now, ok := e.catalog.get(v.ID)
		if !ok {
			return "", fmt.Errorf("volume %s: %w", v.ID, ErrNotFound)
		}
		if *v = now.clone(); v.attachment(id) == nil {
			return "", nil
		}
	case v.attachment(id).Forced:
		return "", err // that was tried
	case errors.Is(err, errUnserved) && ctx.Err() == nil: // nobody takes what it still has
	case isSocket(v.attachment(id).Kind) && ctx.Err() == nil: // its worker may be what does not answer
	case !errors.Is(err, blockdev.ErrBusy):
		return "", err
	}
	return e.releaseByForce(ctx, v, id)
}

// releaseByForce is 2 to 4 of ForceDetach.
func (e *Engine) releaseByForce(ctx context.Context, v *Volume, id string) (Fence, error) {
	if err := e.beginDetaching(ctx, v, id); err != nil {
		return "", err
	}
	a := *v.attachment(id)
	if isSocket(a.Kind) {
		return e.releaseServed(ctx, v, id)
	}
	fence, did, err := e.takeOut(ctx, v, a)
	if errors.Is(err, errors.ErrUnsupported) {
		return e.endSandbox(ctx, v, id)
	}
	if err != nil {
		return "", e.stayForced(ctx, v, id, err)
	}
	return fence, e.forget(ctx, v, id, fmt.Sprintf("Detached from %s by force%s", a.Holder, did))
}

// takeOut takes a volume, which no worker serves, out of a sandbox that lives on; did
// says how. errors.ErrUnsupported where that cannot be.
func (e *Engine) takeOut(ctx context.Context, v *Volume, a Attachment) (fence Fence, did string, err error) {
	err = e.lift(ctx, *v, a)
	if err != nil && errors.Is(e.keepServed(ctx, *v), errUnserved) {
		err = nil // they go with the device
	}
	switch {
	case err != nil:
	case e.isRaw(a.Target): // there is no filesystem of ours to shut down, and what has the image open goes on with it
		err = e.pullOut(ctx, *v, a)
	case a.ReadOnly && len(v.Attachments) > 1:
		// A reader among others: its device takes no writes from anybody.
		err = e.leaveSandbox(ctx, *v, a, true)
	case a.Forced || e.severable(ctx, *v):
		return FencedFilesystem, ": the filesystem was shut down", e.cutOff(ctx, v, a.ID)
	default:
		err = errors.ErrUnsupported
	}
	return FencedNothing, "", err
}

// severable asks the pool whether the image can be cut off from its device.
func (e *Engine) severable(ctx context.Context, v Volume) bool {
	pool, ok := e.o.Pool.(blockdev.Severer)
	if !ok {
		return false
	}
	err := e.step(ctx, v.ID, stepSever, func(ctx context.Context) error { return pool.CanSever(ctx, v.ID) })
	return err == nil
}

// cutOff shuts the filesystem down and separates the image from whoever still has
// it. errors.ErrUnsupported when nothing could be done and nothing was.
func (e *Engine) cutOff(ctx context.Context, v *Volume, id string) error {
	a := *v.attachment(id)
	if !a.Forced { // from here on it is not flushed any more: that would report the loss of what is lost on purpose
		v.attachment(id).Forced = true
		if err := e.commitFreeing(ctx, v.clone()); err != nil {
			return err
		}
	}
	switch err := e.keepServed(ctx, *v); {
	case errors.Is(err, errUnserved):
		return e.cutOffUnserved(ctx, *v, a, err)
	case err != nil:
		return err
	}
	if a.Forced { // an earlier try may have come as far as that
		if severed, err := e.severed(ctx, *v); err != nil {
			return err
		} else if severed {
			e.forgetEndpoint(v.ID) // what a step that hung has ended
			return e.leaveDead(ctx, *v, a, "")
		}
	}
	err := e.shutDown(ctx, *v)
	if errors.Is(err, errors.ErrUnsupported) {
		v.attachment(id).Forced = false
		return errors.Join(err, e.commitFreeing(ctx, v.clone()))
	}
	if err != nil {
		return err
	}
	e.count(countShutdown)
	if err := e.leaveSandbox(ctx, *v, a, true); err != nil {
		if !errors.Is(err, blockdev.ErrBusy) {
			return err
		}
		// The sandbox hinders it, by a mount of its own upon it say. What it keeps is dead.
		e.o.Log.Warn("a shut down volume could not be unmounted in its sandbox", "volume", v.ID, "attachment", id, "err", err)
	}
	held, err := e.letGo(ctx, *v, a.ReadOnly)
	if err != nil || !held {
		return err
	}
	how := stepSever
	if overWorker(e.endpointNow(v.ID)) {
		how = stepEndWorker
	}
	_, err = e.sever(ctx, *v, how)
	return err
}

// sever cuts the image off from its opening: by stepSever, or by stepEndWorker where a
// worker serves it. flushFailed: not all that one had is durable, which is as after a
// power cut, and was told to whoever flushed.
func (e *Engine) sever(ctx context.Context, v Volume, how string) (flushFailed bool, err error) {
	e.dismissKeeper(v.ID)
	pool := e.o.Pool.(blockdev.Severer) //nolint:forcetypeassert // severable has seen it, before or in an earlier life
	err = e.step(ctx, v.ID, how, func(ctx context.Context) error { return pool.Sever(ctx, v.ID) })
	if how == stepEndWorker && errors.Is(err, blockdev.ErrFailed) {
		e.o.Log.Error("a flush failed of a volume that was taken away by force", "volume", v.ID, "workspace", v.Workspace, "err", err)
		flushFailed, err = true, nil
	}
	switch {
	case err == nil:
		e.count(countSevered)
		e.forgetEndpoint(v.ID)
	case overWorker(e.endpointNow(v.ID)): // the next try needs the device
		e.guardDevice(v.ID)
	}
	return flushFailed, err
}

// shutDown flushes and shuts the filesystem down; one that cannot be flushed any
// more loses what is not written.
func (e *Engine) shutDown(ctx context.Context, v Volume) error {
	err := e.step(ctx, v.ID, stepShutdown, func(ctx context.Context) error { return e.o.Stage.Shutdown(ctx, v.ID, true) })
	if err == nil || errors.Is(err, errors.ErrUnsupported) || hangs(err) != nil {
		return err
	}
	e.o.Log.Warn("a filesystem that is shut down could not be flushed", "volume", v.ID, "err", err)
	return e.step(ctx, v.ID, stepShutdown, func(ctx context.Context) error { return e.o.Stage.Shutdown(ctx, v.ID, false) })
}

// letGo lets go of the shut down filesystem and its device. held: somebody else
// does not.
func (e *Engine) letGo(ctx context.Context, v Volume, readOnly bool) (held bool, err error) {
	err = e.step(ctx, v.ID, stepAbandon, func(ctx context.Context) error {
		info, err := e.o.Pool.Stat(ctx, v.ID)
		if err != nil || !info.Open {
			return err
		}
		endpoint, err := e.open(ctx, v.ID, mountWant(readOnly))
		if err != nil {
			return err
		}
		return e.o.Stage.Abandon(ctx, v.ID, endpoint.Path)
	})
	if errors.Is(err, blockdev.ErrBusy) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, e.closeDevice(ctx, v)
}

// endSandbox proves the sandbox dead and then detaches ordinarily.
func (e *Engine) endSandbox(ctx context.Context, v *Volume, id string) (Fence, error) {
	a := *v.attachment(id)
	attacher := e.o.Attachers[a.Target.Type]
	if attacher == nil {
		return "", e.stayForced(ctx, v, id, fmt.Errorf("attachments of type %q are not configured", a.Target.Type))
	}
	err := e.step(ctx, v.ID, stepKill, func(ctx context.Context) error {
		request, err := e.request(ctx, *v, a)
		if err != nil {
			return err
		}
		return attacher.Fence(ctx, request)
	})
	if errors.Is(err, attach.ErrCannotFence) {
		// Nothing was done: the holder has it as before.
		before := e.stay(ctx, v, id, Attached, fmt.Errorf("%w: it is in use, and neither can its filesystem be shut down here: %w", blockdev.ErrBusy, err))
		return "", &Problem{Kind: ErrCannotFence, Message: fmt.Sprintf(
			"volume %q is in use, and nothing would prove that its holder does not write any more: %s", v.Name, innermost(err)), Err: before}
	}
	if err != nil {
		return "", e.stayForced(ctx, v, id, err)
	}
	e.count(countKilled)
	e.happened(v, "detach", "%s was ended by force", a.Holder)
	return FencedSandbox, e.release(ctx, v, id)
}

// stayForced is stay for what began by force.
func (e *Engine) stayForced(ctx context.Context, v *Volume, id string, cause error) error {
	cause = e.stay(ctx, v, id, Detaching, cause)
	if lostWrite(cause) || hangs(cause) != nil {
		return cause
	}
	return &Problem{Kind: ErrCannotFence, Message: fmt.Sprintf("volume %q is not proven to be out of its holder's reach yet: that is tried again", v.Name), Err: cause}
}

// lockForced is lockNamed for who comes with force: it waits also for the end of a
// step that hangs.
func (e *Engine) lockForced(ctx context.Context, workspace, name string, ids ...string) (Volume, func(), error) {
	v, release, err := e.lockNamed(ctx, workspace, name)
	if hangs(err) == nil {
		return v, release, err
	}
	known, err := e.Volume(workspace, name)
	if err != nil {
		return Volume{}, nil, err
	}
	for _, a := range known.Attachments {
		if len(ids) == 0 || a.ID == ids[0] {
			if err := e.unhang(ctx, known.ID, a.ID); err != nil {
				return Volume{}, nil, e.detachError(known, a.ID, err)
			}
		}
	}
	return e.lockNamed(ctx, workspace, name)
}

// unhang waits for the end of a step that hangs. One that hangs in the sandbox (a
// filesystem that the sandbox serves itself, say) is freed by ending the sandbox,
// where that is one. Of one that hangs in the device nothing is thrown away: what
// is under way could still be written, whatever is done.
func (e *Engine) unhang(ctx context.Context, id blockdev.ID, attachment string) error {
	h := e.locks.hung(id)
	if h == nil {
		return nil
	}
	if h.what == stepAttach || h.what == stepDetach || h.what == stepProbe {
		e.endBeside(ctx, id, attachment)
	}
	bounded, cancel := context.WithTimeout(ctx, e.o.StepLimit)
	defer cancel()
	if e.locks.calm(bounded, id) {
		return nil
	}
	return &Problem{Kind: ErrCannotFence, Message: "the volume cannot be fenced: " + h.Error() + ", and until then it may still be written; it goes on by itself when that ends", Err: h}
}

// endBeside ends the sandbox of an attachment while a step hangs in it. Nothing
// waits for that: it may hang as well.
func (e *Engine) endBeside(ctx context.Context, id blockdev.ID, attachment string) {
	v, ok := e.catalog.get(id)
	if !ok {
		return
	}
	v = v.clone()
	a := v.attachment(attachment)
	if a == nil || isSocket(a.Kind) || e.o.Attachers[a.Target.Type] == nil { // what a worker serves ends with the worker
		return
	}
	go func() {
		err := e.o.Attachers[a.Target.Type].Fence(ctx, attach.Request{Volume: id, Target: a.Target, MountPath: a.MountPath, ReadOnly: a.ReadOnly})
		if err != nil {
			e.o.Log.Warn("a sandbox in which a step hangs could not be ended", "volume", id, "attachment", attachment, "err", err)
			return
		}
		e.count(countKilled)
	}()
}
