package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"holdfast/blockdev/serve/vhost/frontend"
)

// loadQueue is where a load puts its requests: a frontend.Queue, or what is like one.
type loadQueue interface {
	Data(slot int) []byte
	Put(slot int, kind uint32, sector uint64, length int)
	Show() error
	Wait() error
	Take() (slot int, status byte, ok bool)
	Abandon()
}

// ioLoad does a job as a guest's driver would: one queue, one thread, a write to the
// server's eventfd only if it asks for one.
type ioLoad struct {
	job    ioJob
	f      io.Closer // what the queue is of
	q      loadQueue
	blocks uint64 // of the disk, of the job's size
	next   uint64 // block, when they come in order
	stride uint64 // to the next block, when none is to come twice
	random *rand.PCG

	slots    []loadSlot
	inflight int
	requests int
	took     []uint32 // latencies in ns
}

// loadSlot is a request in flight.
type loadSlot struct {
	since    time.Duration
	kind     uint32
	flushing bool
}

// loadVhost does a job for a while on the server that listens on a socket.
func loadVhost(ctx context.Context, socket string, j ioJob, each time.Duration) (s ioSample, requests float64, err error) {
	l, err := newVhostLoad(socket, j)
	if err != nil {
		return s, 0, err
	}
	defer func() { err = errors.Join(err, l.f.Close()) }()
	return l.measure(ctx, each)
}

// measure does the job for a while.
func (l *ioLoad) measure(ctx context.Context, each time.Duration) (s ioSample, requests float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, each+30*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, l.q.Abandon)()
	before, err := ownCPU()
	if err != nil {
		return s, 0, err
	}
	took, err := l.run(each)
	if err != nil {
		return s, 0, err
	}
	after, err := ownCPU()
	if err != nil {
		return s, 0, err
	}
	requests = float64(l.requests)
	slices.Sort(l.took)
	at := func(q float64) float64 { return quantileOf(l.took, q) / 1000 }
	return ioSample{iops: requests / took.Seconds(), p50: at(0.5), p99: at(0.99), p999: at(0.999), client: (after - before) / requests}, requests, nil
}

func newVhostLoad(socket string, j ioJob) (*ioLoad, error) {
	f, err := frontend.New(frontend.Options{Depth: j.depth, Buffer: j.block})
	if err != nil {
		return nil, err
	}
	if err := f.Connect(socket); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	config, err := f.Config()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	size := int64(binary.LittleEndian.Uint64(config)) * 512
	if size < int64(j.block) {
		return nil, errors.Join(fmt.Errorf("%w: the disk is smaller than a request", errors.ErrUnsupported), f.Close())
	}
	return newLoad(j, f, f.Queues[0], size), nil
}

// newLoad makes one of a job for a disk of some bytes, at least one request's.
func newLoad(j ioJob, f io.Closer, q loadQueue, size int64) *ioLoad {
	blocks := uint64(size / int64(j.block))
	l := &ioLoad{
		job: j, f: f, q: q, blocks: blocks, stride: coprime(blocks), random: rand.NewPCG(rand.Uint64(), 1),
		slots: make([]loadSlot, j.depth), took: make([]uint32, 0, 1<<20),
	}
	l.next = l.random.Uint64() % blocks
	if !j.random {
		l.next, l.stride = 0, 1
	}
	for n := range j.depth {
		b := l.q.Data(n)
		for i := 0; i+8 <= len(b); i += 8 {
			binary.LittleEndian.PutUint64(b[i:], l.random.Uint64())
		}
	}
	return l
}

// coprime gives a step by which all of n blocks are visited, in an order that no
// server can foresee by the distance to the last one alone.
func coprime(n uint64) uint64 {
	for step := uint64(float64(n)*0.618034) | 1; ; step += 2 {
		a, b := n, step
		for b != 0 {
			a, b = b, a%b
		}
		if a == 1 {
			return step
		}
	}
}

// run keeps the job's depth of requests in flight for a while, and waits for the
// last of them.
func (l *ioLoad) run(each time.Duration) (time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	start := time.Now()
	for n := range l.slots {
		l.begin(n, 0)
	}
	if err := l.q.Show(); err != nil {
		return 0, err
	}
	for l.inflight > 0 {
		if err := l.q.Wait(); err != nil {
			return 0, err
		}
		now := time.Since(start)
		begun := false
		for n, status, ok := l.q.Take(); ok; n, status, ok = l.q.Take() {
			if status != 0 {
				return 0, fmt.Errorf("%s: a request failed with status %d", l.job.name, status)
			}
			begun = l.end(n, now, now < each) || begun
		}
		if begun {
			if err := l.q.Show(); err != nil {
				return 0, err
			}
		}
	}
	return time.Since(start), nil
}

// begin puts the next request into the queue.
func (l *ioLoad) begin(n int, now time.Duration) {
	block := l.next
	if l.job.random && !l.job.once {
		block = l.random.Uint64() % l.blocks
	} else {
		l.next = (l.next + l.stride) % l.blocks
	}
	kind := uint32(frontend.Write)
	if l.job.reads == 100 || l.job.reads > 0 && l.random.Uint64()%100 < uint64(l.job.reads) {
		kind = frontend.Read
	}
	l.slots[n] = loadSlot{since: now, kind: kind}
	l.inflight++
	l.q.Put(n, kind, block*uint64(l.job.block)/512, l.job.block)
}

// end takes an answer, and tells whether another request was put in its place. The
// latency of a job that flushes is its flushes', that of a mixture its larger part's.
func (l *ioLoad) end(n int, now time.Duration, more bool) (begun bool) {
	slot := l.slots[n]
	l.inflight--
	if l.job.flush && !slot.flushing {
		l.slots[n] = loadSlot{since: now, flushing: true}
		l.inflight++
		l.q.Put(n, frontend.Flush, 0, 0)
		return true
	}
	l.requests++
	if slot.flushing || (slot.kind == frontend.Read) == (l.job.reads >= 50) {
		l.took = append(l.took, uint32(min(now-slot.since, 4*time.Second)))
	}
	if more {
		l.begin(n, now)
	}
	return more
}
