package vhost

import (
	"sync/atomic"
	"unsafe"
)

// Flags of virtqueues (virtio 1.2, 2.7).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	noInterrupt = 1 // in the available ring
	noNotify    = 1 // in the used ring
)

const (
	descSize     = 16
	maxQueueSize = 1024
)

// descriptor is struct virtq_desc.
type descriptor struct {
	addr  uint64
	len   uint32
	flags uint16
	next  uint16
}

type usedElement struct{ id, len uint32 }

// virtqueue is a split virtqueue in the guest's memory, which the guest writes at
// any time: a value is read once and then checked.
type virtqueue struct {
	num      uint16 // a power of two
	eventIdx bool
	desc     *descriptor
	avail    *uint16 // flags, idx, ring[num], used_event
	used     *uint16 // flags, idx
	elements *usedElement
	event    *uint16 // avail_event, behind the used ring

	lastAvail uint16 // next to take
	usedIdx   uint16 // next to give
	told      uint16 // usedIdx when the guest was last asked to look
	toldValid bool
	barrier   uint32
}

// newVirtqueue finds the three parts; false where they are not in memory.
func newVirtqueue(m *memory, num uint16, desc, avail, used uint64, eventIdx bool) (v virtqueue, ok bool) {
	n := uint64(num)
	d := m.ofUser(desc, descSize*n, 16)
	a := m.ofUser(avail, 6+2*n, 2)
	u := m.ofUser(used, 6+8*n, 4)
	if num == 0 || d == nil || a == nil || u == nil {
		return v, false
	}
	return virtqueue{
		num: num, eventIdx: eventIdx, desc: (*descriptor)(d), avail: (*uint16)(a), used: (*uint16)(u),
		elements: (*usedElement)(unsafe.Add(u, 4)), event: (*uint16)(unsafe.Add(u, 4+8*n)),
	}, true
}

// fence keeps what stands before it before what stands behind it, for everybody:
// a store that releases and then a load that acquires, which no processor that Go
// runs on swaps with anything. Go has no atomics of 16 bits.
func (v *virtqueue) fence() {
	atomic.StoreUint32(&v.barrier, 1)
	_ = atomic.LoadUint32(&v.barrier)
}

func at16(base *uint16, n int) *uint16 {
	return (*uint16)(unsafe.Add(unsafe.Pointer(base), 2*n))
}

func (v *virtqueue) availIdx() uint16 { return *at16(v.avail, 1) }

// head is the descriptor with which the next request begins; the caller has seen
// that there is one and fenced.
func (v *virtqueue) head() uint16 {
	return *at16(v.avail, 2+int(v.lastAvail&(v.num-1)))
}

func (v *virtqueue) descriptor(n uint16) descriptor {
	return *(*descriptor)(unsafe.Add(unsafe.Pointer(v.desc), descSize*int(n)))
}

// give puts a request into the used ring; publish shows it.
func (v *virtqueue) give(head uint16, written uint32) {
	e := (*usedElement)(unsafe.Add(unsafe.Pointer(v.elements), 8*int(v.usedIdx&(v.num-1))))
	e.id, e.len = uint32(head), written
	v.usedIdx++
}

func (v *virtqueue) publish() {
	v.fence()
	*at16(v.used, 1) = v.usedIdx
}

// wantsCall tells whether the guest wants to be told of what was published.
func (v *virtqueue) wantsCall() bool {
	v.fence()
	from, to := v.told, v.usedIdx
	valid := v.toldValid
	v.told, v.toldValid = to, true
	if !v.eventIdx {
		return *v.avail&noInterrupt == 0
	}
	event := *at16(v.avail, 2+int(v.num)) // used_event
	return !valid || to-event-1 < to-from
}

// quiet asks the guest for no kicks, awaitKick for the next one. After awaitKick
// the caller looks once more.
func (v *virtqueue) quiet() {
	if !v.eventIdx {
		*v.used = noNotify
	}
}

func (v *virtqueue) awaitKick() {
	if v.eventIdx {
		*v.event = v.lastAvail
	} else {
		*v.used = 0
	}
	v.fence()
}
