package vhost_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/serve/vhost"
	"holdfast/blockdev/serve/vhost/frontend"
)

// TestHostileRings: a queue that makes no sense stops; the next guest is served.
func TestHostileRings(t *testing.T) {
	image := newImage(t)
	_, socket := served(t, image, os.O_RDWR, vhost.Options{Serial: serial})

	for name, spoil := range map[string]func(q *frontend.Queue){
		"head out of range":     func(q *frontend.Queue) { q.PutHead(60000) },
		"circle":                func(q *frontend.Queue) { q.Descriptor(0, 0, 64, next, 0); q.PutHead(0) },
		"next out of range":     func(q *frontend.Queue) { q.Descriptor(0, 0, 64, next, 999); q.PutHead(0) },
		"address out of range":  func(q *frontend.Queue) { q.Descriptor(0, 1<<40, 16, next, 1); q.PutHead(0) },
		"address wraps":         func(q *frontend.Queue) { q.Descriptor(0, ^uint64(0)-1<<32, 1<<31, next, 1); q.PutHead(0) },
		"length beyond memory":  func(q *frontend.Queue) { q.Descriptor(0, 0, ^uint32(0), next, 1); q.PutHead(0) },
		"no status":             func(q *frontend.Queue) { q.Descriptor(0, 0, 64, 0, 0); q.PutHead(0) },
		"empty status":          func(q *frontend.Queue) { q.Descriptor(0, 0, 0, write, 0); q.PutHead(0) },
		"no header":             func(q *frontend.Queue) { q.Descriptor(0, 0, 64, write, 0); q.PutHead(0) },
		"indirect in itself":    func(q *frontend.Queue) { q.Descriptor(0, 0, 16, indirect, 0); q.PutHead(0) },
		"indirect of odd size":  func(q *frontend.Queue) { q.Descriptor(0, 0, 17, indirect, 0); q.PutHead(0) },
		"indirect out of range": func(q *frontend.Queue) { q.Descriptor(0, 1<<40, 32, indirect, 0); q.PutHead(0) },
		"more than the queue": func(q *frontend.Queue) {
			q.Put(0, frontend.Read, 0, block)
			q.PutHead(0)
			q.PutHead(0)
			q.PutHead(0)
			q.PutHead(0)
		},
		"the same one twice":          func(q *frontend.Queue) { q.Put(0, frontend.Flush, 0, 0); q.PutHead(0) },
		"written before what is read": func(q *frontend.Queue) { q.Put(0, frontend.Read, 0, block); q.Descriptor(0, 0, 16, next|write, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			f := connected(t, socket, frontend.Options{})
			spoil(f.Queues[0])
			if err := errors.Join(f.Queues[0].Show(), f.Queues[0].Kick()); err != nil {
				t.Fatal(err)
			}
			if !f.Queues[0].Seen() {
				t.Error("it was taken as if it made sense")
			}
			if _, err := f.StopQueue(0); err != nil {
				t.Errorf("the connection: %v", err)
			}
		})
	}
	f := connected(t, socket, frontend.Options{})
	if status := one(t, f.Queues[0], func() { f.Queues[0].Put(0, frontend.Read, 0, block) }); status != 0 {
		t.Errorf("afterwards: status %d", status)
	}
}

// TestHostileMessages: what is no message ends the connection, and only that.
func TestHostileMessages(t *testing.T) {
	image := newImage(t)
	_, socket := served(t, image, os.O_RDWR, vhost.Options{Serial: serial})
	message := func(request, flags uint32, payload ...byte) []byte {
		b := binary.LittleEndian.AppendUint32(nil, request)
		b = binary.LittleEndian.AppendUint32(b, flags)
		return append(binary.LittleEndian.AppendUint32(b, uint32(len(payload))), payload...)
	}
	huge := message(5, 1)
	binary.LittleEndian.PutUint32(huge[8:], 1<<31)
	for name, bytes := range map[string][]byte{
		"garbage":                 []byte("GET / HTTP/1.1\r\nHost: here\r\n\r\n"),
		"wrong version":           message(1, 2),
		"a reply":                 message(1, 5),
		"huge":                    huge,
		"unknown request":         message(99, 1),
		"short features":          message(2, 1, 1, 2, 3),
		"features not offered":    message(2, 1, 0, 0, 0, 0, 0, 0, 0, 0x80),
		"queue out of range":      message(8, 1, 200, 0, 0, 0, 128, 0, 0, 0),
		"queue of three":          message(8, 1, 0, 0, 0, 0, 3, 0, 0, 0),
		"kick without descriptor": message(12, 1, 0, 0, 0, 0, 0, 0, 0, 0),
		"memory without any":      message(5, 1, append([]byte{1, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 32)...)...),
		"inflight out of bounds":  message(31, 1, append(make([]byte, 16), 255, 255, 255, 255)...),
		"short configuration":     message(24, 1, 1),
	} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		_, err = conn.Write(bytes)
		if err == nil {
			_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
			_, err = conn.Read(make([]byte, 64))
		}
		if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%s: %v", name, err)
		}
		conn.Close()
	}
	for range 1000 {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	f := connected(t, socket, frontend.Options{})
	if status := one(t, f.Queues[0], func() { f.Queues[0].Put(0, frontend.Read, 0, block) }); status != 0 {
		t.Errorf("afterwards: status %d", status)
	}
}

// FuzzRing gives the server a queue of any content, which changes while it is read.
// Whatever it is, the server lives, be it one that uses its device by the ring or by
// helpers.
func FuzzRing(f *testing.F) {
	_, ring := served(f, newImage(f), os.O_RDWR, vhost.Options{Serial: serial})
	_, helped := serving(f, plain{newOverlay(f, "")}, vhost.Options{Serial: serial})
	_, lent := serving(f, newOverlay(f, newImage(f)), vhost.Options{Serial: serial})
	f.Add(make([]byte, 64), uint16(0))
	f.Add([]byte{0, 0x20, 0, 0, 1, 0, 0, 0, 16, 0, 0, 0, 1, 0, 1, 0, 0, 0x30, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0}, uint16(0))
	f.Add(sensible(), uint16(0))
	f.Fuzz(func(t *testing.T, table []byte, head uint16) {
		for _, socket := range []string{ring, helped, lent} {
			tryRing(t, socket, table[:min(len(table), block)], head)
		}
	})
}

// sensible is the beginning of a table with a read, for a fuzzer to start from: its
// header and its data are of zeroes.
func sensible() []byte {
	b := make([]byte, 0, 48)
	for n, d := range []struct {
		length uint32
		flags  uint16
	}{{16, 1}, {block, 3}, {1, 2}} {
		b = binary.LittleEndian.AppendUint64(b, 1<<32+0x4000)
		b = binary.LittleEndian.AppendUint32(b, d.length)
		b = binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(b, d.flags), uint16(n+1))
	}
	return b
}

func tryRing(t *testing.T, socket string, table []byte, head uint16) {
	t.Helper()
	fe, err := frontend.New(frontend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer fe.Close()
	if err := fe.Connect(socket); err != nil {
		t.Fatal(err)
	}
	q := fe.Queues[0]
	copy(fe.Memory(), table)
	q.PutHead(head % 8)
	q.PutHead((head + 1) % 8)
	if err := errors.Join(q.Show(), q.Kick()); err != nil {
		t.Fatal(err)
	}
	for n := range table {
		fe.Memory()[n] ^= byte(head)
	}
	q.Seen()
	if _, err := fe.StopQueue(0); err != nil {
		t.Fatalf("the server is gone: %v", err)
	}
}

// FuzzMessages says anything to the server, which then serves somebody else.
func FuzzMessages(f *testing.F) {
	image := newImage(f)
	_, socket := served(f, image, os.O_RDWR, vhost.Options{Serial: serial})
	f.Add([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 11, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, said []byte) {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write(said) // the server may have hung up
		conn.Close()
		fe, err := frontend.New(frontend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer fe.Close()
		if err := fe.Connect(socket); err != nil {
			t.Fatalf("the server is gone: %v", err)
		}
	})
}
