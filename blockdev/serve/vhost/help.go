package vhost

import (
	"errors"
	"sync"
	"syscall"
	"unsafe"

	"holdfast/blockdev/serve/device"
	"holdfast/internal/sys"
)

const (
	// helpersMost bounds the goroutines of a loop. Reads that wait for a base far away
	// have to leave some to the others.
	helpersMost = 64
	// copyAtOnce is how much of a request's data is copied at once where the device
	// cannot have the guest's own memory.
	copyAtOnce = 256 << 10
)

// helping is how a loop has done by goroutines what would hold it up: it hands
// requests over, and gets them back with their errors through asking.
type helping struct {
	jobs    chan *request
	busy    int // requests that are not back yet
	helpers int
	idle    sync.WaitGroup
	taken   []*request // finished ones that the loop goes through
}

// help hands a request over.
func (l *loop) help(r *request) {
	l.busy++
	served := l.served
	r.served = served
	l.jobs <- r
	if l.helpers < min(l.busy, helpersMost) {
		l.helpers++
		l.idle.Go(l.work)
	}
}

// helped ends a request that is back.
func (l *loop) helped(r *request) {
	l.busy--
	if r == &l.syncing {
		l.server.flusher.done(l, r.err)
		return
	}
	if r.kind == kindIn && r.err == nil {
		r.written = uint32(r.length)
	}
	l.finish(r, r.err)
}

// endHelping waits for the helpers, who have nothing to do any more.
func (l *loop) endHelping() {
	close(l.jobs)
	l.idle.Wait()
}

func (l *loop) work() {
	for r := range l.jobs {
		r.err = r.help()
		l.mu.Lock()
		if l.finished = append(l.finished, r); len(l.finished) == 1 {
			_ = sys.SignalEvent(l.waker) // the loop lives: it waits for this
		}
		l.mu.Unlock()
	}
}

// help performs a request on the device itself.
func (r *request) help() error {
	d := r.served.device
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
