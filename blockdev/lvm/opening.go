package lvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/opened"
	"holdfast/internal/sys"
)

// Open implements blockdev.Backend: it activates the volume, and has a worker serve it
// where a socket is wanted first.
func (p *Pool) Open(ctx context.Context, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
	e, err := p.openImage(ctx, id, w)
	return e, blockdev.Op("lvm.Open", id, err)
}

func (p *Pool) openImage(ctx context.Context, id blockdev.ID, w blockdev.Want) (e blockdev.Endpoint, err error) {
	if err := check(ctx, id); err != nil {
		return e, err
	}
	switch {
	case len(w.Kinds) == 0:
		return e, fmt.Errorf("%w: no kind of endpoint is wanted", blockdev.ErrInvalid)
	case !slices.Contains(w.Kinds, blockdev.Block) && !p.atWorker(w.Kinds):
		return e, fmt.Errorf("a thin volume is a block device, not %v: %w", w.Kinds, errors.ErrUnsupported)
	}
	f, err := p.find(ctx, id)
	if err != nil {
		return e, err
	}
	if !f.draft {
		if _, err := p.meta.description(id); err != nil {
			return e, err
		}
	}
	active, err := p.active(f.Name)
	if err != nil {
		return e, err
	}
	note, err := p.note(id)
	switch {
	case err != nil:
		return e, err
	case note != nil:
		return p.openServed(ctx, f, *note, false, w)
	case !active && p.atWorker(w.Kinds):
		n, err := opened.New(w)
		if err != nil {
			return e, err
		}
		return p.openServed(ctx, f, n, true, w)
	case !slices.Contains(w.Kinds, blockdev.Block):
		return e, fmt.Errorf("open as a block device: %w", blockdev.ErrBusy)
	}
	return p.openBlock(ctx, f, active, w)
}

func (p *Pool) openBlock(ctx context.Context, f found, active bool, w blockdev.Want) (e blockdev.Endpoint, err error) {
	if !active {
		if err := p.activate(ctx, f.Name, w.ReadOnly); err != nil {
			return e, err
		}
	}
	readOnly, err := p.readOnly(f.Name)
	if err != nil {
		return e, err
	}
	if readOnly != w.ReadOnly {
		return e, fmt.Errorf("%w: it is open read-only=%t, not %t", blockdev.ErrBusy, readOnly, w.ReadOnly)
	}
	lease, err := p.lease(f.Name)
	if err != nil {
		return e, err
	}
	p.own(f.id, true)
	return blockdev.Endpoint{Kind: blockdev.Block, Path: p.node(f.Name), Size: f.size, ReadOnly: readOnly, Lease: lease}, nil
}

// activate makes a volume's device. A volume that is to be read-only is so before
// its caller hears of it.
func (p *Pool) activate(ctx context.Context, name string, readOnly bool) error {
	if err := p.tell(ctx, "activate", "lvchange", "-ay", "-K", p.lv(name)); err != nil {
		return p.explain(err)
	}
	if !readOnly {
		return nil
	}
	if err := p.setReadOnly(name, true); err != nil {
		return errors.Join(err, p.deactivate(context.WithoutCancel(ctx), name))
	}
	return nil
}

func (p *Pool) deactivate(ctx context.Context, name string) error {
	return p.tell(ctx, "deactivate", "lvchange", "-an", p.lv(name))
}

func (p *Pool) withNode(name string, fn func(*os.File) error) error {
	f, err := os.OpenFile(p.node(name), os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(fn(f), f.Close())
}

func (p *Pool) setReadOnly(name string, readOnly bool) error {
	return p.fault.effect("set read-only", func() error {
		return p.withNode(name, func(f *os.File) error { return sys.SetDeviceReadOnly(f, readOnly) })
	})
}

func (p *Pool) readOnly(name string) (is bool, err error) {
	err = p.withNode(name, func(f *os.File) error { is, err = sys.DeviceReadOnly(f); return err })
	return is, err
}

// lease names one activation: the kernel numbers block devices as they are made,
// and never gives a number twice until the next boot (Documentation/ABI/stable/
// sysfs-block, diskseq).
func (p *Pool) lease(name string) (string, error) {
	device, ok, err := sys.MapperDevice(p.dmName(name))
	if err == nil && !ok {
		err = fmt.Errorf("%w: its device is gone", blockdev.ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	number, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/diskseq", device.Major, device.Minor))
	if err != nil {
		return "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return "dm:" + strings.TrimSpace(string(boot)) + ":" + strings.TrimSpace(string(number)), nil
}

// Close implements blockdev.Backend: it flushes and deactivates the volume.
func (p *Pool) Close(ctx context.Context, id blockdev.ID, lease string) error {
	return blockdev.Op("lvm.Close", id, p.closeImage(ctx, id, lease))
}

func (p *Pool) closeImage(ctx context.Context, id blockdev.ID, lease string) error {
	if !id.Valid() {
		return fmt.Errorf("image id %q: %w", string(id), blockdev.ErrInvalid)
	}
	n, err := p.note(id)
	switch {
	case err != nil:
		return err
	case n != nil && n.Lease() == lease:
		return p.closeServed(ctx, id)
	case n != nil:
		return nil
	}
	f, err := p.find(ctx, id)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if active, err := p.active(f.Name); err != nil || !active {
		return err
	}
	now, err := p.lease(f.Name)
	if err != nil || now != lease {
		return err
	}
	if err := p.flushVolume(f.Name); err != nil {
		return err
	}
	if err := p.deactivate(ctx, f.Name); err != nil {
		return err
	}
	p.own(id, false)
	return nil
}

// own remembers whether this process has an image open.
func (p *Pool) own(id blockdev.ID, open bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if open {
		p.mine[id] = true
	} else {
		delete(p.mine, id)
	}
}

func (p *Pool) isMine(id blockdev.ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mine[id]
}
