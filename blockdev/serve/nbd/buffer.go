package nbd

import (
	"sync"
	"unsafe"
)

// bufferFront is the room before a buffer's data, where the header of the reply
// goes: header and data are sent in one piece, and the data stays aligned.
const bufferFront = 4096

// bufferAlign is what direct I/O may ask of memory.
const bufferAlign = 4096

// buffer is the memory of one request.
type buffer struct {
	mem   []byte // bufferFront bytes, then data; aligned to bufferAlign
	class int
}

// Data of 4 KiB, 16 KiB and on to 16 MiB, then the largest request.
const bufferClasses = 8

func classSize(class int) int { return min(4096<<(2*class), maxPayload) }

// pools keep buffers that are not in use until the next collections of garbage.
var pools [bufferClasses]sync.Pool

// classOf gives the smallest class for n bytes of data, at most maxPayload.
func classOf(n int) (class int) {
	for classSize(class) < n {
		class++
	}
	return class
}

// bufferCost is the memory that a buffer for n bytes of data takes.
func bufferCost(n int) int64 { return int64(bufferFront + classSize(classOf(n))) }

// takeBuffer gives a buffer for n bytes of data, at most maxPayload.
func takeBuffer(n int) *buffer {
	class := classOf(n)
	if b, ok := pools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{mem: aligned(bufferFront + classSize(class)), class: class}
}

func (b *buffer) free() { pools[b.class].Put(b) }

func (b *buffer) data(n int) []byte { return b.mem[bufferFront : bufferFront+n] }

// framed is a header of some bytes and n bytes of data behind it.
func (b *buffer) framed(header, n int) []byte { return b.mem[bufferFront-header : bufferFront+n] }

func aligned(n int) []byte {
	mem := make([]byte, n)
	if misaligned(mem) == 0 {
		return mem
	}
	mem = make([]byte, n+bufferAlign)
	skip := (bufferAlign - misaligned(mem)) % bufferAlign
	return mem[skip : skip+n : skip+n]
}

func misaligned(b []byte) int { return int(uintptr(unsafe.Pointer(&b[0])) % bufferAlign) }

// budget bounds the bytes of a connection's requests in flight.
type budget struct {
	mu     sync.Mutex
	freed  sync.Cond
	left   int64
	closed bool
}

func newBudget(most int64) *budget {
	b := &budget{left: most}
	b.freed.L = &b.mu
	return b
}

// take waits until n bytes are left; false once the budget is closed.
func (b *budget) take(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.left < n && !b.closed {
		b.freed.Wait()
	}
	b.left -= n
	return !b.closed
}

func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left += n
	b.freed.Signal()
}

func (b *budget) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.freed.Broadcast()
}
