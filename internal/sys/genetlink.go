package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNoFamily means that this kernel has no such family of generic netlink: what speaks
// it is neither built in nor loaded.
var ErrNoFamily = errors.New("no such family of generic netlink")

// attributes are those of a netlink message, in the kernel's byte order.
type attributes []byte

const attributeHead = unix.SizeofRtAttr // bytes: length and type, 16 bits each

func (a attributes) bytes(kind uint16, value []byte) attributes {
	order := binary.NativeEndian
	a = order.AppendUint16(a, uint16(attributeHead+len(value))) //nolint:gosec // ours, and short
	a = append(order.AppendUint16(a, kind), value...)
	for len(a)%unix.NLA_ALIGNTO != 0 {
		a = append(a, 0)
	}
	return a
}

func (a attributes) uint32(kind uint16, value uint32) attributes {
	return a.bytes(kind, binary.NativeEndian.AppendUint32(nil, value))
}

func (a attributes) uint64(kind uint16, value uint64) attributes {
	return a.bytes(kind, binary.NativeEndian.AppendUint64(nil, value))
}

func (a attributes) text(kind uint16, value string) attributes {
	return a.bytes(kind, append([]byte(value), 0))
}

func (a attributes) nested(kind uint16, value attributes) attributes {
	return a.bytes(kind|unix.NLA_F_NESTED, value)
}

// find gives the value of the first attribute of a kind, nil where there is none.
func (a attributes) find(kind uint16) []byte {
	order := binary.NativeEndian
	for len(a) >= attributeHead {
		length := int(order.Uint16(a))
		if length < attributeHead || length > len(a) {
			return nil
		}
		if order.Uint16(a[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == kind {
			return a[attributeHead:length]
		}
		a = a[min((length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(a)):]
	}
	return nil
}

// genetlink makes one call of generic netlink, and gives the attributes of its answer,
// nil for a call that is only acknowledged.
func genetlink(family uint16, command, version uint8, a attributes) (answer attributes, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	order := binary.NativeEndian
	request := make([]byte, unix.NLMSG_HDRLEN+unix.GENL_HDRLEN, unix.NLMSG_HDRLEN+unix.GENL_HDRLEN+len(a))
	order.PutUint16(request[4:], family)
	order.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	request[unix.NLMSG_HDRLEN], request[unix.NLMSG_HDRLEN+1] = command, version
	request = append(request, a...)
	order.PutUint32(request, uint32(len(request))) //nolint:gosec // ours, and short
	if err := retry(func() error { return unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) }); err != nil {
		return nil, err
	}
	for buffer := make([]byte, 8<<10); ; {
		var n int
		err := retry(func() (err error) { n, _, err = unix.Recvfrom(fd, buffer, 0); return err })
		if err != nil {
			return nil, err
		}
		messages, err := syscall.ParseNetlinkMessage(buffer[:n])
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			switch {
			case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4: // 0: the acknowledgement, which comes last
				if errno := int32(order.Uint32(m.Data)); errno != 0 { //nolint:gosec // a negative errno
					return nil, syscall.Errno(-errno)
				}
				return answer, nil
			case m.Header.Type == family && len(m.Data) >= unix.GENL_HDRLEN:
				answer = append(attributes(nil), m.Data[unix.GENL_HDRLEN:]...)
			}
		}
	}
}

// genetlinkFamily asks for the number of a family, and of the last attribute that it
// knows. ErrNoFamily.
func genetlinkFamily(name string) (family uint16, last uint32, err error) {
	answer, err := genetlink(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, 1, attributes{}.text(unix.CTRL_ATTR_FAMILY_NAME, name))
	if errors.Is(err, unix.ENOENT) {
		return 0, 0, fmt.Errorf("%q: %w", name, ErrNoFamily)
	}
	if err != nil {
		return 0, 0, err
	}
	number, most := answer.find(unix.CTRL_ATTR_FAMILY_ID), answer.find(unix.CTRL_ATTR_MAXATTR)
	if len(number) < 2 || len(most) < 4 {
		return 0, 0, errors.New("generic netlink: an answer that is none")
	}
	return binary.NativeEndian.Uint16(number), binary.NativeEndian.Uint32(most), nil
}
