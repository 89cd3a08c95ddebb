package lvm

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"

	"holdfast/blockdev"
)

// Calls take the way that is usually right and look closer when LVM refuses: a
// report costs as much as a change.

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
	rows, err := p.rows(ctx)
	if err != nil {
		return found{}, err
	}
	n := slices.IndexFunc(rows, func(r row) bool { return r.Name == imagePrefix+string(id) })
	if n < 0 {
		return found{}, blockdev.ErrNotFound
	}
	f, _, err := p.imageOf(rows[n])
	return f, err
}

// Create implements blockdev.Backend.
func (p *Pool) Create(ctx context.Context, id blockdev.ID, size int64) error {
	return blockdev.Op("lvm.Create", id, p.create(ctx, id, size))
}

func (p *Pool) create(ctx context.Context, id blockdev.ID, size int64) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	size, err := p.checkSize(size)
	if err != nil {
		return err
	}
	if err := p.admits(); err != nil {
		return err
	}
	return p.makeDraft(ctx, id, func(name string) error {
		return p.change(ctx, "create", outcome{createCommits, adds(p.fresh(name, size))}, "lvcreate", "-an", "-ky", "-Wn", "-V", fmt.Sprintf("%db", size), "-T", p.lv(p.thin), "-n", name, "--addtag", markTag, "--addtag", p.tag())
	})
}

// fresh is what LVM will report of a volume that was just made, but for its number.
func (p *Pool) fresh(name string, size int64) row {
	return row{Name: name, Size: strconv.FormatInt(size, 10), Pool: p.thin, Tags: markTag + "," + p.tag()}
}

// makeDraft makes a draft, in the place of an earlier one. blockdev.ErrExists when
// there is an image, described or not.
func (p *Pool) makeDraft(ctx context.Context, id blockdev.ID, make func(name string) error) error {
	f, err := p.find(ctx, id)
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
	case err != nil:
		return err
	case !f.draft:
		return blockdev.ErrExists
	default:
		if err := p.removeDraft(ctx, id); err != nil {
			return err
		}
	}
	if err := p.meta.beginDraft(id); err != nil {
		return err
	}
	err = make(imagePrefix + string(id))
	if errors.Is(err, blockdev.ErrExists) { // somebody else's: it must not be taken for our draft
		return errors.Join(err, p.meta.dropDraft(id))
	}
	return err
}

// removeDraft takes a draft away; absent is success. An opening that a dead
// process made does not count.
func (p *Pool) removeDraft(ctx context.Context, id blockdev.ID) error {
	name := imagePrefix + string(id)
	if _, err := p.find(ctx, id); errors.Is(err, blockdev.ErrNotFound) {
		return errors.Join(p.meta.forget(id), p.meta.dropDraft(id))
	} else if err != nil {
		return err
	}
	active, err := p.active(name)
	if err != nil {
		return err
	}
	n, err := p.note(id)
	if err != nil {
		return err
	}
	if (active || n != nil) && p.isMine(id) {
		return fmt.Errorf("%w: the draft is open", blockdev.ErrBusy)
	}
	if n != nil {
		if err := p.closeServed(ctx, id); err != nil && !errors.Is(err, blockdev.ErrFailed) {
			return err
		}
		active = false
	}
	if active {
		if err := p.deactivate(ctx, name); err != nil {
			return err
		}
	}
	err = p.change(ctx, "remove draft", outcome{removeCommits, drops(name)}, "lvremove", "-f", p.lv(name))
	if err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		return err
	}
	return errors.Join(p.meta.forget(id), p.meta.dropDraft(id))
}

// Clone implements blockdev.Cloner.
func (p *Pool) Clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	return blockdev.Op("lvm.Clone", dst, p.clone(ctx, dst, src, size))
}

func (p *Pool) clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	if err := check(ctx, dst, src); err != nil {
		return err
	}
	size, err := p.checkSize(size)
	if err != nil {
		return err
	}
	if err := p.admits(); err != nil {
		return err
	}
	from, err := p.find(ctx, src)
	switch {
	case err != nil:
		return fmt.Errorf("source %s: %w", src, err)
	case from.draft:
		return fmt.Errorf("source %s: %w", src, blockdev.ErrNotFound)
	case size < from.size:
		return fmt.Errorf("%w: %d bytes, the source has %d", blockdev.ErrInvalid, size, from.size)
	}
	return p.makeDraft(ctx, dst, func(name string) error {
		err := p.change(ctx, "clone", outcome{createCommits, adds(p.fresh(name, from.size))}, "lvcreate", "-s", "-an", "-ky", "-n", name, "--addtag", markTag, "--addtag", p.tag(), p.lv(from.Name))
		if err != nil || size == from.size {
			return err
		}
		return p.extend(ctx, name, size)
	})
}

// Snapshot implements blockdev.Snapshotter: a thin snapshot, for which the device, if
// it is active, is suspended a moment, with all that was flushed in it.
func (p *Pool) Snapshot(ctx context.Context, snap, of blockdev.ID) (held time.Duration, err error) {
	held, err = p.snapshot(ctx, snap, of)
	return held, blockdev.Op("lvm.Snapshot", snap, err)
}

func (p *Pool) snapshot(ctx context.Context, snap, of blockdev.ID) (held time.Duration, err error) {
	if err := check(ctx, snap, of); err != nil {
		return 0, err
	}
	from, err := p.find(ctx, of)
	if err != nil {
		return 0, fmt.Errorf("source %s: %w", of, err)
	}
	begin := time.Now()
	err = p.clone(ctx, snap, of, from.size)
	return time.Since(begin), err
}

func (p *Pool) extend(ctx context.Context, name string, size int64) error {
	longer := alters(name, func(r *row) { r.Size = strconv.FormatInt(size, 10) })
	return p.change(ctx, "extend", outcome{extendCommits, longer}, "lvextend", "-L", fmt.Sprintf("%db", size), p.lv(name))
}

// Publish implements blockdev.Backend.
func (p *Pool) Publish(ctx context.Context, id blockdev.ID, description []byte) error {
	return blockdev.Op("lvm.Publish", id, p.publish(ctx, id, description))
}

func (p *Pool) publish(ctx context.Context, id blockdev.ID, description []byte) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	f, err := p.find(ctx, id)
	if err == nil {
		err = p.sound()
	}
	if err != nil {
		return err
	}
	active, err := p.active(f.Name)
	if err != nil {
		return err
	}
	if f.draft && active {
		if err := p.flushVolume(f.Name); err != nil {
			return err
		}
	}
	if f.draft {
		return p.explain(p.meta.publish(id, description))
	}
	return p.explain(p.meta.describe(id, description))
}

// Describe implements blockdev.Backend.
func (p *Pool) Describe(ctx context.Context, id blockdev.ID, description []byte) error {
	return blockdev.Op("lvm.Describe", id, p.describe(ctx, id, description))
}

func (p *Pool) describe(ctx context.Context, id blockdev.ID, description []byte) error {
	f, err := p.find(ctx, id)
	if err == nil && f.draft {
		err = blockdev.ErrNotFound
	}
	if err == nil {
		err = p.sound()
	}
	if err != nil {
		return err
	}
	return p.explain(p.meta.describe(id, description))
}

// Grow implements blockdev.Backend.
func (p *Pool) Grow(ctx context.Context, id blockdev.ID, size int64) error {
	return blockdev.Op("lvm.Grow", id, p.grow(ctx, id, size))
}

func (p *Pool) grow(ctx context.Context, id blockdev.ID, size int64) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	size, err := p.checkSize(size)
	if err != nil {
		return err
	}
	f, err := p.find(ctx, id)
	if err != nil {
		return err
	}
	if f.size >= size {
		return p.growServed(ctx, id, f.size)
	}
	active, err := p.active(f.Name)
	if err != nil {
		return err
	}
	readOnly := false
	if active {
		if readOnly, err = p.readOnly(f.Name); err != nil {
			return err
		}
	}
	if err := p.extend(ctx, f.Name, size); err != nil {
		return err
	}
	if readOnly { // a new table may have taken the mark away
		if err := p.setReadOnly(f.Name, true); err != nil {
			return err
		}
	}
	return p.growServed(ctx, id, size)
}

// Remove implements blockdev.Backend.
func (p *Pool) Remove(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("lvm.Remove", id, p.remove(ctx, id))
}

func (p *Pool) remove(ctx context.Context, id blockdev.ID) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	f, err := p.find(ctx, id)
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		return errors.Join(p.meta.forget(id), p.meta.dropDraft(id))
	case err != nil:
		return err
	case f.draft:
		return p.removeDraft(ctx, id)
	}
	active, err := p.active(f.Name)
	switch {
	case err != nil:
		return err
	case active:
		return fmt.Errorf("%w: it is open", blockdev.ErrBusy)
	}
	if n, err := p.note(id); err != nil || n != nil {
		return errors.Join(err, fmt.Errorf("%w: it is open at a worker", blockdev.ErrBusy))
	}
	err = p.rename(ctx, "remove", f.Name, unique(trashPrefix, id))
	if err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		return err
	}
	p.wakeReclaim()
	return p.explain(p.meta.forget(id))
}

func (p *Pool) rename(ctx context.Context, what, name, to string) error {
	return p.change(ctx, what, outcome{renameCommits, alters(name, func(r *row) { r.Name = to })}, "lvrename", p.group, name, to)
}

func (p *Pool) wakeReclaim() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

var trashForm = regexp.MustCompile(`^` + trashPrefix + `([^.]+)\.[0-9a-f]{12}$`)

// isTrash tells what Remove has put aside, by its whole name.
func isTrash(r row) bool {
	found := trashForm.FindStringSubmatch(r.Name)
	return found != nil && blockdev.ID(found[1]).Valid()
}

// reclaim removes what is in the trash: giving back the blocks of a large volume
// takes time.
func (p *Pool) reclaim(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		}
		rows, err := p.rows(ctx)
		for _, r := range rows {
			if isTrash(r) && err == nil {
				err = p.change(ctx, "reclaim", outcome{removeCommits, drops(r.Name)}, "lvremove", "-f", p.lv(r.Name))
			}
		}
		if err != nil && ctx.Err() == nil {
			p.log.Warn("removed images are still there: their space is reclaimed later", "pool", p.Name(), "err", err)
		}
	}
}
