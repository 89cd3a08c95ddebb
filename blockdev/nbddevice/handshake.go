package nbddevice

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"time"
)

// Terms are what a server says of an export.
type Terms struct {
	Size  int64  // bytes
	Flags uint16 // of the transmission phase
}

// The handshake, newstyle (doc/proto.md of the NBD project).
const (
	magic        = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption  = 0x49484156454f5054 // "IHAVEOPT"
	fixed        = 1 << 0
	noZeroes     = 1 << 1
	optionExport = 1 // NBD_OPT_EXPORT_NAME: the only one after which nothing else is said
)

// handshakeTime bounds a handshake with a server on this host.
const handshakeTime = 10 * time.Second

var errHandshake = errors.New("not what an NBD server says")

// Dial connects to a server at a unix socket and goes through the handshake for an
// export, which the kernel's client does not do itself. The caller closes the socket; the
// kernel has its own reference by then.
func Dial(socket, export string) (*os.File, Terms, error) {
	conn, err := net.DialTimeout("unix", socket, handshakeTime)
	if err != nil {
		return nil, Terms{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return nil, Terms{}, err
	}
	t, err := handshake(conn, export)
	if err != nil {
		return nil, Terms{}, fmt.Errorf("handshake with %s: %w", socket, err)
	}
	f, err := conn.(*net.UnixConn).File() //nolint:forcetypeassert // of a unix socket
	return f, t, err
}

func handshake(conn io.ReadWriter, export string) (Terms, error) {
	var hello struct {
		Magic, Option uint64
		Flags         uint16
	}
	if err := binary.Read(conn, binary.BigEndian, &hello); err != nil {
		return Terms{}, err
	}
	if hello.Magic != magic || hello.Option != magicOption || hello.Flags&(fixed|noZeroes) != fixed|noZeroes {
		return Terms{}, fmt.Errorf("%w: greeting %+v", errHandshake, hello)
	}
	b := binary.BigEndian.AppendUint32(nil, fixed|noZeroes)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, optionExport)
	b = binary.BigEndian.AppendUint32(b, uint32(len(export))) //nolint:gosec // ours
	if _, err := conn.Write(append(b, export...)); err != nil {
		return Terms{}, err
	}
	var reply struct {
		Size  uint64
		Flags uint16
	}
	if err := binary.Read(conn, binary.BigEndian, &reply); err != nil {
		return Terms{}, err
	}
	if reply.Size > math.MaxInt64 {
		return Terms{}, fmt.Errorf("%w: a size of %d bytes", errHandshake, reply.Size)
	}
	return Terms{int64(reply.Size), reply.Flags}, nil
}
