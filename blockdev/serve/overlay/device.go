package overlay

import (
	"errors"
	"io"
)

// Extenter is a File that knows its holes.
type Extenter interface {
	// Extent tells whether the bytes at off are a hole, which reads as zero, and how
	// far that goes: 1 to limit bytes.
	Extent(off, limit int64) (length int64, hole bool, err error)
}

// Discard makes whole blocks of a range read as zero and gives their space back:
// what was discarded is not asked of the base again. The rest of it stays.
func (v *Overlay) Discard(off, n int64) error {
	if err := v.within(off, n); err != nil {
		return err
	}
	first, end := (off+BlockSize-1)/BlockSize, (off+n)/BlockSize
	if first >= end {
		return nil
	}
	return v.Zero(first*BlockSize, (end-first)*BlockSize, true)
}

// BlockSize is the unit of offsets and lengths that the data's files take: where
// they are opened for direct I/O the sectors of disks.
func (v *Overlay) BlockSize() int { return sectorSize }

// Extent tells whether the bytes at off are a hole, which reads as zero, and how far
// that goes: 1 to limit bytes. What a layer holds in a file that knows no holes
// counts as data.
func (v *Overlay) Extent(off, limit int64) (length int64, hole bool, err error) {
	if err := v.within(off, limit); err != nil {
		return 0, false, err
	}
	v.gate.RLock()
	defer v.gate.RUnlock()
	return v.extent(v.stack, off, limit)
}

func (v *Overlay) extent(stack []*layer, off, limit int64) (length int64, hole bool, err error) {
	if len(stack) == 0 {
		return v.baseExtent(off, limit)
	}
	l := stack[0]
	held, to := l.run(off/BlockSize, (off+limit-1)/BlockSize+1)
	limit = min(limit, to*BlockSize-off)
	if !held {
		return v.extent(stack[1:], off, limit)
	}
	if f, ok := l.Data.(Extenter); ok {
		return f.Extent(off, limit)
	}
	return limit, false, nil
}

func (v *Overlay) baseExtent(off, limit int64) (length int64, hole bool, err error) {
	if v.base == nil {
		return limit, true, nil
	}
	from, to, err := v.base.Next(off)
	switch {
	case errors.Is(err, io.EOF):
		return limit, true, nil
	case err != nil:
		return 0, false, err
	case from > off:
		return min(from-off, limit), true, nil
	}
	return min(to-off, limit), false, nil
}
