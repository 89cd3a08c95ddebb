package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"

	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/meter"
)

// kindOf says what a request counts as; false for those that are not counted.
func kindOf(r *request) (meter.Kind, bool) {
	switch r.kind {
	case cmdRead:
		return meter.Read, true
	case cmdWrite:
		return meter.Write, true
	case cmdFlush:
		return meter.Flush, true
	case cmdTrim:
		return meter.Discard, true
	case cmdWriteZeroes:
		return meter.Zero, true
	default:
		return 0, false
	}
}

// throttle takes a request from the export's limits, and gives the nanoseconds to
// wait before it is performed.
func (t *terms) throttle(r *request) int64 {
	switch r.kind {
	case cmdRead:
		return t.export.limiter.TakeRead(meter.Now(), int64(r.length))
	case cmdWrite:
		return t.export.limiter.TakeWrite(meter.Now(), int64(r.length))
	case cmdTrim, cmdWriteZeroes:
		return t.export.limiter.TakeWrite(meter.Now(), 0)
	default:
		return 0
	}
}

// cause is what a request waits for that is performed now. The caller has the gate.
func (t *terms) cause(r *request) meter.Cause {
	switch far := t.export.served.far; {
	case r.kind == cmdFlush:
		return meter.Flushing
	case r.kind == cmdRead && far != nil && far.Absent(int64(r.offset), int64(r.length)):
		return meter.Hydration
	}
	return meter.Device
}

// fetches tells whether a request has to fetch something from far away. The caller has
// the gate.
func (t *terms) fetches(r *request) bool {
	far := t.export.served.far
	if far == nil {
		return false
	}
	switch r.kind {
	case cmdRead, cmdWrite, cmdWriteZeroes:
		return far.Fetches(r.kind != cmdRead, int64(r.offset), int64(r.length))
	}
	return false
}

// perform does what a checked request asks for, with data to read into or to write.
// The caller has the gate.
func (t *terms) perform(q *meter.Queue, r *request, data []byte) error {
	if r.kind == cmdFlush {
		return t.flush(q)
	}
	if r.kind != cmdRead {
		if err := t.export.flusher.failure(); err != nil {
			return err
		}
	}
	began, cause := meter.Now(), t.cause(r)
	if r.kind != cmdRead && t.fetches(r) {
		cause = meter.Hydration
	}
	q.Wait(cause)
	err := t.transfer(r, data)
	q.Waited(cause, began)
	if err != nil || r.kind == cmdRead {
		return err
	}
	return t.settle(q, r)
}

// settle is the end of a request that wrote: what FUA asks for, and no success after
// a failed sync.
func (t *terms) settle(q *meter.Queue, r *request) error {
	if r.flags&flagFUA != 0 {
		return t.flush(q)
	}
	return t.export.flusher.failure()
}

func (t *terms) flush(q *meter.Queue) error {
	if t.readOnly {
		return nil // nothing was written through it
	}
	began := meter.Now()
	q.Wait(meter.Flushing)
	defer q.Waited(meter.Flushing, began)
	return t.export.flusher.flush()
}

func (t *terms) transfer(r *request, data []byte) error {
	d, off, length := t.export.served.device, int64(r.offset), int64(r.length)
	switch r.kind {
	case cmdRead:
		return device.ReadWhole(d, data, off)
	case cmdWrite:
		return device.WriteWhole(d, data, off)
	case cmdTrim:
		if err := d.Discard(off, length); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		return nil
	case cmdWriteZeroes:
		return zero(d, off, length, r.flags&flagNoHole == 0, r.flags&flagFastZero != 0)
	default:
		return fmt.Errorf("command %d: %w", r.kind, errors.ErrUnsupported)
	}
}

// zeroes is written where a device has no quicker way.
var zeroes = aligned(256 << 10)

func zero(d Device, off, length int64, hole, fast bool) error {
	err := errors.ErrUnsupported
	if hole {
		err = d.Zero(off, length, true)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		err = d.Zero(off, length, false)
	}
	if fast || !errors.Is(err, errors.ErrUnsupported) {
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

// maxExtents bounds a reply about the block status; clients ask on from its end.
const maxExtents = 1024

// blockStatus gives the reply to a request for the block status. The caller has the
// gate.
func (t *terms) blockStatus(r *request) ([]byte, error) {
	b := make([]byte, chunkSize, chunkSize+64)
	b = binary.BigEndian.AppendUint32(b, contextAllocationID)
	most := maxExtents
	if r.flags&flagReqOne != 0 {
		most = 1
	}
	off, end := int64(r.offset), int64(r.offset)+int64(r.length)
	var run int64 // bytes of the extent that is being put together
	var state uint32
	for off < end {
		n, hole, err := t.export.served.device.Extent(off, end-off)
		if err != nil {
			return nil, err
		}
		if n <= 0 || n > end-off {
			return nil, fmt.Errorf("an extent of %d bytes at %d", n, off)
		}
		now := uint32(0)
		if hole {
			now = stateHole | stateZero
		}
		if run > 0 && now != state {
			b = appendExtent(b, run, state)
			run = 0
			if most--; most == 0 {
				break
			}
		}
		run, state, off = run+n, now, off+n
	}
	if run > 0 {
		b = appendExtent(b, run, state)
	}
	putChunk(b, chunkDone, chunkBlockStatus, r.cookie, uint32(len(b)-chunkSize))
	return b, nil
}

func appendExtent(b []byte, length int64, state uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, uint32(length)), state)
}

// failureSize is room for any reply without data.
const failureSize = chunkSize + 6

// putResult makes the reply to a request without data, or to one that failed, and
// gives its length.
func (t *terms) putResult(b []byte, r *request, c code) int {
	if !t.structured || r.kind != cmdRead && r.kind != cmdBlockStatus {
		putSimple(b, r.cookie, c)
		return simpleSize
	}
	putChunk(b, chunkDone, chunkError, r.cookie, 6)
	binary.BigEndian.PutUint32(b[chunkSize:], uint32(c))
	binary.BigEndian.PutUint16(b[chunkSize+4:], 0) // no message
	return failureSize
}

// putReadHeader makes the header of a read's data of n bytes in the front of its
// buffer, and gives header and data.
func (t *terms) putReadHeader(b *buffer, r *request) []byte {
	n := int(r.length)
	if !t.structured {
		framed := b.framed(simpleSize, n)
		putSimple(framed, r.cookie, codeOK)
		return framed
	}
	framed := b.framed(dataChunkSize, n)
	putChunk(framed, chunkDone, chunkOffsetData, r.cookie, uint32(n)+8)
	binary.BigEndian.PutUint64(framed[chunkSize:], r.offset)
	return framed
}
