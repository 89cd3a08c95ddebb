package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"sync"
	"sync/atomic"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/throttle"
)

// Feature bits (virtio 1.2, 5.2.3 and 6; vhost-user.rst).
const (
	featureSegMax      = 1 << 2
	featureReadOnly    = 1 << 5
	featureBlockSize   = 1 << 6
	featureFlush       = 1 << 9
	featureTopology    = 1 << 10
	featureMultiQueue  = 1 << 12
	featureDiscard     = 1 << 13
	featureWriteZeroes = 1 << 14
	featureIndirect    = 1 << 28
	featureEventIdx    = 1 << 29
	featureProtocol    = 1 << 30
	featureVersion1    = 1 << 32

	protocolMultiQueue = 1 << 0
	protocolReplyAck   = 1 << 3
	protocolBackendReq = 1 << 5
	protocolConfig     = 1 << 9
	protocolInflight   = 1 << 12
	protocolReset      = 1 << 13
	protocolMemSlots   = 1 << 15
	protocolFeatures   = protocolMultiQueue | protocolReplyAck | protocolBackendReq | protocolConfig | protocolInflight | protocolReset | protocolMemSlots
)

const (
	sector     = 512
	serialSize = 20  // of GET_ID's answer
	segmentMax = 126 // pieces of memory in a request: a queue of 128 less header and status
	// rangeSectors bounds one discard or write of zeroes: 1 GiB.
	rangeSectors = 1 << 21
	configSize   = 60
	maxQueues    = 64
)

// Options of a server. The zero value of each field will do.
type Options struct {
	Serial   string // what the guest finds the disk by, up to 20 bytes
	ReadOnly bool
	Queues   int // 0: 1
	Meter    *meter.Meter
	Limiter  *throttle.Limiter // see Throttle
	// Ended is told how a VMM's connection ended: nil when it hung up.
	Ended func(error)
}

// Server shows a device to one VMM after the other as a disk. Its methods may be
// called from any goroutine.
type Server struct {
	o       Options
	size    atomic.Int64
	block   int // bytes; what the guest was told
	flusher flusher

	mu      sync.Mutex
	session *session
	closed  bool

	// changing is held by what starts loops and by Swap.
	changing sync.Mutex
	loops    map[*loop]struct{}
	served   *served
}

// New serves a device, which stays the caller's until Serve has returned. Its size
// must be a multiple of the block size.
func New(d Device, o Options) (*Server, error) {
	s, err := newServer(d, o)
	return s, blockdev.Op("vhost.New", "", err)
}

func newServer(d Device, o Options) (*Server, error) {
	o.Queues = max(o.Queues, 1)
	if o.Queues > maxQueues || len(o.Serial) > serialSize {
		return nil, fmt.Errorf("%w: %d queues (at most %d), serial of %d bytes (at most %d)", blockdev.ErrInvalid, o.Queues, maxQueues, len(o.Serial), serialSize)
	}
	if o.Meter == nil {
		o.Meter = &meter.Meter{}
	}
	if o.Limiter == nil {
		o.Limiter = &throttle.Limiter{}
	}
	s := &Server{o: o, served: newServed(d), loops: map[*loop]struct{}{}}
	s.block = s.served.block
	return s, s.measure(s.served)
}

func (s *Server) measure(d *served) error {
	size := d.device.Size()
	if size <= 0 || size%int64(s.block) != 0 {
		return fmt.Errorf("%w: %d bytes in blocks of %d", blockdev.ErrInvalid, size, s.block)
	}
	s.size.Store(size)
	return nil
}

// Resized looks how large the device is now and tells the guest. The guest sees a
// larger disk at once; requests beyond the end of a smaller one fail.
func (s *Server) Resized() error {
	return blockdev.Op("vhost.Resized", "", s.resized())
}

func (s *Server) resized() error {
	s.changing.Lock()
	err := s.measure(s.served)
	s.changing.Unlock()
	if err != nil {
		return err
	}
	s.mu.Lock()
	session := s.session
	s.mu.Unlock()
	if session == nil {
		return nil
	}
	return session.tellConfig()
}

// Serve serves the VMMs that connect, one after the other, until l is closed or the
// server is; then it is nil. A connection that breaks leaves no request half done.
func (s *Server) Serve(l *net.UnixListener) error {
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return blockdev.Op("vhost.Serve", "", err)
		}
		session := newSession(s, conn)
		if !s.enter(session) {
			_ = conn.Close() // nothing was said
			return nil
		}
		err = session.serve()
		s.leave()
		if s.o.Ended != nil {
			s.o.Ended(err)
		}
	}
}

func (s *Server) enter(session *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.session = session
	}
	return !s.closed
}

func (s *Server) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.session = nil
}

// Connected tells whether a VMM is connected.
func (s *Server) Connected() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.session != nil
}

// Close ends Serve when what has begun is done; the caller closes the listener
// first, which wakes it. Requests that have not begun stay in the guest's queue for
// the next server.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.session == nil {
		return nil
	}
	if err := s.session.conn.CloseRead(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil // it has just ended by itself
}

// Failed is why no write is acknowledged any more: a flush failed
// (blockdev.ErrFailed). nil while all is well.
func (s *Server) Failed() error { return s.flusher.failure() }

func (s *Server) features() uint64 {
	f := uint64(featureSegMax | featureBlockSize | featureFlush | featureTopology | featureIndirect | featureEventIdx | featureProtocol | featureVersion1)
	if s.o.Queues > 1 {
		f |= featureMultiQueue
	}
	if s.o.ReadOnly {
		return f | featureReadOnly
	}
	return f | featureDiscard | featureWriteZeroes
}

// config is struct virtio_blk_config.
func (s *Server) config() []byte {
	le := binary.LittleEndian
	c := make([]byte, configSize)
	le.PutUint64(c, uint64(s.size.Load()/sector))
	le.PutUint32(c[12:], segmentMax)
	le.PutUint32(c[20:], uint32(s.block))
	page := max(1, 4096/s.block) // what filesystems like, in blocks
	c[24] = byte(bits.TrailingZeros(uint(page)))
	le.PutUint16(c[26:], uint16(page))
	le.PutUint32(c[28:], uint32(page))
	c[32] = 1 // a write cache, which flushes empty
	le.PutUint16(c[34:], uint16(s.o.Queues))
	le.PutUint32(c[36:], rangeSectors)
	le.PutUint32(c[40:], 1)
	le.PutUint32(c[44:], uint32(4096/sector))
	le.PutUint32(c[48:], rangeSectors)
	le.PutUint32(c[52:], 1)
	c[56] = 1 // zeroes may be written by a hole
	return c
}
