package nbd

import (
	"encoding/binary"
	"os"
	"sync"

	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/uring"
)

// loopHelpers bounds the helpers of a connection. What has to be fetched from far away
// is not theirs, and may be as many as there are slots.
const loopHelpers = 16

// helping is how the loop has done by goroutines what would hold it up: it hands
// slots over and gets them back with their results, woken by an eventfd.
type helping struct {
	l       *loop
	wake    *os.File
	wakeFD  int
	counter [8]byte // read of the eventfd
	awake   bool    // a read of the eventfd waits in the ring
	jobs    chan *slot
	helped  int // slots that are not back yet
	helpers int
	idle    sync.WaitGroup

	mu       sync.Mutex
	finished []*slot
	taken    []*slot // finished ones that the loop goes through; its own
}

func (h *helping) start(l *loop, wake *os.File) {
	h.l, h.wake = l, wake
	h.wakeFD = int(wake.Fd())
	h.jobs = make(chan *slot, loopSlots) // handing over never waits
}

// end waits for the helpers, who have nothing to do any more.
func (h *helping) end() error {
	close(h.jobs)
	h.idle.Wait()
	return h.wake.Close()
}

// help hands a slot over.
func (h *helping) help(s *slot) {
	h.l.helped++
	if !s.settle && h.l.cause(&s.request) == meter.Hydration {
		h.idle.Go(func() { h.do(s) })
		return
	}
	h.jobs <- s
	if h.helpers < min(h.l.helped, loopHelpers) {
		h.helpers++
		h.idle.Go(h.work)
	}
}

func (h *helping) work() {
	for s := range h.jobs {
		if !s.settle && h.l.fetches(&s.request) { // not known before, or a part of a block
			h.idle.Go(func() { h.do(s) })
			continue
		}
		h.do(s)
	}
}

func (h *helping) do(s *slot) {
	switch {
	case s.kind == cmdBlockStatus:
		s.status, s.err = h.l.blockStatus(&s.request)
	case s.settle:
		s.err = h.l.terms.settle(h.l.queue, &s.request)
	case s.buf != nil:
		s.err = h.l.terms.perform(h.l.queue, &s.request, s.buf.data(int(s.length)))
	default:
		s.err = h.l.terms.perform(h.l.queue, &s.request, nil)
	}
	h.mu.Lock()
	first := len(h.finished) == 0
	h.finished = append(h.finished, s)
	h.mu.Unlock()
	if first {
		h.rouse()
	}
}

// rouse completes the waker's read.
func (h *helping) rouse() {
	_, _ = h.wake.Write(binary.NativeEndian.AppendUint64(nil, 1)) // fails only when it is closed
}

// wakeable keeps a read of the eventfd waiting in the ring.
func (l *loop) wakeable() {
	if l.awake {
		return
	}
	l.awake = true
	uring.Read(l.ring.Next(), l.wakeFD, l.counter[:], 0, tagWake)
}

// finishHelped answers what the helpers are through with.
func (l *loop) finishHelped() {
	if l.helped == 0 {
		return
	}
	l.mu.Lock()
	l.taken, l.finished = l.finished, l.taken[:0]
	l.mu.Unlock()
	for _, s := range l.taken {
		l.helped--
		l.finish(s, s.err)
	}
}
