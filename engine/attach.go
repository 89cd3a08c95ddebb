package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
)

// Attach returns when the volume is visible in the sandbox. One writer or many
// readers: a conflicting holder is ErrAttached and named. The same request again
// gets the same attachment.
func (e *Engine) Attach(ctx context.Context, workspace, name string, r AttachVolume) (Attachment, error) {
	if err := checkHolder(r.Holder); err != nil {
		return Attachment{}, err
	}
	attacher := e.o.Attachers[r.Target.Type]
	if attacher == nil {
		return Attachment{}, problem(ErrInvalid, "target.type", "must be one of: %s", strings.Join(slices.Sorted(maps.Keys(e.o.Attachers)), ", "))
	}
	return do(ctx, e, func(ctx context.Context) (Attachment, error) {
		v, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Attachment{}, err
		}
		defer release()
		if v, err = e.current(ctx, v); err != nil {
			return Attachment{}, err
		}
		if a := v.sameAttachment(r); a != nil && a.Phase == Attached {
			return *a, nil
		}
		if err := v.admits(r); err != nil {
			return Attachment{}, err
		}
		target, err := attacher.Resolve(ctx, r.Target, r.MountPath)
		if err != nil {
			return Attachment{}, attachError(err)
		}
		v = v.clone()
		if err := e.prepare(ctx, &v, r.ReadOnly); err != nil {
			return Attachment{}, userError(err)
		}
		return e.attach(ctx, v, r, target)
	})
}

// current asks the sandboxes of a volume's attachments how they are before a
// caller is told that one is in the way, or that all is well: a sandbox that died
// a moment ago lets go now, and one that was started again under its old name is
// not taken for the one that had the volume. What cannot be asked stays.
func (e *Engine) current(ctx context.Context, v Volume) (Volume, error) {
	if len(v.Attachments) == 0 {
		return v, nil
	}
	v = v.clone()
	if err := e.tendAttachments(ctx, &v); err != nil {
		if lostWrite(err) {
			return v, err
		}
		e.o.Log.Warn("an attachment could not be looked after", "volume", v.ID, "workspace", v.Workspace, "err", err)
	}
	return v, nil
}

// sameAttachment finds the attachment that an equal request made.
func (v Volume) sameAttachment(r AttachVolume) *Attachment {
	for i, a := range v.Attachments {
		if a.Holder == r.Holder && a.Asked == r.Target && a.MountPath == r.MountPath && a.ReadOnly == r.ReadOnly {
			return &v.Attachments[i]
		}
	}
	return nil
}

// admits checks the state of the volume against a request: one writer or many readers.
func (v Volume) admits(r AttachVolume) error {
	switch {
	case v.Phase != Ready || v.Failure != "":
		return notReady(v)
	case v.Filesystem == filesystem.None:
		return problem(ErrUnsupported, "", "volume %q has no filesystem to mount: targets host and runc need ext4, xfs or btrfs", v.Name)
	case v.Tainted:
		return problem(ErrUnsupported, "", "volume %q was writable as raw blocks by a tenant: this host does not mount it", v.Name)
	case len(v.Attachments) >= maxAttachments:
		return problem(ErrConflict, "", "volume %q has its maximum of %d attachments", v.Name, maxAttachments)
	}
	for _, a := range v.Attachments {
		if a.ReadOnly && r.ReadOnly && a.Phase != Detaching {
			continue
		}
		how := "read-only"
		if !a.ReadOnly {
			how = "writable"
		}
		return problem(ErrAttached, "", "volume %q is attached %s to %s (attachment %s, %s)", v.Name, how, a.Holder, a.ID, a.Phase)
	}
	return nil
}

// prepare finishes what the volume waits for before it is used: growth that is
// pending, and the recovery of a dirty journal, which a read-only device cannot do.
func (e *Engine) prepare(ctx context.Context, v *Volume, readOnly bool) error {
	if len(v.Attachments) > 0 {
		return nil
	}
	if err := e.deactivate(ctx, *v); err != nil {
		return err
	}
	if err := e.settle(ctx, v); err != nil {
		return err
	}
	if v.Failure != "" {
		return notReady(*v)
	}
	if !readOnly {
		return nil
	}
	_, err := e.activate(ctx, *v, false)
	return errors.Join(err, e.deactivate(ctx, *v))
}

// attach makes the intent and the epoch durable, then the volume visible. What
// fails is taken back.
func (e *Engine) attach(ctx context.Context, v Volume, r AttachVolume, target attach.Target) (Attachment, error) {
	if !r.ReadOnly {
		v.Epoch++
	}
	a := Attachment{
		ID: string(newID("att", e.now())), Holder: r.Holder, Target: target, Asked: r.Target,
		MountPath: r.MountPath, ReadOnly: r.ReadOnly, Epoch: v.Epoch, Phase: Attaching,
		CreatedAt: e.now(), CreatedBy: r.Actor,
	}
	v.Attachments = append(v.Attachments, a)
	e.happened(&v, "attach", "Attached to %s", a.Holder)
	if err := e.save(ctx, &v); err != nil {
		return Attachment{}, userError(err)
	}
	e.watch(v.ID)
	if err := e.bring(ctx, &v, a.ID); err != nil {
		if lostWrite(err) {
			return Attachment{}, err
		}
		e.happened(&v, "failure", "Attaching to %s failed", a.Holder)
		e.o.Log.Warn("an attachment failed and is taken back", "volume", v.ID, "workspace", v.Workspace, "attachment", a.ID, "err", err)
		if undo := e.release(ctx, &v, a.ID); undo != nil {
			e.o.Log.Warn("a failed attachment could not be taken back: it is tried again", "volume", v.ID, "attachment", a.ID, "err", undo)
		}
		return Attachment{}, attachError(err)
	}
	return *v.attachment(a.ID), nil
}

// bring makes an attachment true: open, mount, move into the sandbox, record.
func (e *Engine) bring(ctx context.Context, v *Volume, id string) error {
	a := v.attachment(id)
	attacher := e.o.Attachers[a.Target.Type]
	if attacher == nil {
		return fmt.Errorf("attachments of type %q are not configured", a.Target.Type)
	}
	if _, err := e.activate(ctx, *v, a.ReadOnly); err != nil {
		return err
	}
	request, err := e.request(ctx, *v, *a)
	if err != nil {
		return err
	}
	if err := attacher.Attach(ctx, request); err != nil {
		return err
	}
	if a.Phase == Attached && a.Failure == "" {
		return nil
	}
	changed := v.clone()
	b := changed.attachment(id)
	b.Phase, b.Failure = Attached, ""
	if err := e.commit(ctx, changed); err != nil {
		return err
	}
	*v = changed
	return nil
}

// Detach returns when the volume is no longer visible in the sandbox, what was
// written is durable and the device is released. While the sandbox has files
// open in it, ErrConflict, and nothing has changed.
func (e *Engine) Detach(ctx context.Context, workspace, name, id, actor string) (Attachment, error) {
	return do(ctx, e, func(ctx context.Context) (Attachment, error) {
		v, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Attachment{}, err
		}
		defer release()
		v = v.clone()
		a := v.attachment(id)
		if a == nil {
			return Attachment{}, problem(ErrNotFound, "", "volume %q has no attachment %.40q", v.Name, id)
		}
		gone := *a
		gone.Phase = Detaching
		v.UpdatedBy = actor
		if err := e.release(ctx, &v, id); err != nil {
			return Attachment{}, detachError(v, id, err)
		}
		if v.hasPendingGrowth(e) {
			e.watch(v.ID)
			e.wake()
		}
		return gone, nil
	})
}

func (v Volume) hasPendingGrowth(e *Engine) bool {
	return len(v.Attachments) == 0 && (v.CheckFirst || e.pendingReason(v.ID) != "")
}

// release takes an attachment away: out of the sandbox, and with the last one
// flush, unmount and close. On ErrBusy in the sandbox it stays attached; when
// only the host still holds the device it stays detaching, and Run tries again.
func (e *Engine) release(ctx context.Context, v *Volume, id string) error {
	a := v.attachment(id)
	before := a.Phase
	if before == Attaching { // its caller is told that it failed: it must not come true later
		before = Detaching
	}
	a.Phase = Detaching
	if err := e.thawFirst(ctx, v, "the volume is being detached"); err != nil {
		return err
	}
	if err := e.commitFreeing(ctx, v.clone()); err != nil {
		return err
	}
	request, err := e.request(ctx, *v, *a)
	if err != nil {
		return e.stay(ctx, v, id, Detaching, err)
	}
	if attacher := e.o.Attachers[a.Target.Type]; attacher != nil {
		if err := attacher.Detach(ctx, request); err != nil {
			return e.stay(ctx, v, id, before, err)
		}
	}
	if len(v.Attachments) == 1 {
		if err := e.deactivate(ctx, *v); err != nil {
			return e.stay(ctx, v, id, Detaching, err)
		}
	}
	changed := v.clone()
	changed.Attachments = slices.DeleteFunc(changed.Attachments, func(b Attachment) bool { return b.ID == id })
	changed.UpdatedAt = e.now()
	e.happened(&changed, "detach", "Detached from %s", a.Holder)
	if err := e.saveFreeing(ctx, &changed); err != nil {
		return err
	}
	*v = changed
	if len(v.Attachments) == 0 {
		e.unwatch(v.ID)
	}
	return nil
}

// stay records how far a release came and why it went no further.
func (e *Engine) stay(ctx context.Context, v *Volume, id string, phase AttachmentPhase, cause error) error {
	changed := v.clone()
	a := changed.attachment(id)
	a.Phase = phase
	a.Failure = "detaching is tried again: the operator's log has the reason"
	if phase != Detaching && errors.Is(cause, blockdev.ErrBusy) {
		a.Failure = innermost(cause) // which processes of the sandbox: for who has to close their files
	}
	if err := e.commitFreeing(ctx, changed); err != nil {
		return errors.Join(cause, err)
	}
	*v = changed
	e.watch(v.ID)
	return cause
}

// request is an attachment in an Attacher's words.
func (e *Engine) request(ctx context.Context, v Volume, a Attachment) (attach.Request, error) {
	dir, err := e.o.Stage.Mounted(ctx, v.ID)
	if err != nil {
		return attach.Request{}, err
	}
	e.mu.Lock()
	endpoint := e.endpoints[v.ID]
	e.mu.Unlock()
	return attach.Request{
		Volume: v.ID, Endpoint: endpoint, Mounted: dir,
		Target: a.Target, MountPath: a.MountPath, ReadOnly: a.ReadOnly,
	}, nil
}

// attachment finds one by id, in place; nil if there is none.
func (v *Volume) attachment(id string) *Attachment {
	for i := range v.Attachments {
		if v.Attachments[i].ID == id {
			return &v.Attachments[i]
		}
	}
	return nil
}

func attachError(err error) error {
	switch {
	case isProblem(err):
		return firstProblem(err)
	case errors.Is(err, blockdev.ErrInvalid):
		return &Problem{Kind: ErrInvalid, Field: "target", Message: innermost(err), Err: err}
	case errors.Is(err, blockdev.ErrGone):
		return &Problem{Kind: ErrConflict, Field: "target", Message: "the sandbox is not running: " + innermost(err), Err: err}
	case errors.Is(err, blockdev.ErrBusy):
		return &Problem{Kind: ErrConflict, Field: "target", Message: innermost(err), Err: err}
	}
	return userError(err)
}

func detachError(v Volume, id string, err error) error {
	if !errors.Is(err, blockdev.ErrBusy) {
		return userError(err)
	}
	if a := v.attachment(id); a != nil && a.Phase == Detaching {
		return &Problem{Kind: ErrConflict, Message: fmt.Sprintf("volume %q has left the sandbox, but something still holds it: detaching is tried again until it lets go", v.Name), Err: err}
	}
	return &Problem{Kind: ErrConflict, Message: fmt.Sprintf("volume %q is in use in the sandbox: close its files there first (%s)", v.Name, innermost(err)), Err: err}
}
