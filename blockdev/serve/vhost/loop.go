package vhost

import (
	"math/bits"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/uring"
	"holdfast/internal/sys"
)

// Completions that are of no request.
const (
	tagKick = 1<<32 + iota
	tagWake
	tagSync
)

// loop serves one queue on a thread and with an io_uring of its own. Its fields
// are that thread's, but for those of asking.
type loop struct {
	server *Server
	served *served
	memory *memory
	queue  virtqueue
	notes  notebook
	kick   int
	call   int // -1: none
	err    int // -1: none

	ring     *sys.Uring
	meter    *meter.Queue
	requests []request
	syncing  request // what a helper needs for a sync
	inflight int     // requests that are being performed
	delayed  [2]delays
	done     []uint16 // answered, not published
	flushed  []flush  // of the sync that has just ended
	spaces   []*[piecesMost]syscall.Iovec
	lentFile *os.File // the last that a device has lent
	lentFD   int
	keeps    bool // it may keep its processor while it waits for the disk
	stopping bool
	broken   bool          // the guest made no sense
	held     bool          // nothing is begun
	quiet    chan struct{} // to be closed when nothing is in flight; nil: nobody waits for that

	helping
	asking
	ended   chan struct{}
	faulted func(error) // told why it ended by itself
}

// asking is how others have something done by the loop's thread.
type asking struct {
	mu       sync.Mutex
	todo     []func()
	finished []*request // by helpers
	waker    int
}

// begin starts a loop; the descriptors stay the caller's until it has ended.
func (l *loop) begin() error {
	wake, err := sys.NewEventFD()
	if err != nil {
		return err
	}
	l.waker, err = syscall.Dup(int(wake.Fd()))
	_ = wake.Close()
	if err != nil {
		return err
	}
	syscall.CloseOnExec(l.waker)
	l.requests = make([]request, l.queue.num)
	for n := range l.requests {
		l.requests[n].head = uint16(n)
	}
	l.syncing.kind = kindFlush
	l.done = make([]uint16, 0, l.queue.num)
	l.beginHelping()
	l.ended = make(chan struct{})
	started := make(chan error)
	go l.run(started)
	if err := <-started; err != nil {
		<-l.ended
		return err
	}
	return nil
}

// ask has f called by the loop's thread between two requests, unless it has ended.
func (l *loop) ask(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.todo = append(l.todo, f)
	_ = sys.SignalEvent(l.waker) // fails only when the loop has ended: nobody adds 2^64 to it
}

// do is ask that waits until it is done.
func (l *loop) do(f func()) {
	done := make(chan struct{})
	l.ask(func() { f(); close(done) })
	select {
	case <-done:
	case <-l.ended:
	}
}

// stop takes nothing more, finishes what has begun, and gives the position in the
// available ring.
func (l *loop) stop() uint16 {
	l.do(func() { l.stopping = true })
	<-l.ended
	return l.queue.lastAvail
}

func (l *loop) run(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(l.ended)
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		_ = syscall.Close(l.waker)
		l.waker = -1
	}()
	var err error
	// There is an entry for each request and for what is of none.
	l.ring, err = sys.NewUring(1 << bits.Len(uint(l.queue.num)+4))
	started <- err
	if err != nil {
		return
	}
	defer func() { _ = l.ring.Close() }() // nothing is in flight
	defer l.endHelping()
	l.meter = l.server.o.Meter.NewQueue()
	defer l.meter.Close()
	if l.keeps = uring.TakeKeep(); l.keeps {
		defer uring.GiveKeep()
	}
	uring.Watch(l.entry(), l.kick, tagKick)
	uring.Watch(l.entry(), l.waker, tagWake)
	l.queue.usedIdx = *at16(l.queue.used, 1)
	for _, head := range l.notes.left(&l.queue) {
		l.open(head)
	}
	for !l.stopping || l.inflight > 0 || l.delays() {
		l.resume()
		l.takeAll()
		l.publish()
		if err := l.enter(); err != nil {
			l.drain()
			l.faulted(err)
			return
		}
		l.events()
		l.publish()
		l.rest()
	}
}

// entry gives an entry of the ring, in which there is room for all that may be asked
// at once.
func (l *loop) entry() *sys.UringEntry { return l.ring.Next() }

// enter submits what was filled and waits for something to do.
func (l *loop) enter() error {
	l.ring.KeepProcessor(l.keeps && l.inflight > l.near.busy+l.far.busy)
	if due, ok := l.nextDue(); ok {
		return l.ring.EnterWithin(1, time.Duration(max(0, due-meter.Now())))
	}
	return l.ring.Enter(1)
}

// rest tells who waits for it that nothing is in flight.
func (l *loop) rest() {
	if l.quiet != nil && l.inflight == 0 {
		close(l.quiet)
		l.quiet = nil
	}
}

// drain is for a ring that cannot be entered: what has begun must end before the
// memory goes away.
func (l *loop) drain() {
	l.stopping, l.broken = true, true
	for l.inflight > 0 {
		_ = l.ring.Enter(0) // it has failed before, and completions come by it
		l.events()
		l.asked()
		runtime.Gosched()
	}
	l.publish()
}

// takeAll begins all requests that the guest has put into the queue, and leaves
// kicks asked for.
func (l *loop) takeAll() {
	if l.stopping || l.broken || l.held {
		return
	}
	v := &l.queue
	v.quiet()
	for {
		waiting := v.availIdx() - v.lastAvail
		if waiting == 0 {
			v.awaitKick()
			if waiting = v.availIdx() - v.lastAvail; waiting == 0 {
				return
			}
			v.quiet()
		}
		v.fence()
		if waiting > v.num {
			l.halt()
			return
		}
		for ; waiting > 0 && !l.broken; waiting-- {
			head := v.head()
			v.lastAvail++
			l.accept(head)
			if waiting > 1 {
				uring.SubmitAhead(l.ring, l.inflight)
			}
		}
		if l.broken {
			return
		}
		if len(l.done) > 0 {
			l.publish()
		}
	}
}

// accept notes a request and begins it.
func (l *loop) accept(head uint16) {
	if head >= l.queue.num || l.requests[head].busy {
		l.halt()
		return
	}
	l.notes.begin(head)
	l.open(head)
}

// open reads a request and begins it.
func (l *loop) open(head uint16) {
	r := &l.requests[head]
	if !l.take(head, r) {
		if r.space != nil {
			l.spaces, r.space = append(l.spaces, r.space), nil
		}
		l.halt()
		return
	}
	r.busy = true
	l.start(r)
}

// halt ends a queue that makes no sense; only a reset by its driver makes it anew.
func (l *loop) halt() {
	l.broken = true
	if l.err >= 0 {
		_ = sys.SignalEvent(l.err)
	}
}

// events takes all completions.
func (l *loop) events() {
	for {
		e, ok := l.ring.Event()
		if !ok {
			return
		}
		switch e.UserData {
		case tagKick:
			l.again(e, l.kick)
		case tagWake:
			l.again(e, l.waker)
			l.asked()
		case tagSync:
			l.synced(e.Res)
		default:
			l.complete(&l.requests[e.UserData], e.Res)
		}
	}
}

// again goes on watching when the kernel has stopped to.
func (l *loop) again(e sys.UringEvent, fd int) {
	if uring.Lasts(e) {
		return
	}
	if e.Res < 0 && e.UserData == tagKick {
		l.broken = true // it is no eventfd
		return
	}
	uring.Watch(l.entry(), fd, e.UserData)
}

// asked does what others asked for, and ends what helpers are through with.
func (l *loop) asked() {
	l.mu.Lock()
	todo := l.todo
	l.todo = nil
	l.taken, l.finished = l.finished, l.taken[:0]
	l.mu.Unlock()
	for _, f := range todo {
		f()
	}
	for _, r := range l.taken {
		l.helped(r)
	}
}

// publish shows the guest what is done, and tells it if it wants to be told.
func (l *loop) publish() {
	if len(l.done) == 0 {
		return
	}
	l.queue.publish()
	l.notes.published(l.done, l.queue.usedIdx)
	l.done = l.done[:0]
	if l.queue.wantsCall() && l.call >= 0 {
		_ = sys.SignalEvent(l.call)
	}
}

// borrow gives room for a long list of pieces; it comes back with the answer.
func (l *loop) borrow() *[piecesMost]syscall.Iovec {
	if n := len(l.spaces); n > 0 {
		s := l.spaces[n-1]
		l.spaces = l.spaces[:n-1]
		return s
	}
	return new([piecesMost]syscall.Iovec)
}
