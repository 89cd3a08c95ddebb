package nbd

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/serve/meter"
)

// TestBadRecords: what a client with a certificate does against TLS ends its connection,
// and nobody else's.
func TestBadRecords(t *testing.T) {
	securely(t)
	var told atomic.Int64
	s, socket := serving(t, Options{Ended: func(_ net.Addr, err error) {
		if err != nil {
			told.Add(1)
		}
	}}, export(t, "", image(t, 8*mib, 0), ExportOptions{}))
	good := dial(t, socket).enter("")
	sealedRecord := func(n int) []byte { return append([]byte{23, 3, 3, byte(n >> 8), byte(n)}, make([]byte, n)...) }
	for name, sends := range map[string][]byte{
		"a request in the clear": requestBytes(cmdRead, 0, 1, 0, 4096),
		"a record of zeroes":     sealedRecord(100),
		"a record too long":      sealedRecord(40000)[:4096],
		"half a record":          sealedRecord(1000)[:500],
		"half a header":          sealedRecord(1000)[:3],
		"the end without a word": nil,
		"an alert in the clear":  {21, 3, 3, 0, 2, 2, 40},
		"a handshake once more":  append([]byte{22, 3, 3, 0, 4}, 1, 0, 0, 0),
	} {
		t.Run(name, func(t *testing.T) {
			before := told.Load()
			c := dial(t, socket).enter("")
			c.ok(cmdWrite, 0, 0, 4096, pattern(4096, 2))
			raw := c.Conn.(*tls.Conn).NetConn()
			if _, err := raw.Write(sends); err != nil {
				t.Fatal(err)
			}
			must(t, raw.(*net.TCPConn).CloseWrite())
			_, _ = io.Copy(io.Discard, raw) // to the end
			good.ok(cmdWrite, 0, 4096, 4096, pattern(4096, 1))
			good.reads(4096, pattern(4096, 1))
			await(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.conns == 1 })
			await(t, func() bool { return told.Load() == before+1 })
		})
	}
}

// TestGoodByeBeforeTheEnd: what a client sends right before it ends the TLS is served.
func TestGoodByeBeforeTheEnd(t *testing.T) {
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			a := newAuthority(t)
			m, told := &meter.Meter{}, make(chan error, 1)
			addr := servingTCP(t, Options{TLS: a.serverConfig(), Ended: func(_ net.Addr, err error) { told <- err }}, export(t, "", image(t, mib, 0), ExportOptions{Meter: m}))
			c := dialTCP(t, addr)
			held := &together{Conn: c.Conn}
			c.Conn = held
			config := a.clientConfig()
			config.MaxVersion = version
			must(t, c.secure(config))
			c.enter("")
			held.holds = true
			c.write(append(append(requestBytes(cmdWrite, 0, 1, 0, 4096), pattern(4096, 1)...), requestBytes(cmdDisconnect, 0, 0, 0, 0)...))
			must(t, c.Conn.(*tls.Conn).CloseWrite())
			if _, err := held.Conn.Write(held.out); err != nil {
				t.Fatal(err)
			}
			if err := <-told; err != nil {
				t.Errorf("the connection ended: %v", err)
			}
			if got := m.Snapshot().Kinds[meter.Write].Requests; got != 1 {
				t.Errorf("%d writes were served", got)
			}
		})
	}
}

// together is a connection that can hold back what it is to send.
type together struct {
	net.Conn
	holds bool
	out   []byte
}

func (c *together) Write(b []byte) (int, error) {
	if !c.holds {
		return c.Conn.Write(b)
	}
	c.out = append(c.out, b...)
	return len(b), nil
}

func (c *together) SetWriteDeadline(time.Time) error { return nil } // crypto/tls sets one when it has ended

// TestRepliesShareRecords: what is ready together is encrypted together, and what is large
// goes in records of the largest size.
func TestRepliesShareRecords(t *testing.T) {
	for name, one := range map[string]struct {
		requests, length int
		most             int // records
	}{
		"small": {33, 512, 16}, "large": {1, 4 * mib, 4*mib/recordSize + 1},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAuthority(t)
			config := a.serverConfig()
			config.DynamicRecordSizingDisabled = true
			addr := servingTCP(t, Options{TLS: config}, export(t, "", image(t, 8*mib, 0), ExportOptions{}))
			c := dialTCP(t, addr)
			counted := c.secureCounted(a.clientConfig())
			c.enter("")
			counted.read = 0
			var all []byte
			for n := range one.requests {
				all = append(all, requestBytes(cmdRead, 0, uint64(n), 0, uint32(one.length))...)
			}
			c.write(all)
			c.read(one.requests * (simpleSize + one.length))
			if counted.read > one.most {
				t.Errorf("%d records, at most %d were expected", counted.read, one.most)
			}
			t.Logf("%d replies in %d records", one.requests, counted.read)
		})
	}
}

// secureCounted is secure, with the records counted.
func (c *client) secureCounted(config *tls.Config) *records {
	c.t.Helper()
	if got := c.last(optStartTLS, nil); got != repAck {
		c.t.Fatalf("STARTTLS: %#x", got)
	}
	r := &records{Conn: c.Conn}
	secured := tls.Client(r, config)
	must(c.t, secured.Handshake())
	c.Conn = secured
	return r
}

// records counts the records that pass a connection.
type records struct {
	net.Conn
	read, written int
	head          []byte // of the next record that is read
	rest          int    // of one
}

func (r *records) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	for at := 0; at < n; {
		if r.rest > 0 {
			skip := min(r.rest, n-at)
			r.rest, at = r.rest-skip, at+skip
			continue
		}
		r.head, at = append(r.head, b[at]), at+1
		if len(r.head) == 5 {
			r.read, r.rest, r.head = r.read+1, int(binary.BigEndian.Uint16(r.head[3:])), r.head[:0]
		}
	}
	return n, err
}

// Write is called with whole records.
func (r *records) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 5; rest = rest[5+int(binary.BigEndian.Uint16(rest[3:])):] {
		r.written++
	}
	return r.Conn.Write(b)
}

// TestKeysAreChanged: a client may ask for other keys at any time (RFC 8446, 4.6.3); the
// answer goes out in its place between the replies. Those who do nothing else are sent
// away.
func TestKeysAreChanged(t *testing.T) {
	a := newAuthority(t)
	addr := servingTCP(t, Options{TLS: a.serverConfig()}, export(t, "", image(t, 8*mib, 0), ExportOptions{}))
	enter := func() (*client, *sealer) {
		var keys bytes.Buffer
		config := a.clientConfig()
		config.MinVersion, config.KeyLogWriter = tls.VersionTLS13, &keys
		c := dialTCP(t, addr)
		counted := c.secureCounted(config)
		counted.written = 0
		c.enter("")
		if suite := c.Conn.(*tls.Conn).ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
			t.Fatalf("%s was agreed on", tls.CipherSuiteName(suite))
		}
		return c, newSealer(t, counted, keys.String())
	}
	c, s := enter()
	data := pattern(64<<10, 3)
	for n := range uint64(50) {
		var sent bytes.Buffer
		sent.Write(s.seal(23, append(requestBytes(cmdWrite, 0, 2*n, n*4096, 4096), data[n*512:][:4096]...)))
		sent.Write(s.changeKeys())
		sent.Write(s.seal(23, requestBytes(cmdRead, 0, 2*n+1, (n/2)*4096, 4096)))
		if _, err := s.conn.Write(sent.Bytes()); err != nil {
			t.Fatal(err)
		}
		replies := c.read(2*simpleSize + 4096) // in some order; of records under wrong keys nothing comes
		if bytes.Count(replies, binary.BigEndian.AppendUint32(nil, magicSimple)) < 2 {
			t.Fatalf("round %d: %x", n, replies[:32])
		}
	}
	c, s = enter()
	for range 1000 {
		if _, err := s.conn.Write(s.changeKeys()); err != nil {
			break // it has hung up
		}
	}
	must(t, c.SetDeadline(time.Now().Add(patience)))
	if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "remote error: tls") && !strings.Contains(err.Error(), syscall.ECONNRESET.Error()) && !strings.Contains(err.Error(), syscall.EPIPE.Error()) {
		t.Errorf("one who asks for other keys all the time: %v", err)
	}
}

// sealer writes TLS 1.3 records in the place of crypto/tls, which never changes keys.
type sealer struct {
	t      *testing.T
	conn   net.Conn
	secret []byte
	aead   cipher.AEAD
	iv     []byte
	next   uint64
}

// newSealer goes on after the records that conn has counted.
func newSealer(t *testing.T, conn *records, keys string) *sealer {
	t.Helper()
	for line := range strings.Lines(keys) {
		if fields := strings.Fields(line); fields[0] == "CLIENT_TRAFFIC_SECRET_0" {
			secret, err := hex.DecodeString(fields[2])
			must(t, err)
			s := &sealer{t: t, conn: conn.Conn}
			s.use(secret)
			s.next = uint64(conn.written)
			return s
		}
	}
	t.Fatalf("no secret in %q", keys)
	return nil
}

// use has a secret's keys used from its first record on.
func (s *sealer) use(secret []byte) {
	s.t.Helper()
	s.secret, s.iv, s.next = secret, s.expand(secret, "iv", 12), 0
	block, err := aes.NewCipher(s.expand(secret, "key", 16))
	must(s.t, err)
	s.aead, err = cipher.NewGCM(block)
	must(s.t, err)
}

// expand is HKDF-Expand-Label (RFC 8446, 7.1).
func (s *sealer) expand(secret []byte, label string, n int) []byte {
	s.t.Helper()
	label = "tls13 " + label
	b, err := hkdf.Expand(sha256.New, secret, fmt.Sprintf("\x00%c%c%s\x00", n, len(label), label), n)
	must(s.t, err)
	return b
}

func (s *sealer) seal(kind byte, text []byte) []byte {
	nonce := bytes.Clone(s.iv)
	for i, b := range binary.BigEndian.AppendUint64(nil, s.next) {
		nonce[4+i] ^= b
	}
	s.next++
	head := binary.BigEndian.AppendUint16([]byte{23, 3, 3}, uint16(len(text)+1+s.aead.Overhead()))
	return s.aead.Seal(head, nonce, append(bytes.Clone(text), kind), head)
}

// changeKeys asks for other keys of the peer, and takes others.
func (s *sealer) changeKeys() []byte {
	record := s.seal(22, []byte{24, 0, 0, 1, 1})
	s.use(s.expand(s.secret, "traffic upd", sha256.Size))
	return record
}
