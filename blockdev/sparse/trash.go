package sparse

import (
	"context"
	"errors"
	"os"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// wakeReclaim tells the worker that there is something in the trash.
func (p *Pool) wakeReclaim() {
	select {
	case p.wake <- struct{}{}:
	default: // it has been told
	}
}

// reclaim empties the trash, one image at a time, whenever it is woken, until ctx
// ends. What cannot be deleted stays, is reported, and is tried again with the
// next removal and at the next start.
func (p *Pool) reclaim(ctx context.Context) {
	defer close(p.done)
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		}
		if err := p.emptyTrash(ctx); err != nil && ctx.Err() == nil {
			p.log.Error("reclaim removed images", "error", err)
		}
	}
}

// emptyTrash deletes what is in the trash now. Two may do so at once.
func (p *Pool) emptyTrash(ctx context.Context) error {
	entries, err := os.ReadDir(p.path(trashDir))
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		errs = append(errs, os.RemoveAll(p.path(trashDir, entry.Name())))
	}
	return errors.Join(errs...)
}

// Capacity implements blockdev.Backend: the space of the filesystem that the
// pool is on, whoever uses it.
func (p *Pool) Capacity(ctx context.Context) (blockdev.Capacity, error) {
	if err := ctx.Err(); err != nil {
		return blockdev.Capacity{}, blockdev.Op("sparse.Capacity", "", err)
	}
	space, err := sys.SpaceOf(p.dir)
	if err != nil {
		return blockdev.Capacity{}, blockdev.Op("sparse.Capacity", "", err)
	}
	return blockdev.Capacity{Total: space.Total, Free: space.Free, Allocated: space.Total - space.Free, Trash: allocatedBelow(p.path(trashDir))}, nil
}
