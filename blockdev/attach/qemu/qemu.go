package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// Type is the target type that this attacher serves.
const Type = "qemu"

// Options configure an Attacher.
type Options struct {
	// Prefixes are the directories below which targets may name monitors: absolute,
	// clean, other than "/". None means that no target is allowed.
	Prefixes []string
	Wait     time.Duration // for a guest to let a device go; 0: 5 s
	Answer   time.Duration // for a monitor to greet; 0: 5 s
}

// killTime bounds how long Fence waits for a killed process to end: one that hangs
// in the kernel does not.
const killTime = 10 * time.Second

// Attacher is an attach.Attacher, attach.Resizer and attach.Sentry.
type Attacher struct {
	o    Options
	boot string
}

var (
	_ attach.Attacher = (*Attacher)(nil)
	_ attach.Resizer  = (*Attacher)(nil)
	_ attach.Sentry   = (*Attacher)(nil)
	_ attach.Named    = (*Attacher)(nil)
)

// New checks the configuration. blockdev.ErrInvalid names the rule.
func New(o Options) (*Attacher, error) {
	for _, p := range o.Prefixes {
		if err := validPath(p); err != nil {
			return nil, blockdev.Op("qemu.New", "", err)
		}
	}
	if o.Wait <= 0 {
		o.Wait = 5 * time.Second
	}
	if o.Answer <= 0 {
		o.Answer = 5 * time.Second
	}
	boot, err := sys.BootID()
	if err != nil {
		return nil, blockdev.Op("qemu.New", "", err)
	}
	return &Attacher{o: o, boot: boot}, nil
}

// Needs is the image itself: QEMU does its own I/O, and a file spares it the loop
// device.
func (a *Attacher) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}, Raw: true}
}

// Serial implements attach.Named; see the function.
func (a *Attacher) Serial(id blockdev.ID) string { return Serial(id) }

// Resolve checks the target, finds the machine's process and looks for a place for
// one more device, so that what can be known to fail does before a volume is
// touched. blockdev.ErrGone when nobody listens there, blockdev.ErrBusy when the
// monitor has another client or the machine no free slot.
func (a *Attacher) Resolve(ctx context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	resolved, err := a.resolve(ctx, t, mountPath)
	return resolved, blockdev.Op("qemu.Resolve", "", err)
}

func (a *Attacher) resolve(ctx context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	switch {
	case mountPath != "":
		return t, invalid("mountPath does not apply to a qemu target: the guest mounts the device itself")
	case t.Path != "" || t.Container != "" || t.Root != "":
		return t, invalid("target.path, target.container and target.root do not apply to a qemu target")
	}
	monitor, err := a.dial(ctx, t.Socket)
	if err != nil {
		return t, err
	}
	m := &machine{Monitor: monitor, wait: a.o.Wait}
	defer m.close()
	pid, err := monitor.Pid()
	if err != nil {
		return t, err
	}
	if pid == 0 {
		return t, invalid("the virtual machine runs in a pid namespace that this server cannot see")
	}
	if m.process, err = openProcess(pid); err != nil {
		return t, err
	}
	if _, err := m.places(ctx); err != nil {
		return t, err
	}
	return attach.Target{Type: Type, Socket: t.Socket, Pid: pid, StartTime: m.process.startTime, Boot: a.boot}, nil
}

// Attach plugs the volume in. It is there already is success; blockdev.ErrBusy when
// there is no place for it, or it is there in the other mode. What fails leaves
// nothing in the machine.
func (a *Attacher) Attach(ctx context.Context, r attach.Request) error {
	return blockdev.Op("qemu.Attach", r.Volume, a.with(ctx, r.Target, func(m *machine) error { return m.plug(ctx, r) }))
}

// Detach asks the guest to let the device go and closes the image: on nil QEMU has
// it open no more. blockdev.ErrBusy when the guest does not answer in Options.Wait;
// it was asked then, and may let go later.
func (a *Attacher) Detach(ctx context.Context, r attach.Request) error {
	err := a.with(ctx, r.Target, func(m *machine) error { return m.unplug(ctx, r.Volume) })
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	return blockdev.Op("qemu.Detach", r.Volume, err)
}

// Resized implements attach.Resizer. The image has its size already.
func (a *Attacher) Resized(ctx context.Context, r attach.Request) error {
	return blockdev.Op("qemu.Resized", r.Volume, a.with(ctx, r.Target, func(m *machine) error { return m.resize(ctx, r) }))
}

// Probe implements attach.Attacher.
func (a *Attacher) Probe(ctx context.Context, r attach.Request) (state attach.State, err error) {
	err = a.with(ctx, r.Target, func(m *machine) error {
		there, err := m.hasDevice(ctx, deviceName(r.Volume))
		if err == nil && there {
			state = attach.StateAttached
		} else if err == nil {
			state = attach.StateMissing
		}
		return err
	})
	if errors.Is(err, blockdev.ErrGone) {
		return attach.StateGone, nil
	}
	return state, blockdev.Op("qemu.Probe", r.Volume, err)
}

// AwaitEnd implements attach.Sentry by the process's descriptor.
func (a *Attacher) AwaitEnd(ctx context.Context, t attach.Target) error {
	p, err := a.open(t)
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	if err != nil {
		return blockdev.Op("qemu.AwaitEnd", "", err)
	}
	defer p.close()
	return blockdev.Op("qemu.AwaitEnd", "", sys.AwaitEnd(ctx, p.pidfd))
}

// Fence kills the machine's process and waits until it has ended. Gone already is
// success.
func (a *Attacher) Fence(ctx context.Context, r attach.Request) error {
	return blockdev.Op("qemu.Fence", r.Volume, a.fence(ctx, r.Target))
}

func (a *Attacher) fence(ctx context.Context, t attach.Target) error {
	p, err := a.open(t)
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	if err := sys.KillProcess(p.pidfd); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	if err := sys.AwaitEnd(bounded, p.pidfd); err != nil {
		return fmt.Errorf("%w: process %d of the virtual machine was killed and does not end: %w", attach.ErrCannotFence, p.pid, err)
	}
	return nil
}

// with runs do with the machine's monitor. An error of a machine that has ended
// meanwhile is blockdev.ErrGone.
func (a *Attacher) with(ctx context.Context, t attach.Target, do func(*machine) error) error {
	m, err := a.connect(ctx, t)
	if errors.Is(err, blockdev.ErrGone) && !a.ended(t) {
		// Its socket is gone, or refuses: that proves nothing of the process.
		return busy("the virtual machine runs and its monitor is not there: %s", err.Error())
	}
	if err != nil {
		return err
	}
	defer m.close()
	err = do(m)
	if err != nil {
		if ended := m.process.alive(); ended != nil {
			return ended
		}
	}
	return err
}

func (a *Attacher) ended(t attach.Target) bool {
	p, err := a.open(t)
	if err == nil {
		p.close()
	}
	return errors.Is(err, blockdev.ErrGone)
}
