package main_test

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
)

// nbdClient is a simple client: one request at a time, simple replies.
type nbdClient struct {
	t    testing.TB
	conn net.Conn
	size int64
}

// dialNBD takes the default export (proto.md: NBD_OPT_EXPORT_NAME).
func dialNBD(t testing.TB, socket string) *nbdClient {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	c := &nbdClient{t: t, conn: conn}
	c.take(18)
	be := binary.BigEndian
	hello := be.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	hello = be.AppendUint64(hello, 0x49484156454f5054)
	c.say(be.AppendUint32(be.AppendUint32(hello, 1), 0))
	export := c.take(10)
	c.size = int64(be.Uint64(export))
	return c
}

func (c *nbdClient) say(b []byte) {
	c.t.Helper()
	_, err := c.conn.Write(b)
	must(c.t, err)
}

func (c *nbdClient) take(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c.conn, b)
	must(c.t, err)
	return b
}

func (c *nbdClient) request(kind uint16, off int64, length int, data []byte) {
	c.t.Helper()
	if failed := c.ask(kind, off, length, data); failed != 0 {
		c.t.Fatalf("request %d at %d: error %d", kind, off, failed)
	}
}

// send makes a request whose answer will have this cookie.
func (c *nbdClient) send(cookie uint64, kind uint16, off int64, length int, data []byte) {
	c.t.Helper()
	be := binary.BigEndian
	b := be.AppendUint32(nil, 0x25609513)
	b = be.AppendUint16(be.AppendUint16(b, 0), kind)
	b = be.AppendUint32(be.AppendUint64(be.AppendUint64(b, cookie), uint64(off)), uint32(length))
	c.say(append(b, data...))
}

// ask makes a request and gives the error of its answer.
func (c *nbdClient) ask(kind uint16, off int64, length int, data []byte) (failed uint32) {
	c.t.Helper()
	be := binary.BigEndian
	c.send(1, kind, off, length, data)
	reply := c.take(16)
	if be.Uint32(reply) != 0x67446698 {
		c.t.Fatalf("request %d at %d: %x", kind, off, reply)
	}
	return be.Uint32(reply[4:])
}

func (c *nbdClient) read(off int64) []byte {
	c.t.Helper()
	c.request(0, off, block, nil)
	return c.take(block)
}

func (c *nbdClient) write(off int64, data []byte) { c.t.Helper(); c.request(1, off, len(data), data) }

func (c *nbdClient) flush() { c.t.Helper(); c.request(3, 0, 0, nil) }
