package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

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
	if _, ok := attacher.(attach.Guest); r.Target.Agent != "" && !ok {
		return Attachment{}, problem(ErrInvalid, "target.agent", "does not apply to a target of type %s", r.Target.Type)
	}
	if r.Ephemeral != nil {
		return e.attachEphemeral(ctx, workspace, name, r)
	}
	return do(ctx, e, func(ctx context.Context) (Attachment, error) {
		v, release, err := e.lockFor(ctx, workspace, name, r)
		if err != nil {
			return Attachment{}, err
		}
		defer release()
		if v, err = e.current(ctx, v); err != nil {
			return Attachment{}, err
		}
		if a := v.sameAttachment(r); a != nil && a.Phase == Attached {
			return *a, r.sameLimits(*a)
		}
		if v.moving() {
			return Attachment{}, movedProblem(v)
		}
		if err := v.admits(r, e.needsOf(r.Target)); err != nil {
			return Attachment{}, err
		}
		if v.Filesystem == filesystem.None && r.MountPath != "" && r.Target.Agent != "" {
			return Attachment{}, problem(ErrInvalid, "mountPath", "volume %q has no filesystem to mount", v.Name)
		}
		target, err := stepOf(ctx, e, v.ID, stepResolve, func(ctx context.Context) (attach.Target, error) {
			return attacher.Resolve(ctx, r.Target, r.MountPath)
		})
		if err != nil {
			return Attachment{}, attachError(v, err)
		}
		if err := e.mayLimit(v, "", e.kindAhead(ctx, v, target, r.ReadOnly), target, r.ReadOnly, r.Limits); err != nil {
			return Attachment{}, err
		}
		v = v.clone()
		if err := e.makeWay(ctx, &v, r); err != nil {
			return Attachment{}, err
		}
		recovered := r.ReadOnly && v.mayMount() == nil
		if v, err = e.prepareFor(ctx, v, recovered, e.needsFlat(ctx, v, target, r.ReadOnly)); err != nil {
			return Attachment{}, attachError(v, err)
		}
		if err := e.unheld(ctx, v); err != nil {
			return Attachment{}, attachError(v, err)
		}
		return e.attach(ctx, v, r, target)
	})
}

func (e *Engine) lockFor(ctx context.Context, workspace, name string, r AttachVolume) (Volume, func(), error) {
	if r.Force {
		return e.lockForced(ctx, workspace, name)
	}
	return e.lockNamed(ctx, workspace, name)
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
	if err := e.tendAttachments(ctx, &v, true); err != nil {
		if lostWrite(err) {
			return v, err
		}
		if hangs(err) != nil {
			return v, hangingProblem(v, err)
		}
		e.o.Log.Warn("an attachment could not be looked after", "volume", v.ID, "workspace", v.Workspace, "err", err)
	}
	if v.Phase == Deleting { // an ephemeral one, whose sandbox has ended
		return v, problem(ErrNotFound, "", "volume %.60q not found", v.Name)
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

// admits checks the state of the volume against a request: one writer or many readers,
// of which one alone can have it by vhost-user.
func (v Volume) admits(r AttachVolume, needs attach.Needs) error {
	switch {
	case v.Phase != Ready || v.Failure != "":
		return notReady(v)
	case needs.Mount && v.mayMount() != nil:
		return v.mayMount()
	case len(v.Attachments) >= maxAttachments:
		return problem(ErrConflict, "", "volume %q has its maximum of %d attachments", v.Name, maxAttachments)
	}
	a := v.inTheWay(r)
	if a == nil || r.Force {
		return nil
	}
	how, instead := "read-only", ""
	if !a.ReadOnly {
		how = "writable"
	}
	if a.ReadOnly && r.ReadOnly && a.Kind == blockdev.VhostUser {
		how = "read-only by vhost-user"
		instead = ": its socket takes one client at a time. Readers share a volume that each of them has by an export of protocol nbd"
	}
	return problem(ErrAttached, "", "volume %q is attached %s to %s (attachment %s, %s)%s", v.Name, how, a.Holder, a.ID, a.Phase, instead)
}

// inTheWay finds an attachment that excludes another one, nil for none.
func (v Volume) inTheWay(r AttachVolume) *Attachment {
	for i, a := range v.Attachments {
		if !a.ReadOnly || !r.ReadOnly || a.Phase == Detaching || a.Kind == blockdev.VhostUser {
			return &v.Attachments[i]
		}
	}
	return nil
}

// prepare finishes what the volume waits for before it is used: growth that is
// pending, and, if it must be recovered, what a dirty journal has, which a
// read-only device cannot do. It gives the volume as it is then.
func (e *Engine) prepare(ctx context.Context, v Volume, recovered bool) (Volume, error) {
	return e.prepareFor(ctx, v, recovered, false)
}

// prepareFor is prepare, and for who cannot use a layered image makes it flat.
func (e *Engine) prepareFor(ctx context.Context, v Volume, recovered, flat bool) (Volume, error) {
	if len(v.Attachments) > 0 {
		return v, nil
	}
	prepared, err := longStepOf(ctx, e, v.ID, stepPrepare, func(ctx context.Context) (Volume, error) {
		v := v.clone()
		if err := e.deactivate(ctx, v); err != nil {
			return v, err
		}
		if err := e.settle(ctx, &v); err != nil {
			return v, err
		}
		if v.Failure != "" {
			return v, notReady(v)
		}
		if flat {
			if err := e.flattenNow(ctx, v); err != nil {
				return v, err
			}
		}
		if !recovered {
			return v, nil
		}
		_, err := e.activate(ctx, v, false)
		return v, errors.Join(err, e.deactivate(ctx, v))
	})
	if hangs(err) != nil {
		return v, err
	}
	return prepared, err
}

// attach makes the intent and the epoch durable, then the volume visible. What
// fails is taken back.
func (e *Engine) attach(ctx context.Context, v Volume, r AttachVolume, target attach.Target) (Attachment, error) {
	if !r.ReadOnly {
		v.Epoch++
	}
	now := e.now()
	a := Attachment{
		ID: string(newID("att", now)), Holder: r.Holder, Target: target, Asked: r.Target,
		MountPath: r.MountPath, ReadOnly: r.ReadOnly, Epoch: v.Epoch, Phase: Attaching, Limits: r.Limits,
		Since: now, Deadline: e.deadline(now), CreatedAt: now, CreatedBy: r.Actor,
	}
	if named, ok := e.o.Attachers[target.Type].(attach.Named); ok {
		a.Serial = named.Serial(v.ID)
	}
	v.Attachments = append(v.Attachments, a)
	e.expose(&v, target, r.ReadOnly)
	e.happened(&v, "attach", "Attached to %s", a.Holder)
	saved, err := stepOf(ctx, e, v.ID, stepDescribe, func(ctx context.Context) (Volume, error) {
		v := v.clone()
		return v, e.save(ctx, &v)
	})
	if err != nil {
		return Attachment{}, attachError(v, err)
	}
	v = saved
	if err := e.bring(ctx, &v, a.ID); err != nil {
		if lostWrite(err) {
			return Attachment{}, err
		}
		e.takeBack(ctx, &v, a, err)
		return Attachment{}, attachError(v, err)
	}
	return *v.attachment(a.ID), nil
}

// deadline is when the steps that begin now have ended, or are said to hang: two
// at most take their whole time.
func (e *Engine) deadline(now time.Time) time.Time {
	return now.Add(2*e.o.StepLimit + longestGrace).Truncate(time.Millisecond)
}

// takeBack undoes an attachment that failed. Its caller is told so: it must not
// come true later.
func (e *Engine) takeBack(ctx context.Context, v *Volume, a Attachment, cause error) {
	e.happened(v, "failure", "Attaching to %s failed", a.Holder)
	e.o.Log.Warn("an attachment failed and is taken back", "volume", v.ID, "workspace", v.Workspace, "attachment", a.ID, "err", cause)
	var undo error
	if hangs(cause) != nil { // nothing can be done to the volume until it ends
		undo = e.stay(ctx, v, a.ID, Detaching, cause)
	} else {
		undo = e.release(ctx, v, a.ID)
	}
	if undo != nil {
		e.o.Log.Warn("a failed attachment could not be taken back: it is tried again", "volume", v.ID, "attachment", a.ID, "err", undo)
	}
}

// bring makes an attachment true: open, mount, move into the sandbox, record.
func (e *Engine) bring(ctx context.Context, v *Volume, id string) error {
	a := *v.attachment(id)
	attacher := e.o.Attachers[a.Target.Type]
	if attacher == nil {
		return fmt.Errorf("attachments of type %q are not configured", a.Target.Type)
	}
	at := v.clone()
	endpoint, err := stepOf(ctx, e, v.ID, stepOpen, func(ctx context.Context) (blockdev.Endpoint, error) {
		if e.isRaw(a.Target) {
			return e.endpointOf(ctx, at, a)
		}
		_, err := e.activate(ctx, at, a.ReadOnly)
		return e.endpointNow(v.ID), err
	})
	if err != nil {
		return err
	}
	if isSocket(endpoint.Kind) && a.Kind != endpoint.Kind {
		if err := e.noteKind(ctx, v, id, endpoint.Kind); err != nil {
			return err
		}
		a, at = *v.attachment(id), v.clone()
	}
	err = e.step(ctx, v.ID, stepAttach, func(ctx context.Context) error {
		request, err := e.request(ctx, at, a)
		if err != nil {
			return err
		}
		if !a.Limits.None() && (isSocket(a.Kind) || e.ownLimiter(a.Target) == nil) { // before anybody can use it
			if err := e.limit(ctx, at, a, a.Limits); err != nil {
				return err
			}
		}
		return attacher.Attach(ctx, request)
	})
	if errors.Is(err, errors.ErrUnsupported) && e.ownLimiter(a.Target) != nil && !a.Limits.None() {
		return noLimits(err)
	}
	if err == nil {
		err = e.mountInside(ctx, at, a)
	}
	if err != nil {
		return err
	}
	if a.Phase != Attached || a.Failure != "" {
		changed := v.clone()
		b := changed.attachment(id)
		b.Phase, b.Failure, b.Deadline, b.RetryAt, b.Kind = Attached, "", time.Time{}, time.Time{}, endpoint.Kind
		if err := e.commit(ctx, changed); err != nil {
			return err
		}
		*v = changed
	}
	if len(v.Attachments) == 1 && e.mustTell(*v.attachment(id)) {
		e.setTold(v.ID, endpoint.Size)
	}
	e.guard(*v)
	e.watchFrom(v.ID, e.nextLook(*v))
	if v.SizeMiB > v.GuestMiB { // it has grown since a guest last had it
		return e.growInside(ctx, v)
	}
	return nil
}

// noteKind makes durable that a sandbox gets a worker's socket, before it does: it
// cannot go on with anything else.
func (e *Engine) noteKind(ctx context.Context, v *Volume, id string, kind blockdev.Kind) error {
	changed := v.clone()
	changed.attachment(id).Kind = kind
	if err := e.commit(ctx, changed); err != nil {
		return err
	}
	*v = changed
	return nil
}

// request is an attachment in an Attacher's words.
func (e *Engine) request(ctx context.Context, v Volume, a Attachment) (attach.Request, error) {
	dir, err := e.o.Stage.Mounted(ctx, v.ID)
	if err != nil {
		return attach.Request{}, err
	}
	endpoint, err := e.endpointOf(ctx, v, a)
	if err != nil {
		return attach.Request{}, err
	}
	r := attach.Request{
		Volume: v.ID, Endpoint: endpoint, Mounted: dir,
		Target: a.Target, MountPath: a.MountPath, ReadOnly: a.ReadOnly, Filesystem: v.Filesystem, Others: v.others(a), Limits: a.Limits,
	}
	if isSocket(endpoint.Kind) { // its worker has them
		r.Limits = blockdev.Limits{}
	}
	return r, nil
}

// others are the sandboxes that a volume is in besides an attachment's.
func (v Volume) others(a Attachment) []attach.Target {
	var targets []attach.Target
	for _, b := range v.Attachments {
		if b.ID != a.ID {
			targets = append(targets, b.Target)
		}
	}
	return targets
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

func attachError(v Volume, err error) error {
	switch {
	case hangs(err) != nil:
		return hangingProblem(v, err)
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
