package blockdevtest

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
)

// The words of the NBD protocol that a client needs that knows the size and asks for
// one thing at a time.
const (
	nbdMagic       = 0x4e42444d41474943
	nbdOption      = 0x49484156454f5054
	nbdOptionReply = 0x3e889045565a9
	nbdRequest     = 0x25609513
	nbdReply       = 0x67446698

	nbdOptStartTLS = 5
	nbdOptGo       = 7
	nbdRepAck      = 1
	nbdRepInfo     = 3

	nbdRead, nbdWrite, nbdDisconnect, nbdFlush = 0, 1, 2, 3
)

// DialNBD connects to the default export of a server at a unix socket. It is a client of
// its own: what it reads was not written by what it tests.
func DialNBD(t testing.TB, socket string) File {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	c := &nbdClient{conn: conn}
	if err := errors.Join(c.greet(), c.enter("")); err != nil {
		t.Fatal(errors.Join(fmt.Errorf("NBD at %s: %w", socket, err), conn.Close()))
	}
	return c
}

// DialNBDS connects to an export at a TCP address, over TLS.
func DialNBDS(address, name string, config *tls.Config) (File, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	c := &nbdClient{conn: conn}
	if err = c.greet(); err == nil {
		err = c.option(nbdOptStartTLS, nil)
	}
	if err == nil {
		c.conn = tls.Client(conn, config)
		err = c.enter(name)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("NBD at %s: %w", address, err), conn.Close())
	}
	return c, nil
}

type nbdClient struct {
	mu   sync.Mutex
	conn net.Conn
}

var errNBD = errors.New("not what an NBD server answers")

// greet takes the server's greeting and answers it.
func (c *nbdClient) greet() error {
	var hello struct {
		Magic, Option uint64
		Flags         uint16
	}
	if err := binary.Read(c.conn, binary.BigEndian, &hello); err != nil {
		return err
	}
	if hello.Magic != nbdMagic || hello.Option != nbdOption {
		return errNBD
	}
	_, err := c.conn.Write(binary.BigEndian.AppendUint32(nil, uint32(hello.Flags&3)))
	return err
}

// option asks for one, and returns once the server has agreed.
func (c *nbdClient) option(option uint32, data []byte) error {
	ask := binary.BigEndian.AppendUint64(nil, nbdOption)
	ask = binary.BigEndian.AppendUint32(ask, option)
	ask = binary.BigEndian.AppendUint32(ask, uint32(len(data))) //nolint:gosec // a test's
	if _, err := c.conn.Write(append(ask, data...)); err != nil {
		return err
	}
	for {
		var answer struct {
			Magic                uint64
			Option, Type, Length uint32
		}
		if err := binary.Read(c.conn, binary.BigEndian, &answer); err != nil {
			return err
		}
		if answer.Magic != nbdOptionReply || answer.Type != nbdRepAck && answer.Type != nbdRepInfo {
			return fmt.Errorf("%w: %+v", errNBD, answer)
		}
		if _, err := io.CopyN(io.Discard, c.conn, int64(answer.Length)); err != nil {
			return err
		}
		if answer.Type == nbdRepAck {
			return nil
		}
	}
}

// enter asks for an export, with no question about it.
func (c *nbdClient) enter(name string) error {
	ask := binary.BigEndian.AppendUint32(nil, uint32(len(name))) //nolint:gosec // a test's
	return c.option(nbdOptGo, append(append(ask, name...), 0, 0))
}

// do makes one request, and fills in with what comes.
func (c *nbdClient) do(command uint16, off int64, length int, out, in []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := binary.BigEndian.AppendUint32(nil, nbdRequest)
	r = binary.BigEndian.AppendUint16(r, 0)
	r = binary.BigEndian.AppendUint16(r, command)
	r = binary.BigEndian.AppendUint64(r, 7)
	r = binary.BigEndian.AppendUint64(r, uint64(off))    //nolint:gosec // offsets are not negative
	r = binary.BigEndian.AppendUint32(r, uint32(length)) //nolint:gosec // a test's
	if _, err := c.conn.Write(append(r, out...)); err != nil || command == nbdDisconnect {
		return err
	}
	var answer struct {
		Magic, Error uint32
		Cookie       uint64
	}
	if err := binary.Read(c.conn, binary.BigEndian, &answer); err != nil {
		return err
	}
	switch {
	case answer.Magic != nbdReply || answer.Cookie != 7:
		return fmt.Errorf("%w: %+v", errNBD, answer)
	case answer.Error != 0:
		return fmt.Errorf("NBD error %d", answer.Error)
	}
	_, err := io.ReadFull(c.conn, in)
	return err
}

func (c *nbdClient) ReadAt(p []byte, off int64) (int, error) {
	if err := c.do(nbdRead, off, len(p), nil, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *nbdClient) WriteAt(p []byte, off int64) (int, error) {
	if err := c.do(nbdWrite, off, len(p), p, nil); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Sync flushes.
func (c *nbdClient) Sync() error { return c.do(nbdFlush, 0, 0, nil, nil) }

// Close takes leave, and waits until the server has.
func (c *nbdClient) Close() error {
	err := c.do(nbdDisconnect, 0, 0, nil, nil)
	_, _ = io.Copy(io.Discard, c.conn) // nothing comes, but the end
	return errors.Join(err, c.conn.Close())
}
