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
// any size and any fragmentation. next are two files that Make has been at, for
// the volume's size.
//
// record makes them and the new stack durable, so that the next Open gets it. It is
// called before anything is written to the new layer: whoever opens that stack, at any
// moment, finds all that the volume has (Recover), since an empty layer hides nothing. A record
// that fails leaves the stack as it was, unless its error is blockdev.ErrFailed: then
// nobody knows what is recorded, and the volume fails.
//
// On success the old top is durable. Any other error than blockdev.ErrFailed after the
// record leaves the volume on the new stack, which Layers tells.
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
	top, err := v.newTop(next)
	if err != nil {
		return 0, err
	}
	flushed := make(chan error, 1)
	go func() { flushed <- v.flush() }() // so that little is left to do afterwards
	if err := record(); err != nil {
		return 0, errors.Join(v.inspect(fmt.Errorf("the new stack of layers: %w", err)), <-flushed)
	}
	began := time.Now()
	old := v.swap(top)
	held = time.Since(began)
	<-flushed //nolint:errcheck // where it failed there is something left, which finish says
	for _, l := range old {
		err = errors.Join(err, v.inspect(l.finish()))
	}
	return held, err
}

// newTop opens a layer that is to come on top. The caller has seals, so the volume does
// not grow.
func (v *Overlay) newTop(next Files) (*layer, error) {
	if err := v.Failed(); err != nil {
		return nil, err
	}
	top, err := openLayer(next, true)
	if err != nil {
		return nil, err
	}
	if top.size != v.Size() || top.valid.count.Load() != 0 {
		return nil, fmt.Errorf("%w: a new layer of %d bytes with %d blocks for a volume of %d", blockdev.ErrInvalid, top.size, top.valid.count.Load(), v.Size())
	}
	return top, nil
}

// swap puts a layer on top and gives those below.
func (v *Overlay) swap(top *layer) []*layer {
	v.gate.Lock()
	defer v.gate.Unlock()
	old := slices.Clone(v.stack)
	old[0].sealed = true
	v.stack = slices.Insert(v.stack, 0, top)
	return old
}

// Layers tells how many layers there are.
func (v *Overlay) Layers() int {
	v.gate.RLock()
	defer v.gate.RUnlock()
	return len(v.stack)
}

// Tighten has the maps of layers that Seal has put below tell all by themselves, so that
// whoever opens them next has nothing to look for. Nothing is lost without it.
func (v *Overlay) Tighten() error {
	v.seals.Lock() // so that the stack stays as it is
	defer v.seals.Unlock()
	for _, l := range v.stack[1:] {
		if !l.sealed { // its files are only read
			continue
		}
		if err := v.inspect(l.tighten()); err != nil {
			return blockdev.Op("overlay.Tighten", "", err)
		}
	}
	return nil
}
