package vhost

import (
	"encoding/binary"

	"holdfast/internal/sys"
)

func (s *session) vring(index uint64) (*vring, error) {
	if index >= uint64(len(s.vrings)) {
		return nil, violated("queue %d of %d", index, len(s.vrings))
	}
	return &s.vrings[index], nil
}

// vringState reads the two numbers of a request about a queue.
func (s *session) vringState(m *message) (v *vring, index, value uint32, err error) {
	if len(m.payload) != 8 {
		return nil, 0, 0, violated("request %d has %d bytes", m.request, len(m.payload))
	}
	index, value = binary.LittleEndian.Uint32(m.payload), binary.LittleEndian.Uint32(m.payload[4:])
	v, err = s.vring(uint64(index))
	return v, index, value, err
}

func (s *session) setVringState(m *message) error {
	v, index, value, err := s.vringState(m)
	if err != nil {
		return err
	}
	switch m.request {
	case setVringNum:
		if value == 0 || value > maxQueueSize || value&(value-1) != 0 {
			return violated("queue of %d", value)
		}
		v.stop()
		v.num = uint16(value)
	case setVringBase:
		if value > 0xffff {
			return violated("base %d", value)
		}
		v.stop()
		v.base = uint16(value)
	case setVringEnable:
		if v.enabled = value != 0; !v.enabled {
			v.stop()
		}
	}
	return s.start(int(index))
}

func (s *session) setVringAddr(m *message) error {
	const size = 40 // index, flags, descriptors, used, available, log
	if len(m.payload) != size {
		return violated("addresses in %d bytes", len(m.payload))
	}
	index := binary.LittleEndian.Uint32(m.payload)
	v, err := s.vring(uint64(index))
	if err != nil {
		return err
	}
	v.stop()
	word := func(n int) uint64 { return binary.LittleEndian.Uint64(m.payload[n:]) }
	v.desc, v.used, v.avail = word(8), word(16), word(24)
	return s.start(int(index))
}

// getVringBase stops a queue, as a driver that goes away wants it.
func (s *session) getVringBase(m *message) error {
	v, index, _, err := s.vringState(m)
	if err != nil {
		return err
	}
	v.stop()
	replace(&v.kick, -1)
	payload := binary.LittleEndian.AppendUint32(nil, index)
	return reply(s.conn, m.request, binary.LittleEndian.AppendUint32(payload, uint32(v.base)), -1)
}

// setVringFD takes one of a queue's eventfds, whose mode is the VMM's business.
func (s *session) setVringFD(m *message) error {
	value, err := m.u64()
	if err != nil {
		return err
	}
	v, err := s.vring(value & vringNumber)
	if err != nil {
		return err
	}
	fd := -1
	if value&noFD == 0 {
		if fd, err = m.takeFD(); err != nil {
			return err
		}
	}
	switch m.request {
	case setVringKick:
		v.stop()
		replace(&v.kick, fd)
	case setVringErr:
		v.exchange(func(l *loop) { l.err = fd })
		replace(&v.err, fd)
	case setVringCall:
		v.exchange(func(l *loop) { l.call = fd })
		replace(&v.call, fd)
		if fd >= 0 {
			_ = sys.SignalEvent(fd) // what was told to the old one may not have been heard
		}
	}
	return s.start(int(value & vringNumber))
}

// exchange changes a running loop.
func (v *vring) exchange(f func(*loop)) {
	if v.loop != nil {
		v.loop.do(func() { f(v.loop) })
	}
}
