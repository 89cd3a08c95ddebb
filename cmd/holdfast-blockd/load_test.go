package main_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"holdfast/blockdev/serve/vhost/frontend"
)

const (
	depth = 8
	own   = 16 // blocks that one slot of the load uses
)

// load keeps a queue of requests in flight, each slot on blocks of its own, and checks
// every answer against what it knows.
type load struct {
	*guest
	stamps [depth][own]uint64 // what each block was written with last
	at     [depth]int
	kind   [depth]uint32
	random *rand.Rand
	last   uint64
	errors int
}

func newLoad(t testing.TB) *load {
	return &load{guest: newGuest(t, frontend.Options{Depth: depth, Inflight: true}), random: rand.New(rand.NewPCG(1, 2))}
}

// connect connects as a VMM does: again until somebody listens.
func (l *load) connect(socket string) {
	l.t.Helper()
	for {
		err := l.f.Connect(socket)
		if err == nil {
			return
		}
		gone := errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
		if !gone {
			l.t.Fatal(err)
		}
	}
}

func stamped(stamp uint64) []byte {
	b := make([]byte, block)
	for i := 0; i < block; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], stamp)
	}
	return b
}

// put puts the next request of a slot into the queue.
func (l *load) put(slot int) {
	q, n := l.f.Queues[0], l.random.IntN(own)
	sector := uint64(slot*own+n) * block / 512
	l.at[slot] = n
	switch k := l.random.IntN(16); {
	case k == 0:
		l.kind[slot] = frontend.Flush
		q.Put(slot, frontend.Flush, 0, 0)
	case k < 9:
		l.last++
		l.kind[slot], l.stamps[slot][n] = frontend.Write, l.last
		copy(q.Data(slot), stamped(l.last))
		q.Put(slot, frontend.Write, sector, block)
	default:
		l.kind[slot] = frontend.Read
		q.Put(slot, frontend.Read, sector, block)
	}
}

// run serves so many requests; between is called after each, and may take the server
// away and bring another one.
func (l *load) run(requests int, between func(done int)) {
	l.t.Helper()
	q := l.f.Queues[0]
	for slot := range depth {
		l.put(slot)
	}
	must(l.t, q.Show())
	for done, inside := 0, depth; inside > 0; {
		must(l.t, q.Wait())
		for slot, status, ok := q.Take(); ok; slot, status, ok = q.Take() {
			l.check(slot, status)
			done++
			inside--
			if done+inside < requests {
				l.put(slot)
				inside++
			}
			must(l.t, q.Show())
			if between != nil {
				between(done)
			}
		}
	}
}

func (l *load) check(slot int, status byte) {
	l.t.Helper()
	if status != 0 {
		l.errors++
		l.t.Errorf("request %d of slot %d: status %d", l.kind[slot], slot, status)
		return
	}
	if want := l.stamps[slot][l.at[slot]]; l.kind[slot] == frontend.Read && !bytes.Equal(l.f.Queues[0].Data(slot), stamped(want)) {
		l.t.Fatalf("block %d of slot %d reads as %x, was written with %d", l.at[slot], slot, l.f.Queues[0].Data(slot)[:8], want)
	}
}

// verify reads all blocks.
func (l *load) verify() {
	l.t.Helper()
	for slot := range depth {
		for n := range own {
			l.good(frontend.Read, uint64(slot*own+n)*block/512, block)
			if want := l.stamps[slot][n]; !bytes.Equal(l.f.Queues[0].Data(0), stamped(want)) {
				l.t.Fatalf("block %d of slot %d reads as %x, was written with %d", n, slot, l.f.Queues[0].Data(0)[:8], want)
			}
		}
	}
}
