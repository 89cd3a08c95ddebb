package sparse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// statExtents bounds how many extents are looked at to tell an image's shared
// bytes; of a more fragmented image the shared bytes beyond are not counted.
const statExtents = 1024

// Describe implements blockdev.Backend.
func (p *Pool) Describe(ctx context.Context, id blockdev.ID, description []byte) error {
	return blockdev.Op("sparse.Describe", id, p.describe(ctx, id, description))
}

func (p *Pool) describe(ctx context.Context, id blockdev.ID, description []byte) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	there, err := exists(p.image(id))
	if err != nil {
		return err
	}
	if !there {
		return blockdev.ErrNotFound
	}
	return p.replaceEnvelope(p.image(id), descriptionFile, string(id), description)
}

// Grow implements blockdev.Backend.
func (p *Pool) Grow(ctx context.Context, id blockdev.ID, size int64) error {
	return blockdev.Op("sparse.Grow", id, p.grow(ctx, id, size))
}

func (p *Pool) grow(ctx context.Context, id blockdev.ID, size int64) error {
	if err := errors.Join(check(ctx, id), checkSize(size)); err != nil {
		return err
	}
	done, err := p.turns.take(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	dir, draft, err := p.locate(id)
	if err != nil {
		return err
	}
	c, err := readChain(id, dir)
	if err != nil {
		return err
	}
	if c != nil {
		return p.growLayered(ctx, id, dir, draft, c, size)
	}
	if err := p.growFile(dir, size); err != nil {
		return err
	}
	if err := p.at("grow.device"); err != nil {
		return err
	}
	o := p.known(id)
	if o.served() {
		_, err := p.growServed(ctx, id, dir, o, size)
		return err
	}
	if !o.looped() {
		return nil
	}
	grown, err := o.device.Grow()
	if err == nil && grown < size {
		err = fmt.Errorf("device %s has %d bytes after growth to %d", o.device.Path, grown, size)
	}
	return err
}

func (p *Pool) growFile(dir string, size int64) error {
	f, err := os.OpenFile(dir+"/"+imageFile, os.O_RDWR, 0)
	if err != nil {
		return notFound(err)
	}
	defer f.Close()
	status, err := sys.StatusOf(f)
	if err != nil {
		return err
	}
	if status.Size < size {
		if status.Links > 1 {
			return fmt.Errorf("%w: other images read from it", blockdev.ErrInvalid)
		}
		if err := f.Truncate(size); err != nil {
			return tooLarge(err)
		}
	}
	if err := p.at("grow.flush"); err != nil {
		return err
	}
	return syncFile(f) // also when the size was there: perhaps of a call cut short
}

// growLayered makes the top larger, to whole blocks.
func (p *Pool) growLayered(ctx context.Context, id blockdev.ID, dir string, draft bool, c *chain, size int64) error {
	if sealedForEver(id, draft) {
		return fmt.Errorf("a snapshot stays as it is: %w", errors.ErrUnsupported)
	}
	if p.isAccessed(id) {
		return fmt.Errorf("this process works on it: %w", blockdev.ErrBusy)
	}
	size = (size + overlay.BlockSize - 1) / overlay.BlockSize * overlay.BlockSize
	if o := p.known(id); o.served() {
		if o.readOnly {
			return fmt.Errorf("open read-only, so its top cannot grow: %w", blockdev.ErrBusy)
		}
		if done, err := p.growServed(ctx, id, dir, o, size); err != nil || done {
			return err
		}
	}
	p.forgetDescent(id)
	if err := p.recoverClosed(id, dir, draft, c); err != nil {
		return err
	}
	v, err := p.assemble(ctx, dir, c, false, nil)
	if err != nil {
		return err
	}
	if err = p.at("grow.flush"); err == nil {
		err = tooLarge(v.Grow(size))
	}
	return errors.Join(err, v.Close())
}

// Remove implements blockdev.Backend.
func (p *Pool) Remove(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("sparse.Remove", id, p.remove(ctx, id))
}

func (p *Pool) remove(ctx context.Context, id blockdev.ID) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	done, err := p.turns.take(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	for _, draft := range []bool{false, true} {
		dir, parent := p.image(id), p.path(imagesDir)
		if draft {
			dir, parent = p.draft(id), p.path(draftsDir)
		}
		if there, err := exists(dir); err != nil {
			return err
		} else if there {
			if err := p.closedForRemoval(ctx, id, dir, draft); err != nil {
				return err
			}
			if err := p.at("remove.rename"); err != nil {
				return err
			}
			p.forgetDescent(id)
			if err := p.discardFreeing(dir); err != nil {
				return err
			}
			if err := p.at("remove.flush"); err != nil {
				return err
			}
		}
		// Also when it is absent: perhaps by a call cut short before the flush.
		if err := syncDir(parent); err != nil {
			return err
		}
	}
	return nil
}

// discardFreeing is discard for a pool so full that even a name has no room:
// the trash is emptied first then.
func (p *Pool) discardFreeing(dir string) error {
	err := p.discard(dir)
	if errors.Is(err, blockdev.ErrNoSpace) {
		if err = p.emptyTrash(context.Background()); err == nil {
			err = p.discard(dir)
		}
	}
	return err
}

// Stat implements blockdev.Backend.
func (p *Pool) Stat(ctx context.Context, id blockdev.ID) (blockdev.Info, error) {
	info, err := p.stat(ctx, id)
	return info, blockdev.Op("sparse.Stat", id, err)
}

func (p *Pool) stat(ctx context.Context, id blockdev.ID) (blockdev.Info, error) {
	if err := check(ctx, id); err != nil {
		return blockdev.Info{}, err
	}
	dir, draft, err := p.locate(id)
	if err != nil {
		return blockdev.Info{}, err
	}
	return p.inspect(id, dir, draft, nil)
}

// inspect reads all that the pool knows of an image. blockdev.ErrCorrupt for an
// image that does not explain itself: not for one that is just being changed. told is
// what workers have said, nil when its own is to be asked.
func (p *Pool) inspect(id blockdev.ID, dir string, draft bool, told heldByWorkers) (blockdev.Info, error) {
	info, err := p.inspectOnce(id, dir, draft, told)
	if errors.Is(err, blockdev.ErrCorrupt) {
		p.changing.Lock()
		defer p.changing.Unlock()
		info, err = p.inspectOnce(id, dir, draft, told)
	}
	return info, err
}

func (p *Pool) inspectOnce(id blockdev.ID, dir string, draft bool, told heldByWorkers) (info blockdev.Info, err error) {
	info = blockdev.Info{ID: id, Draft: draft, Open: p.known(id) != nil}
	if !draft {
		if info.Description, err = readEnvelope(dir+"/"+descriptionFile, string(id)); err != nil {
			return info, unexplained("description", err)
		}
	}
	c, err := readChain(id, dir)
	if err != nil {
		return info, err
	}
	if c != nil {
		return info, p.inspectLayers(&info, dir, c, told)
	}
	f, err := os.Open(dir + "/" + imageFile)
	if draft && errors.Is(err, fs.ErrNotExist) {
		return info, nil // a Create cut short
	}
	if err != nil {
		return info, unexplained("image", err)
	}
	defer f.Close()
	status, shared, err := spaceOf(f)
	info.Size, info.Allocated, info.Shared = status.Size, status.Allocated, shared
	return info, err
}

func unexplained(what string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s is missing (%w)", blockdev.ErrCorrupt, what, err)
	}
	return err
}

// Trim implements blockdev.Trimmer. blockdev.ErrBusy while the image is open.
func (p *Pool) Trim(ctx context.Context, id blockdev.ID) (freed int64, err error) {
	freed, err = p.trim(ctx, id)
	return freed, blockdev.Op("sparse.Trim", id, err)
}

func (p *Pool) trim(ctx context.Context, id blockdev.ID) (int64, error) {
	if err := check(ctx, id); err != nil {
		return 0, err
	}
	done, err := p.turns.take(ctx, id)
	if err != nil {
		return 0, err
	}
	defer done()
	dir, _, err := p.locate(id)
	if err != nil {
		return 0, err
	}
	c, err := readChain(id, dir)
	if err != nil {
		return 0, err
	}
	if c != nil {
		return 0, blockdev.ErrLayered
	}
	if p.isAccessed(id) {
		return 0, blockdev.ErrBusy
	}
	f, err := os.OpenFile(dir+"/"+imageFile, os.O_RDWR, 0)
	if err != nil {
		return 0, notFound(err)
	}
	defer f.Close()
	o := p.known(id)
	if o == nil {
		o, err = p.unknownDevice(id, dir, f)
	}
	if err != nil || o != nil {
		return 0, errors.Join(err, blockdev.ErrBusy)
	}
	freed, err := extent.Trim(ctx, f)
	if err == nil {
		err = syncFile(f)
	}
	return freed, err
}
