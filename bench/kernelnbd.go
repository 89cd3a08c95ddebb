package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/internal/sys"
)

// kernelNBD is a block device of the kernel's NBD client. Only a guest has one here.
type kernelNBD struct {
	device *os.File
	ended  chan error
}

// connectKernel makes a device of the default export of the server at a unix socket,
// over one connection, and waits until it has its size.
func connectKernel(ctx context.Context, device, socket string) (_ *kernelNBD, err error) {
	conn, size, flags, err := handshake(socket)
	if err != nil {
		return nil, fmt.Errorf("handshake with %s: %w", socket, err)
	}
	defer conn.Close() // the kernel has its own
	k := &kernelNBD{ended: make(chan error, 1)}
	if k.device, err = os.OpenFile(device, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	if err := sys.NBDConnect(k.device, conn, size, flags); err != nil {
		return nil, errors.Join(err, k.device.Close())
	}
	go func() { k.ended <- sys.NBDServe(k.device) }()
	sectors := filepath.Join("/sys/class/block", filepath.Base(device), "size")
	for {
		text, err := os.ReadFile(sectors)
		if err != nil || strings.TrimSpace(string(text)) != "0" {
			return k, err
		}
		select {
		case err := <-k.ended:
			return nil, errors.Join(fmt.Errorf("%s has ended before it had a size", device), err)
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (k *kernelNBD) Close() error {
	return errors.Join(sys.NBDDisconnect(k.device), <-k.ended, sys.NBDClear(k.device), k.device.Close())
}

// handshake asks for the default export by NBD_OPT_EXPORT_NAME (the protocol's
// fixed newstyle): the kernel knows only what comes after it.
func handshake(socket string) (conn *os.File, size int64, flags uint16, err error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, 0, 0, err
	}
	defer c.Close()
	const (
		greeting   = 18 // bytes: two magic numbers, the server's flags
		ours       = 3  // fixed newstyle, no zeroes at the end
		exportName = 1
	)
	if _, err := io.ReadFull(c, make([]byte, greeting)); err != nil {
		return nil, 0, 0, err
	}
	hello := binary.BigEndian.AppendUint32(nil, ours)
	hello = append(hello, "IHAVEOPT"...)
	hello = binary.BigEndian.AppendUint32(hello, exportName)
	hello = binary.BigEndian.AppendUint32(hello, 0) // bytes of the name
	if _, err := c.Write(hello); err != nil {
		return nil, 0, 0, err
	}
	reply := make([]byte, 10)
	if _, err := io.ReadFull(c, reply); err != nil {
		return nil, 0, 0, err
	}
	conn, err = c.(*net.UnixConn).File()                                                        //nolint:forcetypeassert // of a unix socket
	return conn, int64(binary.BigEndian.Uint64(reply)), binary.BigEndian.Uint16(reply[8:]), err //nolint:gosec // a size that the server has as int64
}
