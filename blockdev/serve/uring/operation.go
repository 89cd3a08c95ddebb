package uring

import (
	"syscall"
	"unsafe"

	"holdfast/internal/sys"
)

// Opcodes, linux/io_uring.h.
const (
	opSendmsg = 9
	opTimeout = 11
	opRead    = 22
	opWrite   = 23
	opSend    = 26
	opRecv    = 27
)

// skipSuccess is IOSQE_CQE_SKIP_SUCCESS.
const skipSuccess = 1 << 6

// Flags of messages, linux/socket.h. The kernel goes on by itself with a message
// that was sent or received in part when it is to wait for all of it.
const (
	msgDontWait = 0x40
	msgWaitAll  = 0x100
	msgNoSignal = 0x4000
)

// Canceled tells of a completion that the kernel had nobody to perform its operation, of
// which nothing was done. What may block has a thread of the kernel's own, which is a fork
// of the one that submits: a signal to that, or a limit on threads, hinders it, and after
// three tries the kernel gives up (io_uring/io-wq.c, io_should_retry_thread). The operation
// is still to be done, in another way: there may be no thread the next time either.
func Canceled(res int) bool { return syscall.Errno(-res) == syscall.ECANCELED }

func transfer(e *sys.UringEntry, opcode uint8, fd int, b []byte, at int64, tag uint64) {
	e.Opcode, e.FD, e.UserData = opcode, int32(fd), tag
	e.Addr, e.Len, e.Off = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), uint32(len(b)), uint64(at)
}

// Read reads into b from an offset of a file. The completion has tag and the number
// of bytes, or an error as -errno, like all of these.
func Read(e *sys.UringEntry, fd int, b []byte, at int64, tag uint64) {
	transfer(e, opRead, fd, b, at, tag)
}

// Write writes b at an offset of a file.
func Write(e *sys.UringEntry, fd int, b []byte, at int64, tag uint64) {
	transfer(e, opWrite, fd, b, at, tag)
}

// Recv receives what is there on a socket, at least one byte unless the end is
// reached; with all, as much as b holds.
func Recv(e *sys.UringEntry, fd int, b []byte, all bool, tag uint64) {
	transfer(e, opRecv, fd, b, 0, tag)
	if all {
		e.OpFlags = msgWaitAll
	}
}

// Send sends all of b, unless it fails.
func Send(e *sys.UringEntry, fd int, b []byte, tag uint64) {
	transfer(e, opSend, fd, b, 0, tag)
	e.OpFlags = msgWaitAll | msgNoSignal
}

// Message is several pieces of memory to send as one.
type Message struct {
	header syscall.Msghdr
	pieces []syscall.Iovec
}

// NewMessage makes room for some pieces.
func NewMessage(most int) *Message { return &Message{pieces: make([]syscall.Iovec, 0, most)} }

// Reset empties it.
func (m *Message) Reset() { m.pieces = m.pieces[:0] }

// Full tells that no piece fits.
func (m *Message) Full() bool { return len(m.pieces) == cap(m.pieces) }

// Add adds a piece, which must not be empty.
func (m *Message) Add(b []byte) {
	v := syscall.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	m.pieces = append(m.pieces, v)
}

// SendMessage sends all pieces of m, unless it fails. m stays untouched until the
// completion is there.
func SendMessage(e *sys.UringEntry, fd int, m *Message, tag uint64) {
	m.header.Iov = unsafe.SliceData(m.pieces)
	m.header.Iovlen = uint64(len(m.pieces))
	e.Opcode, e.FD, e.UserData = opSendmsg, int32(fd), tag
	e.Addr, e.Len = uint64(uintptr(unsafe.Pointer(&m.header))), 1
	e.OpFlags = msgWaitAll | msgNoSignal
}

// AtOnce makes of a Send or SendMessage one that does what it can while it is
// submitted, and has a completion only unless all was sent: the bytes that were, or
// -EAGAIN for none. The ring has to be Quiet.
func AtOnce(e *sys.UringEntry) {
	e.Flags |= skipSuccess
	e.OpFlags |= msgDontWait
}

// Timer is the time of a Timeout.
type Timer struct{ spec syscall.Timespec }

// Timeout completes after some nanoseconds, with -ETIME. t stays untouched until the
// next Enter has submitted it.
func Timeout(e *sys.UringEntry, t *Timer, nanoseconds int64, tag uint64) {
	t.spec = syscall.NsecToTimespec(nanoseconds)
	e.Opcode, e.FD, e.UserData = opTimeout, -1, tag
	e.Addr, e.Len = uint64(uintptr(unsafe.Pointer(&t.spec))), 1
}
