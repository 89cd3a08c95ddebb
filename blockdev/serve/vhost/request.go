package vhost

import (
	"encoding/binary"
	"math"
	"syscall"
	"unsafe"

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
	bounceMost   = 64 << 20
)

// request is one that is being served; its number is that of its first descriptor.
type request struct {
	busy    bool
	kind    uint32
	way     int // of its data
	offset  int64
	left    int64 // bytes still to move
	length  int64
	status  *byte
	written uint32 // what the guest is told, the status included

	inline [piecesInline]syscall.Iovec
	pieces []syscall.Iovec // what is left of the data
	list   []syscall.Iovec // where pieces began, for the bounced
	bounce []byte          // aligned copy, for memory that direct I/O does not take
	space  *[piecesMost]syscall.Iovec
}

// take copies a request's descriptors and checks them; false when they make no
// sense, after which nothing in the queue does.
func (l *loop) take(head uint16, r *request) bool {
	p := parser{l: l, r: r}
	r.pieces, r.written, r.status, r.bounce = r.inline[:0], 0, nil, nil
	if !p.walk(head) || p.headerGot < requestHeader || r.status == nil {
		return false
	}
	r.kind = binary.LittleEndian.Uint32(p.header[:])
	at := binary.LittleEndian.Uint64(p.header[8:])
	r.offset = -1
	if at <= math.MaxInt64/sector {
		r.offset = int64(at) * sector
	}
	r.list, r.left, r.length = r.pieces, p.bytes, p.bytes
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

// start begins a request. It is false when it is answered already.
func (l *loop) start(head uint16, r *request) bool {
	d := l.device
	if !r.goesRight() {
		return l.answer(head, r, statusIOError)
	}
	switch r.kind {
	case kindIn, kindOut:
		if r.kind == kindOut && (d.o.ReadOnly || d.failed.Load()) || !l.fits(r.offset, r.length) || r.length == 0 {
			return l.answer(head, r, statusIOError)
		}
		if !l.aligned(r) && !l.bounced(r) {
			return l.answer(head, r, statusIOError)
		}
	case kindFlush:
		if d.failed.Load() {
			return l.answer(head, r, statusIOError)
		}
	case kindGetID:
		return l.getID(head, r)
	case kindDiscard, kindWriteZeroes:
		if status := l.readRange(r); status != statusOK {
			return l.answer(head, r, status)
		}
	default:
		return l.answer(head, r, statusUnsupported)
	}
	l.submit(head, r)
	return true
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
	size, block := l.device.size.Load(), int64(l.device.block)
	return offset >= 0 && length >= 0 && offset <= size && length <= size-offset && offset%block == 0 && length%block == 0
}

// aligned tells whether direct I/O takes a request's memory.
func (l *loop) aligned(r *request) bool {
	all := uintptr(0)
	for n := range r.pieces {
		all |= uintptr(unsafe.Pointer(r.pieces[n].Base)) | uintptr(r.pieces[n].Len)
	}
	return all&uintptr(l.device.align-1) == 0
}

// bounced gives a request memory that direct I/O takes: firmware has buffers
// anywhere. Rare, so it may allocate.
func (l *loop) bounced(r *request) bool {
	if r.length > bounceMost {
		return false
	}
	align := l.device.align
	b := make([]byte, int(r.length)+align)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (align - 1)
	r.bounce = b[skip : skip+int(r.length)]
	if r.kind == kindOut {
		gather(r.bounce, r.list)
	}
	r.pieces = r.inline[:1]
	if r.space == nil { // the list stands where the one piece goes
		r.space = l.borrow()
		r.list = r.space[:copy(r.space[:], r.list)]
	}
	r.inline[0] = syscall.Iovec{Base: unsafe.SliceData(r.bounce)}
	r.inline[0].SetLen(len(r.bounce))
	return true
}

func bytesOf(v *syscall.Iovec) []byte { return unsafe.Slice(v.Base, v.Len) }

func gather(to []byte, from []syscall.Iovec) {
	for n := range from {
		to = to[copy(to, bytesOf(&from[n])):]
	}
}

func scatter(to []syscall.Iovec, from []byte) {
	for n := range to {
		from = from[copy(bytesOf(&to[n]), from):]
	}
}

func (l *loop) getID(head uint16, r *request) bool {
	var id [serialSize]byte
	copy(id[:], l.device.o.Serial)
	scatter(r.pieces, id[:])
	r.written = uint32(min(r.length, serialSize))
	return l.answer(head, r, statusOK)
}

// readRange copies what a discard or a write of zeroes is about.
func (l *loop) readRange(r *request) byte {
	if l.device.o.ReadOnly || l.device.failed.Load() {
		return statusIOError
	}
	if r.length != rangeSize {
		return statusUnsupported // one range at a time was offered
	}
	var b [rangeSize]byte
	gather(b[:], r.pieces)
	at, sectors, flags := binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])
	if flags&^zeroUnmap != 0 || r.kind == kindDiscard && flags != 0 {
		return statusUnsupported
	}
	if at > math.MaxInt64/sector || sectors == 0 || sectors > rangeSectors || !l.fits(int64(at)*sector, int64(sectors)*sector) {
		return statusIOError
	}
	r.offset, r.length = int64(at)*sector, int64(sectors)*sector
	r.left = 0
	if flags&zeroUnmap != 0 {
		r.kind = kindDiscard // a hole in a file reads as zero, for certain
	}
	return statusOK
}

// submit asks for what is left of a request.
func (l *loop) submit(head uint16, r *request) {
	e := l.ring.Next()
	if e == nil { // cannot be: there is an entry for each descriptor
		l.answer(head, r, statusIOError)
		return
	}
	l.inflight++
	fd, tag := l.device.fd, uint64(head)
	switch r.kind {
	case kindIn:
		if len(r.pieces) == 1 {
			uring.Read(e, fd, bytesOf(&r.pieces[0]), r.offset, tag)
		} else {
			uring.ReadPieces(e, fd, r.pieces, r.offset, tag)
		}
	case kindOut:
		if len(r.pieces) == 1 {
			uring.Write(e, fd, bytesOf(&r.pieces[0]), r.offset, tag)
		} else {
			uring.WritePieces(e, fd, r.pieces, r.offset, tag)
		}
	case kindFlush:
		uring.SyncData(e, fd, tag)
	case kindDiscard:
		uring.Punch(e, fd, r.offset, r.length, tag)
	case kindWriteZeroes:
		uring.Zero(e, fd, r.offset, r.length, tag)
	}
}

// complete takes the kernel's answer.
func (l *loop) complete(head uint16, r *request, res int32) {
	l.inflight--
	switch {
	case res == -int32(syscall.EINTR) || res == -int32(syscall.EAGAIN):
		l.submit(head, r)
	case res < 0:
		l.failed(head, r, syscall.Errno(-res))
	case r.kind != kindIn && r.kind != kindOut:
		l.answer(head, r, statusOK)
	case res == 0 || int64(res) > r.left: // the end of a file that is shorter than it was
		l.answer(head, r, statusIOError)
	case int64(res) < r.left:
		r.advance(int64(res))
		l.submit(head, r)
	default:
		if r.kind == kindIn {
			r.written = uint32(r.length)
			if r.bounce != nil {
				scatter(r.list, r.bounce)
			}
		}
		l.answer(head, r, statusOK)
	}
}

func (l *loop) failed(head uint16, r *request, errno syscall.Errno) {
	status := byte(statusIOError)
	switch {
	case r.kind == kindFlush:
		l.device.failed.Store(true)
	case r.kind != kindIn && r.kind != kindOut && (errno == syscall.EOPNOTSUPP || errno == syscall.ENODEV || errno == syscall.ENOSYS):
		status = statusUnsupported
	}
	l.answer(head, r, status)
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

// answer ends a request; it is false, for start.
func (l *loop) answer(head uint16, r *request, status byte) bool {
	*r.status = status
	l.queue.give(head, r.written+1)
	l.notes.finish(head)
	l.done = append(l.done, head)
	if r.space != nil {
		l.spaces = append(l.spaces, r.space)
	}
	r.busy, r.space, r.bounce, r.pieces, r.list = false, nil, nil, nil, nil
	return false
}
