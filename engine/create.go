package engine

import (
	"context"
	"errors"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
	"holdfast/templates"
)

// CreateVolume returns when the volume is usable and durable. A create that
// fails leaves nothing.
func (e *Engine) CreateVolume(ctx context.Context, r CreateVolume) (Volume, error) {
	return once(ctx, e, keyed[Volume]{
		workspace: r.Workspace, key: r.IdempotencyKey, request: requestDigest(r),
		make: func(ctx context.Context, key string) (Volume, blockdev.ID, string, error) {
			v, err := e.create(ctx, r, key)
			return v, v.ID, v.Name, err
		},
		replay: e.catalog.get,
	})
}

func (e *Engine) create(ctx context.Context, r CreateVolume, idempotencyKey string) (Volume, error) {
	v, err := e.design(ctx, r)
	if err != nil {
		return Volume{}, err
	}
	return do(ctx, e, func(ctx context.Context) (Volume, error) {
		release, err := e.locks.acquire(ctx, v.ID)
		if err != nil {
			return Volume{}, err
		}
		defer release()
		if err := e.intend(ctx, v, idempotencyKey, r); err != nil {
			return Volume{}, err
		}
		switch err := e.settle(ctx, &v); {
		case errors.Is(err, blockdev.ErrLayered) && v.Phase == Ready: // usable; its filesystem grows later
			e.setPending(v.ID, pendingFlat)
		case err != nil:
			return Volume{}, e.abandon(ctx, v, idempotencyKey, err)
		}
		if v.Remote {
			e.watch(v.ID)
		}
		return v, nil
	})
}

// design makes the record that a request asks for, or says what is wrong with it.
func (e *Engine) design(ctx context.Context, r CreateVolume) (Volume, error) {
	now := e.now()
	v := Volume{
		ID: newID(blockdev.PrefixVolume, now), Sequence: 1,
		Workspace: r.Workspace, Name: r.Name, DisplayName: r.DisplayName, Labels: r.Labels, ExternalID: r.ExternalID,
		UUID: newUUID(), Phase: Allocating, Ephemeral: r.Ephemeral,
		CreatedAt: now, UpdatedAt: now, CreatedBy: r.Actor, UpdatedBy: r.Actor,
	}
	if v.Name == "" {
		v.Name = newName()
	}
	var err error
	if err := errors.Join(checkName(v.Name), checkDisplayName(v.DisplayName), checkExternalID(v.ExternalID), checkLabels(v.Labels)); err != nil {
		return Volume{}, firstProblem(err)
	}
	if v.Region, err = e.checkRegion(r.Region); err != nil {
		return Volume{}, err
	}
	if v.Filesystem, err = checkFilesystem(r.Filesystem); err != nil {
		return Volume{}, err
	}
	if v.Pool, err = e.choosePool(r.Pool); err != nil {
		return Volume{}, err
	}
	v.SizeMiB = DefaultSizeMiB
	if r.Snapshot != "" {
		if err := e.fromSnapshot(&v, r); err != nil {
			return Volume{}, err
		}
	} else if r.Template != "" {
		if err := e.resolve(ctx, &v, r); err != nil {
			return Volume{}, err
		}
	}
	if r.SizeMiB != nil {
		v.SizeMiB = *r.SizeMiB
	}
	if err := e.checkSize(v.SizeMiB, v.Filesystem); err != nil {
		return Volume{}, err
	}
	return v, nil
}

// resolve pins the template's revision and takes its default size.
func (e *Engine) resolve(ctx context.Context, v *Volume, r CreateVolume) error {
	ref := r.Template
	if v.Filesystem == filesystem.None {
		return problem(ErrInvalid, "spec.filesystem", "a volume from a template has a filesystem: leave it out or choose ext4, xfs or btrfs")
	}
	template, revision, err := e.o.Library.Resolve(ctx, v.Workspace, ref)
	if errors.Is(err, templates.ErrNotFound) || errors.Is(err, templates.ErrInvalid) {
		return &Problem{Kind: ErrInvalid, Field: "spec.template", Message: err.Error(), Err: err}
	}
	if err != nil {
		return err
	}
	v.Template, v.Revision = template.Name+":"+revision.Name, revision.ID
	if template.DefaultSizeMiB > 0 {
		v.SizeMiB = template.DefaultSizeMiB
	}
	if revision.Remote != nil {
		return e.resolveRemote(v, r, template, revision)
	}
	return nil
}

// resolveRemote takes what a volume cannot have otherwise whose bytes are far away.
func (e *Engine) resolveRemote(v *Volume, r CreateVolume, template templates.Template, from templates.Revision) error {
	switch {
	case r.Filesystem != "" && v.Filesystem != from.Remote.Filesystem:
		return problem(ErrInvalid, "spec.filesystem", "template %s is remote and holds %s: leave it out", v.Template, from.Remote.Filesystem)
	case r.Pool != "" && !e.holdsRemote(v.Pool):
		return problem(ErrUnsupported, "spec.pool", "template %s is remote, and pool %q cannot have volumes of it: it keeps images in a volume group, or has no workers. %s", v.Template, e.poolName(v.Pool), e.remotePools())
	}
	if !e.holdsRemote(v.Pool) { // a policy has chosen it
		v.Pool = e.policyPool(func(p OtherPool) bool { return p.Remote })
	}
	v.Filesystem = from.Remote.Filesystem
	if template.DefaultSizeMiB == 0 { // it was published for volumes of this size
		v.SizeMiB = 0
	}
	v.SizeMiB = max(v.SizeMiB, mibUp(from.ImageBytes))
	v.Remote = true
	return nil
}

// intend takes the name, the promise and the quota, and begins to make the wish
// durable. It need not be so before the draft is begun, which nobody sees and a
// crash discards: allocate waits for it before the image gets its name.
func (e *Engine) intend(ctx context.Context, v Volume, idempotencyKey string, r CreateVolume) error {
	if !e.catalog.add(v) {
		return problem(ErrExists, "metadata.name", "Volume %s already exists", v.Name)
	}
	err := e.place(v.ID, v.Pool)
	if err == nil {
		err = e.ledger(v.Pool).promise(v.Workspace, v.ID, v.bytes(), e.Quota(v.Workspace))
	}
	if err != nil {
		e.catalog.remove(v.ID)
		return err
	}
	durable := make(chan error, 1)
	e.mu.Lock()
	e.intents[v.ID] = durable
	e.mu.Unlock()
	go func() {
		durable <- e.o.Store.Update(ctx, func(tx *metadata.Tx) error {
			if idempotencyKey != "" {
				if err := idempotencyTable.Put(tx, idempotencyKey, e.remember(v.ID, v.Name, requestDigest(r))); err != nil {
					return err
				}
			}
			return volumesTable.Put(tx, string(v.ID), v)
		})
	}()
	return nil
}

// intended waits until the wish is durable; one from another life is.
func (e *Engine) intended(id blockdev.ID) error {
	e.mu.Lock()
	durable := e.intents[id]
	delete(e.intents, id)
	e.mu.Unlock()
	if durable == nil {
		return nil
	}
	return <-durable
}

// abandon undoes a create that failed: the caller gets the reason, and nothing
// is left. What cannot be undone now is finished by Run.
func (e *Engine) abandon(ctx context.Context, v Volume, idempotencyKey string, cause error) error {
	cause = errors.Join(cause, e.intended(v.ID))
	if lostWrite(cause) {
		return cause // fail-stop: records stay for the next start
	}
	if idempotencyKey != "" {
		if err := e.dropKeys(ctx, []string{idempotencyKey}); err != nil {
			return errors.Join(cause, err)
		}
	}
	v.Phase = Deleting
	if err := e.bury(ctx, v); err != nil {
		if lostWrite(err) {
			return errors.Join(cause, err)
		}
		e.o.Log.Error("a failed create could not be undone: it is tried again", "volume", v.ID, "workspace", v.Workspace, "err", err)
	}
	return userError(cause)
}

// userError makes a failed step readable for its caller.
func userError(err error) error {
	switch {
	case isProblem(err):
		return firstProblem(err)
	case errors.Is(err, templates.ErrTooSmall), errors.Is(err, filesystem.ErrTooSmall):
		return &Problem{Kind: ErrInvalid, Field: "spec.size", Message: innermost(err), Err: err}
	case errors.Is(err, blockdev.ErrNoSpace), errors.Is(err, templates.ErrNoSpace):
		return &Problem{Kind: ErrNoSpace, Message: "the pool is full: delete volumes or template versions, or enlarge the pool", Err: err}
	case errors.Is(err, blockdev.ErrUnavailable):
		return &Problem{Kind: blockdev.ErrUnavailable, Message: innermost(err), Err: err}
	}
	return err
}

// firstProblem finds the first error in a chain or a join that is for the user.
func firstProblem(err error) error {
	var p *Problem
	if errors.As(err, &p) {
		return p
	}
	return err
}

// innermost is the text of a wrapped error without the operations around it.
func innermost(err error) string {
	var op *blockdev.OpError
	for errors.As(err, &op) && op.Err != nil {
		err = op.Err
		op = nil
	}
	return err.Error()
}
