package vhost

import (
	"cmp"
	"encoding/binary"
	"slices"
	"unsafe"

	"holdfast/internal/sys"
)

// The inflight region (vhost-user.rst, "Inflight I/O tracking", split virtqueue):
// for each queue a header and a note for each descriptor.
type (
	inflightHeader struct {
		features      uint64
		version       uint16
		num           uint16
		lastBatchHead uint16
		usedIdx       uint16
	}
	inflightNote struct {
		inflight uint8
		_        [5]uint8
		next     uint16
		counter  uint64
	}
)

const inflightAlign = 64

func inflightQueueSize(num uint16) int64 {
	return (16 + 16*int64(num) + inflightAlign - 1) &^ (inflightAlign - 1)
}

// notebook is the part of the inflight region that belongs to a queue; the zero
// value notes nothing.
type notebook struct {
	header  *inflightHeader
	notes   []inflightNote
	counter uint64
}

// inflightRegion is what the VMM keeps between two servers.
type inflightRegion struct {
	mapping   []byte
	offset    uint64
	queues    uint16
	queueSize uint16
}

func parseInflight(b []byte) (size, offset uint64, queues, queueSize uint16) {
	le := binary.LittleEndian
	return le.Uint64(b), le.Uint64(b[8:]), le.Uint16(b[16:]), le.Uint16(b[18:])
}

func validInflight(queues, queueSize uint16, most int) bool {
	return queues > 0 && int(queues) <= most && queueSize > 0 && queueSize <= maxQueueSize
}

func newInflight(description []byte, fd, most int) (*inflightRegion, error) {
	size, offset, queues, queueSize := parseInflight(description)
	need := uint64(inflightQueueSize(queueSize)) * uint64(queues)
	if !validInflight(queues, queueSize, most) || offset%8 != 0 || offset > 1<<40 || size > 1<<40 || size < need {
		return nil, violated("inflight region of %d bytes at %d for %d queues of %d", size, offset, queues, queueSize)
	}
	mapping, err := sys.MapShared(fd, int64(offset+size))
	if err != nil {
		return nil, err
	}
	return &inflightRegion{mapping: mapping, offset: offset, queues: queues, queueSize: queueSize}, nil
}

func (r *inflightRegion) close() error {
	if r == nil {
		return nil
	}
	return sys.Unmap(r.mapping)
}

// notebook gives a queue's part.
func (r *inflightRegion) notebook(queue int, num uint16) (notebook, error) {
	if r == nil {
		return notebook{}, nil
	}
	if queue >= int(r.queues) || num > r.queueSize {
		return notebook{}, violated("queue %d of %d has no place in the inflight region", queue, num)
	}
	p := unsafe.Pointer(&r.mapping[int64(r.offset)+int64(queue)*inflightQueueSize(r.queueSize)])
	b := notebook{header: (*inflightHeader)(p), notes: unsafe.Slice((*inflightNote)(unsafe.Add(p, 16)), num)}
	if b.header.version == 0 {
		b.header.version, b.header.num = 1, num
	}
	return b, nil
}

// begin notes a request before it has any effect.
func (b *notebook) begin(head uint16) {
	if b.header == nil {
		return
	}
	b.counter++
	b.notes[head].counter = b.counter
	b.notes[head].inflight = 1
}

// kept tells whether requests that are not finished come to the next server.
func (b *notebook) kept() bool { return b.header != nil }

// finish notes that the used ring has a request, before that is published.
func (b *notebook) finish(head uint16) {
	if b.header == nil {
		return
	}
	b.notes[head].next = b.header.lastBatchHead
	b.header.lastBatchHead = head
}

// published strikes out what was finished and published up to usedIdx.
func (b *notebook) published(heads []uint16, usedIdx uint16) {
	if b.header == nil {
		return
	}
	for _, head := range heads {
		b.notes[head].inflight = 0
	}
	b.header.usedIdx = usedIdx
}

// left gives the requests that the last server had begun and not published, the
// oldest first, and takes the queue's positions from what it had published.
func (b *notebook) left(v *virtqueue) []uint16 {
	if b.header == nil {
		return nil
	}
	published := *at16(v.used, 1)
	// It ended between publishing and striking out: the batch is linked.
	head := b.header.lastBatchHead
	for n := published - b.header.usedIdx; n != 0 && n <= v.num && head < v.num; n-- {
		b.notes[head].inflight = 0
		head = b.notes[head].next
	}
	b.header.usedIdx = published
	var heads []uint16
	order := map[uint16]uint64{} // the counters as read once: the VMM can write them
	for n := range b.notes {
		if b.notes[n].inflight == 1 {
			heads, order[uint16(n)] = append(heads, uint16(n)), b.notes[n].counter
			b.counter = max(b.counter, order[uint16(n)])
		}
	}
	slices.SortFunc(heads, func(a, c uint16) int { return cmp.Compare(order[a], order[c]) })
	v.lastAvail = published + uint16(len(heads))
	return heads
}
