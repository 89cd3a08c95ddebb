package vhost

import (
	"errors"
	"sync"
	"syscall"
	"unsafe"

	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/meter"
	"holdfast/internal/sys"
)

const (
	// helpersMost bounds the goroutines of a pool.
	helpersMost = 64
	// copyAtOnce is how much of a request's data is copied at once where the device
	// cannot have the guest's own memory.
	copyAtOnce = 256 << 10
)

// helping is how a loop has done by goroutines what would hold it up: it hands
// requests over, and gets them back with their errors through asking. What has to be
// fetched from far away has goroutines of its own: while the store is silent all of
// them wait, and the others go on.
type helping struct {
	near, far pool
	idle      sync.WaitGroup
	taken     []*request // finished ones that the loop goes through
}

// pool is goroutines that perform requests; it is the loop's own.
type pool struct {
	jobs    chan *request
	busy    int // requests that are not back yet
	helpers int
}

// errFetches: a request is one for the pool of those that are fetched.
var errFetches = errors.New("it has to be fetched")

func (l *loop) beginHelping() {
	for _, p := range []*pool{&l.near, &l.far} {
		p.jobs = make(chan *request, int(l.queue.num)+1) // handing over never waits
	}
}

func (l *loop) poolOf(r *request) *pool {
	if r.cause == meter.Hydration {
		return &l.far
	}
	return &l.near
}

// help hands a request over.
func (l *loop) help(r *request) {
	p := l.poolOf(r)
	p.busy++
	r.served = l.served
	p.jobs <- r
	if p.helpers < min(p.busy, helpersMost) {
		p.helpers++
		l.idle.Go(func() { l.work(p.jobs) })
	}
}

// helped ends a request that is back.
func (l *loop) helped(r *request) {
	l.poolOf(r).busy--
	if r == &l.syncing {
		l.server.flusher.done(l, r.err)
		return
	}
	if r.err == errFetches { //nolint:errorlint // never wrapped
		now := meter.Now()
		l.meter.Waited(r.cause, r.since)
		r.since, r.cause, r.err = now, meter.Hydration, nil
		l.meter.Wait(r.cause)
		l.help(r)
		return
	}
	if r.kind == kindIn && r.err == nil {
		r.written = uint32(r.length)
	}
	l.finish(r, r.err)
}

// endHelping waits for the helpers, who have nothing to do any more.
func (l *loop) endHelping() {
	close(l.near.jobs)
	close(l.far.jobs)
	l.idle.Wait()
}

func (l *loop) work(jobs <-chan *request) {
	for r := range jobs {
		r.err = r.help()
		l.mu.Lock()
		if l.finished = append(l.finished, r); len(l.finished) == 1 {
			_ = sys.SignalEvent(l.waker) // the loop lives: it waits for this
		}
		l.mu.Unlock()
	}
}

// fetches tells whether a request has to fetch something, which Absent may not have
// known while the stack changed.
func (r *request) fetches() bool {
	far := r.served.far
	if far == nil || r.cause == meter.Hydration {
		return false
	}
	switch r.kind {
	case kindIn, kindOut, kindWriteZeroes:
		return far.Fetches(r.kind != kindIn, r.offset, r.length)
	}
	return false
}

// help performs a request on the device itself.
func (r *request) help() error {
	d := r.served.device
	if r.fetches() {
		return errFetches
	}
	switch r.kind {
	case kindFlush:
		return d.Sync()
	case kindDiscard:
		return d.Discard(r.offset, r.length)
	case kindWriteZeroes:
		return zero(d, r.offset, r.length, r.hole)
	}
	if len(r.pieces) == 1 && aligned(r.pieces, r.served.align) {
		return r.transfer(d, bytesOf(&r.pieces[0]), r.offset)
	}
	whole := buffers.Get().(*[]byte) //nolint:forcetypeassert // nothing else is in it
	defer buffers.Put(whole)
	at := cursor{pieces: r.pieces}
	for done := int64(0); done < r.length; {
		b := (*whole)[:min(r.length-done, copyAtOnce)]
		if r.kind == kindOut {
			at.gather(b)
		}
		if err := r.transfer(d, b, r.offset+done); err != nil {
			return err
		}
		if r.kind == kindIn {
			at.scatter(b)
		}
		done += int64(len(b))
	}
	return nil
}

// transfer reads or writes all of b.
func (r *request) transfer(d Device, b []byte, off int64) error {
	if r.kind == kindOut {
		return device.WriteWhole(d, b, off)
	}
	return device.ReadWhole(d, b, off)
}

// buffers are for data that is copied, aligned for any device.
var buffers = sync.Pool{New: func() any { b := alignedBuffer(copyAtOnce); return &b }}

func alignedBuffer(n int) []byte {
	const align = 4096
	b := make([]byte, n+align)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (align - 1)
	return b[skip : skip+n]
}

// zeroes is written where a device has no quicker way.
var zeroes = alignedBuffer(copyAtOnce)

func zero(d Device, off, length int64, hole bool) error {
	err := errors.ErrUnsupported
	if hole {
		err = d.Zero(off, length, true)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		err = d.Zero(off, length, false)
	}
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	for length > 0 {
		n := min(length, int64(len(zeroes)))
		if err := device.WriteWhole(d, zeroes[:n], off); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// cursor is a place in a list of pieces of memory.
type cursor struct {
	pieces []syscall.Iovec
	skip   int // bytes of the first
}

// gather copies the next bytes into b, as many as it holds.
func (c *cursor) gather(b []byte) { c.each(len(b), func(piece []byte) { b = b[copy(b, piece):] }) }

// scatter copies b to the next bytes.
func (c *cursor) scatter(b []byte) { c.each(len(b), func(piece []byte) { b = b[copy(piece, b):] }) }

func (c *cursor) each(n int, do func(piece []byte)) {
	for n > 0 {
		piece := bytesOf(&c.pieces[0])[c.skip:]
		piece = piece[:min(n, len(piece))]
		do(piece)
		n -= len(piece)
		if c.skip += len(piece); uint64(c.skip) == c.pieces[0].Len {
			c.pieces, c.skip = c.pieces[1:], 0
		}
	}
}
