package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
)

// The generic netlink of the kernel's NBD client (include/uapi/linux/nbd-netlink.h),
// which x/sys does not have.
const (
	nbdFamily  = "nbd"
	nbdVersion = 1

	nbdConnect     = 1 // NBD_CMD_CONNECT
	nbdDisconnect  = 2 // NBD_CMD_DISCONNECT
	nbdReconfigure = 3 // NBD_CMD_RECONFIGURE

	nbdIndex       = 1  // u32
	nbdSize        = 2  // u64, bytes
	nbdBlockSize   = 3  // u64, bytes
	nbdTimeout     = 4  // u64, s
	nbdServerFlags = 5  // u64
	nbdSockets     = 7  // nested: items
	nbdDeadTimeout = 8  // u64, s
	nbdBackend     = 10 // string

	nbdSocketItem = 1 // nested
	nbdSocketFD   = 1 // u32
)

// ErrNoNBD means that this kernel's NBD client is not there, or too old to be told
// what its devices belong to (before Linux 5.14).
var ErrNoNBD = errors.New("this kernel has no NBD client")

// NBDConfig is how a device of the kernel's NBD client is made.
type NBDConfig struct {
	Backend string     // what the device is found by again; see NBDBackends
	Sockets []*os.File // connections to one server, past the handshake
	Size    int64      // bytes
	Block   int64      // of the device's logical block, bytes
	Flags   uint16     // the server's, from the handshake
	// Dead is for how long requests wait for a connection when there is none, whole
	// seconds. 0: they fail.
	Dead time.Duration
}

// NBDAvailable is nil where NBDConnect can do something, else ErrNoNBD.
func NBDAvailable() error {
	_, err := nbdNumber()
	return err
}

func nbdNumber() (uint16, error) {
	family, last, err := genetlinkFamily(nbdFamily)
	switch {
	case errors.Is(err, ErrNoFamily):
		return 0, fmt.Errorf("%w: %w", ErrNoNBD, err)
	case err == nil && last < nbdBackend:
		return 0, fmt.Errorf("%w that names what its devices belong to", ErrNoNBD)
	}
	return family, wrap("nbd", "generic netlink", err)
}

// NBDConnect makes a block device of a server, and tells its number: /dev/nbdN, one that
// nobody uses. It stays when this process ends, until NBDDisconnect. A server may take as
// long as it wants for a request. It is made whole or not at all.
func NBDConnect(c NBDConfig) (number int, err error) {
	a := attributes{}.uint64(nbdSize, uint64(c.Size)).uint64(nbdBlockSize, uint64(c.Block)).uint64(nbdTimeout, 0). //nolint:gosec // sizes
															uint64(nbdServerFlags, uint64(c.Flags)).uint64(nbdDeadTimeout, uint64(c.Dead/time.Second)).text(nbdBackend, c.Backend) //nolint:gosec // a duration
	answer, err := nbdCall("nbd connect", nbdConnect, a, c.Sockets...)
	if err != nil {
		return 0, err
	}
	index := answer.find(nbdIndex)
	if len(index) < 4 {
		return 0, errors.New("nbd connect: an answer that is none")
	}
	return int(binary.NativeEndian.Uint32(index)), nil
}

// NBDReconnect gives a device a connection in place of one that has ended. It does
// nothing, which is no error, while none has. EINVAL for a device of another backend.
func NBDReconnect(number int, backend string, socket *os.File) error {
	_, err := nbdCall("nbd reconfigure", nbdReconfigure, nbdDevice(number).text(nbdBackend, backend), socket)
	return err
}

// NBDResize tells a device its size in bytes, whole blocks, and its users with it. EINVAL
// for a device of another backend.
func NBDResize(number int, backend string, size int64) error {
	_, err := nbdCall("nbd reconfigure", nbdReconfigure, nbdDevice(number).text(nbdBackend, backend).uint64(nbdSize, uint64(size))) //nolint:gosec // a size
	return err
}

// NBDDisconnect takes the connections of a device away: requests that wait, and all that
// come, fail. The device is free once nobody has it open. It is whoever's it is: the
// caller has it open, and has seen whose it is.
func NBDDisconnect(number int) error {
	_, err := nbdCall("nbd disconnect", nbdDisconnect, nbdDevice(number))
	return err
}

func nbdDevice(number int) attributes {
	return attributes{}.uint32(nbdIndex, uint32(number)) //nolint:gosec // a device's
}

// nbdCall makes one call, with sockets of which the kernel takes its own references.
func nbdCall(name string, command uint8, a attributes, sockets ...*os.File) (attributes, error) {
	family, err := nbdNumber()
	if err != nil {
		return nil, err
	}
	var items attributes
	for _, s := range sockets {
		// The descriptor is looked up while the call lasts.
		err := control(s, func(fd uintptr) error {
			items = items.nested(nbdSocketItem, attributes{}.uint32(nbdSocketFD, uint32(fd))) //nolint:gosec // a descriptor
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if len(items) > 0 {
		a = a.nested(nbdSockets, items)
	}
	answer, err := genetlink(family, command, nbdVersion, a)
	runtime.KeepAlive(sockets)
	return answer, os.NewSyscallError(name, err)
}
