package frontend

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"holdfast/internal/sys"
)

// Kinds of request (virtio 1.2, 5.2.6).
const (
	Read        = 0
	Write       = 1
	Flush       = 4
	ID          = 8
	Discard     = 11
	WriteZeroes = 13
)

const (
	page       = 4096
	headerRoom = 64 // of each slot: header and status
)

// Queue is a virtqueue as its driver sees it. Request n of Depth always uses the
// three descriptors from 3n on.
type Queue struct {
	num                     uint16
	eventIdx                bool
	base                    uint64 // in the guest's memory
	descAt, availAt, usedAt uint64
	memory                  []byte
	headers, data           int // offsets
	buffer                  int
	availIdx, shown, taken  uint16
	kick, call, fault       int
	barrier                 uint32
	abandoned               atomic.Bool
}

// ErrAbandoned is what Wait says after Abandon.
var ErrAbandoned = errors.New("the queue was abandoned")

// Abandon ends Wait, for good: nobody is to be waited for any more. It may be called
// from any goroutine.
func (q *Queue) Abandon() {
	q.abandoned.Store(true)
	_ = sys.SignalEvent(q.call) // cannot fail: nobody adds 2^64 to it
}

func queueNum(depth int) int {
	n := 4
	for n < 3*depth {
		n *= 2
	}
	return n
}

func pages(n int) int { return (n + page - 1) &^ (page - 1) }

func queueBytes(o Options) int {
	n := queueNum(o.Depth)
	return pages(16*n) + pages(6+2*n) + pages(6+8*n) + pages(headerRoom*o.Depth) + o.Depth*pages(o.Buffer)
}

func newQueue(memory []byte, base uint64, o Options) (*Queue, error) {
	n := queueNum(o.Depth)
	avail := pages(16 * n)
	used := avail + pages(6+2*n)
	headers := used + pages(6+8*n)
	q := &Queue{num: uint16(n), base: base, memory: memory, buffer: pages(o.Buffer), descAt: base, availAt: base + uint64(avail), usedAt: base + uint64(used)}
	q.headers, q.data = headers, headers+pages(headerRoom*o.Depth)
	var err error
	if q.kick, err = eventFD(); err != nil {
		return nil, err
	}
	if q.call, err = eventFD(); err != nil {
		return nil, err
	}
	if q.fault, err = eventFD(); err != nil {
		return nil, err
	}
	return q, syscall.SetNonblock(q.fault, true) // ours alone
}

// eventFD is a blocking one, as VMMs have them.
func eventFD() (int, error) {
	f, err := sys.NewEventFD()
	if err != nil {
		return -1, err
	}
	fd, err := syscall.Dup(int(f.Fd()))
	return fd, errors.Join(err, f.Close())
}

func (q *Queue) close() {
	for _, fd := range []int{q.kick, q.call, q.fault} {
		_ = syscall.Close(fd)
	}
}

func (q *Queue) fence() {
	atomic.StoreUint32(&q.barrier, 1)
	_ = atomic.LoadUint32(&q.barrier)
}

func (q *Queue) word(at uint64, n int) *uint16 {
	return (*uint16)(unsafe.Pointer(&q.memory[at-q.base+uint64(2*n)]))
}

func (q *Queue) usedSeen() uint16 { return *q.word(q.usedAt, 1) }

// Data is the memory of a request's data.
func (q *Queue) Data(slot int) []byte {
	return q.memory[q.data+slot*q.buffer : q.data+(slot+1)*q.buffer]
}

// Descriptor writes an entry of the table: the guest address is an offset into the
// memory if it is not to be nonsense.
func (q *Queue) Descriptor(n int, offset uint64, length uint32, flags, next uint16) {
	b := q.memory[16*n:]
	binary.LittleEndian.PutUint64(b, guestBase+offset)
	binary.LittleEndian.PutUint32(b[8:], length)
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// Put puts a request into the queue; Show shows it to the server.
func (q *Queue) Put(slot int, kind uint32, sector uint64, length int) {
	header := q.headers + slot*headerRoom
	binary.LittleEndian.PutUint32(q.memory[header:], kind)
	binary.LittleEndian.PutUint64(q.memory[header+8:], sector)
	q.memory[header+16] = 0xff
	n, status := 3*slot, uint16(3*slot+2)
	way := uint16(0)
	if kind == Read || kind == ID {
		way = 2
	}
	if length == 0 {
		q.Descriptor(n, q.base+uint64(header), 16, 1, status)
	} else {
		q.Descriptor(n, q.base+uint64(header), 16, 1, uint16(n+1))
		q.Descriptor(n+1, q.base+uint64(q.data+slot*q.buffer), uint32(length), 1|way, status)
	}
	q.Descriptor(int(status), q.base+uint64(header+16), 1, 2, 0)
	q.PutHead(uint16(n))
}

// PutRange puts a request about a range: a discard or a write of zeroes.
func (q *Queue) PutRange(slot int, kind uint32, sector uint64, sectors, flags uint32) {
	b := q.Data(slot)
	binary.LittleEndian.PutUint64(b, sector)
	binary.LittleEndian.PutUint32(b[8:], sectors)
	binary.LittleEndian.PutUint32(b[12:], flags)
	q.Put(slot, kind, 0, 16)
}

// PutHead puts a chain of descriptors into the queue.
func (q *Queue) PutHead(head uint16) {
	*q.word(q.availAt, 2+int(q.availIdx&(q.num-1))) = head
	q.availIdx++
}

// Show shows what was put, and kicks the server if it wants that.
func (q *Queue) Show() error {
	q.fence()
	*q.word(q.availAt, 1) = q.availIdx
	q.fence()
	from, to := q.shown, q.availIdx
	q.shown = to
	if q.eventIdx {
		event := *q.word(q.usedAt, 2+4*int(q.num))
		if to-event-1 >= to-from {
			return nil
		}
	} else if *q.word(q.usedAt, 0)&1 != 0 {
		return nil
	}
	return q.Kick()
}

// Kick wakes the server.
func (q *Queue) Kick() error { return os.NewSyscallError("write", sys.SignalEvent(q.kick)) }

// Take takes an answer: the request and its status; false when there is none.
func (q *Queue) Take() (slot int, status byte, ok bool) {
	if q.taken == q.usedSeen() {
		return 0, 0, false
	}
	q.fence()
	at := q.usedAt - q.base + 4 + 8*uint64(q.taken&(q.num-1))
	slot = int(binary.LittleEndian.Uint32(q.memory[at:])) / 3
	q.taken++
	return slot, q.memory[q.headers+slot*headerRoom+16], true
}

// Seen waits until the server has read all that was shown, and tells whether it has
// called the queue nonsense instead. It needs EVENT_IDX.
func (q *Queue) Seen() (faulty bool) {
	var b [8]byte
	for {
		if n, err := syscall.Read(q.fault, b[:]); n > 0 && err == nil {
			return true
		}
		if q.fence(); *q.word(q.usedAt, 2+4*int(q.num)) == q.shown {
			return false
		}
		runtime.Gosched()
	}
}

// Wait waits until there is an answer to take.
func (q *Queue) Wait() error {
	for {
		if q.abandoned.Load() {
			return ErrAbandoned
		}
		if q.eventIdx {
			*q.word(q.availAt, 2+int(q.num)) = q.taken
		}
		q.fence()
		if q.taken != q.usedSeen() {
			return nil
		}
		var b [8]byte
		_, err := syscall.Read(q.call, b[:])
		if errors.Is(err, syscall.EAGAIN) {
			// QEMU's servers make every descriptor that they are sent non-blocking. This one they
			// only write, so it may be what it was.
			err = syscall.SetNonblock(q.call, false)
		}
		if err != nil && !errors.Is(err, syscall.EINTR) {
			return os.NewSyscallError("read", err)
		}
	}
}
