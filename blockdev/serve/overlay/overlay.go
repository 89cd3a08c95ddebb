package overlay

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"holdfast/blockdev"
)

// Source is the immutable base of a stack.
type Source interface {
	// ReadAt gives verified bytes. It is asked for nothing behind Size. One that is
	// far away waits until it can answer or is closed.
	io.ReaderAt
	Size() int64 // bytes
	// Next finds the first bytes at or behind off that may be something else than
	// zeroes: [from, to). io.EOF where there are none.
	Next(off int64) (from, to int64, err error)
}

// Overlay is an open volume. All methods are safe for concurrent use; two that
// write the same bytes at once leave either's, as disks do.
type Overlay struct {
	base Source
	size atomic.Int64
	miss atomic.Pointer[func(off, n int64)]

	gate    sync.RWMutex // shared by what reads and writes, alone by what changes the stack
	stack   []*layer     // the top first
	chunks  chunkLocks
	flushes flushes
	seals   sync.Mutex
	merging *merging // under seals; nil: none is under way
	failed  atomic.Pointer[error]
}

// Open opens a volume of these layers, the top first, over base (nil: zeroes).
// blockdev.ErrCorrupt for a map that is none.
func Open(layers []Files, base Source) (*Overlay, error) {
	v, err := open(layers, base)
	return v, blockdev.Op("overlay.Open", "", err)
}

func open(layers []Files, base Source) (*Overlay, error) {
	if len(layers) == 0 {
		return nil, fmt.Errorf("%w: a volume has at least one layer", blockdev.ErrInvalid)
	}
	v := &Overlay{base: base}
	for i, f := range layers {
		l, err := openLayer(f, i == 0)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		v.stack = append(v.stack, l)
	}
	v.size.Store(v.stack[0].size)
	if bottom := v.stack[len(v.stack)-1]; base != nil && base.Size() > bottom.size { // growth would bring its end to light
		return nil, fmt.Errorf("%w: a base of %d bytes under a layer of %d", blockdev.ErrInvalid, base.Size(), bottom.size)
	}
	return v, nil
}

// Size is the volume's, in bytes.
func (v *Overlay) Size() int64 { return v.size.Load() }

// Held tells how many blocks the top layer holds, and of how many.
func (v *Overlay) Held() (held, of int64) {
	v.gate.RLock()
	defer v.gate.RUnlock()
	return v.stack[0].valid.count.Load(), blocksOf(v.Size())
}

// OnMiss has fn called with each range that was read from the base. It must be
// quick.
func (v *Overlay) OnMiss(fn func(off, n int64)) { v.miss.Store(&fn) }

// Failed is the error after which nothing is acknowledged any more, nil while all
// is well.
func (v *Overlay) Failed() error {
	if err := v.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// inspect remembers a failed sync for ever.
func (v *Overlay) inspect(err error) error {
	if errors.Is(err, blockdev.ErrFailed) {
		v.failed.CompareAndSwap(nil, &err)
	}
	return err
}

func (v *Overlay) within(off, n int64) error {
	if off < 0 || n < 0 || off > v.Size()-n {
		return fmt.Errorf("%w: %d bytes at %d of a volume of %d", blockdev.ErrInvalid, n, off, v.Size())
	}
	return nil
}

// ReadAt implements io.ReaderAt. blockdev.ErrInvalid past the end.
func (v *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if err := v.within(off, int64(len(p))); err != nil {
		return 0, err
	}
	v.gate.RLock()
	missing, err := readLayers(v.stack, p, off, nil)
	v.gate.RUnlock()
	if err != nil {
		return 0, err
	}
	// The base never changes, and may keep its readers waiting for ever: nobody who
	// wants to change the stack has to wait for it.
	for _, m := range missing {
		if err := v.readBase(p[m.from-off:m.to-off], m.from); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// span is the bytes from an offset to below another.
type span struct{ from, to int64 }

// readLayers fills p from the highest of these layers that has each block, and adds
// to missing what none has.
func readLayers(stack []*layer, p []byte, off int64, missing []span) ([]span, error) {
	if len(stack) == 0 {
		return append(missing, span{off, off + int64(len(p))}), nil
	}
	l := stack[0]
	for len(p) > 0 {
		first, end := off/BlockSize, (off+int64(len(p))-1)/BlockSize+1
		held, to := l.run(first, end)
		n := min(to*BlockSize-off, int64(len(p)))
		var err error
		if held {
			err = readWhole(l.Data, p[:n], off)
		} else {
			missing, err = readLayers(stack[1:], p[:n], off, missing)
		}
		if err != nil {
			return missing, err
		}
		p, off = p[n:], off+n
	}
	return missing, nil
}

func (v *Overlay) readBase(p []byte, off int64) error {
	var n int64
	if v.base != nil {
		n = max(0, min(int64(len(p)), v.base.Size()-off))
	}
	clear(p[n:])
	if n == 0 {
		return nil
	}
	if err := readWhole(v.base, p[:n], off); err != nil {
		return fmt.Errorf("base: %w", err)
	}
	if fn := v.miss.Load(); fn != nil {
		(*fn)(off, n)
	}
	return nil
}

// farAway is a Source that may have to fetch what it is asked for.
type farAway interface {
	// Absent tells whether it would have to, to read a range. It never waits long.
	Absent(off, n int64) bool
}

// Absent tells whether some of a range would have to be fetched to be read. It never
// waits; while the stack changes it says no.
func (v *Overlay) Absent(off, n int64) bool {
	far, ok := v.base.(farAway)
	if !ok || n <= 0 || v.within(off, n) != nil || !v.gate.TryRLock() {
		return false
	}
	defer v.gate.RUnlock()
	return absent(v.stack, far, off, off+n)
}

// Fetches tells whether a read of a range, or a write, which keeps the rest of blocks
// that it writes in part, would have to fetch something of a base that is far away. It
// waits for the gate, not for the base.
func (v *Overlay) Fetches(write bool, off, n int64) bool {
	far, ok := v.base.(farAway)
	if !ok || n <= 0 || v.within(off, n) != nil {
		return false
	}
	v.gate.RLock()
	defer v.gate.RUnlock()
	if !write {
		return absent(v.stack, far, off, off+n)
	}
	block := func(at int64) bool {
		from := at - at%BlockSize
		return at%BlockSize != 0 && absent(v.stack, far, from, min(from+BlockSize, v.Size()))
	}
	return block(off) || block(off+n)
}

func absent(stack []*layer, far farAway, off, end int64) bool {
	if len(stack) == 0 {
		return far.Absent(off, end-off)
	}
	for off < end {
		held, to := stack[0].run(off/BlockSize, (end-1)/BlockSize+1)
		next := min(to*BlockSize, end)
		if !held && absent(stack[1:], far, off, next) {
			return true
		}
		off = next
	}
	return false
}

// WriteAt implements io.WriterAt. It is durable after a Sync.
func (v *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := v.within(off, int64(len(p))); err != nil {
		return 0, err
	}
	if err := v.Failed(); err != nil || len(p) == 0 {
		return 0, err
	}
	done, err := v.rewrite(p, off)
	if !done && err == nil {
		err = v.firstWrite(p, off)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func blocksAround(off, n int64) run { return run{off / BlockSize, (off+n-1)/BlockSize + 1} }

// rewrite writes blocks that the top layer holds; done is false where it lacks some.
func (v *Overlay) rewrite(p []byte, off int64) (done bool, err error) {
	v.gate.RLock()
	defer v.gate.RUnlock()
	top := v.stack[0]
	if r := blocksAround(off, int64(len(p))); !top.holds(r.first, r.end) {
		return false, nil
	}
	err = writeWhole(top.Data, p, off)
	top.dirty.Store(true)
	return true, err
}

// firstWrite writes blocks of which the top layer lacks some. Those of them that
// are written in part are filled up from below; what the base has of those is read
// before anybody is kept waiting.
func (v *Overlay) firstWrite(p []byte, off int64) error {
	r := blocksAround(off, int64(len(p)))
	end := off + int64(len(p))
	var first, last edge
	defer first.free()
	defer last.free()
	if off%BlockSize != 0 || end%BlockSize != 0 && r.end == r.first+1 {
		first.in, first.block = true, r.first
	}
	if end%BlockSize != 0 && r.end > r.first+1 {
		last.in, last.block = true, r.end-1
	}
	if err := errors.Join(v.fetchEdge(&first), v.fetchEdge(&last)); err != nil {
		return err
	}
	v.gate.RLock()
	defer v.gate.RUnlock()
	defer v.chunks.lock(r, first.in || last.in)()
	top := v.stack[0]
	from, to := off, end // what is written as it is
	if first.in && !top.holds(r.first, r.first+1) {
		from = min((r.first+1)*BlockSize, end)
		if err := v.fillUp(&first, p[:from-off], off); err != nil {
			return v.wroteSome(top, r, err)
		}
	}
	if last.in && !top.holds(last.block, r.end) {
		to = last.block * BlockSize
		if err := v.fillUp(&last, p[to-off:], to); err != nil {
			return v.wroteSome(top, r, err)
		}
	}
	if from < to {
		if err := writeWhole(top.Data, p[from-off:to-off], from); err != nil {
			return v.wroteSome(top, r, err)
		}
	}
	top.mark(r.first, r.end)
	return nil
}

// wroteSome is the end of a write that failed: what a witness has of it would come up
// after a crash, so it is held from now on.
func (v *Overlay) wroteSome(top *layer, r run, err error) error {
	if lost := top.adopt(r); lost != nil && top.witness {
		return v.inspect(fmt.Errorf("%w: %w, and what there is now cannot be told: %w", blockdev.ErrFailed, err, lost))
	}
	return err
}

// edge is a block that is written in part.
type edge struct {
	in    bool // there is one
	block int64
	below *[]byte // what the base has of it; nil where a layer holds it
}

func (e *edge) free() {
	if e.below != nil {
		blocks.Put(e.below)
	}
}

// fetchEdge reads a block of the base, unless a layer holds it already: what is held
// once is held ever after.
func (v *Overlay) fetchEdge(e *edge) error {
	if !e.in || v.layersHold(e.block) {
		return nil
	}
	e.below = blocks.Get().(*[]byte) //nolint:forcetypeassert // nothing else is in it
	return v.readBase(*e.below, e.block*BlockSize)
}

func (v *Overlay) layersHold(block int64) bool {
	v.gate.RLock()
	defer v.gate.RUnlock()
	return slices.ContainsFunc(v.stack, func(l *layer) bool { return l.holds(block, block+1) })
}

// fillUp writes a whole block of which p at off is a part.
func (v *Overlay) fillUp(e *edge, p []byte, off int64) error {
	whole := blocks.Get().(*[]byte) //nolint:forcetypeassert // nothing else is in it
	defer blocks.Put(whole)
	missing, err := readLayers(v.stack, *whole, e.block*BlockSize, nil)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		copy(*whole, *e.below)
	}
	copy((*whole)[off-e.block*BlockSize:], p)
	return writeWhole(v.stack[0].Data, *whole, e.block*BlockSize)
}

// zeroAtOnce bounds how long Zero keeps writers out of a range.
const zeroAtOnce = 1 << 30

// Zero makes a range read as zero and gives its space back, that of whole blocks.
// errors.ErrUnsupported where the space is to be kept: the caller writes zeroes.
func (v *Overlay) Zero(off, n int64, hole bool) error {
	if !hole {
		return errors.ErrUnsupported
	}
	if err := v.within(off, n); err != nil {
		return err
	}
	first, end := (off+BlockSize-1)/BlockSize, (off+n)/BlockSize
	if first >= end {
		return v.writeZeroes(off, n)
	}
	if err := v.writeZeroes(off, first*BlockSize-off); err != nil {
		return err
	}
	for first < end {
		to := min(end, first+zeroAtOnce/BlockSize)
		if err := v.punch(run{first, to}); err != nil {
			return err
		}
		first = to
	}
	return v.writeZeroes(end*BlockSize, off+n-end*BlockSize)
}

func (v *Overlay) writeZeroes(off, n int64) error {
	_, err := v.WriteAt(make([]byte, n), off) // less than a block, or two parts of blocks
	return err
}

func (v *Overlay) punch(r run) error {
	if err := v.Failed(); err != nil {
		return err
	}
	v.gate.RLock()
	defer v.gate.RUnlock()
	defer v.chunks.lock(r, true)()
	top := v.stack[0]
	if err := v.inspect(top.secure(r)); err != nil {
		return err
	}
	if err := top.Data.Punch(r.first*BlockSize, (r.end-r.first)*BlockSize); err != nil {
		return fmt.Errorf("punch: %w", err)
	}
	top.dirty.Store(true)
	_ = top.fill(r, func(missing run) error {
		top.markHoles(missing.first, missing.end)
		return nil
	})
	return top.tellHoles(r)
}

// Begin gives the file and the right to read a range directly at the volume's
// offsets, without this package, until End is called; ok is false where not all of it
// is in one file, or the stack is about to change: then ReadAt is the way. It never
// waits.
func (v *Overlay) Begin(off, n int64) (data File, ok bool) {
	if n <= 0 || v.within(off, n) != nil || v.failed.Load() != nil || !v.gate.TryRLock() {
		return nil, false
	}
	if data = v.holder(off, n); data == nil {
		v.gate.RUnlock()
		return nil, false
	}
	return data, true
}

// holder is the file that a whole range is read from, that of a layer or of a base on
// this host; nil where there are several.
func (v *Overlay) holder(off, n int64) File {
	r := blocksAround(off, n)
	for _, l := range v.stack {
		held, to := l.run(r.first, r.end)
		switch {
		case to < r.end:
			return nil
		case held:
			return l.Data
		}
	}
	image, ok := v.base.(*Image)
	if !ok || off+n > image.size {
		return nil
	}
	if fn := v.miss.Load(); fn != nil {
		(*fn)(off, n)
	}
	return OSFile{image.f}
}

// End ends what Begin has begun.
func (v *Overlay) End() { v.gate.RUnlock() }

// BeginWrite is Begin for a write, in the top layer's file. It also gives whole blocks that the top layer does
// not hold yet (first): they are its own when EndWrite says that all was written.
func (v *Overlay) BeginWrite(off, n int64) (data File, first, ok bool) {
	if n <= 0 || v.within(off, n) != nil || v.failed.Load() != nil || !v.gate.TryRLock() {
		return nil, false, false
	}
	top, r := v.stack[0], blocksAround(off, n)
	if top.holds(r.first, r.end) {
		return top.Data, false, true
	}
	if off%BlockSize != 0 || n%BlockSize != 0 || !v.chunks.tryShare(r) {
		v.gate.RUnlock()
		return nil, false, false
	}
	return top.Data, true, true
}

// EndWrite ends what BeginWrite has begun, with what it gave; wrote says that all
// bytes were written.
func (v *Overlay) EndWrite(off, n int64, first, wrote bool) {
	top := v.stack[0]
	if first {
		r := blocksAround(off, n)
		if wrote {
			top.mark(r.first, r.end)
		} else {
			_ = v.wroteSome(top, r, errNotAll) // the caller has the error
		}
		v.chunks.unshare(r)
	}
	top.dirty.Store(true)
	v.gate.RUnlock()
}

// errNotAll is a write of which only the caller of EndWrite knows more.
var errNotAll = errors.New("not all was written")

// Sync is a flush: everything whose write had ended before is durable. Those that
// come while one is under way share the next one.
func (v *Overlay) Sync() error {
	return blockdev.Op("overlay.Sync", "", v.flushes.join(v.flush))
}

func (v *Overlay) flush() error {
	if err := v.Failed(); err != nil {
		return err
	}
	v.gate.RLock()
	stack := slices.Clone(v.stack)
	v.gate.RUnlock()
	for i, l := range stack {
		durable := l.finish
		if i == 0 {
			durable = func() error { return l.commit(false) }
		}
		if err := v.inspect(durable()); err != nil {
			return err
		}
	}
	return v.Failed()
}

// Close is a Sync after which the maps tell all by themselves, so that the next Open has
// nothing to look for. Nobody may use the volume meanwhile or afterwards. The files
// stay the caller's. A volume that is not closed loses nothing.
func (v *Overlay) Close() error {
	err := v.flush()
	if err == nil {
		err = v.inspect(v.stack[0].tighten())
	}
	if err == nil {
		err = v.Tighten()
	}
	return blockdev.Op("overlay.Close", "", err)
}

// Grow makes the volume size bytes large, a multiple of BlockSize; it never
// shrinks. What is new reads as zero. Durable on return.
func (v *Overlay) Grow(size int64) error {
	return blockdev.Op("overlay.Grow", "", v.grow(size))
}

func (v *Overlay) grow(size int64) error {
	if err := errors.Join(checkSize(size), v.Failed()); err != nil {
		return err
	}
	v.seals.Lock() // a new top has the volume's size
	defer v.seals.Unlock()
	v.gate.Lock()
	defer v.gate.Unlock()
	top := v.stack[0]
	if size <= v.Size() {
		return nil
	}
	top.commits.Lock()
	defer top.commits.Unlock()
	if err := v.inspect(top.grow(size)); err != nil {
		return err
	}
	v.size.Store(size)
	return nil
}
