package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// Requests of the VMM (docs/interop/vhost-user.rst of QEMU).
const (
	getFeatures         = 1
	setFeatures         = 2
	setOwner            = 3
	resetOwner          = 4
	setMemTable         = 5
	setVringNum         = 8
	setVringAddr        = 9
	setVringBase        = 10
	getVringBase        = 11
	setVringKick        = 12
	setVringCall        = 13
	setVringErr         = 14
	getProtocolFeatures = 15
	setProtocolFeatures = 16
	getQueueNum         = 17
	setVringEnable      = 18
	setBackendReqFD     = 21
	getConfig           = 24
	setConfig           = 25
	getInflightFD       = 31
	setInflightFD       = 32
	resetDevice         = 34
	getMaxMemSlots      = 36
	addMemReg           = 37
	remMemReg           = 38
)

// The one request of ours to the VMM: the configuration space has changed.
const configChanged = 2

// Parts of a header's flags.
const (
	version     = 1
	versionMask = 3
	isReply     = 1 << 2
	needReply   = 1 << 3
)

const (
	headerSize  = 12
	maxPayload  = 4096 // a memory table of all slots has 8 + 32 * maxRegions
	maxPassed   = maxRegions
	noFD        = 1 << 8 // in the payload of the three that set an eventfd
	vringNumber = 0xff
)

// errProtocol means that the VMM said something that makes no sense.
var errProtocol = errors.New("vhost-user protocol violated")

func violated(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errProtocol, fmt.Sprintf(format, args...))
}

// message is one request. Whoever keeps one of fds takes it out.
type message struct {
	request, flags uint32
	payload        []byte
	fds            []int
}

func (m *message) u64() (uint64, error) {
	if len(m.payload) != 8 {
		return 0, violated("request %d has %d bytes", m.request, len(m.payload))
	}
	return binary.LittleEndian.Uint64(m.payload), nil
}

// takeFD gives the only descriptor, which is the caller's from then on.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, violated("request %d has %d descriptors", m.request, len(m.fds))
	}
	fd := m.fds[0]
	m.fds = nil
	return fd, nil
}

// close closes the descriptors that nobody took.
func (m *message) close() {
	for _, fd := range m.fds {
		_ = syscall.Close(fd)
	}
	m.fds = nil
}

// readMessage reads a whole message; io.EOF where the VMM hung up between two.
func readMessage(conn *net.UnixConn) (m *message, err error) {
	m = &message{}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	header := make([]byte, headerSize)
	control := make([]byte, syscall.CmsgSpace(maxPassed*4))
	n, controlled, flags, _, err := conn.ReadMsgUnix(header, control)
	if err != nil {
		return m, err
	}
	if m.fds, err = passed(control[:controlled]); err != nil {
		return m, err
	}
	switch {
	case n == 0:
		return m, io.EOF
	case flags&syscall.MSG_CTRUNC != 0:
		return m, violated("more than %d descriptors", maxPassed)
	}
	if _, err := io.ReadFull(conn, header[n:]); err != nil {
		return m, err
	}
	m.request, m.flags = binary.LittleEndian.Uint32(header), binary.LittleEndian.Uint32(header[4:])
	size := binary.LittleEndian.Uint32(header[8:])
	if m.flags&versionMask != version || m.flags&isReply != 0 || size > maxPayload {
		return m, violated("request %d has the flags %#x and %d bytes", m.request, m.flags, size)
	}
	m.payload = make([]byte, size)
	_, err = io.ReadFull(conn, m.payload)
	return m, err
}

func passed(control []byte) (fds []int, err error) {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	for _, c := range messages {
		some, err := syscall.ParseUnixRights(&c)
		if err != nil {
			return fds, err
		}
		for _, fd := range some {
			syscall.CloseOnExec(fd)
		}
		fds = append(fds, some...)
	}
	return fds, nil
}

// appendMessage makes a message.
func appendMessage(b []byte, request, flags uint32, payload []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, request)
	b = binary.LittleEndian.AppendUint32(b, flags|version)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// reply answers a request, with a descriptor unless fd is negative.
func reply(conn *net.UnixConn, request uint32, payload []byte, fd int) error {
	var rights []byte
	if fd >= 0 {
		rights = syscall.UnixRights(fd)
	}
	_, _, err := conn.WriteMsgUnix(appendMessage(nil, request, isReply, payload), rights, nil)
	return err
}
