package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
)

// statTime bounds a question of statistics to a guest.
const statTime = 3 * time.Second

// agentOf is how the agent in a target's guest is asked, nil where there is none.
func (e *Engine) agentOf(t attach.Target) attach.Guest {
	if g, ok := e.o.Attachers[t.Type].(attach.Guest); ok && g.HasAgent(t) {
		return g
	}
	return nil
}

// inside finds the attachment through whose agent a volume's filesystem can be
// worked on: attached, and for more than looking writable.
func (e *Engine) inside(v Volume, readers bool) (Attachment, attach.Guest) {
	for _, a := range v.Attachments {
		if g := e.agentOf(a.Target); g != nil && a.Phase == Attached && (readers || !a.ReadOnly) {
			return a, g
		}
	}
	return Attachment{}, nil
}

// mayWork refuses what cannot be done to a volume's filesystem, here or by an agent.
func (e *Engine) mayWork(v Volume, what string) error {
	if _, g := e.inside(v, false); g != nil {
		v.Tainted = false // this host does not mount it
	}
	return v.hostMay(what)
}

// askInside is a step in a guest.
func (e *Engine) askInside(ctx context.Context, v Volume, a Attachment, what string, ask func(context.Context, attach.Request) error) error {
	return e.step(ctx, v.ID, what, func(ctx context.Context) error {
		request, err := e.request(ctx, v, a)
		if err != nil {
			return err
		}
		return ask(ctx, request)
	})
}

// mounted is where a volume's filesystem is mounted: at a directory of this host, or
// in a guest.
type mounted struct {
	e     *Engine
	v     Volume
	dir   string
	guest attach.Guest // nil: here
	a     Attachment
}

// mountOf finds where an attached volume is mounted.
func (e *Engine) mountOf(ctx context.Context, v Volume) (mounted, error) {
	if a, g := e.inside(v, false); g != nil {
		return mounted{e: e, v: v, guest: g, a: a}, nil
	}
	dir, err := e.o.Stage.Mounted(ctx, v.ID)
	if err == nil && dir == "" {
		err = problem(ErrConflict, "", "volume %q is not mounted on this host", v.Name)
	}
	return mounted{e: e, v: v, dir: dir}, err
}

// sync makes durable what was written, and what was removed free.
func (m mounted) sync(ctx context.Context) error {
	if m.guest == nil {
		return m.e.o.Filesystems.SyncMounted(ctx, m.dir, m.v.Filesystem)
	}
	return guestError(m.v, m.e.askInside(ctx, m.v, m.a, stepInside, m.guest.SyncInside))
}

func (m mounted) trim(ctx context.Context, from, length int64) (filesystem.Trimmed, error) {
	if m.guest == nil {
		return m.e.o.Filesystems.TrimMounted(ctx, m.dir, m.v.Filesystem, from, length)
	}
	t, err := stepOf(ctx, m.e, m.v.ID, stepInside, func(ctx context.Context) (filesystem.Trimmed, error) {
		request, err := m.e.request(ctx, m.v, m.a)
		if err != nil {
			return filesystem.Trimmed{}, err
		}
		return m.guest.TrimInside(ctx, request, from, length)
	})
	return t, guestError(m.v, err)
}

func (m mounted) freeze(ctx context.Context, timeout time.Duration) error {
	if m.guest == nil {
		return m.e.o.Filesystems.Freeze(m.dir)
	}
	return guestError(m.v, m.e.askInside(ctx, m.v, m.a, stepInside, func(ctx context.Context, r attach.Request) error {
		return m.guest.FreezeInside(ctx, r, timeout)
	}))
}

// thawInside asks the guest to thaw; it does so by itself at the freeze's end.
func (e *Engine) thawInside(ctx context.Context, v Volume, a Attachment, g attach.Guest) error {
	bounded, cancel := context.WithTimeout(ctx, e.o.StepLimit)
	defer cancel()
	// Not a step: a thaw waits for no lock of the volume, nor does it change the image.
	err := g.ThawInside(bounded, attach.Request{Volume: v.ID, Target: a.Target, MountPath: a.MountPath})
	if errors.Is(err, blockdev.ErrGone) || errors.Is(err, attach.ErrNotInside) {
		return nil
	}
	return guestError(v, err)
}

// guestError tells a user what a guest has not done.
func guestError(v Volume, err error) error {
	switch {
	case err == nil, isProblem(err):
		return err
	case hangs(err) != nil:
		return hangingProblem(v, err)
	case errors.Is(err, blockdev.ErrGone):
		return &Problem{Kind: ErrConflict, Message: fmt.Sprintf("the virtual machine of volume %q has ended", v.Name), Err: err}
	case errors.Is(err, errors.ErrUnsupported):
		return &Problem{Kind: ErrUnsupported, Message: fmt.Sprintf("volume %q: %s", v.Name, innermost(err)), Err: err}
	case errors.Is(err, blockdev.ErrBusy):
		return &Problem{Kind: ErrConflict, Message: fmt.Sprintf("volume %q: %s", v.Name, innermost(err)), Err: err}
	}
	return err
}

// mountInside mounts an attached volume in its guest, where a place for it is named.
func (e *Engine) mountInside(ctx context.Context, v Volume, a Attachment) error {
	g := e.agentOf(a.Target)
	if g == nil || a.MountPath == "" {
		return nil
	}
	return e.askInside(ctx, v, a, stepMountInside, g.MountInside)
}

// growInside grows the filesystem in the guest. What cannot be done now is pending.
func (e *Engine) growInside(ctx context.Context, v *Volume) error {
	a, g := e.inside(*v, false)
	if g == nil {
		return nil
	}
	if v.frozenAt(e.o.Now()) {
		e.setPending(v.ID, "the filesystem grows when it is thawed")
		return nil
	}
	err := e.askInside(ctx, *v, a, stepInside, g.GrowInside)
	switch {
	case err == nil:
		v.GuestMiB = v.SizeMiB
		e.setPending(v.ID, "")
		return e.save(ctx, v)
	case hangs(err) != nil, lostWrite(err):
		return err
	case errors.Is(err, attach.ErrNotInside):
		e.setPending(v.ID, "the filesystem grows when it is mounted in the guest")
	case errors.Is(err, blockdev.ErrBusy):
		e.setPending(v.ID, "growing in the guest is tried again: "+innermost(err))
	default:
		e.setPending(v.ID, pendingFailed)
	}
	e.o.Log.Info("a filesystem does not grow in its guest yet", "volume", v.ID, "workspace", v.Workspace, "err", err)
	e.postpone(v.ID)
	e.watch(v.ID)
	return nil
}

// leaveGuest unmounts a volume in its guest before its device is taken away.
// attach.ErrInUse, and nothing has changed, while it is in use there. What was never
// attached holds nothing that anybody was promised: it goes in any case.
func (e *Engine) leaveGuest(ctx context.Context, v Volume, a Attachment, lazy bool) error {
	g := e.agentOf(a.Target)
	if g == nil || v.Filesystem == filesystem.None && a.MountPath == "" {
		return nil
	}
	err := e.askInside(ctx, v, a, stepUnmountInside, func(ctx context.Context, r attach.Request) error {
		r.Lazy = lazy
		return g.UnmountInside(ctx, r)
	})
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	return err
}

// pullOut takes a volume out of a machine whose guest does not let it go: the agent
// flushes and hides it, if it can, and the device goes. errors.ErrUnsupported when
// that does not do.
func (e *Engine) pullOut(ctx context.Context, v Volume, a Attachment) error {
	if e.agentOf(a.Target) == nil {
		return errors.ErrUnsupported // its device was asked for already
	}
	if err := e.leaveGuest(ctx, v, a, true); err != nil {
		e.o.Log.Warn("a volume that is taken away by force could not be unmounted in its guest", "volume", v.ID, "attachment", a.ID, "err", err)
	}
	err := e.leaveSandbox(ctx, v, a, true)
	if err == nil && len(v.Attachments) == 1 {
		err = e.closeDevice(ctx, v)
	}
	if errors.Is(err, blockdev.ErrBusy) {
		return errors.Join(errors.ErrUnsupported, err)
	}
	return err
}

// statsInside asks a guest for the statistics of a volume.
func (e *Engine) statsInside(ctx context.Context, v Volume, s Stats) (Stats, error) {
	a, g := e.inside(v, true)
	if g == nil {
		s.Unknown = "the filesystem is in use by a virtual machine: ask there"
		return s, nil
	}
	release, free := e.locks.try(v.ID)
	if !free {
		s.Unknown = "something is being done to the volume: ask again"
		return s, nil
	}
	defer release()
	bounded, cancel := context.WithTimeout(ctx, statTime)
	defer cancel()
	type told struct {
		usage  filesystem.Usage
		frozen bool
	}
	said, err := stepOf(bounded, e, v.ID, stepInside, func(ctx context.Context) (t told, err error) {
		request, err := e.request(ctx, v, a)
		if err == nil {
			t.usage, t.frozen, err = g.StatInside(ctx, request)
		}
		return t, err
	})
	switch {
	case errors.Is(err, attach.ErrNotInside):
		s.Unknown = "the volume is attached to a virtual machine, and not mounted there"
	case errors.Is(err, blockdev.ErrBusy):
		s.Unknown = "the guest was asked: " + innermost(err)
	case err != nil && ctx.Err() != nil:
		return s, err
	case err != nil:
		s.Unknown = "the guest could not be asked"
		e.o.Log.Warn("no statistics of a volume in a guest", "volume", v.ID, "workspace", v.Workspace, "err", err)
	default:
		s.State, s.Filesystem = Mounted, &said.usage
		if said.frozen {
			s.State, s.Freeze = Frozen, v.Frozen
		}
	}
	return s, nil
}

// Remains says in plain words what of an attachment is left to its guest, or to who
// connects to an export; "" for nothing.
func (e *Engine) Remains(a Attachment) string {
	if !e.isRaw(a.Target) {
		return ""
	}
	device := "the device"
	if a.Serial != "" {
		device = "/dev/disk/by-id/virtio-" + a.Serial
	}
	switch {
	case a.Target.Protocol == string(blockdev.NBD):
		return "For who connects: connect again after the volume has grown, then grow its filesystem; unmount it and hang up before the volume is detached."
	case a.Target.Protocol != "":
		return "For who connects: grow its filesystem after the volume has grown; unmount it and hang up before the volume is detached."
	case e.agentOf(a.Target) == nil:
		return fmt.Sprintf("In the guest: mount %s, grow its filesystem after the volume has grown, and unmount it before the volume is detached. No agent is named in the target.", device)
	case a.MountPath == "":
		return fmt.Sprintf("In the guest: mount %s. The agent grows, trims, freezes and unmounts it.", device)
	}
	return ""
}
