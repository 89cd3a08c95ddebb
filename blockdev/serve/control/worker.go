package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/internal/sys"
)

// Status asks how the volume does. blockdev.ErrNotFound when the worker has ended.
func (w *Worker) Status(ctx context.Context) (serve.Service, error) {
	reply, err := w.call(ctx, &wire.Request{Op: wire.Status})
	if err == nil && reply.Service == nil {
		err = fmt.Errorf("%w: no status came", wire.ErrProtocol)
	}
	if err != nil {
		return serve.Service{}, blockdev.Op("control.Status", w.id, err)
	}
	service := *reply.Service
	service.Pid = w.pid
	return service, nil
}

// Throttle makes exactly these limits hold; the zero Limits lift all.
func (w *Worker) Throttle(ctx context.Context, limits blockdev.Limits) error {
	_, err := w.call(ctx, &wire.Request{Op: wire.Throttle, Limits: &limits})
	return blockdev.Op("control.Throttle", w.id, err)
}

// Grow makes the volume size bytes large and tells its clients. A flat image's file
// is that large already, durably; a layered one is grown by the worker, durably on
// return.
func (w *Worker) Grow(ctx context.Context, size int64) error {
	_, err := w.call(ctx, &wire.Request{Op: wire.Grow, Size: size})
	return blockdev.Op("control.Grow", w.id, err)
}

// Seal puts next, files at which overlay.Make has been, on top: what the volume
// reads as at this moment stays in the layers below, durably on return. record makes
// next and the new stack durable; it is called before anything is written to next, and
// as long as it lasts all goes on as ever. held is how long requests waited. A flat
// image's file becomes the base of a new overlay, whose only layer is next.
//
// When record fails the stack stays as it was, unless with blockdev.ErrFailed: then the
// volume fails, since nobody knows what is recorded. When this process ends before
// record has returned, the change waits until Settle is called by the next one.
func (w *Worker) Seal(ctx context.Context, next Layer, record func() error) (held time.Duration, err error) {
	reply, err := w.converse(ctx, &wire.Request{Op: wire.Seal, Name: filepath.Base(next.Data.Name())},
		func(wire.Pending) error { return record() }, next.Data, next.Map)
	if err != nil {
		return 0, blockdev.Op("control.Seal", w.id, err)
	}
	return time.Duration(reply.Held), nil
}

// Merge says which layers become one, and how: see overlay.Merge.
type Merge struct {
	Layer int    // the upper one, 0 is the top; the one below it is the lower
	Down  *Layer // of the lower one, to be written; not for layer 0. nil: upwards
	Most  int64  // bytes to copy; 0: all
	// Copied is set, if not nil, to how many bytes were copied, as overlay.Merge counts
	// them; it stays where the worker does not tell.
	Copied *int64
}

// Merge makes one layer of two; record makes the shorter stack durable. When it fails the
// stack stays as it was. done is false when it has ended early. See overlay.Merge and,
// for the end of this process meanwhile, Settle.
func (w *Worker) Merge(ctx context.Context, m Merge, record func() error) (done bool, err error) {
	request := &wire.Request{Op: wire.Absorb, Layer: m.Layer, Most: m.Most, Down: m.Down != nil}
	var files []*os.File
	if m.Down != nil {
		files = []*os.File{m.Down.Data, m.Down.Map}
	}
	reply, err := w.converse(ctx, request, func(wire.Pending) error { return record() }, files...)
	if err != nil {
		return false, blockdev.Op("control.Merge", w.id, err)
	}
	if m.Copied != nil && reply.Copied != nil {
		*m.Copied = *reply.Copied
	}
	return !reply.More, nil
}

// Change is a change of the stack that waits for its record.
type Change struct {
	Sealed string // base name of the data file of the layer that Seal has put on top; or ""
	Layer  int    // and this layer is what Merge takes out
}

// Settle ends a Seal or Merge whose caller ended before its record was there: record
// gets what was to be recorded, makes it durable (it may be already), and is followed
// as in Seal and Merge. Nothing waits is success, without a call.
func (w *Worker) Settle(ctx context.Context, record func(Change) error) error {
	_, err := w.converse(ctx, &wire.Request{Op: wire.Settle}, func(p wire.Pending) error {
		return record(Change{Sealed: p.Name, Layer: p.Layer})
	})
	return blockdev.Op("control.Settle", w.id, err)
}

// SetAddress has the worker ask for its base at url from now on, and follow redirects
// below the prefixes; what waits for the address before is asked for anew. It is
// forgotten with the worker. blockdev.ErrInvalid for an address that is none, or where
// the base is none that is far away.
func (w *Worker) SetAddress(ctx context.Context, url string, prefixes []string) error {
	_, err := w.call(ctx, &wire.Request{Op: wire.Address, Remote: &wire.Remote{URL: url, Prefixes: prefixes}})
	return blockdev.Op("control.SetAddress", w.id, err)
}

// Expose has the worker take clients over the network; see serve.Exposer.
func (w *Worker) Expose(ctx context.Context, e serve.Exposure) error {
	r := &wire.Request{Op: wire.Expose, Expose: &wire.Exposure{
		Name: e.Name, Socket: e.Socket != nil, Certificate: e.Certificate, Key: e.Key, Authorities: e.Authorities, Clients: e.Clients,
	}}
	var files []*os.File
	if e.Socket != nil {
		files = append(files, e.Socket)
	}
	_, err := w.call(ctx, r, files...)
	return blockdev.Op("control.Expose", w.id, err)
}

// Withdraw ends what Expose began; see serve.Exposer.
func (w *Worker) Withdraw(ctx context.Context, name string, force bool) error {
	_, err := w.call(ctx, &wire.Request{Op: wire.Withdraw, Name: name, Force: force})
	return blockdev.Op("control.Withdraw", w.id, err)
}

// Trace gives the chunks of 1 MiB that were missed, in the order of the first miss.
func (w *Worker) Trace(ctx context.Context) ([]int64, error) {
	reply, err := w.call(ctx, &wire.Request{Op: wire.Trace})
	if err != nil {
		return nil, blockdev.Op("control.Trace", w.id, err)
	}
	return reply.Trace, nil
}

// Stop has the worker finish what has begun, flush and end, and returns when it has
// ended and nothing of it is left. A virtual machine keeps what has not begun for
// the next worker. blockdev.ErrFailed when the flush failed, or an earlier one had;
// it has ended nevertheless. It runs no more is success.
func (w *Worker) Stop(ctx context.Context) error {
	return blockdev.Op("control.Stop", w.id, w.end(ctx, w.hold, func(*os.File) error {
		_, err := w.call(ctx, &wire.Request{Op: wire.Stop})
		if errors.Is(err, blockdev.ErrNotFound) {
			err = nil
		}
		return err
	}))
}

// Kill ends the worker at once, also one that does not answer: what was not flushed may
// be lost. On return it has ended, and nothing reaches the image through it any more.
func (w *Worker) Kill(ctx context.Context) error {
	return blockdev.Op("control.Kill", w.id, w.end(ctx, w.seize, sys.KillProcess))
}

// AwaitEnd returns nil when the process has ended, and an error when ctx has.
func (w *Worker) AwaitEnd(ctx context.Context) error {
	pidfd, err := w.hold(ctx)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return blockdev.Op("control.AwaitEnd", w.id, err)
	}
	defer pidfd.Close()
	return blockdev.Op("control.AwaitEnd", w.id, sys.AwaitEnd(ctx, pidfd))
}

// end ends the process and takes away what is left of it.
func (w *Worker) end(ctx context.Context, hold func(context.Context) (*os.File, error), how func(pidfd *os.File) error) error {
	halted := w.halt(ctx, hold, how)
	if halted != nil && !errors.Is(halted, blockdev.ErrFailed) {
		return halted
	}
	return errors.Join(halted, w.s.clear(ctx, w.home))
}

// halt ends the process.
func (w *Worker) halt(ctx context.Context, hold func(context.Context) (*os.File, error), how func(pidfd *os.File) error) error {
	pidfd, err := hold(ctx)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pidfd.Close()
	asked := how(pidfd)
	if asked != nil && !errors.Is(asked, blockdev.ErrFailed) {
		return asked
	}
	if err := sys.AwaitEnd(ctx, pidfd); err != nil {
		if asked != nil { // it is not blockdev.ErrFailed, which says that the worker has ended
			return fmt.Errorf("the worker does not end: %w, and it said: %s", err, asked.Error())
		}
		return fmt.Errorf("the worker does not end: %w", err)
	}
	return asked
}

// hold opens the worker's process. That it is this one is proven by its answering
// after.
func (w *Worker) hold(ctx context.Context) (*os.File, error) {
	c, err := w.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	pidfd, err := sys.OpenPidfd(w.pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, fmt.Errorf("%w (%w)", errEnded, err)
	}
	if err != nil {
		return nil, err
	}
	if _, err := talkWithin(ctx, c, &wire.Request{Op: wire.Status}, nil, nil); err != nil {
		return nil, errors.Join(err, pidfd.Close())
	}
	return pidfd, nil
}
