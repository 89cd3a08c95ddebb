package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Reconcile compares the records with what runs. The daemon calls it once, after
// the engine's: sandboxes that live are found again as they are; one that was
// being made or taken away is taken away; one that has ended (the machine was
// booted, say) has failed and its volumes are free; what no record names is
// removed.
func (r *Runtime) Reconcile(ctx context.Context) error {
	known := map[string]bool{}
	for _, b := range r.all() {
		rec := b.record()
		known[rec.ID] = true
		if err := r.tendBox(ctx, b); err != nil {
			r.o.Log.Warn("a sandbox needs another try", "sandbox", rec.ID, "name", rec.Name, "err", err)
			r.wake()
		}
	}
	entries, err := os.ReadDir(r.containers.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if known[e.Name()] {
			continue
		}
		r.o.Log.Warn("a sandbox that no record names is removed", "sandbox", e.Name())
		if err := r.dismantle(ctx, record{ID: e.Name()}); err != nil {
			return fmt.Errorf("sandboxes: remove %s: %w", e.Name(), err)
		}
	}
	return nil
}

// Run looks after the sandboxes until ctx ends: those that have ended, and
// deletions that are not finished.
func (r *Runtime) Run(ctx context.Context) error {
	ticker := time.NewTicker(r.o.ProbeInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-r.kick:
			// What failed a moment ago fails again at once: give it a moment.
			select {
			case <-ctx.Done():
				return nil
			case <-ticker.C:
			}
		}
		for _, b := range r.all() {
			select {
			case b.turn <- struct{}{}:
			default:
				continue // somebody works on it
			}
			err := r.tend(ctx, b)
			b.release()
			if err != nil && ctx.Err() == nil {
				r.o.Log.Warn("a sandbox needs another try", "sandbox", b.record().ID, "err", err)
			}
		}
	}
}

func (r *Runtime) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

func (r *Runtime) tendBox(ctx context.Context, b *box) error {
	if err := b.lock(ctx); err != nil {
		return err
	}
	defer b.release()
	return r.tend(ctx, b)
}

// tend takes a sandbox on from where its record says it is. Its turn is the caller's.
func (r *Runtime) tend(ctx context.Context, b *box) error {
	rec := b.record()
	if there, err := r.find(rec.Workspace, rec.Name); err != nil || there != b {
		return nil //nolint:nilerr // it is gone
	}
	switch rec.Phase {
	case deleting:
		return r.finish(ctx, b)
	case deploying: // a crash cut its making short: nobody waits for it
		return r.fail(ctx, b, "The server stopped while the sandbox was being made")
	case deployed:
		alive, err := r.containers.alive(rec.First)
		if err != nil || alive {
			return err
		}
		if rec.First.Boot != r.containers.boot {
			return r.fail(ctx, b, "The machine was started again")
		}
		return r.fail(ctx, b, "The sandbox's first process has ended")
	}
	return nil
}

// fail says why a sandbox is no more, after its volumes are free. The record
// stays until it is deleted or its name is used again.
func (r *Runtime) fail(ctx context.Context, b *box, why string) error {
	rec := b.record()
	if err := r.dismantle(ctx, rec); err != nil {
		return err
	}
	rec.Phase, rec.First = failed, member{}
	rec.happened(r.now(), "failure", why)
	r.o.Log.Warn("sandbox failed", "sandbox", rec.ID, "workspace", rec.Workspace, "name", rec.Name, "why", why)
	return r.saveFreeing(ctx, b, rec)
}

// Teardown ends every container of a RunDir, without the records: for a host that
// is to be left as it was. The directory goes with them.
func Teardown(ctx context.Context, runDir string) error {
	c := newContainers(runDir, "")
	entries, err := os.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		root := rootfs{dir: filepath.Join(c.dir, e.Name())}
		if err := errors.Join(c.remove(ctx, e.Name()), root.release()); err != nil {
			return fmt.Errorf("sandboxes: %w", err)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/holdfast", "/sys/fs/cgroup/*/holdfast"} {
		groups, _ := filepath.Glob(pattern)
		for _, group := range groups {
			_ = os.Remove(group) // only an empty one goes
		}
	}
	return os.RemoveAll(runDir)
}
