package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/uring"
	"holdfast/internal/sys"
)

// send sends the replies that are ready in one piece, unless some are on their way.
func (l *loop) send() {
	if l.sealed != nil {
		l.sendSealed()
		return
	}
	if l.sending > 0 || len(l.outgoing) == 0 {
		return
	}
	e := l.operation()
	if len(l.outgoing) == 1 {
		l.sending = 1
		reply := l.slots[l.outgoing[0]].reply
		uring.Send(e, l.sock, reply, tagSend)
		l.sendAtOnce(e, len(reply), true)
		return
	}
	l.message.Reset()
	bytes := 0
	for l.sending < len(l.outgoing) && !l.message.Full() {
		reply := l.slots[l.outgoing[l.sending]].reply
		l.message.Add(reply)
		bytes += len(reply)
		l.sending++
	}
	uring.SendMessage(e, l.sock, l.message, tagSend)
	l.sendAtOnce(e, bytes, l.sending == len(l.outgoing))
}

// atOnceSize bounds what is sent without a completion: its buffers come back when
// the loop wakes for something else, which on an idle connection is never.
const atOnceSize = 128 << 10

// sendAtOnce saves the loop from being woken by its own send, where the receive that
// is under way will wake it and nothing else waits for the send to end.
func (l *loop) sendAtOnce(e *sys.UringEntry, bytes int, all bool) {
	if l.receiving && !l.full && all && bytes <= atOnceSize && l.ring.Quiet() {
		l.atOnce = bytes
		uring.AtOnce(e)
	}
}

// sentAtOnce ends a send of which no completion has told that it failed.
func (l *loop) sentAtOnce() {
	if l.atOnce == 0 || !l.ring.Submitted() {
		return
	}
	l.inflight--
	n := l.atOnce
	l.atOnce = 0
	l.sent(n)
}

// sent lets go of the replies that went out whole; the rest is sent next.
func (l *loop) sent(n int) {
	l.sending = 0
	if n < 0 {
		if errno := syscall.Errno(-n); errno != syscall.EINTR && errno != syscall.EAGAIN && !uring.Canceled(n) {
			l.breakOff(os.NewSyscallError("send", errno))
		}
		return
	}
	if l.sealed != nil {
		l.sentSealed(n)
		return
	}
	gone := 0
	for n > 0 {
		s := &l.slots[l.outgoing[gone]]
		if n < len(s.reply) {
			s.reply = s.reply[n:]
			break
		}
		n -= len(s.reply)
		l.release(s)
		gone++
	}
	l.outgoing = l.outgoing[:copy(l.outgoing, l.outgoing[gone:])]
}

// breakOff is the end of a client that takes no replies: none follows, and nothing
// more is received. What is in flight comes to its end.
func (l *loop) breakOff(why error) {
	l.broken = why
	for _, n := range l.outgoing {
		l.release(&l.slots[n])
	}
	l.outgoing = l.outgoing[:0]
	_ = syscall.Shutdown(l.sock, syscall.SHUT_RDWR) // ends a receive that waits
	if !l.receiving {
		l.hangUp(why)
	}
}

// resume goes on with throttled requests that are due. When the client hung up or
// the server is closed they are dropped: nobody was told that they were done.
func (l *loop) resume() {
	if len(l.delayed) == 0 {
		return
	}
	gone := l.over != nil && !errors.Is(l.over, io.EOF) || l.closed.Load()
	now := meter.Now()
	for len(l.delayed) > 0 {
		s := &l.slots[l.delayed[0]]
		if s.due > now && !gone {
			return
		}
		l.delayed.pop(&l.slots)
		l.queue.Waited(meter.Throttle, s.since)
		if gone {
			l.finish(s, net.ErrClosed)
		} else {
			l.perform(s)
		}
	}
}

// arm sets a timer for the throttled request that is due next, unless one rings
// before it.
func (l *loop) arm() {
	if len(l.delayed) == 0 {
		return
	}
	due := l.slots[l.delayed[0]].due
	free := -1
	for n, at := range l.timerAt {
		if at == 0 {
			free = n
		} else if at <= due {
			return
		}
	}
	now := meter.Now()
	if free < 0 {
		l.late.arm(due, now, l.rouse)
		return
	}
	l.timerAt[free] = due
	uring.Timeout(l.ring.Next(), &l.timers[free], max(1, due-now), tagTimer+uint64(free))
}

// delays are slots in the order in which they are due: a heap.
type delays []int

func (d *delays) push(slots *[loopSlots]slot, number int) {
	*d = append(*d, number)
	h := *d
	for i := len(h) - 1; i > 0; {
		up := (i - 1) / 2
		if slots[h[up]].due <= slots[h[i]].due {
			return
		}
		h[up], h[i] = h[i], h[up]
		i = up
	}
}

func (d *delays) pop(slots *[loopSlots]slot) {
	h := *d
	last := len(h) - 1
	h[0] = h[last]
	h = h[:last]
	*d = h
	for i := 0; ; {
		down := 2*i + 1
		if down >= len(h) {
			return
		}
		if down+1 < len(h) && slots[h[down+1]].due < slots[h[down]].due {
			down++
		}
		if slots[h[i]].due <= slots[h[down]].due {
			return
		}
		h[i], h[down] = h[down], h[i]
		i = down
	}
}
