package engine

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
)

// releaseServed takes away by force what a worker serves. The worker is the only process
// that has the image, so its end proves that nobody writes; a virtual machine goes on
// without the volume. What it has acknowledged is in the image. A reader among others
// loses what is its alone: the worker goes on for the others.
func (e *Engine) releaseServed(ctx context.Context, v *Volume, id string) (Fence, error) {
	a := *v.attachment(id)
	if len(v.Attachments) > 1 && !a.Forced {
		return e.releaseReader(ctx, v, a)
	}
	if e.agentOf(a.Target) != nil && !a.Forced {
		err := e.pullOut(ctx, *v, a)
		switch {
		case err == nil:
			return FencedNothing, e.forget(ctx, v, id, fmt.Sprintf("Detached from %s by force", a.Holder))
		case lostWrite(err), hangs(err) != nil, ctx.Err() != nil:
			return "", e.stayForced(ctx, v, id, err)
		}
	}
	if !a.Forced && !e.severable(ctx, *v) {
		return e.endSandbox(ctx, v, id)
	}
	return FencedWorker, e.endWorker(ctx, v, id)
}

// releaseReader ends a reader's own way to a volume that others read by the same worker.
// Where it has none of its own its sandbox is ended.
func (e *Engine) releaseReader(ctx context.Context, v *Volume, a Attachment) (Fence, error) {
	err := e.leaveSandbox(ctx, *v, a, true)
	switch {
	case err == nil:
		return FencedWorker, e.forget(ctx, v, a.ID, fmt.Sprintf("Detached from %s by force: its connections were ended, those of other readers go on", a.Holder))
	case errors.Is(err, blockdev.ErrBusy):
		return e.endSandbox(ctx, v, a.ID)
	}
	return "", e.stayForced(ctx, v, a.ID, err)
}

// endWorker ends the worker, and takes away what is left in the sandbox as far as that
// lets it go. That it is done by force is durable first: the image is not opened for this
// attachment again, whatever crashes.
func (e *Engine) endWorker(ctx context.Context, v *Volume, id string) error {
	a := v.attachment(id)
	if !a.Forced {
		a.Forced = true
		if err := e.commitFreeing(ctx, v.clone()); err != nil {
			return err
		}
	}
	flushFailed, err := e.sever(ctx, *v, stepEndWorker)
	if err != nil {
		return e.stayForced(ctx, v, id, err)
	}
	told := ""
	if flushFailed {
		told = ", whose last flush failed"
	}
	err = e.leaveFenced(ctx, *v, *v.attachment(id))
	switch {
	case hangs(err) != nil:
		return e.stayForced(ctx, v, id, err)
	case err != nil:
		e.o.Log.Warn("a device stays in its sandbox that leads nowhere any more", "volume", v.ID, "attachment", id, "err", err)
		told += "; the device that it leaves behind fails every request until it is unplugged"
	}
	return e.forget(ctx, v, id, fmt.Sprintf("Detached from %s by force: its worker was ended%s", a.Holder, told))
}

// leaveFenced takes out of a sandbox what it cannot use any more. The image is not
// opened for that.
func (e *Engine) leaveFenced(ctx context.Context, v Volume, a Attachment) error {
	attacher := e.o.Attachers[a.Target.Type]
	if attacher == nil {
		return nil
	}
	request := v.withoutOpening(a)
	request.Lazy = true
	return e.step(ctx, v.ID, stepDetach, func(ctx context.Context) error { return attacher.Detach(ctx, request) })
}
