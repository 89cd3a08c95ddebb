package bench

import (
	"context"
	"errors"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"holdfast/blockdev/serve/uring"
	"holdfast/blockdev/serve/vhost/frontend"
	"holdfast/internal/sys"
)

// handover has requests on a file done by a thread of its own with an io_uring: what
// is left of a server when the protocol, the other process and its limits are taken
// away. Both sides share memory and are woken by eventfds, each only when it sleeps, as
// a guest's driver and a vhost-user server are. What this path loses beside the raw
// file no server can win back.
type handover struct {
	file     *os.File
	memory   []byte
	block    int
	slots    []handedRequest
	asked    handRing
	answered handRing
	end      atomic.Bool
	ended    chan error
	events   [2]*os.File
	waker    int // eventfd of the thread
	caller   int // eventfd of who asks; it waits in read(2)
	gone     atomic.Bool
}

// handedRequest is a request.
type handedRequest struct {
	kind   uint32
	at     int64
	length int
	failed bool
}

// handRing takes slots from one thread to the other. It has room for all there are.
type handRing struct {
	slots       []int
	put, taken  uint32 // of the one side, and of the other
	shown       atomic.Uint32
	othersSleep atomic.Bool // who takes wants to be woken
}

func (r *handRing) add(slot int) {
	r.slots[r.put%uint32(len(r.slots))] = slot
	r.put++
}

// show shows what was added, and wakes who sleeps for it.
func (r *handRing) show(wake int) error {
	r.shown.Store(r.put)
	if r.othersSleep.CompareAndSwap(true, false) {
		return os.NewSyscallError("write", sys.SignalEvent(wake))
	}
	return nil
}

func (r *handRing) take() (slot int, ok bool) {
	if r.taken == r.shown.Load() {
		return 0, false
	}
	slot = r.slots[r.taken%uint32(len(r.slots))]
	r.taken++
	return slot, true
}

// rests asks to be woken; false when something is there already.
func (r *handRing) rests() bool {
	r.othersSleep.Store(true)
	if r.taken == r.shown.Load() {
		return true
	}
	r.othersSleep.Store(false)
	return false
}

// newHandover starts the thread, for so many requests of block bytes at a time.
func newHandover(image string, depth, block int) (h *handover, err error) {
	h = &handover{block: block, slots: make([]handedRequest, depth), ended: make(chan error, 1)}
	h.asked.slots, h.answered.slots = make([]int, depth), make([]int, depth)
	defer func() {
		if err != nil {
			err = errors.Join(err, h.drop())
		}
	}()
	if h.file, err = os.OpenFile(image, os.O_RDWR|syscall.O_DIRECT, 0); err != nil {
		return h, err
	}
	shared, err := sys.MemoryFile("requests", int64(depth*block)) // like a guest's
	if err != nil {
		return h, err
	}
	h.memory, err = sys.MapShared(int(shared.Fd()), int64(depth*block))
	_ = shared.Close() // it stays mapped
	if err != nil {
		return h, err
	}
	for n := range h.events {
		if h.events[n], err = sys.NewEventFD(); err != nil {
			return h, err
		}
	}
	h.waker, h.caller = int(h.events[0].Fd()), int(h.events[1].Fd())
	started := make(chan error)
	go h.serve(started)
	return h, <-started
}

// Close ends the thread; nothing is in flight.
func (h *handover) Close() error {
	h.end.Store(true)
	_ = sys.SignalEvent(h.waker)
	return errors.Join(<-h.ended, h.drop())
}

func (h *handover) drop() error {
	var errs []error
	if h.memory != nil {
		errs = append(errs, sys.Unmap(h.memory))
	}
	for _, f := range []*os.File{h.events[0], h.events[1], h.file} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Data, Put, Show, Wait, Take and Abandon are those of frontend.Queue.
func (h *handover) Data(slot int) []byte { return h.memory[slot*h.block : (slot+1)*h.block] }

func (h *handover) Put(slot int, kind uint32, sector uint64, length int) {
	h.slots[slot] = handedRequest{kind: kind, at: int64(sector) * 512, length: length}
	h.asked.add(slot)
}

func (h *handover) Show() error { return h.asked.show(h.waker) }

func (h *handover) Wait() error {
	for h.answered.rests() {
		if h.gone.Load() {
			return frontend.ErrAbandoned
		}
		var b [8]byte
		if _, err := syscall.Read(h.caller, b[:]); err != nil && !errors.Is(err, syscall.EINTR) {
			return os.NewSyscallError("read", err)
		}
	}
	return nil
}

func (h *handover) Take() (slot int, status byte, ok bool) {
	slot, ok = h.answered.take()
	if ok && h.slots[slot].failed {
		status = 1
	}
	return slot, status, ok
}

func (h *handover) Abandon() {
	h.gone.Store(true)
	_ = sys.SignalEvent(h.caller)
}

const handoverWake = 1 << 32 // tag of the thread's eventfd; those of requests are their slots

// serve is the thread.
func (h *handover) serve(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ring, err := sys.NewUring(1024)
	started <- err
	if err != nil {
		return
	}
	keeps := uring.TakeKeep()
	if keeps {
		defer uring.GiveKeep()
	}
	uring.Watch(ring.Next(), h.waker, handoverWake)
	for inflight := 0; err == nil && !h.end.Load(); {
		for slot, ok := h.asked.take(); ok; slot, ok = h.asked.take() {
			uring.SubmitAhead(ring, inflight) // as our workers do
			h.submit(ring.Next(), slot)
			inflight++
		}
		ring.KeepProcessor(keeps && inflight > 0)
		if h.asked.rests() {
			err = ring.Enter(1)
		}
		answers := false
		for e, ok := ring.Event(); ok; e, ok = ring.Event() {
			if e.UserData != handoverWake {
				s := &h.slots[e.UserData]
				s.failed = int(e.Res) != s.length
				h.answered.add(int(e.UserData))
				inflight--
				answers = true
			} else if !uring.Lasts(e) {
				uring.Watch(ring.Next(), h.waker, handoverWake)
			}
		}
		if answers {
			err = errors.Join(err, h.answered.show(h.caller))
		}
	}
	h.ended <- errors.Join(err, ring.Close())
}

func (h *handover) submit(e *sys.UringEntry, slot int) {
	s := &h.slots[slot]
	switch b := h.Data(slot)[:s.length]; s.kind {
	case frontend.Read:
		uring.Read(e, int(h.file.Fd()), b, s.at, uint64(slot))
	case frontend.Write:
		uring.Write(e, int(h.file.Fd()), b, s.at, uint64(slot))
	default:
		uring.SyncData(e, int(h.file.Fd()), uint64(slot))
	}
}

// openThread is the raw file by another thread. Its CPU is this process's: the
// client's has both sides.
func openThread(_ context.Context, b *IO, p *ioPath) error {
	p.run = func(ctx context.Context, j ioJob, each time.Duration) (s ioSample, requests float64, err error) {
		h, err := newHandover(b.image, j.depth, j.block)
		if err != nil {
			return s, 0, err
		}
		defer func() { err = errors.Join(err, h.Close()) }()
		return newLoad(j, h, h, b.size).measure(ctx, each)
	}
	return nil
}
