package lvm

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"holdfast/blockdev"
)

// found is an image or draft as LVM reports it.
type found struct {
	row
	id    blockdev.ID
	draft bool
	size  int64
}

// find gives a published image, or else a draft. blockdev.ErrNotFound.
func (p *Pool) find(ctx context.Context, id blockdev.ID) (found, error) {
	if err := check(ctx, id); err != nil {
		return found{}, err
	}
	image, draft := imagePrefix+string(id), draftPrefix+string(id)
	rows, err := p.rows(ctx, fmt.Sprintf("(lv_name=%s || lv_name=%s) && %s", image, draft, p.ours()))
	if err != nil {
		return found{}, err
	}
	var best found
	for _, r := range rows {
		if best.Name == "" || r.Name == image {
			best = found{row: r, id: id, draft: r.Name == draft}
		}
	}
	if best.Name == "" {
		return found{}, blockdev.ErrNotFound
	}
	best.size, err = best.bytes()
	return best, err
}

// Create implements blockdev.Backend.
func (p *Pool) Create(ctx context.Context, id blockdev.ID, size int64) error {
	return blockdev.Op("lvm.Create", id, p.create(ctx, id, size))
}

func (p *Pool) create(ctx context.Context, id blockdev.ID, size int64) error {
	size, err := p.checkSize(size)
	if err == nil {
		err = p.clear(ctx, id)
	}
	if err != nil {
		return err
	}
	return p.change(ctx, "lvcreate", "-an", "-ky", "-Wn", "-V", fmt.Sprintf("%db", size), "-T", p.lv(p.thin),
		"-n", draftPrefix+string(id), "--addtag", markTag, "--addtag", p.tag())
}

// clear makes room for a draft: an earlier one goes. blockdev.ErrExists when there
// is an image.
func (p *Pool) clear(ctx context.Context, id blockdev.ID) error {
	old, err := p.find(ctx, id)
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		return nil
	case err != nil:
		return err
	case !old.draft:
		return blockdev.ErrExists
	}
	return p.removeDraft(ctx, old)
}

// removeDraft takes a draft away. An opening that a dead process made does not
// count.
func (p *Pool) removeDraft(ctx context.Context, f found) error {
	if f.active() {
		if p.isMine(f.id) {
			return fmt.Errorf("%w: the draft is open", blockdev.ErrBusy)
		}
		if err := p.deactivate(ctx, f.Name); err != nil {
			return err
		}
	}
	return p.change(ctx, "lvremove", "-f", p.lv(f.Name))
}

// Clone implements blockdev.Cloner.
func (p *Pool) Clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	return blockdev.Op("lvm.Clone", dst, p.clone(ctx, dst, src, size))
}

func (p *Pool) clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	size, err := p.checkSize(size)
	if err != nil {
		return err
	}
	if err := check(ctx, dst, src); err != nil {
		return err
	}
	from, err := p.find(ctx, src)
	switch {
	case err != nil:
		return fmt.Errorf("source %s: %w", src, err)
	case from.draft:
		return fmt.Errorf("source %s: %w", src, blockdev.ErrNotFound)
	case size < from.size && size < p.roundUp(from.size):
		return fmt.Errorf("%w: %d bytes, the source has %d", blockdev.ErrInvalid, size, from.size)
	}
	if err := p.clear(ctx, dst); err != nil {
		return err
	}
	name := draftPrefix + string(dst)
	if err := p.change(ctx, "lvcreate", "-s", "-an", "-ky", "-n", name, "--addtag", markTag, "--addtag", p.tag(), p.lv(from.Name)); err != nil {
		return err
	}
	if size == from.size {
		return nil
	}
	return p.extend(ctx, name, size)
}

func (p *Pool) extend(ctx context.Context, name string, size int64) error {
	return p.change(ctx, "lvextend", "-L", fmt.Sprintf("%db", size), p.lv(name))
}

// Publish implements blockdev.Backend.
func (p *Pool) Publish(ctx context.Context, id blockdev.ID, description []byte) error {
	return blockdev.Op("lvm.Publish", id, p.publish(ctx, id, description))
}

func (p *Pool) publish(ctx context.Context, id blockdev.ID, description []byte) error {
	f, err := p.find(ctx, id)
	if err != nil {
		return err
	}
	if f.draft && f.active() {
		if err := syncDevice(p.node(f.Name)); err != nil {
			return err
		}
	}
	if err := p.meta.describe(id, description); err != nil || !f.draft {
		return err
	}
	return p.change(ctx, "lvrename", p.group, f.Name, imagePrefix+string(id))
}

// Describe implements blockdev.Backend.
func (p *Pool) Describe(ctx context.Context, id blockdev.ID, description []byte) error {
	return blockdev.Op("lvm.Describe", id, p.describe(ctx, id, description))
}

func (p *Pool) describe(ctx context.Context, id blockdev.ID, description []byte) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	// Descriptions of images alone are there: see tidy.
	if exists, err := p.meta.has(id); err != nil || !exists {
		return errors.Join(err, ifNot(exists, blockdev.ErrNotFound))
	}
	return p.meta.describe(id, description)
}

func ifNot(ok bool, err error) error {
	if ok {
		return nil
	}
	return err
}

// Grow implements blockdev.Backend.
func (p *Pool) Grow(ctx context.Context, id blockdev.ID, size int64) error {
	return blockdev.Op("lvm.Grow", id, p.grow(ctx, id, size))
}

func (p *Pool) grow(ctx context.Context, id blockdev.ID, size int64) error {
	size, err := p.checkSize(size)
	if err != nil {
		return err
	}
	f, err := p.find(ctx, id)
	if err != nil || f.size >= size {
		return err
	}
	readOnly := false
	if f.active() {
		if readOnly, err = p.readOnly(f.Name); err != nil {
			return err
		}
	}
	if err := p.extend(ctx, f.Name, size); err != nil {
		return err
	}
	if readOnly { // a new table may have taken the mark away
		return p.setReadOnly(f.Name, true)
	}
	return nil
}

// Remove implements blockdev.Backend.
func (p *Pool) Remove(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("lvm.Remove", id, p.remove(ctx, id))
}

func (p *Pool) remove(ctx context.Context, id blockdev.ID) error {
	f, err := p.find(ctx, id)
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		return nil
	case err != nil:
		return err
	case f.draft:
		return p.removeDraft(ctx, f)
	case f.active():
		return fmt.Errorf("%w: it is open", blockdev.ErrBusy)
	}
	if err := p.change(ctx, "lvrename", p.group, f.Name, unique(trashPrefix, id)); err != nil {
		return err
	}
	p.wakeReclaim()
	return p.meta.forget(id)
}

func (p *Pool) wakeReclaim() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// reclaim removes what is in the trash: giving back the blocks of a large volume
// takes time.
func (p *Pool) reclaim(ctx context.Context) {
	defer close(p.done)
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		}
		rows, err := p.rows(ctx, p.ours())
		for _, r := range rows {
			if strings.HasPrefix(r.Name, trashPrefix) && err == nil {
				err = p.change(ctx, "lvremove", "-f", p.lv(r.Name))
			}
		}
		if err != nil && ctx.Err() == nil {
			p.log.Warn("removed images are still there: their space is reclaimed later", "pool", p.Name(), "err", err)
		}
	}
}
