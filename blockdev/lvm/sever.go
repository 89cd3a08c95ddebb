package lvm

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/opened"
)

var _ blockdev.Severer = (*Pool)(nil)

// CanSever implements blockdev.Severer: errors.ErrUnsupported for what is not open at a
// worker. A thin volume's device cannot be cut off from it.
func (p *Pool) CanSever(_ context.Context, id blockdev.ID) error {
	_, err := p.severable(id)
	return blockdev.Op("lvm.CanSever", id, err)
}

// severable gives the note of what is open at a worker.
func (p *Pool) severable(id blockdev.ID) (*opened.Note, error) {
	if !id.Valid() {
		return nil, fmt.Errorf("image id %q: %w", string(id), blockdev.ErrInvalid)
	}
	n, err := p.note(id)
	if err == nil && (n == nil || p.workers == nil) {
		err = fmt.Errorf("no worker serves it: %w", errors.ErrUnsupported)
	}
	return n, err
}

// Sever implements blockdev.Severer: the worker, which alone has the device open, is
// ended. errors.ErrUnsupported for one that is open as a block device.
func (p *Pool) Sever(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("lvm.Sever", id, p.sever(ctx, id))
}

func (p *Pool) sever(ctx context.Context, id blockdev.ID) error {
	f, err := p.find(ctx, id)
	if err != nil {
		return err
	}
	n, err := p.severable(id)
	if errors.Is(err, errors.ErrUnsupported) {
		if active, asked := p.active(f.Name); asked != nil || !active { // it is not open
			return asked
		}
	}
	if err != nil {
		return err
	}
	return opened.Severing{
		Workers: p.workers, Log: p.log, ID: id, Note: *n, Size: f.size,
		Worker: func(ctx context.Context) (*control.Worker, error) { return p.observed(ctx, id) },
		Stop: func(ctx context.Context, w *control.Worker) error {
			return p.fault.effect("stop worker", func() error { return w.Stop(ctx) })
		},
		Close: func(ctx context.Context, _ bool, failed error) error { return p.endServed(ctx, id, failed) },
	}.Sever(ctx)
}
