package sandbox

import (
	"context"
	"errors"
	"os"

	"holdfast/api"
	"holdfast/engine"
)

// Delete durably deletes; the answer's status is DELETING. What is left to do is
// done at once in the background, and by the next start if need be.
func (r *Runtime) Delete(ctx context.Context, workspace, name, actor string) (api.Sandbox, error) {
	return do(ctx, r, func(ctx context.Context) (api.Sandbox, error) {
		b, err := r.find(workspace, name)
		if err != nil {
			return api.Sandbox{}, err
		}
		if rec := b.record(); rec.Phase == deleting {
			return rec.show(), nil
		}
		if err := b.lock(ctx); err != nil {
			return api.Sandbox{}, err
		}
		rec := b.record()
		if there, err := r.find(workspace, name); err != nil || there != b {
			b.release()
			return api.Sandbox{}, problem(engine.ErrNotFound, "", "sandbox %.60q not found", name)
		}
		rec.Phase, rec.UpdatedBy = deleting, actor
		rec.happened(r.now(), "deletion", "Deletion requested")
		if err := r.saveFreeing(ctx, b, rec); err != nil {
			b.release()
			return api.Sandbox{}, err
		}
		if !r.begin() {
			b.release() // the next start goes on
			return rec.show(), nil
		}
		go func() {
			defer r.steps.Done()
			defer b.release()
			if err := r.finish(r.ctx, b); err != nil {
				r.o.Log.Warn("a sandbox's deletion is not finished: it is tried again", "sandbox", rec.ID, "name", rec.Name, "err", err)
				r.wake()
			}
		}()
		return rec.show(), nil
	})
}

// finish takes away all that a sandbox has, and its record. Its turn is the caller's.
func (r *Runtime) finish(ctx context.Context, b *box) error {
	rec := b.record()
	if err := r.dismantle(ctx, rec); err != nil {
		return err
	}
	if err := r.erase(ctx, rec); err != nil {
		return err
	}
	r.o.Log.Info("sandbox gone", "sandbox", rec.ID, "workspace", rec.Workspace, "name", rec.Name)
	return nil
}

// dismantle ends the container, frees its volumes and deletes those that were its
// own. Each step is done already is success.
func (r *Runtime) dismantle(ctx context.Context, rec record) error {
	if err := r.containers.remove(ctx, rec.ID); err != nil {
		return err
	}
	root := r.rootfs(rec)
	if err := root.release(); err != nil {
		return err
	}
	if err := os.RemoveAll(root.dir); err != nil {
		return err
	}
	var errs []error
	for _, m := range rec.Volumes {
		errs = append(errs, r.freeVolume(ctx, rec, m))
	}
	return errors.Join(errs...)
}

// freeVolume takes a volume out of a sandbox that has ended, and deletes it if it
// was made for it.
func (r *Runtime) freeVolume(ctx context.Context, rec record, m mount) error {
	v, err := r.o.Engine.Volume(rec.Workspace, m.Volume)
	if errors.Is(err, engine.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, a := range v.Attachments {
		if a.Target.Type != api.SandboxTarget || a.Target.Container != rec.ID {
			continue
		}
		_, err := r.o.Engine.Detach(ctx, rec.Workspace, m.Volume, a.ID, rec.UpdatedBy)
		if err != nil && !errors.Is(err, engine.ErrNotFound) {
			return err
		}
	}
	if !m.ephemeral() {
		return nil
	}
	_, err = r.o.Engine.DeleteVolume(ctx, rec.Workspace, m.Volume, rec.UpdatedBy)
	if errors.Is(err, engine.ErrNotFound) {
		return nil
	}
	return err
}

// Change changes what can be changed: the metadata. What cannot must be as it is,
// or be left out.
func (r *Runtime) Change(ctx context.Context, workspace, name string, c api.ChangeSandbox) (api.Sandbox, error) {
	return do(ctx, r, func(ctx context.Context) (api.Sandbox, error) {
		b, err := r.find(workspace, name)
		if err != nil {
			return api.Sandbox{}, err
		}
		if err := b.lock(ctx); err != nil {
			return api.Sandbox{}, err
		}
		defer b.release()
		rec := b.record()
		if there, err := r.find(workspace, name); err != nil || there != b {
			return api.Sandbox{}, problem(engine.ErrNotFound, "", "sandbox %.60q not found", name)
		}
		if rec.Phase == deleting {
			return api.Sandbox{}, problem(engine.ErrConflict, "", "sandbox %q is being deleted", name)
		}
		if err := r.unchanged(rec, c); err != nil {
			return api.Sandbox{}, err
		}
		if c.DisplayName != nil {
			rec.DisplayName = *c.DisplayName
		}
		if c.ExternalID != nil {
			rec.ExternalID = *c.ExternalID
		}
		if c.Labels != nil {
			rec.Labels = c.Labels
		}
		if err := checkRecord(rec); err != nil {
			return api.Sandbox{}, firstProblem(err)
		}
		rec.UpdatedAt, rec.UpdatedBy = r.now(), c.Actor
		if err := r.save(ctx, b, rec); err != nil {
			return api.Sandbox{}, err
		}
		return rec.show(), nil
	})
}

func (r *Runtime) unchanged(rec record, c api.ChangeSandbox) error {
	fixed := func(field string) error {
		return problem(engine.ErrInvalid, field, "cannot be changed: delete the sandbox and create it again")
	}
	switch {
	case c.Region != nil && *c.Region != "" && *c.Region != rec.Region:
		return fixed("spec.region")
	case c.Image != nil && *c.Image != "" && *c.Image != rec.Image:
		return fixed("spec.runtime.image")
	case c.MemoryMiB != nil && min(*c.MemoryMiB, r.o.MaxMemoryMiB) != rec.MemoryMiB:
		return fixed("spec.runtime.memory")
	case c.Volumes == nil:
		return nil
	case len(c.Volumes) != len(rec.Volumes):
		return fixed("spec.volumes")
	}
	for _, asked := range c.Volumes {
		if asked.Type == "" {
			asked.Type = persistent
		}
		found := false
		for _, m := range rec.Volumes {
			if asked.Type == persistent {
				asked.SizeMB = m.SizeMB
			}
			found = found || asked == m.VolumeMount
		}
		if !found {
			return fixed("spec.volumes")
		}
	}
	return nil
}
