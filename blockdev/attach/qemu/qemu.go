package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/attach/vmguest"
	"holdfast/blockdev/attach/vmsocket"
)

// Type is the target type that this attacher serves.
const Type = "qemu"

// endTime bounds the wait for the end of a process that has hung up, and is not ending yet.
const endTime = 50 * time.Millisecond

// Options configure an Attacher.
type Options struct {
	Door   *vmsocket.Door // to the monitors that the operator allows
	Wait   time.Duration  // for a guest to let a device go; 0: 5 s
	Answer time.Duration  // for a monitor to greet, and an agent in the guest to say something; 0: 5 s
	// Command bounds one command, which takes milliseconds as a rule; 0: 10 s.
	Command time.Duration
	AIO     AIO // "": Auto
}

// Attacher is an attach.Attacher, attach.Resizer, attach.Limiter, attach.Sentry and
// attach.Guest.
type Attacher struct {
	*vmguest.Agents
	o Options
}

var (
	_ attach.Attacher = (*Attacher)(nil)
	_ attach.Resizer  = (*Attacher)(nil)
	_ attach.Sentry   = (*Attacher)(nil)
	_ attach.Named    = (*Attacher)(nil)
	_ attach.Limiter  = (*Attacher)(nil)
	_ attach.Meter    = (*Attacher)(nil)
	_ attach.Guest    = (*Attacher)(nil)
	_ attach.Chooser  = (*Attacher)(nil)
)

// New gives an Attacher.
func New(o Options) *Attacher {
	if o.Wait <= 0 {
		o.Wait = 5 * time.Second
	}
	if o.Answer <= 0 {
		o.Answer = 5 * time.Second
	}
	if o.Command <= 0 {
		o.Command = 10 * time.Second
	}
	serial := func(r attach.Request) (string, error) { return Serial(r.Volume), nil }
	return &Attacher{&vmguest.Agents{Door: o.Door, Serial: serial, Patience: o.Answer}, o}
}

// Needs is the image itself: QEMU does its own I/O, and a file spares it the loop
// device.
func (a *Attacher) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block, blockdev.VhostUser}, Raw: true}
}

// KindsFor implements attach.Chooser, see vmsocket.KindsFor.
func (a *Attacher) KindsFor(t attach.Target) []blockdev.Kind { return vmsocket.KindsFor(t) }

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
	t, err := a.o.Door.Resolve(ctx, Type, t, mountPath)
	if err != nil {
		return t, err
	}
	err = a.with(ctx, t, func(m *machine) error {
		if t.Shared, err = m.sharesMemory(ctx); err != nil {
			return err
		}
		if err := vmsocket.Private(t, "-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem"); err != nil {
			return err
		}
		if t.Transport != "" {
			_, err = m.ports(ctx)
			return err
		}
		_, err = m.places(ctx)
		return err
	})
	if err == nil {
		err = a.Greet(ctx, t)
	}
	return t, err
}

// Attach plugs the volume in. It is there already is success; blockdev.ErrBusy when
// there is no place for it, or it is there in the other mode. What fails leaves
// nothing in the machine.
func (a *Attacher) Attach(ctx context.Context, r attach.Request) error {
	return blockdev.Op("qemu.Attach", r.Volume, a.with(ctx, r.Target, func(m *machine) error {
		if err := a.o.Door.SeesImage(r); err != nil {
			return err
		}
		if r.Endpoint.Kind == blockdev.VhostUser {
			return m.plugServed(ctx, r)
		}
		return m.plug(ctx, r)
	}))
}

// Detach asks the guest to let the device go and closes the image: on nil QEMU has
// it open no more. blockdev.ErrBusy when the guest does not answer in Options.Wait;
// it was asked then, and may let go later. Where the target names QEMU's own guest
// agent, the filesystem is flushed first.
func (a *Attacher) Detach(ctx context.Context, r attach.Request) error {
	// An agent that does not answer keeps no device: the guest is asked for it as well.
	flushed := a.flushInside(ctx, r)
	if errors.Is(flushed, blockdev.ErrGone) {
		return nil
	}
	err := a.with(ctx, r.Target, func(m *machine) error {
		if err := m.unplug(ctx, r.Volume); err != nil {
			return errors.Join(err, flushed)
		}
		held, err := a.o.Door.HoldsImage(r)
		if err == nil && held {
			err = busy("the virtual machine has closed the volume and still has its image open, by other means")
		}
		return err
	})
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	return blockdev.Op("qemu.Detach", r.Volume, err)
}

// Resized implements attach.Resizer. The image has its size already. A reader is not
// told, and that is success: QEMU cannot. What a worker serves grows by the worker, which
// tells the guest.
func (a *Attacher) Resized(ctx context.Context, r attach.Request) error {
	if r.Endpoint.Kind == blockdev.VhostUser {
		return nil
	}
	return blockdev.Op("qemu.Resized", r.Volume, a.with(ctx, r.Target, func(m *machine) error { return m.resize(ctx, r) }))
}

// Probe implements attach.Attacher. A volume that the agent should have mounted, and
// says it has not, is missing.
func (a *Attacher) Probe(ctx context.Context, r attach.Request) (state attach.State, err error) {
	err = a.with(ctx, r.Target, func(m *machine) error {
		there, err := m.hasDevice(ctx, deviceName(r.Volume))
		if err == nil && there && !a.Missing(ctx, r) {
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
	return blockdev.Op("qemu.AwaitEnd", "", a.o.Door.AwaitEnd(ctx, t))
}

// Fence kills the machine's process and waits until it has ended. Gone already is
// success.
func (a *Attacher) Fence(ctx context.Context, r attach.Request) error {
	return blockdev.Op("qemu.Fence", r.Volume, a.o.Door.Kill(ctx, r.Target))
}

// with runs do with the machine's monitor. Any error of a machine that has ended
// meanwhile is blockdev.ErrGone.
func (a *Attacher) with(ctx context.Context, t attach.Target, do func(*machine) error) error {
	process, err := a.o.Door.Open(t)
	if err != nil {
		return err
	}
	defer process.Close()
	m, err := a.monitor(ctx, t)
	if err == nil {
		err = do(&machine{m, a.o})
		_ = m.Close()
	}
	if err == nil {
		return nil
	}
	if hungUp(err) {
		ending, cancel := context.WithTimeout(ctx, endTime)
		defer cancel()
		_ = a.o.Door.AwaitEnd(ending, t)
	}
	if gone := process.Gone(ctx); gone != nil {
		return gone
	}
	if hungUp(err) {
		return hindered{"the monitor has hung up: whether its last command was carried out is not known", err}
	}
	return err
}

// hungUp reports whether the other end of the connection has ended it.
func hungUp(err error) bool {
	return errors.Is(err, qmp.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)
}

func (a *Attacher) monitor(ctx context.Context, t attach.Target) (*qmp.Monitor, error) {
	conn, err := a.o.Door.Dial(ctx, t)
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, a.o.Answer)
	defer cancel()
	m, err := qmp.Open(bounded, conn)
	switch {
	case errors.Is(err, qmp.ErrNotQMP):
		return nil, fmt.Errorf("%w: what listens on the socket is not a monitor (QMP) of QEMU", blockdev.ErrInvalid)
	case err != nil && ctx.Err() == nil && bounded.Err() != nil:
		return nil, busy("the monitor does not answer within %s: it has another client, or its process is stopped", a.o.Answer)
	}
	return m, err
}

// hindered is a blockdev.ErrBusy of a virtual machine, in its own words.
type hindered struct {
	text  string
	cause error // nil for none
}

func (h hindered) Error() string { return h.text }

// Is lets it be told as blockdev.ErrBusy.
func (h hindered) Is(target error) bool { return target == blockdev.ErrBusy }

func (h hindered) Unwrap() error { return h.cause }

func busy(format string, args ...any) error { return hindered{text: fmt.Sprintf(format, args...)} }
