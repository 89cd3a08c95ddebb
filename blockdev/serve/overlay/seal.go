package overlay

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/blockdev"
)

// Seal ends the top layer's life as the one that is written and puts an empty one
// over it: what the volume reads as at this moment stays readable from the layers
// below for ever, a snapshot. Writers wait for those under way and no longer, at
// any size and any fragmentation. next are two files that Create has been at, for
// the volume's size. record makes the new stack durable, so that the next Open
// gets it; it is called when the old top is durable, and every Sync that begins
// after the change waits for it. When it fails so does the volume: what has been
// written to the new layer could not be found again.
func (v *Overlay) Seal(next Files, record func() error) error {
	_, err := v.SealHeld(next, record)
	return err
}

// SealHeld is Seal, and tells for how long readers and writers were kept waiting.
func (v *Overlay) SealHeld(next Files, record func() error) (held time.Duration, err error) {
	held, err = v.seal(next, record)
	return held, blockdev.Op("overlay.Seal", "", err)
}

func (v *Overlay) seal(next Files, record func() error) (held time.Duration, err error) {
	v.seals.Lock()
	defer v.seals.Unlock()
	if err := errors.Join(v.flush(), v.inspect(v.stack[0].commit(true))); err != nil { // so that little is left to do afterwards
		return 0, err
	}
	top, err := openLayer(next, true)
	if err != nil {
		return 0, err
	}
	pending := &barrier{make(chan struct{})}
	defer func() {
		v.barrier.Store(nil)
		close(pending.done)
	}()
	began := time.Now()
	old, err := v.swap(top, pending)
	held = time.Since(began)
	if err != nil {
		return held, err
	}
	for i, l := range old {
		var err error
		if i == 0 {
			err = l.tighten() // nobody writes to it any more
		} else if l.dirty.Load() {
			err = l.commit(true)
		}
		if v.inspect(err) != nil {
			return held, v.unrecorded(err)
		}
	}
	if err := record(); err != nil {
		return held, v.unrecorded(err)
	}
	return held, nil
}

// swap puts a layer on top and gives those below.
func (v *Overlay) swap(top *layer, pending *barrier) ([]*layer, error) {
	v.gate.Lock()
	defer v.gate.Unlock()
	if top.size != v.Size() || top.valid.count.Load() != 0 {
		return nil, fmt.Errorf("%w: a new layer of %d bytes with %d blocks for a volume of %d", blockdev.ErrInvalid, top.size, top.valid.count.Load(), v.Size())
	}
	old := slices.Clone(v.stack)
	v.barrier.Store(pending)
	v.stack = slices.Insert(v.stack, 0, top)
	return old, nil
}

func (v *Overlay) unrecorded(err error) error {
	return v.inspect(fmt.Errorf("%w: the new stack of layers: %w", blockdev.ErrFailed, err))
}
