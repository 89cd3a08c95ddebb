package overlay

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/blockdev"
)

// mergeAtOnce is how much is copied while writers of the same range wait.
const mergeAtOnce = 1 << 20 // bytes

// Merge says which two layers of a stack are to become one, and how.
type Merge struct {
	// Layer is the upper one, 0 the top; the one below it is the lower.
	Layer int
	// Into is the lower layer's files, opened to be written, when the upper one's blocks
	// are to be brought down; nil when the lower one's are to be brought up. Nobody
	// but this stack reads from what is brought down to, and for layer 0 nobody writes
	// the volume meanwhile.
	Into *Files
	// Most bounds how many bytes are copied, more or less; 0 does not, and must be for
	// what goes down from the top. Merge is called again with the same for the rest.
	Most int64
	Pace Pace // as for hydration

	// Progress, of what goes down from the top: from where on, in bytes, it goes, and when
	// it ends early how far it has got, durably. It holds as long as nobody writes the
	// volume. nil is the beginning.
	Progress *int64
	// Copied is set, if not nil, to how many bytes this call has copied; what was shared
	// counts as ShareCost for each call of ShareInto.
	Copied *int64
}

// Merge brings blocks of one layer to another, shared where that is possible (Sharer)
// and else copied, and takes the one that is not needed any more out of the stack. What
// the volume and every snapshot but that of the lower layer read as does not change, at
// no moment: brought up is what the upper one reads as already, and what is brought
// down lies under it until the end. record makes the shorter stack durable, as in Seal,
// after all of it is; when it fails the stack stays as it was, and with
// blockdev.ErrFailed, as in Seal, the volume fails. done is false when Most was reached
// before. unused are files that the overlay does not use any more. Cut at any time it
// can be begun again. Not beside another Seal or Merge: it waits for them.
func (v *Overlay) Merge(ctx context.Context, m Merge, record func() error) (done bool, unused []Files, err error) {
	done, unused, err = v.merge(ctx, m, record)
	return done, unused, blockdev.Op("overlay.Merge", "", err)
}

// Absorb is the Merge of layers i and i+1, upwards and at once.
func (v *Overlay) Absorb(ctx context.Context, i int, record func() error) error {
	_, _, err := v.merge(ctx, Merge{Layer: i}, record)
	return blockdev.Op("overlay.Absorb", "", err)
}

func (v *Overlay) merge(ctx context.Context, m Merge, record func() error) (done bool, unused []Files, err error) {
	v.seals.Lock()
	defer v.seals.Unlock()
	g, unused, err := v.begin(m)
	if err != nil {
		return false, unused, err
	}
	if g.down && m.Layer == 0 {
		err = g.resume(ctx, m.Pace, m.Progress)
		done = err == nil
	} else {
		done, err = g.some(ctx, m.Most, m.Pace)
	}
	if m.Copied != nil {
		*m.Copied = g.copied
	}
	if err != nil || !done {
		return false, unused, err
	}
	if err := v.inspect(g.to.commit(true)); err != nil {
		return false, unused, err
	}
	if err := record(); err != nil {
		return false, unused, v.inspect(err)
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	at := slices.Index(v.stack, g.from)
	v.stack = slices.Delete(v.stack, at, at+1)
	v.merging = nil
	return true, append(unused, g.from.Files), nil
}

// merging is a merge that was begun.
type merging struct {
	v        *Overlay
	from, to *layer
	down     bool
	next     int64 // block; what lies before has been brought
	sharing  *sharing
	buf      []byte // of mergeAtOnce, once something has to be copied
	copied   int64  // bytes, by this call
}

// begin gives the merge that was begun, or begins one. The caller has seals, under
// which alone the stack changes.
func (v *Overlay) begin(m Merge) (g *merging, unused []Files, err error) {
	v.gate.RLock()
	deep := len(v.stack)
	v.gate.RUnlock()
	if m.Into != nil {
		unused = append(unused, *m.Into)
	}
	if m.Layer < 0 || m.Layer+1 >= deep || m.Into != nil && m.Layer == 0 && m.Most != 0 {
		return nil, unused, fmt.Errorf("%w: no layer below %d of %d", blockdev.ErrInvalid, m.Layer, deep)
	}
	g = &merging{v: v, from: v.stack[m.Layer+1], to: v.stack[m.Layer], down: m.Into != nil}
	if g.down {
		g.from, g.to = g.to, g.from
	}
	for _, l := range []*layer{g.from, g.to} {
		if l == v.stack[0] {
			continue
		}
		// put takes it for durable, also one that was the top when the merge began.
		if err := v.inspect(l.finish()); err != nil {
			return nil, unused, err
		}
	}
	top := g.down && m.Layer == 0 // which may have been written since
	if old := v.merging; old != nil && old.from == g.from && old.to == g.to && !top {
		old.copied = 0
		return old, unused, nil
	}
	if g.down {
		unused = []Files{g.to.Files}
		if err := v.makeWritable(g.to, *m.Into, g.from.size); err != nil {
			return nil, unused, err
		}
	}
	g.sharing = shareFrom(g.from.Data)
	v.merging = g
	return g, unused, nil
}

// makeWritable gives a sealed layer files that can be written, and at least a size. It is
// a witness only if it is loose already: in others nobody has looked for what an
// unfinished write may have left, which would be held with the rest.
func (v *Overlay) makeWritable(l *layer, files Files, size int64) error {
	v.gate.Lock()
	defer v.gate.Unlock()
	l.commits.Lock()
	defer l.commits.Unlock()
	l.Files = files
	w, ok := l.Data.(Witness)
	l.witness = ok && l.loose && w.Witnesses()
	if l.size >= size {
		return nil
	}
	return v.inspect(l.grow(size))
}

// paceEvery is how many bytes are copied between two looks at the pace.
const paceEvery = 4 << 20

// some goes on until all is brought, or most bytes were copied, unless that is 0.
func (g *merging) some(ctx context.Context, most int64, pace Pace) (done bool, err error) {
	paid := int64(0)
	for end := min(blocksOf(g.from.size), blocksOf(g.to.size)); g.next < end; {
		if most > 0 && g.copied >= most {
			return false, nil
		}
		if pace != nil && g.copied-paid >= paceEvery {
			if err := pace(ctx, g.copied-paid); err != nil {
				return false, err
			}
			paid = g.copied
		}
		err := errors.Join(ctx.Err(), g.v.Failed())
		if err == nil {
			err = g.one(end)
		}
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

// resume is some for what goes down from the top.
func (g *merging) resume(ctx context.Context, pace Pace, progress *int64) error {
	if progress != nil {
		g.next = *progress / BlockSize
	}
	_, err := g.some(ctx, 0, pace)
	if err == nil || progress == nil {
		return err
	}
	lost := g.v.inspect(g.kept())
	if lost == nil {
		*progress = g.next * BlockSize
	}
	return errors.Join(err, lost)
}

// kept makes what was brought durable, and known to who goes on: a base has no map.
func (g *merging) kept() error {
	if g.to.Map == nil {
		return g.to.syncData()
	}
	return g.to.commit(true)
}

// one looks at the next blocks, up to end at most.
func (g *merging) one(end int64) error {
	limit, hole, err := g.ahead(end)
	if err != nil {
		return err
	}
	held, to := g.from.run(g.next, limit)
	if held {
		err = g.bring(run{g.next, to}, hole)
	}
	if err == nil {
		g.next = to
	}
	return err
}

// ahead tells up to where to look at once, and whether there is nothing but a hole.
func (g *merging) ahead(end int64) (limit int64, hole bool, err error) {
	limit = min(end, g.next+g.sharing.most(mergeAtOnce)/BlockSize)
	if !g.from.holds(g.next, g.next+1) {
		return end, false, nil
	}
	if f, ok := g.from.Data.(Extenter); ok {
		n, hole, err := f.Extent(g.next*BlockSize, min((end-g.next)*BlockSize, zeroAtOnce))
		if err != nil {
			return 0, false, err
		}
		if hole && n >= BlockSize {
			return g.next + n/BlockSize, true, nil
		}
		if n >= BlockSize {
			limit = min(limit, g.next+n/BlockSize)
		}
	}
	return limit, false, nil
}

// bring brings a run of blocks that one layer holds to the other.
func (g *merging) bring(r run, hole bool) error {
	if g.down { // nobody reads these blocks of the lower one: the upper one has them
		return g.put(r, hole)
	}
	g.v.gate.RLock()
	defer g.v.gate.RUnlock()
	defer g.v.chunks.lock(r, true)()
	return g.to.fill(r, func(missing run) error { return g.put(missing, hole) })
}

func (g *merging) put(r run, hole bool) error {
	g.copied += ShareCost
	if hole {
		if err := g.to.Data.Punch(r.first*BlockSize, (r.end-r.first)*BlockSize); err != nil {
			return err
		}
		g.to.markHoles(r.first, r.end)
	} else if done, err := g.sharing.into(g.to.Data, r); err != nil {
		return err
	} else if done {
		g.to.mark(r.first, r.end)
	} else if err := g.copy(r); err != nil {
		return err
	}
	if g.to != g.v.stack[0] { // no flush is to wait for what nobody needs yet
		g.to.dirty.Store(false)
	}
	return nil
}

func (g *merging) copy(r run) error {
	if g.buf == nil {
		g.buf = aligned(mergeAtOnce)
	}
	for r.first < r.end {
		part := run{r.first, min(r.end, r.first+mergeAtOnce/BlockSize)}
		p := g.buf[:(part.end-part.first)*BlockSize]
		if err := readWhole(g.from.Data, p, part.first*BlockSize); err != nil {
			return err
		}
		if err := g.to.copyIn(part, p); err != nil {
			return err
		}
		g.copied += int64(len(p))
		r.first = part.end
	}
	return nil
}

// MergeIntoBase writes all that the only layer holds into the file that is the volume's
// base, and nobody else's. Until the end that layer lies over it, and so does not
// change what anybody reads; then the file is the volume, as large, durably, and the
// layer is not needed any more. Cut at any time it can be begun again. Nobody may use
// the volume meanwhile. pace as for hydration, progress as in Merge.
func (v *Overlay) MergeIntoBase(ctx context.Context, base File, pace Pace, progress *int64) error {
	return blockdev.Op("overlay.MergeIntoBase", "", v.mergeIntoBase(ctx, base, pace, progress))
}

func (v *Overlay) mergeIntoBase(ctx context.Context, base File, pace Pace, progress *int64) error {
	v.seals.Lock()
	defer v.seals.Unlock()
	if len(v.stack) != 1 || v.base == nil {
		return fmt.Errorf("%w: a stack of %d layers, over a base: %t", blockdev.ErrInvalid, len(v.stack), v.base != nil)
	}
	if err := v.flush(); err != nil {
		return err
	}
	if progress == nil || *progress == 0 {
		// What an earlier time has left behind the base's end would come to light.
		if err := errors.Join(base.Truncate(v.base.Size()), base.Truncate(v.Size())); err != nil {
			return err
		}
	}
	whole := &layer{Files: Files{Data: base}, size: v.Size(), valid: newBitmap(blocksOf(v.Size()))}
	g := &merging{v: v, from: v.stack[0], to: whole, down: true, sharing: shareFrom(v.stack[0].Data)}
	if err := g.resume(ctx, pace, progress); err != nil {
		return err
	}
	return v.inspect(whole.syncData())
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
