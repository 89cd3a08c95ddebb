package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/blockdev"
)

// Options of a server. The zero value of each field stands for its default.
type Options struct {
	// TLS is offered to all clients, and forced on those of TCP. Client certificates
	// are asked for as it says.
	TLS *tls.Config
	// PlainLoopback lets clients of a TCP listener on a loopback address do without
	// TLS. Every user of the host can connect to it.
	PlainLoopback bool
	// Unlisted exports are not told to who asks for a list, and the empty name stands for
	// none: who wants one must know its name.
	Unlisted bool
	// Admit is asked when a client's handshake is over. What it gives is called at the
	// connection's end; nil ends the connection at once.
	Admit func() (leave func())
	// HandshakeTime is how long a client may take until the transmission phase;
	// default 10 s.
	HandshakeTime time.Duration
	// MaxConnections bounds the connections, those in the handshake among them;
	// default 256. One more takes the place of the one that is in the handshake for the
	// longest time, and is closed at once where none is: so those who only connect keep
	// nobody out for long.
	MaxConnections int
	// MaxInFlight bounds the bytes of the buffers of one connection's requests that are
	// being served, up to four times of their data; at least one request of the largest
	// size; default 64 MiB.
	MaxInFlight int64
	// Ended is told how a connection ended, nil for one that its client ended as it
	// should. It is called by the connection's goroutine.
	Ended func(remote net.Addr, err error)

	noLoop bool // for tests: goroutines serve unix sockets as well
}

// endTime bounds how long Close waits for clients to take the replies to requests
// that were being served.
const endTime = 5 * time.Second

// longAgo, as a deadline, ends what is waiting.
var longAgo = time.Unix(1, 0)

// Server serves exports to clients.
type Server struct {
	options Options
	ctx     context.Context // ends when the server is closed
	cancel  context.CancelFunc

	mu      sync.Mutex
	exports map[string]*Export
	conns   int
	evicted int        // of conns: those that lost their place and have not ended yet
	shaking []net.Conn // in the handshake, the oldest first
	ended   sync.WaitGroup
}

// NewServer gives a server without exports.
func NewServer(o Options) *Server {
	if o.HandshakeTime == 0 {
		o.HandshakeTime = 10 * time.Second
	}
	if o.MaxConnections == 0 {
		o.MaxConnections = 256
	}
	if o.MaxInFlight == 0 {
		o.MaxInFlight = 64 << 20
	}
	o.MaxInFlight = max(o.MaxInFlight, maxPayload+bufferFront)
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{options: o, ctx: ctx, cancel: cancel, exports: map[string]*Export{}}
}

// Add offers an export to connections that are made from now on. ErrExists for a
// name that is taken.
func (s *Server) Add(e *Export) error { return blockdev.Op("nbd.Add", "", s.add(e.name, e)) }

// AddAs is Add by another name: an export of several servers has one in each.
// ErrInvalid for a name that cannot be told to clients.
func (s *Server) AddAs(name string, e *Export) error {
	if len(name) > maxString {
		return blockdev.Op("nbd.AddAs", "", fmt.Errorf("a name of more than %d bytes: %w", maxString, blockdev.ErrInvalid))
	}
	return blockdev.Op("nbd.AddAs", "", s.add(name, e))
}

func (s *Server) add(name string, e *Export) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, taken := s.exports[name]; taken {
		return fmt.Errorf("export %q: %w", name, blockdev.ErrExists)
	}
	s.exports[name] = e
	return nil
}

// Remove takes an export from those that new connections see. Connections that have
// it go on.
func (s *Server) Remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.exports, name)
}

// find gives an export; the empty name stands for the only one that is listed.
func (s *Server) find(name string) *Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.exports[name]; ok || name != "" || len(s.exports) != 1 || s.options.Unlisted {
		return e
	}
	for _, only := range s.exports {
		return only
	}
	return nil
}

// listed is an export by its name in this server.
type listed struct {
	name string
	*Export
}

func (s *Server) all() []listed {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]listed, 0, len(s.exports))
	for name, e := range s.exports {
		list = append(list, listed{name, e})
	}
	slices.SortFunc(list, func(a, b listed) int { return strings.Compare(a.name, b.name) })
	return list
}

// Serve takes connections from l until the server is closed; it closes l and
// returns nil then. TCP without TLS is refused with ErrInvalid, but for loopback
// addresses when the options allow them.
func (s *Server) Serve(l net.Listener) error {
	tlsNeeded, err := s.tlsNeeded(l.Addr())
	if err != nil {
		return blockdev.Op("nbd.Serve", "", errors.Join(err, l.Close()))
	}
	stop := context.AfterFunc(s.ctx, func() { l.Close() })
	defer stop()
	err = s.accept(l, tlsNeeded)
	return blockdev.Op("nbd.Serve", "", errors.Join(err, ignoreClosed(l.Close())))
}

func (s *Server) tlsNeeded(addr net.Addr) (bool, error) {
	if addr.Network() == "unix" {
		return false, nil
	}
	tcp, ok := addr.(*net.TCPAddr)
	plain := ok && tcp.IP.IsLoopback() && s.options.PlainLoopback
	if s.options.TLS == nil && !plain {
		return false, fmt.Errorf("%s without TLS: give a certificate, or a loopback address and the option for it: %w", addr, blockdev.ErrInvalid)
	}
	return !plain, nil
}

// retryAccept is how long no connection is taken after one could not be for want of
// descriptors or memory.
const retryAccept = 50 * time.Millisecond

func (s *Server) accept(l net.Listener, tlsNeeded bool) error {
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			if !s.start(conn, tlsNeeded) {
				conn.Close()
			}
		case s.ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		default:
			select {
			case <-s.ctx.Done():
			case <-time.After(retryAccept):
			}
		}
	}
}

// ServeConn serves one connection that somebody else made, and returns when it has
// ended; it closes it. Who hands it over answers for who is at the other end: TLS
// is offered, not forced.
func (s *Server) ServeConn(conn net.Conn) error {
	if !s.enter(conn) {
		return blockdev.Op("nbd.ServeConn", "", errors.Join(blockdev.ErrBusy, conn.Close()))
	}
	return blockdev.Op("nbd.ServeConn", "", s.serve(conn, false))
}

// start serves a connection in its own goroutine, unless there are too many.
func (s *Server) start(conn net.Conn, tlsNeeded bool) bool {
	if !s.enter(conn) {
		return false
	}
	go func() {
		err := s.serve(conn, tlsNeeded)
		if s.options.Ended != nil {
			s.options.Ended(conn.RemoteAddr(), err)
		}
	}()
	return true
}

func (s *Server) enter(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	full := s.conns-s.evicted >= s.options.MaxConnections
	if s.ctx.Err() != nil || full && len(s.shaking) == 0 {
		return false
	}
	if full {
		s.evicted++
		_ = s.shaking[0].Close() // its goroutine finds out
		s.shaking = s.shaking[1:]
	}
	s.shaking = append(s.shaking, conn)
	s.conns++
	s.ended.Add(1)
	return true
}

// shaken ends a connection's handshake. false: it had lost its place.
func (s *Server) shaken(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := slices.Index(s.shaking, conn)
	if n < 0 {
		s.evicted--
		return false
	}
	s.shaking = slices.Delete(s.shaking, n, n+1)
	return true
}

func (s *Server) leave() {
	s.mu.Lock()
	s.conns--
	s.mu.Unlock()
	s.ended.Done()
}

// serve takes a connection through both phases.
func (s *Server) serve(conn net.Conn, tlsNeeded bool) error {
	defer s.leave()
	_ = conn.SetDeadline(time.Now().Add(s.options.HandshakeTime))
	stop := context.AfterFunc(s.ctx, func() { _ = conn.SetDeadline(longAgo) })
	used, t, err := s.negotiate(conn, tlsNeeded)
	placed := s.shaken(conn)
	switch {
	case !stop() && err == nil:
		err = net.ErrClosed // the server was closed meanwhile
	case !placed && err == nil:
		err = blockdev.ErrBusy
	}
	if err != nil {
		conn.Close()
		if errors.Is(err, errLeft) {
			return nil
		}
		return fmt.Errorf("handshake: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	if s.options.Admit != nil {
		leave := s.options.Admit()
		if leave == nil {
			return errors.Join(blockdev.ErrBusy, used.Close())
		}
		defer leave()
	}
	return s.transmit(used, t)
}

// Close ends all connections: requests that are being served are answered, if the
// client takes the answers within five seconds. It returns when all have ended. It
// does not sync.
func (s *Server) Close() error {
	s.mu.Lock()
	s.cancel() // under the lock, so that nobody enters any more
	s.mu.Unlock()
	s.ended.Wait()
	return nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
