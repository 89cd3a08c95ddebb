package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// do does what a call asks for.
func (w *worker) do(c wire.Conn, r *wire.Request, files []*os.File) (*wire.Reply, error) {
	switch r.Op {
	case wire.Status:
		return w.status(), nil
	case wire.Stop:
		return nil, w.stop()
	}
	if err := w.refused(); err != nil {
		wire.CloseAll(files)
		return nil, err
	}
	switch r.Op {
	case wire.Throttle:
		w.volume.throttle(*r.Limits)
		return nil, nil
	case wire.Trace:
		return &wire.Reply{Trace: w.volume.trace(w.ctx)}, nil
	case wire.Settle:
		return nil, w.settle(c)
	case wire.Expose:
		return nil, w.expose(r.Expose, files)
	case wire.Address:
		return nil, w.volume.setAddress(r.Remote)
	case wire.Withdraw:
		return nil, w.withdraw(r.Name, r.Force)
	case wire.Grow, wire.Seal, wire.Absorb:
		w.changing.Lock()
		defer w.changing.Unlock()
		if w.ctx.Err() != nil {
			return nil, fmt.Errorf("%w: the worker ends", blockdev.ErrBusy)
		}
		switch r.Op {
		case wire.Grow:
			return nil, w.volume.grow(r.Size)
		case wire.Seal:
			return w.seal(c, r.Name, files)
		}
		return w.absorb(c, r, files)
	}
	wire.CloseAll(files)
	return nil, fmt.Errorf("%w: %s is not asked for here", wire.ErrProtocol, r.Op)
}

// pending is a change of the stack that waits for the daemon's record.
type pending struct {
	change  wire.Pending
	settler chan settler // daemons that come for it
	over    chan struct{}
}

// settler is a call that takes the place of the one that began the change.
type settler struct {
	c    wire.Conn
	done chan error
}

// recorded has the daemon make a change durable. A daemon that has gone may or may not
// have done so, so the change neither is there nor is not: it waits for the next one, as
// long as the worker may wait.
func (w *worker) recorded(c wire.Conn, change wire.Pending) error {
	p := &pending{change: change, settler: make(chan settler), over: make(chan struct{})}
	w.mu.Lock()
	w.pending = p
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		w.pending = nil
		w.mu.Unlock()
		close(p.over)
	}()
	heard, err := w.ask(c, change)
	for !heard {
		select {
		case next := <-p.settler:
			heard, err = w.ask(next.c, change)
			next.done <- err
		case <-w.leaving.Done():
			return fmt.Errorf("%w: the worker ends", blockdev.ErrBusy)
		}
	}
	return err
}

// ask asks one daemon for the record; heard is false when it has gone instead, or cannot
// be waited for.
func (w *worker) ask(c wire.Conn, change wire.Pending) (heard bool, err error) {
	stop := context.AfterFunc(w.leaving, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := c.Answer(&wire.Reply{Record: &change}); err != nil {
		return false, nil
	}
	r, _, err := c.Request()
	if err != nil || r.Op != wire.Recorded {
		return false, nil
	}
	return true, r.Error.Err()
}

// settle offers the caller to whoever waits for one. Nothing waits is success.
func (w *worker) settle(c wire.Conn) error {
	w.mu.Lock()
	p := w.pending
	w.mu.Unlock()
	if p == nil {
		return nil
	}
	s := settler{c, make(chan error, 1)}
	select {
	case p.settler <- s:
		return <-s.done
	case <-p.over: // its own daemon was there after all
		return nil
	}
}

// seal puts a layer on top.
func (w *worker) seal(c wire.Conn, name string, files []*os.File) (*wire.Reply, error) {
	v := w.volume
	next := overlay.Files{Data: overlay.OSFile{File: files[0]}, Map: overlay.OSFile{File: files[1]}}
	record := func() error { return w.recorded(c, wire.Pending{Op: wire.Seal, Name: name}) }
	v.mu.Lock()
	layers := v.layers
	v.mu.Unlock()
	if layers != nil && layers.Layers() >= wire.MaxLayers {
		wire.CloseAll(files)
		return nil, fmt.Errorf("%w: there are %d layers", blockdev.ErrInvalid, wire.MaxLayers)
	}
	if layers == nil {
		held, err := v.cover(next, record)
		return &wire.Reply{Held: int64(held)}, err
	}
	held, err := layers.SealHeld(next, record)
	if err == nil {
		go func() { _ = layers.Tighten() }() // nobody waits for it; a failed sync is told by Failed
	}
	return &wire.Reply{Held: int64(held)}, err
}

// absorb merges a layer with the one below it.
func (w *worker) absorb(c wire.Conn, r *wire.Request, files []*os.File) (*wire.Reply, error) {
	v := w.volume
	v.mu.Lock()
	layers := v.layers
	v.mu.Unlock()
	if layers == nil {
		wire.CloseAll(files)
		return nil, fmt.Errorf("%w: the image is flat", blockdev.ErrInvalid)
	}
	copied := int64(0)
	m, gone := overlay.Merge{Layer: r.Layer, Most: r.Most, Copied: &copied}, r.Layer+1
	if r.Down {
		m.Into, gone = &overlay.Files{Data: overlay.OSFile{File: files[0]}, Map: overlay.OSFile{File: files[1]}}, r.Layer
	}
	done, unused, err := layers.Merge(w.ctx, m, func() error { return w.recorded(c, wire.Pending{Op: wire.Absorb, Layer: gone}) })
	for _, f := range unused { // what has no name any more gives its space back
		closeLayer(f)
	}
	if done {
		v.hydration.look()
	}
	return &wire.Reply{More: !done, Copied: &copied}, err
}

func closeLayer(files overlay.Files) {
	for _, f := range []overlay.File{files.Data, files.Map} {
		if one, ok := f.(overlay.OSFile); ok {
			_ = one.Close() // nothing of it is wanted
		}
	}
}

// cover makes a flat image the base of an overlay whose only layer is next, under the
// hands of its clients: they wait for what is under way and no longer. As in
// overlay.Seal the record comes first; a flush after the change waits for what the
// image had got before.
func (w *volume) cover(next overlay.Files, record func() error) (held time.Duration, err error) {
	size := w.size
	layers, err := overlay.Open([]overlay.Files{next}, overlay.NewImage(w.flat, size))
	if err != nil {
		return 0, err
	}
	if layers.Size() != size {
		return 0, fmt.Errorf("%w: a layer of %d bytes for a volume of %d", blockdev.ErrInvalid, layers.Size(), size)
	}
	over := &covering{Overlay: layers, settled: make(chan struct{})}
	defer over.settle()
	flushed := make(chan error, 1)
	go func() { flushed <- sys.SyncData(w.flat) }() // so that little is left to do afterwards
	err = record()
	lost := <-flushed
	if err != nil && lost == nil && !errors.Is(err, blockdev.ErrFailed) {
		return 0, err
	}
	if err = errors.Join(err, lost); err != nil {
		return 0, w.giveUp(over, err)
	}
	if held, err = w.front.swap(over, func() error { return nil }); err != nil {
		return 0, w.giveUp(over, err) // the record says otherwise
	}
	w.mu.Lock()
	w.layers = layers
	w.mu.Unlock()
	if err = sys.SyncData(w.flat); err != nil {
		err = w.giveUp(over, err)
	}
	return held, err
}

// giveUp fails the volume, and has its clients feel it.
func (w *volume) giveUp(over *covering, err error) error {
	err = w.breakDown(err)
	over.broken.Store(&err)
	over.settle() // a flush that waits would keep the swap waiting
	_, swapped := w.front.swap(over, func() error { return nil })
	return errors.Join(err, swapped)
}

// breakDown fails the volume.
func (w *volume) breakDown(err error) error {
	if !errors.Is(err, blockdev.ErrFailed) {
		err = fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
	}
	w.mu.Lock()
	w.broken = err
	w.mu.Unlock()
	return err
}

// covering is an overlay over a flat image that clients wrote to just now. Its flushes
// wait until what they wrote is durable.
type covering struct {
	*overlay.Overlay
	settled chan struct{}
	once    sync.Once
	broken  atomic.Pointer[error]
}

// settle lets flushes go on.
func (c *covering) settle() { c.once.Do(func() { close(c.settled) }) }

// failure is why nothing is acknowledged any more.
func (c *covering) failure() error {
	if err := c.broken.Load(); err != nil {
		return *err
	}
	return nil
}

// Sync is Overlay's, after the change.
func (c *covering) Sync() error {
	<-c.settled
	if err := c.failure(); err != nil {
		return err
	}
	return c.Overlay.Sync()
}

// WriteAt is Overlay's while the volume has not failed.
func (c *covering) WriteAt(p []byte, off int64) (int, error) {
	if err := c.failure(); err != nil {
		return 0, err
	}
	return c.Overlay.WriteAt(p, off)
}

// Zero is Overlay's while the volume has not failed.
func (c *covering) Zero(off, n int64, hole bool) error {
	if err := c.failure(); err != nil {
		return err
	}
	return c.Overlay.Zero(off, n, hole)
}

// Discard is Overlay's while the volume has not failed.
func (c *covering) Discard(off, n int64) error {
	if err := c.failure(); err != nil {
		return err
	}
	return c.Overlay.Discard(off, n)
}

// Begin lends nothing of a volume that has failed.
func (c *covering) Begin(off, n int64) (overlay.File, bool) {
	if c.failure() != nil {
		return nil, false
	}
	return c.Overlay.Begin(off, n)
}

// BeginWrite lends nothing of a volume that has failed.
func (c *covering) BeginWrite(off, n int64) (data overlay.File, first, ok bool) {
	if c.failure() != nil {
		return nil, false, false
	}
	return c.Overlay.BeginWrite(off, n)
}
