package sparse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/nbddevice"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control"
	"holdfast/internal/sys"
)

// A layered image is a block device by way of the kernel's NBD client: a worker serves
// it, and the client's device is the worker's only client. The note of the opening is
// there before the device and goes after it, so the device is found again at every
// moment, by the note's token. The worker may end and another one follow: requests wait
// meanwhile.

var (
	_ blockdev.LayerServer = (*Pool)(nil)
	_ serve.Reviver        = (*Pool)(nil)
)

// ServesLayers implements blockdev.LayerServer.
func (p *Pool) ServesLayers(_ context.Context, id blockdev.ID) error {
	err := nbddevice.Available()
	if !p.layers {
		err = fmt.Errorf("no image here is layered: %w", errors.ErrUnsupported)
	}
	return blockdev.Op("sparse.ServesLayers", id, err)
}

// Revive implements serve.Reviver.
func (p *Pool) Revive(ctx context.Context, id blockdev.ID, lease string) error {
	return blockdev.Op("sparse.Revive", id, p.revive(ctx, id, lease))
}

func (p *Pool) revive(ctx context.Context, id blockdev.ID, lease string) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	done, err := p.turns.take(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	o := p.known(id)
	if !o.served() || o.lease != lease || !o.atWorker.Device {
		return nil
	}
	dir, _, err := p.locate(id)
	if err != nil {
		return err
	}
	w, err := p.serving(ctx, id, dir, o)
	if err == nil {
		_, err = p.servedEndpoint(ctx, id, dir, o, w)
	}
	return err
}

// serving gives the worker of an opening that is remembered: another one where it has ended.
func (p *Pool) serving(ctx context.Context, id blockdev.ID, dir string, o *opening) (*control.Worker, error) {
	changes := p.addresses.count()
	w, err := p.running(ctx, id, dir, o, blockdev.Limits{}, true) // limits are the kernel's, at the device
	if err == nil && changes != p.addresses.count() {             // while it was being started
		p.tellFound(ctx, id, dir)
	}
	return w, err
}

// onDevice reports whether a layered image opens for who wants no socket.
func onDevice(w blockdev.Want) bool {
	return w.Served && slices.Contains(w.Kinds, blockdev.Block) && nbddevice.Available() == nil
}

// deviceOver gives the device of an opening whose worker runs: made if it is not there,
// connected again if the worker is another one, and of the image's size.
func (p *Pool) deviceOver(ctx context.Context, id blockdev.ID, o *opening, w *control.Worker, size int64) (path string, err error) {
	d, err := nbddevice.Find(o.atWorker.Backend(id))
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		d, err = p.newDevice(id, o, w)
	case err == nil:
		err = reconnect(ctx, d, w)
	}
	if err == nil {
		_, err = d.Grow(size)
	}
	return d.Path, err
}

func (p *Pool) newDevice(id blockdev.ID, o *opening, w *control.Worker) (nbddevice.Device, error) {
	if err := p.at("open.device"); err != nil {
		return nbddevice.Device{}, err
	}
	socket, terms, err := nbddevice.Dial(w.Socket(), "")
	if err != nil {
		return nbddevice.Device{}, err
	}
	defer socket.Close()
	return nbddevice.Attach(o.atWorker.Backend(id), terms, socket)
}

// noticeTime is how long the kernel may take to notice that a worker is gone whose
// socket has closed.
const (
	noticeTime = 10 * time.Second
	noticePoll = 5 * time.Millisecond
)

// reconnect makes sure that a device is connected to a worker. The caller has the turn,
// so nobody else is.
func reconnect(ctx context.Context, d nbddevice.Device, w *control.Worker) error {
	s, err := w.Status(ctx)
	if err != nil || s.Clients > 0 {
		return err
	}
	for deadline := time.Now().Add(noticeTime); ; {
		socket, _, err := nbddevice.Dial(w.Socket(), "")
		if err != nil {
			return err
		}
		taken, err := d.Reconnect(socket)
		if err != nil || taken {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %w: the kernel does not let go of a worker that has ended", d.Path, blockdev.ErrBusy)
		}
		select {
		case <-time.After(noticePoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// detachDevice flushes and takes away the device of an opening, if it has one. What the
// device still has to write needs a worker. blockdev.ErrBusy while it is mounted;
// blockdev.ErrFailed, and it is gone, when what was written is lost.
func (p *Pool) detachDevice(ctx context.Context, id blockdev.ID, o *opening) error {
	if !o.atWorker.Device {
		return nil
	}
	d, err := nbddevice.Find(o.atWorker.Backend(id))
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	dir := ""
	if err == nil {
		dir, _, err = p.locate(id)
	}
	if err != nil {
		return err
	}
	w, err := p.serving(ctx, id, dir, o)
	if err == nil {
		err = reconnect(ctx, d, w)
	}
	if err != nil {
		return p.detachDead(ctx, id, d, err)
	}
	if err := p.at("close.device"); err != nil {
		return err
	}
	return p.detachKept(ctx, id, dir, o, d, w)
}

// detachKept is Detach with a worker: its flush waits for the next one where that ends
// meanwhile, and nobody else can start that, as the caller has the turn.
func (p *Pool) detachKept(ctx context.Context, id blockdev.ID, dir string, o *opening, d nbddevice.Device, w *control.Worker) error {
	keeping, stop := context.WithCancel(context.WithoutCancel(ctx)) // the flush does not end with ctx
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		p.keepConnected(keeping, id, dir, o, d, w)
	}()
	err := d.Detach(ctx)
	stop()
	<-kept
	return err
}

const (
	// unservedTime is how long no worker can be had until a device that nobody has mounted
	// is taken away, and unservedPause how long nobody tries meanwhile.
	unservedTime  = 30 * time.Second
	unservedPause = 100 * time.Millisecond
	// apartTime is how long a device and its worker may have lost each other, though that
	// lives, before anybody looks.
	apartTime = 5 * time.Second
)

// keepConnected has a device that is connected to a worker stay so, be it to the next one,
// until ctx ends.
func (p *Pool) keepConnected(ctx context.Context, id blockdev.ID, dir string, o *opening, d nbddevice.Device, w *control.Worker) {
	awaitParting(ctx, w)
	for served := time.Now(); ctx.Err() == nil; {
		w, err := p.serving(ctx, id, dir, o)
		if err == nil {
			err = reconnect(ctx, d, w)
		}
		if err == nil {
			together := awaitParting(ctx, w)
			served = time.Now()
			if together {
				continue
			}
		}
		switch {
		case ctx.Err() != nil:
			return
		case time.Since(served) > unservedTime:
			p.log.Error("a device is taken away whose worker cannot be started", "id", id, "device", d.Path, "error", errors.Join(err, d.Abandon()))
			return
		}
		p.log.Warn("the worker of a device has ended while that is detached", "id", id, "device", d.Path, "error", err)
		select {
		case <-time.After(unservedPause):
		case <-ctx.Done():
		}
	}
}

// awaitParting waits for the end of a worker. together is true when it has not come for so
// long that it is to be seen whether the device is connected.
func awaitParting(ctx context.Context, w *control.Worker) (together bool) {
	ctx, cancel := context.WithTimeout(ctx, apartTime)
	defer cancel()
	_ = w.AwaitEnd(ctx) // whatever it is, it is looked at
	return ctx.Err() != nil
}

// detachDead takes a device away for which no worker can be had, for a reason: one that
// nobody has mounted has nothing left to write.
func (p *Pool) detachDead(ctx context.Context, id blockdev.ID, d nbddevice.Device, reason error) error {
	if ctx.Err() != nil {
		return reason
	}
	held, err := sys.DeviceHeld(d.Path)
	if err != nil || held {
		return errors.Join(reason, err)
	}
	p.log.Error("a device is taken away whose worker cannot be started", "id", id, "device", d.Path, "error", reason)
	return d.Abandon()
}

// abandonDevice takes the device of an opening away, whoever has it. Its worker has
// ended.
func (p *Pool) abandonDevice(id blockdev.ID, o *opening) error {
	if !o.atWorker.Device {
		return nil
	}
	d, err := nbddevice.Find(o.atWorker.Backend(id))
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err == nil {
		err = p.at("close.abandon")
	}
	if err == nil {
		err = d.Abandon()
	}
	return err
}

// growDevice grows an image and the device over it. A worker that has ended is followed
// by another one first: who has the device is to see its size.
func (p *Pool) growDevice(ctx context.Context, id blockdev.ID, dir string, o *opening, size int64) error {
	w, err := p.serving(ctx, id, dir, o)
	if err == nil && w.Size() < size {
		err = w.Grow(ctx, size)
	}
	if err == nil {
		err = p.at("grow.device")
	}
	if err == nil {
		_, err = p.deviceOver(ctx, id, o, w, size)
	}
	return err
}
