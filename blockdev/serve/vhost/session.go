package vhost

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"

	"holdfast/internal/sys"
)

// session is what one VMM has said over its connection.
type session struct {
	server   *Server
	conn     *net.UnixConn
	features uint64
	protocol uint64
	memory   memory
	inflight *inflightRegion
	vrings   []vring

	mu      sync.Mutex
	backend int // socket for requests of ours, -1: none
	fault   error
}

// vring is a queue as the VMM describes it.
type vring struct {
	num               uint16
	desc, avail, used uint64
	base              uint16
	kick, call, err   int // -1: none
	enabled           bool
	loop              *loop // while it runs
}

func newSession(server *Server, conn *net.UnixConn) *session {
	s := &session{server: server, conn: conn, backend: -1, vrings: make([]vring, server.o.Queues)}
	for n := range s.vrings {
		s.vrings[n] = vring{kick: -1, call: -1, err: -1}
	}
	return s
}

// serve answers the VMM until it hangs up, and finishes what has begun.
func (s *session) serve() (err error) {
	defer func() { err = errors.Join(err, s.end()) }()
	for {
		m, err := readMessage(s.conn)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		err = s.handle(m)
		m.close()
		if err != nil {
			return err
		}
	}
}

func (s *session) end() error {
	s.pause()
	for n := range s.vrings {
		v := &s.vrings[n]
		for _, fd := range []*int{&v.kick, &v.call, &v.err} {
			replace(fd, -1)
		}
	}
	s.mu.Lock()
	replace(&s.backend, -1)
	fault := s.fault
	s.mu.Unlock()
	return errors.Join(fault, s.memory.close(), s.inflight.close(), s.conn.Close())
}

// hangUp ends the connection when a queue cannot be served any more: the VMM may
// come again.
func (s *session) hangUp(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = errors.Join(s.fault, why)
	_ = s.conn.CloseRead() // fails only when it has ended already
}

func replace(fd *int, by int) {
	if *fd >= 0 {
		_ = syscall.Close(*fd)
	}
	*fd = by
}

// handle obeys one request. Those with an answer of their own have answered; the
// others are acknowledged when the VMM asks for that.
func (s *session) handle(m *message) error {
	answered, err := s.dispatch(m)
	if answered || m.flags&needReply == 0 || s.protocol&protocolReplyAck == 0 || errors.Is(err, errProtocol) {
		return err
	}
	var result uint64
	if err != nil {
		result = 1
	}
	return reply(s.conn, m.request, binary.LittleEndian.AppendUint64(nil, result), -1)
}

func (s *session) dispatch(m *message) (answered bool, err error) {
	switch m.request {
	case getFeatures:
		return true, s.replyU64(m, s.server.features())
	case getProtocolFeatures:
		return true, s.replyU64(m, protocolFeatures)
	case getQueueNum:
		return true, s.replyU64(m, uint64(len(s.vrings)))
	case getMaxMemSlots:
		return true, s.replyU64(m, maxRegions)
	case getConfig:
		return true, s.getConfig(m)
	case getVringBase:
		return true, s.getVringBase(m)
	case getInflightFD:
		return true, s.getInflight(m)
	case setFeatures, setProtocolFeatures:
		return false, s.setFeatures(m)
	case setOwner, setConfig: // nothing in the configuration can be written
		return false, nil
	case resetOwner, resetDevice:
		s.reset()
		return false, nil
	case setMemTable:
		return false, s.setMemTable(m)
	case addMemReg, remMemReg:
		return false, s.changeMemory(m)
	case setInflightFD:
		return false, s.setInflight(m)
	case setBackendReqFD:
		return false, s.setBackend(m)
	case setVringAddr:
		return false, s.setVringAddr(m)
	case setVringNum, setVringBase, setVringEnable:
		return false, s.setVringState(m)
	case setVringKick, setVringCall, setVringErr:
		return false, s.setVringFD(m)
	}
	return false, violated("request %d was not offered", m.request)
}

func (s *session) replyU64(m *message, v uint64) error {
	return reply(s.conn, m.request, binary.LittleEndian.AppendUint64(nil, v), -1)
}

func (s *session) setFeatures(m *message) error {
	v, err := m.u64()
	if err != nil {
		return err
	}
	offered, to := uint64(protocolFeatures), &s.protocol
	if m.request == setFeatures {
		offered, to = s.server.features(), &s.features
	}
	if v&^offered != 0 {
		return violated("features %#x were not offered", v&^offered)
	}
	s.pause()
	*to = v
	return s.resume()
}

// reset takes everything back but the connection, the memory and what was agreed.
func (s *session) reset() {
	s.pause()
	for n := range s.vrings {
		v := &s.vrings[n]
		replace(&v.kick, -1)
		v.enabled, v.base = false, 0
	}
}

func (s *session) getConfig(m *message) error {
	const head = 12 // offset, size, flags
	if len(m.payload) < head {
		return violated("configuration asked for in %d bytes", len(m.payload))
	}
	offset, size := binary.LittleEndian.Uint32(m.payload), binary.LittleEndian.Uint32(m.payload[4:])
	if uint64(size) != uint64(len(m.payload)-head) || offset > 256 || size > 256 {
		return reply(s.conn, m.request, nil, -1) // vhost-user.rst: no bytes mean failure
	}
	all := append(s.server.config(), make([]byte, 512)...)
	copy(m.payload[head:], all[offset:])
	return reply(s.conn, m.request, m.payload, -1)
}

// tellConfig says that the configuration space has changed.
func (s *session) tellConfig() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.backend < 0 {
		return nil // it did not want to know
	}
	_, err := syscall.SendmsgN(s.backend, appendMessage(nil, configChanged, 0, nil), nil, nil, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
	return err
}

func (s *session) setBackend(m *message) error {
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	replace(&s.backend, fd)
	return nil
}

func (s *session) setMemTable(m *message) error {
	if len(m.payload) < 8 {
		return violated("memory table of %d bytes", len(m.payload))
	}
	count := int(binary.LittleEndian.Uint32(m.payload))
	if count > maxRegions || len(m.payload) != 8+regionSize*count || len(m.fds) != count {
		return violated("memory table of %d regions in %d bytes with %d descriptors", count, len(m.payload), len(m.fds))
	}
	s.pause()
	if err := s.memory.close(); err != nil {
		return err
	}
	for n, fd := range m.fds {
		if err := s.memory.add(m.payload[8+regionSize*n:], fd); err != nil {
			return err
		}
	}
	return s.resume()
}

func (s *session) changeMemory(m *message) error {
	if len(m.payload) != 8+regionSize {
		return violated("memory region of %d bytes", len(m.payload))
	}
	s.pause()
	var err error
	switch {
	case m.request == remMemReg:
		err = s.memory.remove(m.payload[8:])
	case len(m.fds) != 1:
		err = violated("memory region with %d descriptors", len(m.fds))
	default:
		err = s.memory.add(m.payload[8:], m.fds[0])
	}
	return errors.Join(err, s.resume())
}

// The size of the struct differs by its padding.
func isInflight(m *message) bool { return len(m.payload) >= 20 && len(m.payload) <= 24 }

func (s *session) getInflight(m *message) error {
	if !isInflight(m) {
		return violated("inflight region in %d bytes", len(m.payload))
	}
	_, _, queues, queueSize := parseInflight(m.payload)
	if !validInflight(queues, queueSize, len(s.vrings)) {
		return violated("inflight region for %d queues of %d", queues, queueSize)
	}
	size := inflightQueueSize(queueSize) * int64(queues)
	f, err := sys.MemoryFile("inflight", size)
	if err != nil {
		return err
	}
	defer f.Close()
	binary.LittleEndian.PutUint64(m.payload, uint64(size))
	binary.LittleEndian.PutUint64(m.payload[8:], 0)
	return reply(s.conn, m.request, m.payload, int(f.Fd()))
}

func (s *session) setInflight(m *message) error {
	if !isInflight(m) || len(m.fds) != 1 {
		return violated("inflight region in %d bytes with %d descriptors", len(m.payload), len(m.fds))
	}
	r, err := newInflight(m.payload, m.fds[0], len(s.vrings))
	if err != nil {
		return err
	}
	s.pause()
	err = s.inflight.close()
	s.inflight = r
	return errors.Join(err, s.resume())
}

// pause stops all loops, when what they have begun is done.
func (s *session) pause() {
	for n := range s.vrings {
		s.vrings[n].stop()
	}
}

func (v *vring) stop() {
	if v.loop != nil {
		v.base = v.loop.stop()
		v.loop.server.remove(v.loop)
		v.loop = nil
	}
}

// resume starts the loops of all queues that are to run.
func (s *session) resume() error {
	for n := range s.vrings {
		if err := s.start(n); err != nil {
			return err
		}
	}
	return nil
}

// start starts a queue's loop if it has all that it needs and does not run yet.
// State of an earlier run does not count: firmware uses a disk before a kernel does.
func (s *session) start(n int) error {
	v := &s.vrings[n]
	enabled := v.enabled || s.features&featureProtocol == 0
	if v.loop != nil || v.kick < 0 || !enabled || v.desc == 0 || len(s.memory.regions) == 0 {
		return nil
	}
	queue, ok := newVirtqueue(&s.memory, v.num, v.desc, v.avail, v.used, s.features&featureEventIdx != 0)
	if !ok {
		return violated("queue %d of %d at %#x, %#x, %#x is not in the guest's memory", n, v.num, v.desc, v.avail, v.used)
	}
	queue.lastAvail = v.base
	notes, err := s.inflight.notebook(n, v.num)
	if err != nil {
		return err
	}
	l := &loop{server: s.server, memory: &s.memory, queue: queue, notes: notes, kick: v.kick, call: v.call, err: v.err, faulted: s.hangUp}
	if err := s.server.add(l); err != nil {
		return err
	}
	v.loop = l
	return nil
}
