package nbd

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"holdfast/blockdev/serve/device"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// patience bounds what a test waits for; nothing takes it that works.
const patience = 2 * time.Minute

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// image is a file of some size with some data and holes.
func image(t testing.TB, size int64, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "image"), os.O_RDWR|os.O_CREATE|flags, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	must(t, f.Truncate(size))
	return f
}

// pattern is data that tells where it belongs.
func pattern(n int, seed uint64) []byte {
	b := aligned(n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

// export serves a file under a name.
func export(t testing.TB, name string, f *os.File, o ExportOptions) *Export {
	t.Helper()
	d, err := device.NewFile(f)
	must(t, err)
	if o.Size == 0 {
		info, err := f.Stat()
		must(t, err)
		o.Size = info.Size()
	}
	e, err := NewExport(name, d, o)
	must(t, err)
	return e
}

// byGoroutines is whether clients are served without io_uring.
var byGoroutines bool

// overTLS is what servers and their clients meet each other with, at ports of the loopback
// address; nil: in the clear, on unix sockets.
var overTLS *struct{ server, client *tls.Config }

// serving starts a server on a socket, and checks at the end that it ends and leaves
// nothing behind.
func serving(t testing.TB, o Options, exports ...*Export) (s *Server, socket string) {
	t.Helper()
	o.noLoop = byGoroutines
	if overTLS != nil {
		o.TLS = overTLS.server
	}
	s = NewServer(o)
	for _, e := range exports {
		must(t, s.Add(e))
	}
	l := listening(t)
	socket = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		must(t, s.Close())
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return s, socket
}

// client speaks the protocol byte by byte.
type client struct {
	t testing.TB
	net.Conn
	size   uint64
	flags  uint16
	cookie uint64
}

func listening(t testing.TB) net.Listener {
	t.Helper()
	network, address := "unix", filepath.Join(t.TempDir(), "nbd.sock")
	if overTLS != nil {
		network, address = "tcp", "127.0.0.1:0"
	}
	l, err := net.Listen(network, address)
	must(t, err)
	return l
}

// reach connects to a server, and says nothing.
func reach(t testing.TB, socket string) net.Conn {
	t.Helper()
	network := "unix"
	if overTLS != nil {
		network = "tcp"
	}
	conn, err := net.Dial(network, socket)
	must(t, err)
	return conn
}

func dial(t testing.TB, socket string) *client {
	t.Helper()
	c := meet(t, reach(t, socket))
	if overTLS != nil {
		must(t, c.secure(overTLS.client))
	}
	return c
}

// meet reads the server's greeting and answers it.
func meet(t testing.TB, conn net.Conn) *client {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	c := &client{t: t, Conn: conn}
	hello := c.read(18)
	if binary.BigEndian.Uint64(hello) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption || binary.BigEndian.Uint16(hello[16:]) != 3 {
		t.Fatalf("greeted by %x", hello)
	}
	c.write(binary.BigEndian.AppendUint32(nil, 3))
	return c
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	must(c.t, err)
	return b
}

func (c *client) write(b []byte) {
	c.t.Helper()
	_, err := c.Write(b)
	must(c.t, err)
}

// ended fails the test unless the server closed the connection.
func (c *client) ended() {
	c.t.Helper()
	if _, err := io.ReadFull(c, make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		c.t.Fatalf("the connection should have ended: %v", err)
	}
}

func optionBytes(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
}

type optionReply struct {
	kind uint32
	data []byte
}

// option sends one and gives the replies, up to an ACK or an error.
func (c *client) option(opt uint32, data []byte) (replies []optionReply) {
	c.t.Helper()
	c.write(optionBytes(opt, data))
	for {
		head := c.read(20)
		if binary.BigEndian.Uint64(head) != magicReply || binary.BigEndian.Uint32(head[8:]) != opt {
			c.t.Fatalf("option %d is answered %x", opt, head)
		}
		r := optionReply{kind: binary.BigEndian.Uint32(head[12:]), data: c.read(int(binary.BigEndian.Uint32(head[16:])))}
		replies = append(replies, r)
		if r.kind == repAck || r.kind >= 1<<31 {
			return replies
		}
	}
}

// last is the kind of the reply that ended an option's.
func (c *client) last(opt uint32, data []byte) uint32 {
	c.t.Helper()
	replies := c.option(opt, data)
	return replies[len(replies)-1].kind
}

func stringBytes(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

func goBytes(name string) []byte { return append(stringBytes(name), 0, 0) }

func metaBytes(export string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(stringBytes(export), uint32(len(queries)))
	for _, q := range queries {
		b = append(b, stringBytes(q)...)
	}
	return b
}

// enter goes on to the transmission phase.
func (c *client) enter(name string) *client {
	c.t.Helper()
	for _, r := range c.option(optGo, goBytes(name)) {
		if r.kind >= 1<<31 {
			c.t.Fatalf("GO %q is refused: %#x %s", name, r.kind, r.data)
		}
		if r.kind == repInfo && binary.BigEndian.Uint16(r.data) == infoExport {
			c.size, c.flags = binary.BigEndian.Uint64(r.data[2:]), binary.BigEndian.Uint16(r.data[10:])
		}
	}
	return c
}

// structured agrees on structured replies and the block status, and enters.
func (c *client) structured(name string) *client {
	c.t.Helper()
	if got := c.last(optStructuredReply, nil); got != repAck {
		c.t.Fatalf("structured replies: %#x", got)
	}
	if got := c.last(optSetMetaContext, metaBytes(name, contextAllocation)); got != repAck {
		c.t.Fatalf("set meta context: %#x", got)
	}
	return c.enter(name)
}

func requestBytes(kind command, flags uint16, cookie, offset uint64, length uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, magicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, uint16(kind))
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	return binary.BigEndian.AppendUint32(b, length)
}

// request makes one and gives its result and data; replies are simple ones or one
// chunk.
func (c *client) request(kind command, flags uint16, offset uint64, length uint32, payload []byte) (code, []byte) {
	c.t.Helper()
	c.cookie++
	c.write(append(requestBytes(kind, flags, c.cookie, offset, length), payload...))
	got, result, data := c.reply(kind, length)
	if got != c.cookie {
		c.t.Fatalf("the reply is to %d, not %d", got, c.cookie)
	}
	return result, data
}

func (c *client) reply(kind command, length uint32) (cookie uint64, result code, data []byte) {
	c.t.Helper()
	head := c.read(4)
	switch magic := binary.BigEndian.Uint32(head); magic {
	case magicSimple:
		rest := c.read(12)
		result, cookie = code(binary.BigEndian.Uint32(rest)), binary.BigEndian.Uint64(rest[4:])
		if result == codeOK && kind == cmdRead {
			data = c.read(int(length))
		}
	case magicStructured:
		rest := c.read(16)
		cookie = binary.BigEndian.Uint64(rest[4:])
		data = c.read(int(binary.BigEndian.Uint32(rest[12:])))
		switch binary.BigEndian.Uint16(rest[2:]) {
		case chunkError:
			result, data = code(binary.BigEndian.Uint32(data)), nil
		case chunkOffsetData:
			data = data[8:]
		}
	default:
		c.t.Fatalf("a reply begins with %#x", magic)
	}
	return cookie, result, data
}

// ok fails the test unless the request succeeds.
func (c *client) ok(kind command, flags uint16, offset uint64, length uint32, payload []byte) []byte {
	c.t.Helper()
	result, data := c.request(kind, flags, offset, length, payload)
	if result != codeOK {
		c.t.Fatalf("command %d at %d+%d: error %d", kind, offset, length, result)
	}
	return data
}

func (c *client) reads(offset uint64, want []byte) {
	c.t.Helper()
	if got := c.ok(cmdRead, 0, offset, uint32(len(want)), nil); !bytes.Equal(got, want) {
		c.t.Fatalf("%d bytes at %d read other than written%s", len(want), offset, firstDifference(got, want))
	}
}

func firstDifference(a, b []byte) string {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf(" from %d on", i)
		}
	}
	return fmt.Sprintf(": %d and %d bytes", len(a), len(b))
}
