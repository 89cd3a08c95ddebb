package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// sock_diag(7) of unix sockets, whose constants x/sys does not have.
const (
	diagByFamily     = 20 // SOCK_DIAG_BY_FAMILY
	diagShowVFS      = 2  // UDIAG_SHOW_VFS
	diagShowPeer     = 4  // UDIAG_SHOW_PEER
	diagVFS          = 1  // UNIX_DIAG_VFS: inode and device of what it is bound to, 32 bits each
	diagPeer         = 2  // UNIX_DIAG_PEER: inode of the other end
	diagRequestSize  = 24 // struct unix_diag_req
	diagMessageSize  = 16 // struct unix_diag_msg
	stateEstablished = 1  // TCP_ESTABLISHED
)

// SocketPeers gives the inodes of this host's sockets that are connected to one which
// listens, or did, at a socket file. They are those of /proc/PID/fd.
func SocketPeers(at Place) (map[uint64]bool, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	defer unix.Close(fd)
	request := make([]byte, unix.NLMSG_HDRLEN+diagRequestSize)
	order := binary.NativeEndian
	order.PutUint32(request, uint32(len(request)))
	order.PutUint16(request[4:], diagByFamily)
	order.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	request[unix.NLMSG_HDRLEN] = unix.AF_UNIX
	order.PutUint32(request[unix.NLMSG_HDRLEN+4:], 1<<stateEstablished)
	order.PutUint32(request[unix.NLMSG_HDRLEN+12:], diagShowVFS|diagShowPeer)
	if err := retry(func() error { return unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) }); err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	peers := map[uint64]bool{}
	for buffer := make([]byte, 32<<10); ; {
		var n int
		err := retry(func() (err error) { n, _, err = unix.Recvfrom(fd, buffer, 0); return err })
		if err != nil {
			return nil, fmt.Errorf("sock_diag: %w", err)
		}
		done, err := takePeers(buffer[:n], at, peers)
		if err != nil || done {
			return peers, err
		}
	}
}

// takePeers reads one answer, and tells whether it was the last.
func takePeers(answer []byte, at Place, peers map[uint64]bool) (done bool, err error) {
	messages, err := syscall.ParseNetlinkMessage(answer)
	if err != nil {
		return false, fmt.Errorf("sock_diag: %w", err)
	}
	for _, m := range messages {
		switch {
		case m.Header.Type == unix.NLMSG_DONE:
			return true, nil
		case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
			return true, fmt.Errorf("sock_diag: %w", syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))) //nolint:gosec // a negative errno
		case m.Header.Type != diagByFamily || len(m.Data) < diagMessageSize:
			return true, errors.New("sock_diag: an answer that is none")
		}
		if peer, bound := peerOf(m.Data[diagMessageSize:], at); bound && peer != 0 {
			peers[peer] = true
		}
	}
	return false, nil
}

// peerOf reads the attributes of one socket: its other end, and whether it is bound to a
// place.
func peerOf(attributes []byte, at Place) (peer uint64, bound bool) {
	order := binary.NativeEndian
	for len(attributes) >= unix.SizeofRtAttr {
		length := int(order.Uint16(attributes))
		if length < unix.SizeofRtAttr || length > len(attributes) {
			break
		}
		value := attributes[unix.SizeofRtAttr:length]
		switch kind := order.Uint16(attributes[2:]); {
		case kind == diagVFS && len(value) >= 8: // the kernel's own form of the device: 12 and 20 bits
			device := order.Uint32(value[4:])
			bound = order.Uint32(value) == uint32(at.Inode) && Device(int(device>>20), int(device&(1<<20-1))) == at.Device //nolint:gosec // the kernel cuts it as well
		case kind == diagPeer && len(value) >= 4:
			peer = uint64(order.Uint32(value))
		}
		attributes = attributes[min((length+3)&^3, len(attributes)):]
	}
	return peer, bound
}
