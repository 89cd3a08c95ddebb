package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"holdfast/blockdev/serve/uring"
)

const (
	// recordSize is the most plain text of a TLS record.
	recordSize = 16 << 10
	// sealedRoom is more than a record of that takes.
	sealedRoom = recordSize + 256
	// sealedSize bounds what is encrypted before what was encrypted earlier has been sent.
	sealedSize = 256 << 10
)

// dry is what TLS reads when all that was received is read. It is temporary, so that TLS
// goes on where it was, in the midst of a record as well.
type dry struct{}

func (dry) Error() string   { return "nothing more was received" }
func (dry) Timeout() bool   { return true }
func (dry) Temporary() bool { return true }

// carrier is what TLS talks through: the network for the handshake, and then memory, which
// a loop fills and empties.
type carrier struct {
	net.Conn
	held bool   // in memory
	in   []byte // received, and not yet read
	end  bool   // nothing follows
	out  []byte // to be sent
}

func (c *carrier) Read(b []byte) (int, error) {
	switch {
	case !c.held:
		return c.Conn.Read(b)
	case len(c.in) > 0:
		n := copy(b, c.in)
		c.in = c.in[n:]
		return n, nil
	case c.end:
		return 0, io.EOF
	}
	return 0, dry{}
}

func (c *carrier) Write(b []byte) (int, error) {
	if !c.held {
		return c.Conn.Write(b)
	}
	c.out = append(c.out, b...)
	return len(b), nil
}

// socket is a connection that the kernel knows.
type socket interface {
	net.Conn
	syscall.Conn
}

// under gives the socket of a connection, nil where it is none, and its TLS if it has.
func under(conn net.Conn) (socket, *sealed) {
	var s *sealed
	if t, ok := conn.(*tls.Conn); ok {
		c, ok := t.NetConn().(*carrier)
		if !ok {
			return nil, nil
		}
		s = &sealed{carrier: c, tls: t}
		conn = c.Conn
	}
	switch c := conn.(type) {
	case *net.UnixConn:
		return c, s
	case *net.TCPConn:
		return c, s
	}
	return nil, nil
}

// sealed is the TLS of a loop's connection. What comes is received as it is and decrypted
// to where it belongs. Replies that are ready together share records; they are encrypted
// beside those that are on their way, up to a bound, and their buffers come back then.
type sealed struct {
	*carrier
	tls      *tls.Conn
	received []byte  // the memory of in
	together []byte  // the plain text of a record
	filling  *buffer // the memory of out
	flight   []byte  // what is on its way
	flying   *buffer // its memory
}

// take has the TLS read and write memory from now on.
func (s *sealed) take() {
	s.held = true
	s.received = make([]byte, receiveSize)
	s.together = make([]byte, 0, recordSize)
}

// full tells that nothing more may be encrypted, and so nothing be decrypted either:
// there are messages that TLS answers by itself.
func (s *sealed) full() bool { return len(s.out)+sealedRoom > sealedSize }

// unsent tells that something is encrypted that has not been sent.
func (s *sealed) unsent() bool { return len(s.out)+len(s.flight) > 0 }

// dry tells that more may be received.
func (s *sealed) dry() bool { return len(s.in) == 0 && !s.end && !s.full() }

// came takes what was received, nothing for the end.
func (s *sealed) came(n int) { s.in, s.end = s.received[:n], n == 0 }

func (s *sealed) write(text []byte) error {
	if len(s.out) == 0 {
		s.filling = takeBuffer(sealedSize)
		s.out = s.filling.mem[:0]
	}
	_, err := s.tls.Write(text)
	return err
}

// decrypt brings some of what was received to where it belongs; false when there is
// nothing, or no room for it.
func (l *loop) decrypt() bool {
	if l.over != nil || l.stuck || l.sealed.full() {
		return false
	}
	n, err := l.sealed.tls.Read(l.space())
	switch {
	case n > 0:
		l.arrived(n) // and is taken before an error, which comes again
	case err == nil || errors.Is(err, dry{}):
	case errors.Is(err, io.EOF):
		l.arrived(0)
	default:
		l.hangUp(fmt.Errorf("TLS: %w", err))
	}
	return n > 0
}

// sendSealed encrypts the replies that are ready, and sends what is encrypted unless some
// is on its way.
func (l *loop) sendSealed() {
	l.seal()
	s := l.sealed
	if l.sending > 0 || l.broken != nil {
		return
	}
	if len(s.flight) == 0 {
		s.flight, s.flying = s.out, s.filling
		s.out, s.filling = nil, nil
	}
	if len(s.flight) == 0 {
		return
	}
	l.sending = 1
	e := l.operation()
	uring.Send(e, l.sock, s.flight, tagSend)
	l.sendAtOnce(e, len(s.flight), len(l.outgoing) == 0 && len(s.out) == 0)
}

// sentSealed goes on behind what was sent.
func (l *loop) sentSealed(n int) {
	s := l.sealed
	if s.flight = s.flight[n:]; len(s.flight) == 0 && s.flying != nil {
		s.flying.free()
		s.flying = nil
	}
}

// seal encrypts replies while there is room.
func (l *loop) seal() {
	for len(l.outgoing) > 0 && !l.sealed.full() {
		text, gone := l.record()
		err := l.sealed.write(text)
		for _, n := range l.outgoing[:gone] {
			l.release(&l.slots[n])
		}
		l.outgoing = l.outgoing[:copy(l.outgoing, l.outgoing[gone:])]
		if err != nil {
			l.breakOff(fmt.Errorf("TLS: %w", err))
			l.rouse() // this may have been all that the loop waits for
		}
	}
}

// record gives the plain text of the next record, and how many replies end in it; those
// are still to be let go. What does not fit of the next stays.
func (l *loop) record() (text []byte, gone int) {
	first := &l.slots[l.outgoing[0]]
	if len(first.reply) >= recordSize || len(l.outgoing) == 1 {
		n := min(len(first.reply), recordSize)
		text, first.reply = first.reply[:n], first.reply[n:]
		if len(first.reply) == 0 {
			gone = 1
		}
		return text, gone
	}
	text = l.sealed.together[:0]
	for _, n := range l.outgoing {
		s := &l.slots[n]
		fits := min(len(s.reply), recordSize-len(text))
		text = append(text, s.reply[:fits]...)
		if s.reply = s.reply[fits:]; len(s.reply) > 0 {
			break
		}
		gone++
	}
	return text, gone
}

// farewell tells the client that nothing follows, if that can be sent at once.
func (l *loop) farewell() {
	s := l.sealed
	if s == nil || l.broken != nil || len(s.flight) > 0 {
		return
	}
	_ = s.tls.Close() // into memory
	if len(s.out) > 0 {
		e := l.ring.Next()
		uring.Send(e, l.sock, s.out, tagSend)
		uring.AtOnce(e)
		_ = l.ring.Submit()
	}
}
