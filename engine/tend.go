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

// Run repeats in the background what is to be retried (pending growth,
// detaching, probes of sandboxes) until ctx ends. A volume that takes its time
// holds no other one up.
func (e *Engine) Run(ctx context.Context) error {
	ticker := time.NewTicker(e.o.ProbeInterval)
	defer ticker.Stop()
	slots := make(chan struct{}, maxStepsAtOnce)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-e.kick:
		}
		if err := e.round(ctx, slots); err != nil {
			return err
		}
	}
}

// round looks at every volume whose time has come, several at a time.
func (e *Engine) round(ctx context.Context, slots chan struct{}) error {
	for _, v := range e.buried.all() {
		e.background(ctx, slots, v.ID, func(ctx context.Context) error { return e.remove(ctx, v) })
	}
	for _, s := range e.snapshots.allLeaving() {
		e.background(ctx, slots, s.ID, func(ctx context.Context) error { return e.removeSnapshot(ctx, s) })
	}
	for _, id := range e.attentive(false) {
		e.background(ctx, slots, id, func(ctx context.Context) error { return e.tendVolume(ctx, id, false) })
	}
	if err := e.inspect(e.forgetKeys(ctx)); err != nil && !errors.Is(err, ErrUnavailable) {
		e.complain("", err)
	}
	e.mu.Lock()
	failed := e.failed
	e.mu.Unlock()
	if failed != nil {
		return &Problem{Kind: ErrUnavailable, Message: "the server lost a write and is stopping", Err: failed}
	}
	return nil
}

// background does something to a volume unless its lock is taken: then whoever has
// it is looking after the volume.
func (e *Engine) background(ctx context.Context, slots chan struct{}, id blockdev.ID, do func(context.Context) error) {
	e.mu.Lock()
	stop := e.stopping || e.failed != nil
	if !stop {
		e.steps.Add(1)
	}
	e.mu.Unlock()
	if stop {
		return
	}
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		e.steps.Done()
		return
	}
	go func() {
		defer e.steps.Done()
		defer func() { <-slots }()
		release, free := e.locks.try(id)
		if !free {
			return
		}
		defer release()
		if err := e.inspect(do(e.ctx)); err != nil {
			e.complain(id, err)
		}
	}()
}

// complain logs what went wrong in the background, not every two seconds.
func (e *Engine) complain(id blockdev.ID, err error) {
	e.mu.Lock()
	said := e.complaint[id]
	e.complaint[id] = err.Error()
	e.mu.Unlock()
	if said != err.Error() {
		e.o.Log.Warn("background work failed: it is tried again", "volume", id, "err", err)
	}
}

// A volume that does not settle (a damaged filesystem, say) is tried again after
// a time that doubles: a checker that fails every two seconds helps nobody.
const (
	firstRetry = 5 * time.Second
	lastRetry  = 10 * time.Minute
)

type retry struct {
	at   time.Time
	wait time.Duration
}

func (e *Engine) due(id blockdev.ID) bool {
	now := e.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	return !now.Before(e.retries[id].at)
}

func (e *Engine) forgetRetry(id blockdev.ID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.retries, id)
}

func (e *Engine) postpone(id blockdev.ID) {
	now := e.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	wait := min(max(2*e.retries[id].wait, firstRetry), lastRetry)
	e.retries[id] = retry{now.Add(wait), wait}
}

// tend looks once, and now, at every volume that needs attention.
func (e *Engine) tend(ctx context.Context) error {
	var failures error
	for _, v := range e.buried.all() {
		if release, free := e.locks.try(v.ID); free {
			failures = errors.Join(failures, e.remove(ctx, v))
			release()
		}
	}
	for _, id := range e.attentive(true) {
		if release, free := e.locks.try(id); free {
			failures = errors.Join(failures, e.tendVolume(ctx, id, true))
			release()
		}
	}
	return errors.Join(failures, e.tendSnapshots(ctx), e.forgetKeys(ctx))
}

// attentive tells the volumes that need attention: all, or those whose time has come.
func (e *Engine) attentive(all bool) []blockdev.ID {
	now := e.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	var ids []blockdev.ID
	for id, at := range e.attention {
		if all || !at.After(now) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// tendVolume takes a volume on by what can be done now. Its lock is held.
func (e *Engine) tendVolume(ctx context.Context, id blockdev.ID, all bool) error {
	v, ok := e.catalog.get(id)
	if !ok {
		e.unwatch(id)
		return nil
	}
	v = v.clone()
	if err := e.tendAttachments(ctx, &v, all); err != nil {
		return fmt.Errorf("volume %s: %w", id, err)
	}
	if v.Move != nil && (all || e.due(id)) {
		if err := e.moveAlong(ctx, &v); err != nil {
			e.postpone(id)
			return fmt.Errorf("volume %s: move: %w", id, err)
		}
	}
	if err := e.tendRemote(ctx, &v); err != nil {
		return fmt.Errorf("volume %s: hydration: %w", id, err)
	}
	if err := e.flattenOn(ctx, v); err != nil {
		return fmt.Errorf("volume %s: flatten: %w", id, err)
	}
	if e.isUnflat(id) && len(v.Attachments) == 0 { // what else is to be done needs it flat
		return nil
	}
	if len(v.Attachments) > 0 {
		e.guard(v)
		e.watchFrom(id, e.nextLook(v))
		if e.pendingReason(id) == "" {
			return nil
		}
		e.watch(id)
	}
	if !e.due(id) {
		return nil
	}
	switch err := e.settle(ctx, &v); {
	case errors.Is(err, blockdev.ErrLayered):
		e.setPending(id, pendingFlat)
		return nil
	case err != nil:
		e.postpone(id)
		return fmt.Errorf("volume %s: %w", id, err)
	}
	if len(v.Attachments) == 0 && v.Move == nil {
		e.rest(ctx, v)
	}
	return nil
}

// lookTime is what one look at an attachment may cost of a long time, so that a
// thousand idle ones cost next to nothing: ends of sandboxes are told by sentries,
// a look only finds what none can tell.
const lookTime = 250 * time.Millisecond

// nextLook is when Run looks at a volume with attachments again.
func (e *Engine) nextLook(v Volume) time.Time {
	now := e.now()
	e.mu.Lock()
	next := now.Add(max(e.o.ProbeInterval, time.Duration(len(e.attention))*lookTime))
	e.mu.Unlock()
	for _, a := range v.Attachments {
		if !a.RetryAt.IsZero() && a.RetryAt.Before(next) {
			next = a.RetryAt
		}
	}
	return next
}

// tendAttachments takes each attachment on by one step; now: also those whose next
// try is later.
func (e *Engine) tendAttachments(ctx context.Context, v *Volume, now bool) error {
	var failures error
	for _, a := range slices.Clone(v.Attachments) {
		if !now && e.now().Before(a.RetryAt) {
			continue
		}
		if err := e.tendAttachment(ctx, v, a); err != nil {
			failures = errors.Join(failures, fmt.Errorf("attachment %s: %w", a.ID, err))
		}
	}
	return failures
}

func (e *Engine) tendAttachment(ctx context.Context, v *Volume, a Attachment) error {
	attacher := e.o.Attachers[a.Target.Type]
	if attacher == nil {
		return fmt.Errorf("attachments of type %q are not configured", a.Target.Type)
	}
	if a.Phase == Detaching {
		return e.release(ctx, v, a.ID)
	}
	if err := e.find(ctx, v, a.ID); err != nil {
		if hangs(err) != nil {
			return e.stay(ctx, v, a.ID, a.Phase, err)
		}
		return err
	}
	a = *v.attachment(a.ID)
	at := v.clone()
	if err := e.keepServed(ctx, at); err != nil {
		return err // whoever uses it waits
	}
	state, err := stepOf(ctx, e, v.ID, stepProbe, func(ctx context.Context) (attach.State, error) {
		request, err := e.request(ctx, at, a)
		if err != nil {
			return "", err
		}
		return attacher.Probe(ctx, request)
	})
	switch {
	case hangs(err) != nil:
		return e.stay(ctx, v, a.ID, a.Phase, err)
	case err != nil:
		return err // unknown: still attached
	case isSocket(a.Kind) && state == attach.StateAttached && a.Phase == Attached:
		return e.lookAtWorker(ctx, at, a)
	case state == attach.StateGone:
		return e.lost(ctx, v, a)
	case state == attach.StateMissing && a.Phase == Attaching && e.now().After(a.Deadline):
		e.happened(v, "failure", "Attaching to %s did not end in its time", a.Holder)
		return e.release(ctx, v, a.ID)
	case state == attach.StateMissing || a.Phase == Attaching:
		err := e.bring(ctx, v, a.ID)
		switch {
		case err == nil, lostWrite(err):
			return err
		case errors.Is(err, blockdev.ErrGone):
			return e.lost(ctx, v, a)
		}
		return e.stay(ctx, v, a.ID, a.Phase, err)
	}
	return nil
}

// lost releases what a sandbox that has ended held.
func (e *Engine) lost(ctx context.Context, v *Volume, a Attachment) error {
	e.count(countLost)
	e.happened(v, "detach", "%s is gone", a.Holder)
	return e.release(ctx, v, a.ID)
}
