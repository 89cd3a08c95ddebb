package worker

import (
	"errors"
	"net"
	"time"

	"holdfast/blockdev/serve/control/wire"
	"holdfast/internal/sys"
)

// mostCalls bounds the calls at a time; one more waits until one ends.
const mostCalls = 16

// obey takes calls as long as the process lives.
func (w *worker) obey() {
	places := make(chan struct{}, mostCalls)
	for {
		places <- struct{}{}
		conn, err := w.control.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptors, no memory: it passes
			<-places
			time.Sleep(retryAccept)
			continue
		}
		go func() {
			defer func() { <-places }()
			defer conn.Close()
			w.take(wire.Conn{UnixConn: conn})
		}()
	}
}

// retryAccept is how long no call is taken after one could not be.
const retryAccept = 50 * time.Millisecond

// take takes one call. Who is not the owner is not heard; who says nothing in time,
// or nothing that makes sense, is told so if it listens, and that is all.
func (w *worker) take(c wire.Conn) {
	peer, err := sys.PeerOf(c)
	if err != nil || peer.User != w.owner {
		return
	}
	_ = c.SetDeadline(time.Now().Add(wire.Patience)) // of a socket that is open
	r, files, err := c.Request()
	if err != nil {
		_ = c.Answer(&wire.Reply{Error: wire.NewError(err)}) // it may have gone
		return
	}
	w.answering.Add(1)
	defer w.answering.Done()
	_ = c.SetDeadline(time.Time{})
	reply, err := w.do(c, r, files)
	if reply == nil {
		reply = &wire.Reply{}
	}
	reply.Error = wire.NewError(err)
	_ = c.SetWriteDeadline(time.Now().Add(wire.Patience))
	_ = c.Answer(reply) // the same
}
