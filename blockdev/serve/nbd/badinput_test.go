package nbd

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/extent"
	"holdfast/blockdev/serve/meter"
)

// TestBadRequests: each gets its error, and the connection goes on.
func TestBadRequests(t *testing.T) {
	const size = 8 * mib
	f := image(t, size, syscall.O_DIRECT)
	_, socket := serving(t, Options{}, export(t, "", f, ExportOptions{}))
	for _, c := range []*client{dial(t, socket).enter(""), dial(t, socket).structured("")} {
		for _, r := range []struct {
			name   string
			kind   command
			flags  uint16
			offset uint64
			length uint32
			want   code
		}{
			{"read past the end", cmdRead, 0, size - 4096, 8192, codeInvalid},
			{"read at the end", cmdRead, 0, size, 4096, codeInvalid},
			{"read far away", cmdRead, 0, 1 << 63, 4096, codeInvalid},
			{"read around the corner", cmdRead, 0, 1<<64 - 4096, 8192, codeInvalid},
			{"write past the end", cmdWrite, 0, size - 4096, 8192, codeNoSpace},
			{"write around the corner", cmdWrite, 0, 1<<64 - 4096, 8192, codeNoSpace},
			{"zeroes past the end", cmdWriteZeroes, 0, size, 4096, codeNoSpace},
			{"zeroes, all that can be asked", cmdWriteZeroes, 0, 0, 1<<32 - 4096, codeNoSpace},
			{"trim past the end", cmdTrim, 0, size, 4096, codeInvalid},
			{"unaligned read", cmdRead, 0, 1, 4096, codeInvalid},
			{"unaligned length", cmdRead, 0, 0, 100, codeInvalid},
			{"unaligned write", cmdWrite, 0, 4096, 100, codeInvalid},
			{"unaligned trim", cmdTrim, 0, 3, 4096, codeInvalid},
			{"empty read", cmdRead, 0, 0, 0, codeInvalid},
			{"empty write", cmdWrite, 0, 0, 0, codeInvalid},
			{"empty zeroes", cmdWriteZeroes, 0, 4096, 0, codeInvalid},
			{"oversized read", cmdRead, 0, 0, maxPayload + 4096, codeInvalid},
			{"the largest read", cmdRead, 0, 0, 1<<32 - 1, codeInvalid},
			{"oversized write", cmdWrite, 0, 0, maxPayload + 4096, codeInvalid},
			{"flush of a range", cmdFlush, 0, 0, 4096, codeInvalid},
			{"unknown command", 77, 0, 0, 4096, codeInvalid},
			{"cache", 5, 0, 0, 4096, codeInvalid},
			{"unknown flag", cmdRead, 1 << 9, 0, 4096, codeInvalid},
			{"write with an unknown flag", cmdWrite, 1 << 9, 0, 4096, codeInvalid},
			{"flags of others", cmdTrim, flagFastZero, 0, 4096, codeInvalid},
		} {
			var payload []byte
			if r.kind == cmdWrite {
				payload = make([]byte, r.length)
			}
			if got, _ := c.request(r.kind, r.flags, r.offset, r.length, payload); got != r.want {
				t.Errorf("%s: error %d, want %d", r.name, got, r.want)
			}
		}
		c.ok(cmdRead, 0, 0, 4096, nil)
	}
	if got, _ := dial(t, socket).enter("").request(cmdBlockStatus, 0, 0, 4096, nil); got != codeInvalid {
		t.Errorf("block status that was not agreed on: %d", got)
	}
	if data, err := extent.Map(t.Context(), f); err != nil || len(data) != 0 {
		t.Errorf("a refused request wrote: %v %v", data, err)
	}
}

// TestBrokenClients: what cannot be answered ends that connection, and another one
// works on all the while.
func TestBrokenClients(t *testing.T) {
	var protocol atomic.Int64
	ended := func(_ net.Addr, err error) {
		if errors.Is(err, errProtocol) {
			protocol.Add(1)
		}
	}
	s, socket := serving(t, Options{Ended: ended}, export(t, "", image(t, 8*mib, 0), ExportOptions{}))
	good := dial(t, socket).enter("")
	greeting := binary.BigEndian.AppendUint32(nil, 3)
	for name, sends := range map[string]struct {
		bytes []byte // after the greeting
		enter bool   // the transmission phase first
		wrong bool   // the server finds a protocol error
	}{
		"unknown client flags":     {bytes: []byte{0x80, 0, 0, 3}, wrong: true},
		"garbage for an option":    {bytes: append(greeting, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"...), wrong: true},
		"half an option":           {bytes: append(greeting, optionBytes(optGo, goBytes(""))[:20]...)},
		"no data after its length": {bytes: append(greeting, optionBytes(optGo, make([]byte, 9000))[:200]...)},
		"a huge export name":       {bytes: append(greeting, optionBytes(optExportName, make([]byte, maxOption+1))...), wrong: true},
		"nothing":                  {},
		"wrong magic":              {bytes: requestBytes(cmdRead, 0, 1, 0, 4096)[1:], enter: true},
		"garbage for a request":    {bytes: []byte(strings.Repeat("x", requestSize)), enter: true, wrong: true},
		"half a request":           {bytes: requestBytes(cmdRead, 0, 1, 0, 4096)[:11], enter: true},
		"half a payload":           {bytes: append(requestBytes(cmdWrite, 0, 1, 0, 8192), make([]byte, 5000)...), enter: true},
		"half a large payload":     {bytes: append(requestBytes(cmdWrite, 0, 1, 0, 4*mib), make([]byte, mib)...), enter: true},
		"half a refused payload":   {bytes: append(requestBytes(cmdWrite, 0, 1, 1<<40, 8192), make([]byte, 5000)...), enter: true},
	} {
		t.Run(name, func(t *testing.T) {
			before := protocol.Load()
			var c net.Conn
			if sends.enter {
				c = dial(t, socket).enter("")
			} else {
				raw := reach(t, socket)
				c = raw
			}
			must(t, c.SetDeadline(time.Now().Add(patience)))
			c.Write(sends.bytes) // the server may have hung up before all is sent
			if !sends.wrong {
				must(t, c.(interface{ CloseWrite() error }).CloseWrite())
			}
			_, _ = io.Copy(io.Discard, c) // to the end
			c.Close()
			good.ok(cmdWrite, 0, 4096, 4096, pattern(4096, 1))
			good.reads(4096, pattern(4096, 1))
			await(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.conns == 1 })
			if sends.wrong {
				await(t, func() bool { return protocol.Load() == before+1 }) // it is told once its place is free
			} else if got := protocol.Load() - before; got != 0 {
				t.Errorf("%d protocol errors were found", got)
			}
		})
	}
}

func (c *client) CloseWrite() error { return c.Conn.(interface{ CloseWrite() error }).CloseWrite() }

// await polls for what happens soon in another goroutine.
func await(t *testing.T, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); {
		if time.Now().After(end) {
			t.Fatal("it does not come")
		}
		runtime.Gosched()
	}
}

// TestDisconnectMidRequest hangs up with requests in flight, many times.
func TestDisconnectMidRequest(t *testing.T) {
	_, socket := serving(t, Options{}, export(t, "", image(t, 8*mib, syscall.O_DIRECT), ExportOptions{}))
	for n := range 100 {
		c := dial(t, socket).enter("")
		for range 20 {
			c.Write(requestBytes(cmdRead, 0, 1, 0, 64<<10))
			c.Write(append(requestBytes(cmdWrite, 0, 2, 0, 4096), make([]byte, 4096)...))
		}
		c.Write(append(requestBytes(cmdWrite, 0, 2, 0, 4096), make([]byte, n*40)...))
		c.Close()
	}
	c := dial(t, socket).enter("")
	c.ok(cmdRead, 0, 0, 4096, nil)
}

// TestClientThatStopsReading asks for far more than it takes: the server stops
// reading from it and keeps no more than its share; others are served, and Close
// does not wait for it for ever.
func TestClientThatStopsReading(t *testing.T) {
	const most = 40 * mib
	e := export(t, "", image(t, 64*mib, 0), ExportOptions{})
	_, socket := serving(t, Options{MaxInFlight: most}, e)
	for range 3 {
		c := dial(t, socket).enter("")
		must(t, c.SetDeadline(time.Now().Add(200*time.Millisecond))) // what it sends until then is what counts
		for {
			if _, err := c.Write(requestBytes(cmdRead, 0, 1, 0, mib)); err != nil {
				break
			}
		}
	}
	if inside := e.meter.Snapshot().Inside; inside > 3*most/mib {
		t.Errorf("%d requests of 1 MiB are in flight for three clients", inside)
	}
	good := dial(t, socket).enter("")
	for range 100 {
		good.ok(cmdWrite, flagFUA, 4096, 4096, pattern(4096, 1))
		good.reads(4096, pattern(4096, 1))
	}
}

// TestClientGoneBehindReplies: a client that is gone while far more of its replies are
// ready than its socket holds leaves nothing behind.
func TestClientGoneBehindReplies(t *testing.T) {
	m := &meter.Meter{}
	s, socket := serving(t, Options{}, export(t, "", image(t, mib, 0), ExportOptions{Meter: m}))
	const requests = streamWorkers // goroutines begin no more of them
	for n := range uint64(10) {
		c := dial(t, socket).enter("")
		// At once: what comes when replies wait already is not decrypted until some have gone.
		c.write(bytes.Repeat(requestBytes(cmdRead, 0, 1, 0, mib), requests))
		await(t, func() bool { return m.Snapshot().Kinds[meter.Read].Requests == requests*(n+1) })
		conn := c.Conn
		if secured, ok := conn.(*tls.Conn); ok {
			conn = secured.NetConn() // which says no good-bye
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			must(t, tcp.SetLinger(0)) // a reset, of which only one of receive and send is told
		}
		must(t, conn.Close())
		await(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.conns == 0 })
	}
}

func TestSlowHandshake(t *testing.T) {
	_, socket := serving(t, Options{HandshakeTime: 2 * time.Second}, export(t, "", image(t, mib, 0), ExportOptions{}))
	silent, err := net.Dial("unix", socket)
	must(t, err)
	defer silent.Close()
	endless := dial(t, socket)
	must(t, silent.SetDeadline(time.Now().Add(patience)))
	if _, err := io.Copy(io.Discard, silent); err != nil {
		t.Errorf("a silent client: %v", err)
	}
	for {
		if _, err := endless.Write(optionBytes(optList, nil)); err != nil {
			break // it goes on with the handshake as long as it is let
		}
	}
	patient := dial(t, socket).enter("")
	await(t, func() bool { _, err := silent.Read(make([]byte, 1)); return err != nil })
	patient.ok(cmdRead, 0, 0, 4096, nil) // the deadline is the handshake's only
}

// TestThousandConnects: connections that do nothing, more than may be; those who
// are there work on, who comes last gets in, and all that they took is given back.
func TestThousandConnects(t *testing.T) {
	s, socket := serving(t, Options{MaxConnections: 64}, export(t, "", image(t, mib, 0), ExportOptions{}))
	files, routines := openFiles(t), runtime.NumGoroutine()
	good := dial(t, socket).enter("")
	good.ok(cmdRead, 0, 0, 4096, nil)
	for range 10 {
		var conns []net.Conn
		for range 100 {
			conns = append(conns, reach(t, socket))
		}
		good.ok(cmdWrite, 0, 0, 4096, pattern(4096, 2))
		last := dial(t, socket).enter("")
		last.ok(cmdRead, 0, 0, 4096, nil)
		conns = append(conns, last)
		for _, c := range conns {
			c.Close()
		}
	}
	await(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.conns == 1 })
	good.reads(0, pattern(4096, 2))
	good.Close() // it may have more goroutines by now than it began with
	await(t, func() bool { return openFiles(t) <= files && runtime.NumGoroutine() <= routines })
	dial(t, socket).enter("").reads(0, pattern(4096, 2))
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(names)
}

// TestNothingIsLeft serves and closes in every state of a connection, and counts
// descriptors and goroutines.
func TestNothingIsLeft(t *testing.T) {
	e := export(t, "", image(t, mib, 0), ExportOptions{})
	round := func() {
		o := Options{noLoop: byGoroutines}
		if overTLS != nil {
			o.TLS = overTLS.server
		}
		s := NewServer(o)
		must(t, s.Add(e))
		l := listening(t)
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		socket := l.Addr().String()
		conns := []*client{dial(t, socket), dial(t, socket).enter(""), dial(t, socket).structured("")}
		conns[1].ok(cmdWrite, 0, 0, 4096, make([]byte, 4096))
		conns[2].ok(cmdRead, 0, 0, 4096, nil)
		conns[2].write(requestBytes(cmdRead, 0, 9, 0, 4096))
		must(t, s.Close())
		must(t, <-served)
		for _, c := range conns {
			c.Close()
		}
		if err := s.Serve(l); err != nil {
			t.Errorf("a closed server serves: %v", err)
		}
	}
	round()
	files, routines := openFiles(t), runtime.NumGoroutine()
	for range 10 {
		round()
	}
	await(t, func() bool { return openFiles(t) <= files && runtime.NumGoroutine() <= routines })
}
