package sparse

import (
	"context"
	"errors"
	"os"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// wakeReclaim tells the background that there is something in the trash.
func (p *Pool) wakeReclaim() { nudge(p.wake) }

// wakeBackground tells the background that an image may have to become flat.
func (p *Pool) wakeBackground() { nudge(p.flatter) }

func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it has been told
	}
}

// whenever does something each time that it is woken, until ctx ends. What fails is
// reported, and tried again the next time and at the next start.
func (p *Pool) whenever(ctx context.Context, woken <-chan struct{}, what string, do func(context.Context) error) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-woken:
		}
		if err := do(ctx); err != nil && ctx.Err() == nil {
			p.log.Error(what, "error", err)
		}
	}
}

// emptyTrash deletes what is in the trash now, one image at a time. Two may do so at
// once.
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
	if len(entries) > 0 {
		p.wakeBackground() // the layers of a snapshot may be another's alone now
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
