package nbd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"holdfast/blockdev/serve/uring"
)

// receive asks for more from the client, unless what is there cannot be taken yet.
func (l *loop) receive() {
	if l.receiving || l.over != nil || l.stuck {
		return
	}
	to := []byte(nil)
	switch {
	case l.sealed == nil:
		to = l.space()
	case l.sealed.dry():
		to = l.sealed.received
	default:
		return
	}
	l.receiving = true
	uring.Recv(l.operation(), l.sock, to, l.large >= 0 && l.sealed == nil, tagReceive)
}

// space is where the client's next bytes belong.
func (l *loop) space() []byte {
	if l.large >= 0 {
		s := &l.slots[l.large]
		return s.buf.data(int(s.length))[s.done:]
	}
	if l.inFrom == l.inTo {
		l.inFrom, l.inTo = 0, 0
	} else if l.inFrom > 0 && l.inTo == len(l.in) {
		l.inTo = copy(l.in, l.in[l.inFrom:l.inTo])
		l.inFrom = 0
	}
	return l.in[l.inTo:]
}

func (l *loop) received(n int) {
	l.receiving = false
	switch {
	case l.broken != nil:
		l.hangUp(l.broken) // TLS would have no room to decrypt the end, and never get any
	case n < 0 && (syscall.Errno(-n) == syscall.EINTR || uring.Canceled(n)):
	case n < 0:
		l.hangUp(os.NewSyscallError("recv", syscall.Errno(-n)))
	case l.closed.Load() && n > 0:
		l.hangUp(net.ErrClosed) // TCP goes on receiving
	case l.sealed != nil:
		l.sealed.came(n)
	default:
		l.arrived(n)
	}
}

// arrived takes what has come to where it belongs, nothing for the end.
func (l *loop) arrived(n int) {
	switch {
	case n == 0 && l.inFrom == l.inTo && l.large < 0 && l.skip == 0:
		l.hangUp(errHungUp)
	case n == 0:
		l.hangUp(io.ErrUnexpectedEOF)
	case l.large >= 0:
		s := &l.slots[l.large]
		if s.done += n; s.done == int(s.length) {
			l.large = -1
			l.begin(s)
		}
	default:
		l.inTo += n
	}
}

// errHungUp is a client that went without a good-bye.
var errHungUp = errors.New("the client hung up")

// hangUp ends the receiving. A large payload that did not come to its end is
// forgotten.
func (l *loop) hangUp(why error) {
	if l.over == nil {
		l.over = why
	}
	l.stuck = false
	if l.large >= 0 {
		l.release(&l.slots[l.large])
		l.large = -1
	}
}

// take goes through what was received, as far as it can.
func (l *loop) take() {
	l.stuck = false
	l.takeArrived()
	for l.sealed != nil && l.decrypt() {
		l.takeArrived()
	}
}

func (l *loop) takeArrived() {
	for l.over == nil && l.large < 0 {
		if l.skip > 0 {
			n := min(l.skip, int64(l.inTo-l.inFrom))
			l.inFrom += int(n)
			if l.skip -= n; l.skip > 0 {
				return
			}
		}
		if l.inTo-l.inFrom < requestSize {
			return
		}
		var r request
		if !r.parse(l.in[l.inFrom : l.inFrom+requestSize]) {
			l.hangUp(fmt.Errorf("%w: request magic", errProtocol))
			return
		}
		if r.kind == cmdDisconnect {
			l.hangUp(io.EOF)
			return
		}
		if !l.takeRequest(&r) {
			return
		}
		if l.inTo-l.inFrom >= requestSize {
			uring.SubmitAhead(l.ring, l.disk)
		}
	}
}

// takeRequest begins one whose header is there; false when it has to wait.
func (l *loop) takeRequest(r *request) bool {
	c := l.check(r)
	there := l.inTo - l.inFrom - requestSize
	if c == codeOK && r.kind == cmdWrite && r.length <= largeSize && there < int(r.length) {
		return false // the rest of the payload comes with the next receive
	}
	data := c == codeOK && r.hasData()
	cost := int64(bufferFront)
	if data {
		cost = bufferCost(int(r.length))
	}
	if len(l.free) == 0 || l.left < cost {
		l.stuck = true
		return false
	}
	s := l.occupy(r, cost, data)
	l.inFrom += requestSize
	switch {
	case c != codeOK:
		l.skip = r.payload()
		l.refuse(s, c)
	case r.kind == cmdWrite:
		s.done = copy(s.buf.data(int(r.length)), l.in[l.inFrom:l.inTo])
		l.inFrom += s.done
		if s.done < int(r.length) {
			l.large = s.number
			return true
		}
		l.begin(s)
	default:
		l.begin(s)
	}
	return true
}
