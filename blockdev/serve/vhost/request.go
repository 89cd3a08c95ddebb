package vhost

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
	"syscall"
	"unsafe"

	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/uring"
)

// Kinds of request and their answers (virtio 1.2, 5.2.6).
const (
	kindIn          = 0
	kindOut         = 1
	kindFlush       = 4
	kindGetID       = 8
	kindDiscard     = 11
	kindWriteZeroes = 13

	statusOK          = 0
	statusIOError     = 1
	statusUnsupported = 2

	zeroUnmap = 1 // flag of a range of zeroes: by a hole, please
)

const (
	requestHeader = 16
	rangeSize     = 16
	// piecesInline are kept with each request; those with more borrow a longer list.
	piecesInline = 4
	piecesMost   = segmentMax + 4 // regions' ends may cut a few
)

// request is one that is being served; its number is that of its first descriptor.
type request struct {
	head    uint16
	busy    bool
	hole    bool // zeroes by a hole, please
	lent    bool // goes directly to a file that a device has lent
	first   bool // as BeginWrite said
	kind    uint32
	way     int // of its data
	offset  int64
	left    int64 // bytes still to move
	length  int64
	status  *byte
	written uint32 // what the guest is told, the status included

	fd     int   // where it goes, while the ring has it
	began  int64 // meter.Now
	since  int64 // it is being performed
	cause  meter.Cause
	due    int64 // while it is delayed
	next   *request
	served *served // while a helper has it, and then
	err    error   // what came of it

	inline [piecesInline]syscall.Iovec
	pieces []syscall.Iovec // what is left of the data
	space  *[piecesMost]syscall.Iovec
}

// take copies a request's descriptors and checks them; false when they make no
// sense, after which nothing in the queue does.
func (l *loop) take(head uint16, r *request) bool {
	p := parser{l: l, r: r}
	r.pieces, r.written, r.status = r.inline[:0], 0, nil
	if !p.walk(head) || p.headerGot < requestHeader || r.status == nil {
		return false
	}
	r.kind = binary.LittleEndian.Uint32(p.header[:])
	at := binary.LittleEndian.Uint64(p.header[8:])
	r.offset = -1
	if at <= math.MaxInt64/sector {
		r.offset = int64(at) * sector
	}
	r.left, r.length = p.bytes, p.bytes
	r.way = p.data
	return true
}

// The way of a request's data.
const (
	none = iota
	fromGuest
	toGuest
	mixed
)

// parser reads a chain of descriptors.
type parser struct {
	l         *loop
	r         *request
	header    [requestHeader]byte
	headerGot int
	bytes     int64
	data      int
	writable  bool // a descriptor for the device to write was there
	seen      int
}

// walk follows the chain, which may end in one table of more.
func (p *parser) walk(head uint16) bool {
	v := &p.l.queue
	for n := head; n < v.num; {
		d := v.descriptor(n)
		if d.flags&descIndirect != 0 {
			return d.flags&(descNext|descWrite) == 0 && p.table(d)
		}
		if !p.one(d, d.flags&descNext == 0) {
			return false
		}
		if d.flags&descNext == 0 {
			return true
		}
		n = d.next
	}
	return false
}

// table follows the chain in an indirect table, which is read where the guest has
// it: each descriptor is still copied once.
func (p *parser) table(t descriptor) bool {
	count := t.len / descSize
	if t.len%descSize != 0 || count == 0 || count > maxQueueSize {
		return false
	}
	b := p.l.memory.at(t.addr, uint64(t.len))
	if len(b) != int(t.len) || uintptr(unsafe.Pointer(&b[0]))%8 != 0 {
		return false
	}
	for n := uint32(0); n < count; {
		d := *(*descriptor)(unsafe.Pointer(&b[n*descSize]))
		if d.flags&descIndirect != 0 || !p.one(d, d.flags&descNext == 0) {
			return false
		}
		if d.flags&descNext == 0 {
			return true
		}
		n = uint32(d.next)
	}
	return false
}

// one takes a descriptor: first the header, then the data, and the status in the
// last byte of all.
func (p *parser) one(d descriptor, last bool) bool {
	if p.seen++; p.seen > piecesMost { // also what ends a circle
		return false
	}
	if d.flags&descWrite == 0 && p.writable {
		return false // what the device reads stands before what it writes
	}
	p.writable = p.writable || d.flags&descWrite != 0
	length := uint64(d.len)
	if last {
		if d.flags&descWrite == 0 || length == 0 {
			return false
		}
		length--
		b := p.l.memory.at(d.addr+length, 1)
		if b == nil {
			return false
		}
		p.r.status = &b[0]
	}
	for length > 0 {
		b := p.l.memory.at(d.addr, length)
		if b == nil {
			return false
		}
		d.addr, length = d.addr+uint64(len(b)), length-uint64(len(b))
		if p.headerGot < requestHeader {
			if d.flags&descWrite != 0 {
				return false
			}
			n := copy(p.header[p.headerGot:], b)
			p.headerGot += n
			b = b[n:]
		}
		if len(b) > 0 && !p.piece(b, d.flags&descWrite != 0) {
			return false
		}
	}
	return true
}

func (p *parser) piece(b []byte, toTheGuest bool) bool {
	way := fromGuest
	if toTheGuest {
		way = toGuest
	}
	if p.data == none {
		p.data = way
	} else if p.data != way {
		p.data = mixed
	}
	r := p.r
	if len(r.pieces) == cap(r.pieces) {
		if len(r.pieces) == piecesMost {
			return false
		}
		if r.space == nil {
			r.space = p.l.borrow()
		}
		r.pieces = r.space[:copy(r.space[:], r.pieces)]
	}
	v := syscall.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	r.pieces = append(r.pieces, v)
	p.bytes += int64(len(b))
	return p.bytes <= 1<<30 // a completion's result has 31 bits
}

// start begins a request, or answers it at once.
func (l *loop) start(r *request) {
	if status := l.check(r); status != statusOK {
		l.answer(r, status)
		return
	}
	if r.kind == kindGetID {
		l.getID(r)
		return
	}
	r.began = meter.Now()
	l.meter.Begin()
	if !l.delay(r) {
		l.perform(r, r.began)
	}
}

// check tells whether a request is one that can be performed.
func (l *loop) check(r *request) byte {
	if !r.goesRight() {
		return statusIOError
	}
	switch r.kind {
	case kindIn, kindOut:
		if r.kind == kindOut && l.server.o.ReadOnly || !l.fits(r.offset, r.length) || r.length == 0 {
			return statusIOError
		}
		return statusOK
	case kindFlush, kindGetID:
		return statusOK
	case kindDiscard, kindWriteZeroes:
		return l.readRange(r)
	}
	return statusUnsupported
}

// perform does a request whose time has come: by the ring where there is a file for
// that, and by a helper otherwise.
func (l *loop) perform(r *request, now int64) {
	l.inflight++
	r.since, r.cause = now, meter.Device
	if r.kind == kindFlush {
		r.cause = meter.Flushing
		l.meter.Wait(r.cause)
		l.flush(r)
		return
	}
	if r.kind != kindIn {
		if err := l.server.flusher.failure(); err != nil {
			l.meter.Wait(r.cause)
			l.finish(r, err)
			return
		}
	}
	if l.lend(r) {
		l.meter.Wait(r.cause)
		l.submit(r)
		return
	}
	if d := l.served; r.kind == kindIn && d.far != nil && d.far.Absent(r.offset, r.length) {
		r.cause = meter.Hydration
	}
	l.meter.Wait(r.cause)
	l.help(r)
}

// lend finds the file that a request may go to without a detour.
func (l *loop) lend(r *request) bool {
	d := l.served
	data := r.kind == kindIn || r.kind == kindOut
	if data && !aligned(r.pieces, d.align) {
		return false
	}
	if d.file != nil {
		r.fd = d.file.Number()
		return true
	}
	if d.lender == nil || !data {
		return false
	}
	var f overlay.File
	var ok bool
	if r.kind == kindIn {
		f, ok = d.lender.Begin(r.offset, r.length)
	} else {
		f, r.first, ok = d.lender.BeginWrite(r.offset, r.length)
	}
	if !ok {
		return false
	}
	r.lent, r.served = true, d
	if r.fd, ok = l.numberOfLent(f); !ok {
		r.giveBack(false)
	}
	return ok
}

// giveBack ends the use of a file that was lent; done says that all was read or
// written.
func (r *request) giveBack(done bool) {
	if !r.lent {
		return
	}
	r.lent = false
	if r.kind == kindIn {
		r.served.lender.End()
		return
	}
	r.served.lender.EndWrite(r.offset-(r.length-r.left), r.length, r.first, done)
}

// numberOfLent gives the number of a file that was lent, which mostly is the last
// one again.
func (l *loop) numberOfLent(f overlay.File) (fd int, ok bool) {
	o, ok := f.(overlay.OSFile)
	if !ok {
		return -1, false
	}
	if o.File != l.lentFile {
		fd, err := device.Number(o.File)
		if err != nil {
			return -1, false
		}
		l.lentFile, l.lentFD = o.File, fd
	}
	return l.lentFD, true
}

// goesRight tells whether a request's data goes the way that its kind says.
func (r *request) goesRight() bool {
	switch r.kind {
	case kindIn, kindGetID:
		return r.way == toGuest
	case kindOut, kindDiscard, kindWriteZeroes:
		return r.way == fromGuest
	}
	return true
}

// fits tells whether a range is on the disk and in whole blocks.
func (l *loop) fits(offset, length int64) bool {
	size, block := l.server.size.Load(), int64(l.server.block)
	return offset >= 0 && length >= 0 && offset <= size && length <= size-offset && offset%block == 0 && length%block == 0
}

// aligned tells whether a device takes this memory: firmware has buffers anywhere.
func aligned(pieces []syscall.Iovec, align int) bool {
	all := uintptr(0)
	for n := range pieces {
		all |= uintptr(unsafe.Pointer(pieces[n].Base)) | uintptr(pieces[n].Len)
	}
	return all&uintptr(align-1) == 0
}

func bytesOf(v *syscall.Iovec) []byte { return unsafe.Slice(v.Base, v.Len) }

func (l *loop) getID(r *request) {
	var id [serialSize]byte
	copy(id[:], l.server.o.Serial)
	n := min(r.length, serialSize)
	at := cursor{pieces: r.pieces}
	at.scatter(id[:n])
	r.written = uint32(n)
	l.answer(r, statusOK)
}

// readRange copies what a discard or a write of zeroes is about.
func (l *loop) readRange(r *request) byte {
	if l.server.o.ReadOnly {
		return statusIOError
	}
	if r.length != rangeSize {
		return statusUnsupported // one range at a time was offered
	}
	var b [rangeSize]byte
	from := cursor{pieces: r.pieces}
	from.gather(b[:])
	at, sectors, flags := binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])
	if flags&^zeroUnmap != 0 || r.kind == kindDiscard && flags != 0 {
		return statusUnsupported
	}
	if at > math.MaxInt64/sector || sectors == 0 || sectors > rangeSectors || !l.fits(int64(at)*sector, int64(sectors)*sector) {
		return statusIOError
	}
	r.offset, r.length = int64(at)*sector, int64(sectors)*sector
	r.left, r.hole = 0, flags&zeroUnmap != 0
	return statusOK
}

// submit asks the kernel for what is left of a request.
func (l *loop) submit(r *request) {
	e, fd, tag := l.entry(), r.fd, uint64(r.head)
	switch {
	case r.kind == kindIn && len(r.pieces) == 1:
		uring.Read(e, fd, bytesOf(&r.pieces[0]), r.offset, tag)
	case r.kind == kindIn:
		uring.ReadPieces(e, fd, r.pieces, r.offset, tag)
	case r.kind == kindOut && len(r.pieces) == 1:
		uring.Write(e, fd, bytesOf(&r.pieces[0]), r.offset, tag)
	case r.kind == kindOut:
		uring.WritePieces(e, fd, r.pieces, r.offset, tag)
	case r.kind == kindDiscard || r.hole: // a hole in a file reads as zero, for certain
		uring.Punch(e, fd, r.offset, r.length, tag)
	default:
		uring.Zero(e, fd, r.offset, r.length, tag)
	}
}

// complete takes the kernel's answer.
func (l *loop) complete(r *request, res int32) {
	switch {
	case res == -int32(syscall.EINTR) || res == -int32(syscall.EAGAIN):
		l.submit(r)
	case uring.Canceled(int(res)):
		l.canceled(r)
	case res < 0:
		l.finish(r, device.Unsupported(syscall.Errno(-res)))
	case r.kind != kindIn && r.kind != kindOut:
		l.finish(r, nil)
	case res == 0 || int64(res) > r.left: // the end of a file that is shorter than it was
		l.finish(r, io.ErrUnexpectedEOF)
	case int64(res) < r.left:
		r.advance(int64(res))
		l.submit(r)
	default:
		if r.kind == kindIn {
			r.written = uint32(r.length)
		}
		l.finish(r, nil)
	}
}

// canceled has a helper perform what the kernel had nobody for. A request of which a part
// has moved stays the ring's: that part is known to nobody else.
func (l *loop) canceled(r *request) {
	if (r.kind == kindIn || r.kind == kindOut) && r.left < r.length {
		l.submit(r)
		return
	}
	r.giveBack(false)
	l.help(r)
}

// finish ends a request that was performed, counts it and answers it.
func (l *loop) finish(r *request, err error) {
	l.inflight--
	r.giveBack(err == nil)
	r.served, r.err = nil, nil
	if err == nil && r.kind != kindIn {
		err = l.server.flusher.failure() // no success after a failed sync
	}
	l.meter.Waited(r.cause, r.since)
	l.meter.End(meterKind(r.kind), r.began, r.length, err != nil)
	switch {
	case err == nil:
		l.answer(r, statusOK)
	case errors.Is(err, overlay.ErrClosed) && l.notes.kept():
		// The worker ends while the store is silent: the next one performs it.
	case (r.kind == kindDiscard || r.kind == kindWriteZeroes) && errors.Is(err, errors.ErrUnsupported):
		l.answer(r, statusUnsupported)
	default:
		l.answer(r, statusIOError)
	}
}

func meterKind(kind uint32) meter.Kind {
	switch kind {
	case kindOut:
		return meter.Write
	case kindFlush:
		return meter.Flush
	case kindDiscard:
		return meter.Discard
	case kindWriteZeroes:
		return meter.Zero
	}
	return meter.Read
}

// advance drops the bytes that moved.
func (r *request) advance(moved int64) {
	r.offset, r.left = r.offset+moved, r.left-moved
	for moved > 0 {
		v := &r.pieces[0]
		if n := int64(v.Len); moved >= n {
			moved, r.pieces = moved-n, r.pieces[1:]
			continue
		}
		rest := bytesOf(v)[moved:]
		v.Base = unsafe.SliceData(rest)
		v.SetLen(len(rest))
		moved = 0
	}
}

// answer ends a request.
func (l *loop) answer(r *request, status byte) {
	*r.status = status
	l.queue.give(r.head, r.written+1)
	l.notes.finish(r.head)
	l.done = append(l.done, r.head)
	if r.space != nil {
		l.spaces = append(l.spaces, r.space)
	}
	r.busy, r.space, r.pieces = false, nil, nil
}
