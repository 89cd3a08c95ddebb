package engine

import (
	"context"
	"errors"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// needsOf is what a target's Attacher must be given.
func (e *Engine) needsOf(t attach.Target) attach.Needs {
	attacher := e.o.Attachers[t.Type]
	if attacher == nil {
		return attach.Needs{Kinds: []blockdev.Kind{blockdev.Block}}
	}
	if picky, ok := attacher.(attach.Picky); ok {
		return picky.NeedsOf(t)
	}
	return attacher.Needs()
}

// Launch tells how a sandbox is started with an attachment's volume; nil where that
// is not asked: the sandbox runs already.
func (e *Engine) Launch(ctx context.Context, v Volume, a Attachment) (*attach.Launch, error) {
	launcher, ok := e.o.Attachers[a.Target.Type].(attach.Launcher)
	if !ok || a.Phase != Attached {
		return nil, nil
	}
	e.mu.Lock()
	endpoint := e.endpoints[v.ID]
	e.mu.Unlock()
	l, err := launcher.Launch(ctx, attach.Request{Volume: v.ID, Endpoint: endpoint, Target: a.Target, ReadOnly: a.ReadOnly, MountPath: a.MountPath}, v.Filesystem)
	if err != nil {
		return nil, attachError(v, err)
	}
	return &l, nil
}

// notStarted reports whether an attachment waits for a sandbox that nobody has
// started yet.
func (e *Engine) notStarted(a Attachment) bool {
	_, finds := e.o.Attachers[a.Target.Type].(attach.Finder)
	return finds && a.Target.Pid == 0
}

// find records the sandbox that has come to hold an attachment's volume, so that its
// end is told. Nobody has is no error.
func (e *Engine) find(ctx context.Context, v *Volume, id string) error {
	a := *v.attachment(id)
	finder, ok := e.o.Attachers[a.Target.Type].(attach.Finder)
	if !ok {
		return nil
	}
	at := v.clone()
	target, err := stepOf(ctx, e, v.ID, stepProbe, func(ctx context.Context) (attach.Target, error) {
		request, err := e.request(ctx, at, a)
		if err != nil {
			return a.Target, err
		}
		return finder.Find(ctx, request)
	})
	if err != nil || target == a.Target {
		return err
	}
	changed := v.clone()
	changed.attachment(id).Target = target
	e.happened(&changed, "attach", "%s runs: process %d has the volume open", a.Holder, target.Pid)
	if err := e.commitFreeing(ctx, changed); err != nil {
		return err
	}
	*v = changed
	e.unguard(*v, a.Target)
	e.guard(*v)
	return nil
}

// unheld refuses a volume that is attached to nobody and that a process has open all
// the same: a virtual machine that outlived its attachment, or was started by hand.
func (e *Engine) unheld(ctx context.Context, v Volume) error {
	if len(v.Attachments) > 0 {
		return nil
	}
	for _, attacher := range e.o.Attachers {
		witness, ok := attacher.(attach.Witness)
		if !ok {
			continue
		}
		users, err := stepOf(ctx, e, v.ID, stepProbe, func(ctx context.Context) (users []attach.Target, err error) {
			err = e.asBytes(ctx, v.ID, true, func(path string) error {
				users, err = witness.Users(ctx, path)
				return err
			}, func(blockdev.Bytes) error { return nil }) // there is no file that anybody could have opened
			return users, err
		})
		if err != nil {
			return err
		}
		if len(users) > 0 {
			return problem(ErrConflict, "", "process %d has the image of volume %q open, and no attachment says why: end it first", users[0].Pid, v.Name)
		}
	}
	return nil
}

// EphemeralVolume asks Attach for a volume that is made for the attachment and
// deleted with its end.
type EphemeralVolume struct {
	SizeMiB    int64
	Template   string // empty: blank
	Filesystem string // empty: ext4
	Region     string
}

// attachEphemeral makes the volume that an attachment asks for and attaches it. What
// fails leaves nothing. The same request again gets the same attachment.
func (e *Engine) attachEphemeral(ctx context.Context, workspace, name string, r AttachVolume) (Attachment, error) {
	wanted := *r.Ephemeral
	r.Ephemeral = nil
	v, err := e.Volume(workspace, name)
	if err == nil && v.Ephemeral && v.sameAttachment(r) != nil {
		return e.Attach(ctx, workspace, name, r)
	}
	v, err = e.CreateVolume(ctx, CreateVolume{
		Workspace: workspace, Name: name, SizeMiB: &wanted.SizeMiB, Template: wanted.Template, Filesystem: wanted.Filesystem, Region: wanted.Region,
		Ephemeral: true, Actor: r.Actor,
	})
	if err != nil {
		return Attachment{}, err
	}
	a, err := e.Attach(ctx, workspace, name, r)
	if err != nil {
		_, undo := e.DeleteVolume(context.WithoutCancel(ctx), workspace, name, r.Actor)
		if undo != nil && !errors.Is(undo, ErrNotFound) {
			e.o.Log.Warn("an ephemeral volume whose attaching failed is left", "volume", v.ID, "workspace", workspace, "err", undo)
		}
	}
	return a, err
}

// orphaned reports whether a volume is to go because nobody has it any more.
func (v Volume) orphaned() bool {
	return v.Ephemeral && v.Phase != Deleting && len(v.Attachments) == 0
}

// end deletes a volume that nobody has any more.
func (e *Engine) end(ctx context.Context, v *Volume) error {
	if err := e.mark(ctx, v); err != nil {
		return err
	}
	if err := e.bury(ctx, *v); err != nil {
		return err
	}
	e.feed.add(Happening{Workspace: v.Workspace, Volume: v.Name, Event: Event{Type: "deletion", Status: v.Status(), Message: "Ephemeral volume is deleted", Time: e.now()}})
	return nil
}
