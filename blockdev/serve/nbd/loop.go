package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/uring"
	"holdfast/internal/sys"
)

const (
	// loopSlots bounds the requests of a connection in flight.
	loopSlots = 256
	// loopEntries is enough for every slot, the receiver, the sender, the waker and
	// a few timers.
	loopEntries = 512
	// receiveSize is how much is received at once; a payload of up to largeSize comes
	// that way, a larger one is received where it belongs.
	receiveSize = 128 << 10
	largeSize   = 64 << 10
	// sendBuffer is what the socket holds, in bytes: a large reply goes out in one go, and
	// its memory comes back, before the client has taken all of it.
	sendBuffer = 2 << 20
	// sendPieces bounds the replies that go out in one message.
	sendPieces = 64
)

// Completions are told apart by their tags: those of slots are their numbers.
const (
	tagReceive = loopSlots + iota
	tagSend
	tagWake
	tagTimer
)

// loop serves a connection on a socket by one io_uring: requests are received,
// files are read and written and replies are sent by one thread, which waits for
// all of it in one place. What io_uring is no better for (flushes, discards, the
// block status), and what a device.Lender does not lend, goes to helpers. Its fields are its thread's but for those of
// helping.
//
// Nothing on the way of a read or write allocates, once buffers are there.
type loop struct {
	*terms
	ring   *sys.Uring
	queue  *meter.Queue
	sock   int
	sealed *sealed // nil: in the clear

	lentFile *os.File // what was lent last, and its number
	lentFD   int

	slots [loopSlots]slot
	free  []int // numbers of slots
	left  int64 // of the bytes in flight

	in        []byte // what was received and not yet taken: in[inFrom:inTo]
	inFrom    int
	inTo      int
	large     int   // slot whose payload is received where it belongs, or -1
	skip      int64 // bytes of a refused payload that are still to come
	receiving bool
	over      error // why no more is received; io.EOF for the client's good-bye
	stuck     bool  // a request waits for a slot or for bytes

	outgoing []int // slots whose replies are to be sent, the oldest first
	sending  int   // how many of them are on their way
	atOnce   int   // bytes of those that are sent while they are submitted; 0: they have a completion
	full     bool  // the socket's buffer was, and nothing has been sent since
	message  *uring.Message
	broken   error // why no more is sent

	held    []int // slots that wait for the end of a Swap
	delayed delays
	timers  [4]uring.Timer
	timerAt [4]int64 // when each is due; 0: not armed
	late    late     // beside them

	relimited atomic.Bool // the limits are others than those that the delayed were taken from

	closed   atomic.Bool // the server is
	keeps    bool        // it may keep its processor while it waits for the disk
	vain     bool        // the last wait ended with nothing
	inflight int         // operations that own memory, the waker's not counted
	disk     int         // of them: reads and writes of files
	serving  int         // slots in use
	helping
}

// slot is a request on its way.
type slot struct {
	request
	number  int
	small   *buffer // for most requests, kept
	buf     *buffer // of this one; nil when it has no data
	cost    int64
	began   int64
	since   int64 // when it began to wait for what it waits for
	due     int64 // when a throttled request goes on
	done    int   // bytes that are read, written, or received of a large payload
	err     error
	status  []byte // reply of a block status
	reply   []byte // what is left to send
	gated   bool   // has the export's gate
	fd      int    // where its data is read or written
	lent    bool   // fd was lent, by the device that is served
	first   bool   // as BeginWrite said
	settle  bool   // its data is written; it waits to be durable
	scratch [failureSize]byte
}

// loopable tells whether the loop is any better for a device than goroutines.
func (e *Export) loopable() bool {
	e.gate.RLock()
	defer e.gate.RUnlock()
	return e.served.fd >= 0 || e.served.lender != nil
}

// loop serves a connection until it ends, and closes it. It is false, with nothing
// done, where there is no io_uring.
func (s *Server) loop(conn socket, secured *sealed, t *terms) (bool, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ring, err := sys.NewUring(loopEntries)
	if err != nil {
		return false, nil
	}
	wake, err := sys.NewEventFD()
	if err != nil {
		_ = ring.Close() // the goroutines serve as well
		return false, nil
	}
	if local, ok := conn.(*net.UnixConn); ok { // TCP finds a size by itself
		_ = local.SetWriteBuffer(sendBuffer) // as much of it as the host allows
	}
	socket, err := sys.TakeSocket(conn)
	if err != nil {
		return true, errors.Join(err, conn.Close(), wake.Close(), ring.Close())
	}
	conn.Close() // the socket lives on; only the poller no longer wakes for it
	l := &loop{terms: t, ring: ring, sealed: secured, queue: t.export.meter.NewQueue(), left: s.options.MaxInFlight, in: make([]byte, receiveSize), large: -1, message: uring.NewMessage(sendPieces)}
	if secured != nil {
		secured.take()
	}
	l.helping.start(l, wake)
	for n := range l.slots {
		l.slots[n].number = n
		l.free = append(l.free, n)
	}
	stop := context.AfterFunc(s.ctx, func() {
		_ = sys.ShutdownSocket(socket, syscall.SHUT_RD) // ends the receive that waits in the ring
		l.closed.Store(true)
		l.rouse()
		time.AfterFunc(endTime, func() { _ = sys.ShutdownSocket(socket, syscall.SHUT_WR) })
	})
	t.export.join(l)
	err = withDescriptor(socket, func(fd int) error {
		l.sock = fd
		defer l.farewell()
		return l.run()
	})
	t.export.leave(l)
	l.late.stop()
	err = errors.Join(err, l.helping.end(), ring.Close())
	l.queue.Close()
	stop()
	if err != nil && s.ctx.Err() != nil {
		err = net.ErrClosed
	}
	return true, errors.Join(err, socket.Close())
}

// withDescriptor lends the descriptor of f, which stays open meanwhile.
func withDescriptor(f syscall.Conn, fn func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	return errors.Join(raw.Control(func(fd uintptr) { inner = fn(int(fd)) }), inner)
}

// run is the loop. It returns when the client is done, gone or wrong, and nothing
// is in flight any more.
func (l *loop) run() error {
	if l.keeps = uring.TakeKeep(); l.keeps {
		defer uring.GiveKeep()
	}
	l.take() // what TLS has read ahead
	for !l.ended() {
		l.wakeable()
		l.receive()
		l.send()
		l.arm()
		if err := l.wait(); err != nil {
			panic(err) // a bug in here; memory that the kernel still owns must not be freed
		}
		l.events()
		l.sentAtOnce()
		l.finishHelped()
		l.resumeHeld()
		l.relimit()
		l.resume()
		l.take()
		l.resume() // the end of the client may be among what was taken, and nothing else would wake the loop
	}
	if l.broken != nil {
		return l.broken
	}
	if errors.Is(l.over, io.EOF) {
		return nil
	}
	return l.over
}

// With many operations in the ring, waiting for two at once saves four of ten calls and
// rings the disk's bell as much less often; the first of them waits no longer than
// batchTime. When none comes in that time the disk is slow, and the next one is waited for.
const (
	batchFrom = 16 // operations
	batchTime = 30 * time.Microsecond
)

// wait submits what was filled, and returns with completions.
func (l *loop) wait() error {
	l.ring.KeepProcessor(l.keeps && l.disk > 0)
	if l.inflight < batchFrom || l.vain {
		return l.ring.Enter(1)
	}
	return l.ring.EnterWithin(2, batchTime)
}

// events takes all completions.
func (l *loop) events() {
	l.vain = true
	for e, ok := l.ring.Event(); ok; e, ok = l.ring.Event() {
		l.vain = false
		l.complete(e)
	}
}

// ended tells that nothing is left to do, and has the waker end as well.
func (l *loop) ended() bool {
	if l.over == nil || l.inflight > 0 || l.serving > 0 || l.sealed != nil && l.broken == nil && l.sealed.unsent() {
		return false
	}
	if l.awake {
		l.rouse()
	}
	return !l.awake
}

// operation gives an entry for one that owns memory. There always is room: no slot
// has two at once.
func (l *loop) operation() *sys.UringEntry {
	l.inflight++
	return l.ring.Next()
}

func (l *loop) complete(e sys.UringEvent) {
	switch {
	case e.UserData == tagWake:
		l.awake = false
	case e.UserData >= tagTimer:
		l.timerAt[e.UserData-tagTimer] = 0
	case e.UserData == tagReceive:
		l.inflight--
		l.received(int(e.Res))
	case e.UserData == tagSend:
		l.inflight--
		l.full, l.atOnce = l.atOnce > 0, 0
		l.sent(int(e.Res))
	default:
		l.inflight--
		l.disk--
		l.transferred(&l.slots[e.UserData], int(e.Res))
	}
}

// occupy takes a slot, with a buffer for data.
func (l *loop) occupy(r *request, cost int64, data bool) *slot {
	last := len(l.free) - 1
	s := &l.slots[l.free[last]]
	l.free = l.free[:last]
	s.request, s.cost, s.began, s.done, s.err, s.status, s.settle = *r, cost, meter.Now(), 0, nil, nil, false
	l.left -= cost
	l.serving++
	switch {
	case data && r.length <= 4096:
		if s.small == nil {
			s.small = takeBuffer(4096)
		}
		s.buf = s.small
	case data:
		s.buf = takeBuffer(int(r.length))
	}
	return s
}

func (l *loop) release(s *slot) {
	if s.buf != nil && s.buf != s.small {
		s.buf.free()
	}
	s.buf, s.reply, s.status = nil, nil, nil
	l.left += s.cost
	l.serving--
	l.free = append(l.free, s.number)
}

// begin performs a request that is all there, or holds it back.
func (l *loop) begin(s *slot) {
	if _, counted := kindOf(&s.request); counted {
		l.queue.Begin()
	}
	if wait := l.throttle(&s.request); wait > 0 {
		s.since = meter.Now()
		s.due = s.since + wait
		l.queue.Wait(meter.Throttle)
		l.delayed.push(&l.slots, s.number)
		return
	}
	l.perform(s)
}

// perform does a request whose time has come, unless a Swap is under way.
func (l *loop) perform(s *slot) {
	if !l.export.gate.TryRLock() {
		l.held = append(l.held, s.number)
		return
	}
	s.gated, s.done = true, 0
	if s.kind != cmdRead && s.kind != cmdWrite {
		l.help(s)
		return
	}
	if s.kind == cmdWrite {
		if err := l.export.flusher.failure(); err != nil {
			l.finish(s, err)
			return
		}
	}
	if !l.lend(s) {
		l.help(s)
		return
	}
	s.since = meter.Now()
	l.queue.Wait(meter.Device)
	l.transfer(s)
}

// resumeHeld goes on with what a Swap held back. Its end rouses the loop.
func (l *loop) resumeHeld() {
	if len(l.held) == 0 {
		return
	}
	held := slices.Clone(l.held)
	l.held = l.held[:0]
	for _, n := range held {
		l.perform(&l.slots[n])
	}
}

// lend finds the file that a read or write may go to without a detour.
func (l *loop) lend(s *slot) (ok bool) {
	d := l.export.served
	if s.fd = d.fd; s.fd >= 0 {
		return true
	}
	if d.lender == nil {
		return false
	}
	var data overlay.File
	if s.kind == cmdRead {
		data, ok = d.lender.Begin(int64(s.offset), int64(s.length))
	} else {
		data, s.first, ok = d.lender.BeginWrite(int64(s.offset), int64(s.length))
	}
	if !ok {
		return false
	}
	s.lent = true
	if s.fd, ok = l.numberOfLent(data); !ok {
		l.giveBack(s, false)
	}
	return ok
}

// numberOfLent gives the number of a file that was lent, which mostly is the last
// one again.
func (l *loop) numberOfLent(data overlay.File) (fd int, ok bool) {
	f, ok := data.(overlay.OSFile)
	if !ok {
		return -1, false
	}
	if f.File != l.lentFile {
		fd, err := device.Number(f.File)
		if err != nil {
			return -1, false
		}
		l.lentFile, l.lentFD = f.File, fd
	}
	return l.lentFD, true
}

// giveBack ends the use of a file that was lent; done says that all was read or
// written.
func (l *loop) giveBack(s *slot, done bool) {
	if !s.lent {
		return
	}
	s.lent = false
	if lender := l.export.served.lender; s.kind == cmdRead {
		lender.End()
	} else {
		lender.EndWrite(int64(s.offset), int64(s.length), s.first, done)
	}
}

func (l *loop) transfer(s *slot) {
	l.disk++
	b, at := s.buf.data(int(s.length))[s.done:], int64(s.offset)+int64(s.done)
	if s.kind == cmdRead {
		uring.Read(l.operation(), s.fd, b, at, uint64(s.number))
	} else {
		uring.Write(l.operation(), s.fd, b, at, uint64(s.number))
	}
}

// transferred goes on with what was read or written in part, and ends it otherwise.
func (l *loop) transferred(s *slot, n int) {
	var err error
	switch {
	case n > 0:
		if s.done += n; s.done < int(s.length) {
			l.transfer(s)
			return
		}
	case n == 0:
		err = fmt.Errorf("%d of %d bytes: %w", s.done, s.length, io.ErrUnexpectedEOF)
	case syscall.Errno(-n) == syscall.EINTR || syscall.Errno(-n) == syscall.EAGAIN:
		l.transfer(s)
		return
	case uring.Canceled(n):
		l.queue.Waited(meter.Device, s.since)
		l.giveBack(s, false)
		l.help(s) // all of it
		return
	default:
		err = syscall.Errno(-n)
	}
	l.queue.Waited(meter.Device, s.since)
	l.giveBack(s, err == nil)
	switch {
	case err != nil || s.kind == cmdRead:
	case s.flags&flagFUA != 0:
		s.settle = true
		l.help(s)
		return
	default:
		err = l.export.flusher.failure()
	}
	l.finish(s, err)
}

// finish counts a request and has it answered.
func (l *loop) finish(s *slot, err error) {
	if s.gated {
		s.gated = false
		l.export.gate.RUnlock()
	}
	if kind, counted := kindOf(&s.request); counted {
		l.queue.End(kind, s.began, int64(s.length), err != nil)
	}
	switch {
	case err != nil:
		l.refuse(s, codeOf(err))
	case s.status != nil:
		l.answer(s, s.status)
	case s.kind == cmdRead:
		l.answer(s, l.putReadHeader(s.buf, &s.request))
	default:
		l.refuse(s, codeOK)
	}
}

// refuse answers without data.
func (l *loop) refuse(s *slot, c code) {
	l.answer(s, s.scratch[:l.putResult(s.scratch[:], &s.request, c)])
}

func (l *loop) answer(s *slot, reply []byte) {
	if l.broken != nil {
		l.release(s)
		return
	}
	s.reply = reply
	l.outgoing = append(l.outgoing, s.number)
}
