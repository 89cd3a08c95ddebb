package overlay

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/blockdev"
)

// absorbAtOnce is how much is copied while writers of the same range wait.
const absorbAtOnce = 1 << 20 // bytes

// Absorb brings into layer i of the stack (0 is the top) what layer i+1 has and it
// has not, shared where that is possible (Sharer) and else copied, and takes layer i+1 out of the stack: its files are not used any more.
// What the volume and every snapshot but that of layer i+1 read as does not
// change. record makes the shorter stack durable, as in Seal; when it fails the
// stack stays as it was. Cut at any time it can be begun again. Not beside another
// Seal or Absorb: it waits for them.
func (v *Overlay) Absorb(ctx context.Context, i int, record func() error) error {
	return blockdev.Op("overlay.Absorb", "", v.absorb(ctx, i, record))
}

func (v *Overlay) absorb(ctx context.Context, i int, record func() error) error {
	v.seals.Lock()
	defer v.seals.Unlock()
	v.gate.RLock()
	deep := len(v.stack)
	v.gate.RUnlock()
	if i < 0 || i+1 >= deep {
		return fmt.Errorf("%w: no layer below %d of %d", blockdev.ErrInvalid, i, deep)
	}
	upper, lower := v.stack[i], v.stack[i+1] // the stack changes under seals only
	m := merging{v, upper, lower, shareFrom(lower.Data), nil}
	for first, end := int64(0), min(blocksOf(lower.size), blocksOf(upper.size)); first < end; {
		held, to := lower.run(first, min(end, first+m.sharing.most(absorbAtOnce)/BlockSize))
		if held {
			if err := m.pullUp(ctx, run{first, to}); err != nil {
				return err
			}
		}
		first = to
	}
	if err := v.inspect(upper.commit(true)); err != nil {
		return err
	}
	if err := record(); err != nil {
		return err
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	v.stack = slices.Delete(v.stack, i+1, i+2)
	return nil
}

// merging brings blocks of one layer into the one above.
type merging struct {
	v            *Overlay
	upper, lower *layer
	sharing      *sharing
	buf          []byte // of absorbAtOnce, once something has to be copied
}

// pullUp gives upper the blocks of a run that it lacks and lower holds.
func (m *merging) pullUp(ctx context.Context, r run) error {
	if err := errors.Join(ctx.Err(), m.v.Failed()); err != nil {
		return err
	}
	m.v.gate.RLock()
	defer m.v.gate.RUnlock()
	defer m.v.chunks.lock(r, true)()
	return m.upper.fill(r, func(missing run) error {
		if done, err := m.sharing.into(m.upper, missing); done || err != nil {
			return err
		}
		return m.copyUp(missing)
	})
}

func (m *merging) copyUp(r run) error {
	if m.buf == nil {
		m.buf = aligned(absorbAtOnce)
	}
	for r.first < r.end {
		part := run{r.first, min(r.end, r.first+absorbAtOnce/BlockSize)}
		p := m.buf[:(part.end-part.first)*BlockSize]
		if err := readWhole(m.lower.Data, p, part.first*BlockSize); err != nil {
			return err
		}
		if err := m.upper.copyIn(part, p); err != nil {
			return err
		}
		r.first = part.end
	}
	return nil
}

// fill calls one for each run of blocks in r that the layer lacks.
func (l *layer) fill(r run, one func(run) error) error {
	for first := r.first; first < r.end; {
		held, to := l.run(first, r.end)
		if !held {
			if err := one(run{first, to}); err != nil {
				return err
			}
		}
		first = to
	}
	return nil
}

// copyIn writes blocks that the layer lacks; blocks of zeroes become holes. The
// caller has them locked alone.
func (l *layer) copyIn(r run, p []byte) error {
	for first := int64(0); first < r.end-r.first; {
		zero, to := zeroRun(p, first)
		off, n := (r.first+first)*BlockSize, (to-first)*BlockSize
		var err error
		if zero { // what an unfinished write has left there must not come up
			err = l.Data.Punch(off, n)
		} else {
			err = writeWhole(l.Data, p[first*BlockSize:to*BlockSize], off)
		}
		if err != nil {
			return err
		}
		l.note(r.first+first, r.first+to, zero)
		first = to
	}
	return nil
}

// zeroRun tells whether the block at first is all zeroes, and up to where blocks are alike in that.
func zeroRun(p []byte, first int64) (zero bool, to int64) {
	blocks := int64(len(p)) / BlockSize
	zero = empty(p[first*BlockSize : (first+1)*BlockSize])
	for to = first + 1; to < blocks && empty(p[to*BlockSize:(to+1)*BlockSize]) == zero; to++ {
	}
	return zero, to
}
