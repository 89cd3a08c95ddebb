package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/throttle"
	"holdfast/internal/sys"
)

// front shows a device to clients.
type front interface {
	// serve serves those that connect until close; l is closed before.
	serve(l *net.UnixListener) error
	// resized tells of the device's new size.
	resized(size int64) error
	throttle(blockdev.Limits)
	// swap puts a device in the place of the served one; see vhost.Server.Swap.
	swap(d shown, during func() error) (held time.Duration, err error)
	clients() int
	failed() error
	// close finishes what has begun.
	close() error
}

// shown is what both fronts can show.
type shown interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	BlockSize() int
	Sync() error
	Discard(off, length int64) error
	Zero(off, length int64, hole bool) error
	Extent(off, limit int64) (length int64, hole bool, err error)
}

// volume is what is served.
type volume struct {
	words   wire.Volume
	front   front
	meter   *meter.Meter
	limiter *throttle.Limiter

	flat    *os.File // a flat image; nil once layers are over it
	store   *store   // nil: its base is none, or here
	left    func()   // is told when a virtual machine has hung up, before the next is taken; nil: nobody
	remote  *overlay.Remote
	program sys.Program
	giving  sync.Mutex // of giveBack

	hydration *hydration

	mu     sync.Mutex
	limits blockdev.Limits
	size   int64
	layers *overlay.Overlay // nil: flat
	broken error            // why a change of the stack has failed the volume
}

// open makes a volume of what was handed over. The lock is only kept.
func open(v *wire.Volume, files []*os.File) (*volume, *os.File, error) {
	next := func(there bool) *os.File {
		if !there {
			return nil
		}
		f := files[0]
		files = files[1:]
		return f
	}
	w := &volume{words: *v, meter: &meter.Meter{}, limiter: &throttle.Limiter{}, limits: v.Limits, size: v.Size}
	w.limiter.Set(v.Limits, 0)
	w.program, _ = sys.OwnProgram() // where it is not found a little more memory stays in use
	w.flat = next(v.Flat)
	var layers []overlay.Files
	for range v.Layers {
		layers = append(layers, overlay.Files{Data: overlay.OSFile{File: next(true)}, Map: overlay.OSFile{File: next(true)}})
	}
	base, digests, lock := next(v.Base), next(v.Remote), next(v.Lock)
	var err error
	if w.flat == nil && !v.Refuse {
		err = w.stack(layers, base, digests)
	}
	w.hydration = newHydration(w)
	if err == nil {
		err = w.show()
	}
	return w, lock, err
}

// stack opens the layers and what is below them.
func (w *volume) stack(layers []overlay.Files, base, digests *os.File) (err error) {
	var source overlay.Source
	switch {
	case base != nil:
		source = overlay.NewImage(base, w.words.BaseSize)
	case digests != nil:
		if w.store, err = openStore(wire.Remote{URL: w.words.URL, Prefixes: w.words.Prefixes}, digests, w.giveBack); err != nil {
			return err
		}
		w.remote = w.store.remote
		source = w.remote
	}
	if w.layers, err = overlay.Open(layers, source); err != nil {
		return err
	}
	if w.layers.Size() != w.size {
		return fmt.Errorf("%w: layers of %d bytes for a volume of %d", blockdev.ErrInvalid, w.layers.Size(), w.size)
	}
	return nil
}

// show makes the front.
func (w *volume) show() (err error) {
	if w.words.Kind == blockdev.NBD {
		w.front, err = newNBD(w)
	} else {
		w.front, err = newVhost(w)
	}
	return err
}

// serving says what is served.
func (w *volume) serving() wire.Serving {
	w.mu.Lock()
	defer w.mu.Unlock()
	return wire.Serving{ID: w.words.ID, Kind: w.words.Kind, ReadOnly: w.words.ReadOnly, Size: w.size}
}

// service says how it does.
func (w *volume) service() serve.Service {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := serve.Service{Kind: w.words.Kind, Clients: w.front.clients(), Meter: w.meter.Snapshot(), Limits: w.limits}
	if err := w.failure(); err != nil {
		s.Failed = err.Error()
	}
	if n, ok := w.front.(*nbdFront); ok {
		s.Exposed = n.exposed()
	}
	if w.layers == nil {
		return s
	}
	held, _ := w.layers.Held()
	s.Layers = &serve.Hydration{Sealed: w.layers.Layers() - 1, Held: min(held*overlay.BlockSize, w.size), Size: w.size, Copied: w.hydration.copied()}
	if w.remote != nil {
		far := w.remote.Status()
		s.Layers.FailingSince, s.Layers.Tries = far.Failing, far.Tries
		if far.Err != nil {
			s.Layers.Reason = far.Err.Error()
		}
	} else if since, tries, why := w.hydration.failing(); why != nil {
		s.Layers.FailingSince, s.Layers.Tries, s.Layers.Reason = since, tries, why.Error()
	}
	return s
}

// failure is why nothing is acknowledged any more. The caller has the lock.
func (w *volume) failure() error {
	if w.broken != nil {
		return w.broken
	}
	if w.layers != nil {
		if err := w.layers.Failed(); err != nil {
			return err
		}
	}
	return w.front.failed()
}

// throttle makes exactly these limits hold.
func (w *volume) throttle(limits blockdev.Limits) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limits = limits
	w.front.throttle(limits)
}

// grow makes the volume size bytes large.
func (w *volume) grow(size int64) error {
	w.mu.Lock()
	layers, now := w.layers, w.size
	w.mu.Unlock()
	switch {
	case size < now:
		return fmt.Errorf("%w: %d bytes, there are %d", blockdev.ErrInvalid, size, now)
	case layers != nil:
		if err := layers.Grow(size); err != nil {
			return err
		}
	default:
		if there, err := sys.BlockDeviceSize(w.flat); err != nil || there < size {
			return errors.Join(err, fmt.Errorf("%w: the image has %d bytes, %d are asked for", blockdev.ErrInvalid, there, size))
		}
	}
	if err := w.front.resized(size); err != nil {
		return err
	}
	w.mu.Lock()
	w.size = size
	w.mu.Unlock()
	w.hydration.look()
	return nil
}

// close flushes. An error that was there before is told again.
func (w *volume) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.failure()
	switch {
	case w.words.Refuse:
		return nil
	case err != nil || w.words.ReadOnly && w.layers == nil:
	case w.layers != nil && w.words.ReadOnly:
		err = w.layers.Sync()
	case w.layers != nil:
		err = w.layers.Close()
	default:
		if err = sys.SyncData(w.flat); err != nil {
			err = fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
		}
	}
	return err
}

// forgo ends the waiting for a base far away, which may be for ever. A virtual machine's
// requests that wait are left to the next worker, those of NBD clients fail.
func (w *volume) forgo() {
	if w.remote != nil {
		w.remote.Close()
	}
}

// trace are the chunks that were missed.
func (w *volume) trace(context.Context) []int64 {
	t := w.hydration.trace()
	return t[:min(len(t), wire.MaxTrace)]
}
