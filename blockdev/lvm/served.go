package lvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/opened"
)

type toWorkers = opened.Calls // embedded, under a name that is not exported

// noteFile says how an image is open at a worker, and is locked by that worker.
func (p *Pool) noteFile(id blockdev.ID) string { return filepath.Join(p.notes, string(id)) }

// note is how an image is open at a worker, nil if it is not.
func (p *Pool) note(id blockdev.ID) (*opened.Note, error) {
	if p.notes == "" {
		return nil, nil
	}
	return opened.Read(p.noteFile(id))
}

// atWorker reports whether a worker gives the first of these kinds that the pool has.
func (p *Pool) atWorker(kinds []blockdev.Kind) bool {
	first := slices.IndexFunc(kinds, func(k blockdev.Kind) bool { return k == blockdev.Block || opened.IsSocket(k) })
	return p.workers != nil && first >= 0 && opened.IsSocket(kinds[first])
}

// openServed opens an image at its worker; a new one if none runs.
func (p *Pool) openServed(ctx context.Context, f found, n opened.Note, fresh bool, w blockdev.Want) (blockdev.Endpoint, error) {
	if err := n.Fits(w); err != nil {
		return blockdev.Endpoint{}, err
	}
	worker, err := p.running(ctx, f, n, w.Limits)
	if err != nil {
		if fresh {
			err = errors.Join(err, p.undoServed(context.WithoutCancel(ctx), f))
		}
		return blockdev.Endpoint{}, err
	}
	p.own(f.id, true)
	if worker.Size() < f.size { // of a Grow that was cut short
		err = worker.Grow(ctx, f.size)
	}
	return blockdev.Endpoint{Kind: n.Kind, Path: worker.Socket(), Size: f.size, ReadOnly: n.ReadOnly, Served: true, Lease: n.Lease()}, err
}

// undoServed takes away what an opening has left that did not succeed.
func (p *Pool) undoServed(ctx context.Context, f found) error {
	active, err := p.active(f.Name)
	if err == nil && active {
		err = p.deactivate(ctx, f.Name)
	}
	if err != nil {
		return err // the note stays: what is active is known by it
	}
	return p.forgetNote(f.id)
}

func (p *Pool) forgetNote(id blockdev.ID) error {
	if err := os.Remove(p.noteFile(id)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// running gives the worker of an image, which is started with limits if it does not run:
// first the note, then the device, then the worker, so that each is found by the one
// before.
func (p *Pool) running(ctx context.Context, f found, n opened.Note, limits blockdev.Limits) (*control.Worker, error) {
	if p.workers == nil {
		return nil, fmt.Errorf("open as %s, and this daemon has no workers: %w", n.Lease(), blockdev.ErrBusy)
	}
	w, err := p.workers.Find(ctx, f.id)
	if !errors.Is(err, blockdev.ErrNotFound) {
		return w, err
	}
	lock, err := opened.Lock(p.noteFile(f.id))
	if err != nil {
		return nil, err
	}
	w, err = p.start(ctx, f, n, limits, lock)
	if err != nil {
		opened.Unlock(lock)
		return nil, err
	}
	return w, lock.Close() // the worker has it, and keeps the lock
}

func (p *Pool) start(ctx context.Context, f found, n opened.Note, limits blockdev.Limits, lock *os.File) (*control.Worker, error) {
	if err := p.fault.effect("note", func() error { return n.Write(lock) }); err != nil {
		return nil, err
	}
	active, err := p.active(f.Name)
	switch {
	case err != nil:
		return nil, err
	case !active:
		err = p.activate(ctx, f.Name, n.ReadOnly)
	case n.ReadOnly:
		err = p.setReadOnly(f.Name, true)
	}
	if err != nil {
		return nil, err
	}
	mode := os.O_RDWR
	if n.ReadOnly {
		mode = os.O_RDONLY
	}
	device, err := os.OpenFile(p.node(f.Name), mode|syscall.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	defer device.Close()
	var w *control.Worker
	err = p.fault.effect("worker", func() (err error) {
		w, err = p.workers.Serve(ctx, control.Spec{ID: f.id, Kind: n.Kind, ReadOnly: n.ReadOnly, Size: f.size, Limits: limits, Flat: device, Lock: lock, Opening: n.Socket()})
		return err
	})
	return w, err
}

// observed gives the worker of an image that is open at one.
func (p *Pool) observed(ctx context.Context, id blockdev.ID) (*control.Worker, error) {
	if err := check(ctx, id); err != nil {
		return nil, err
	}
	n, err := p.note(id)
	if err != nil {
		return nil, err
	}
	if n == nil || p.workers == nil {
		return nil, fmt.Errorf("no worker serves it: %w", blockdev.ErrNotFound)
	}
	return p.workers.Find(ctx, id)
}

// growServed tells a worker, if one runs, what size the device has.
func (p *Pool) growServed(ctx context.Context, id blockdev.ID, size int64) error {
	w, err := p.observed(ctx, id)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err == nil && w.Size() < size {
		err = w.Grow(ctx, size)
	}
	return err
}

// endWorker has the worker flush and end; none is success.
func (p *Pool) endWorker(ctx context.Context, id blockdev.ID) error {
	w, err := p.observed(ctx, id)
	if err == nil {
		err = opened.Unused(ctx, w)
	}
	if err == nil {
		err = p.fault.effect("stop worker", func() error { return w.Stop(ctx) })
	}
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	return err
}

// closeServed ends an opening at a worker. blockdev.ErrBusy while it has clients. A
// flush that failed is told, once nothing of the opening is left.
func (p *Pool) closeServed(ctx context.Context, id blockdev.ID) error {
	failed := p.endWorker(ctx, id)
	if failed != nil && !errors.Is(failed, blockdev.ErrFailed) {
		return failed
	}
	return p.endServed(ctx, id, failed)
}

// endServed ends an opening whose worker has ended, or failed to flush.
func (p *Pool) endServed(ctx context.Context, id blockdev.ID, failed error) error {
	f, err := p.find(ctx, id)
	if errors.Is(err, blockdev.ErrNotFound) {
		return errors.Join(failed, p.forgetNote(id))
	}
	active := false
	if err == nil {
		active, err = p.active(f.Name)
	}
	if err == nil && active && failed == nil {
		err = p.flushVolume(f.Name) // what a worker had written that was killed
	}
	if err == nil && active {
		err = p.deactivate(ctx, f.Name)
	}
	if err == nil {
		p.own(id, false)
		err = p.forgetNote(id)
	}
	return errors.Join(failed, err)
}

// Counters implements blockdev.Meter: for what is open at a worker.
func (p *Pool) Counters(ctx context.Context, id blockdev.ID) (blockdev.Counters, error) {
	n, err := p.note(id)
	if err == nil && n == nil {
		err = fmt.Errorf("a thin volume's device has no counters of one opening: %w", errors.ErrUnsupported)
	}
	var c blockdev.Counters
	if err == nil {
		c, err = p.ServedCounters(ctx, id)
	}
	return c, blockdev.Op("lvm.Counters", id, err)
}
