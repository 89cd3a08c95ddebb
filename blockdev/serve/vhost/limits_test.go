package vhost_test

import (
	"os"
	"runtime"
	"sync/atomic"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/meter"
	"holdfast/blockdev/serve/vhost"
	"holdfast/blockdev/serve/vhost/frontend"
)

// until gives way to others until something is so.
func until(so func() bool) {
	for !so() {
		runtime.Gosched()
	}
}

// putAll puts a request of a kind into each slot of a queue and shows them.
func putAll(t *testing.T, q *frontend.Queue, depth int, kind uint32) {
	t.Helper()
	for slot := range depth {
		q.Put(slot, kind, uint64(slot*8), block)
	}
	if err := q.Show(); err != nil {
		t.Fatal(err)
	}
}

// takeAll takes so many answers.
func takeAll(t *testing.T, q *frontend.Queue, count int) {
	t.Helper()
	for count > 0 {
		if err := q.Wait(); err != nil {
			t.Fatal(err)
		}
		for _, status, ok := q.Take(); ok; _, status, ok = q.Take() {
			if count--; status != 0 {
				t.Errorf("status %d", status)
			}
		}
	}
}

// TestLimits: what a limit holds back waits, is told as waiting and lets others pass,
// until the limit is lifted, or the queue stopped.
func TestLimits(t *testing.T) {
	const depth = 8
	counts := &meter.Meter{}
	s, socket := serving(t, openFile(t, newImage(t), os.O_RDWR), vhost.Options{Queues: 2, Meter: counts})
	f := connected(t, socket, frontend.Options{Queues: 2, Depth: depth})
	reads, others := f.Queues[0], f.Queues[1]
	waiting := func() int64 { return counts.Snapshot().Waits[meter.Throttle].Now }
	holdBack := func() {
		t.Helper()
		s.Throttle(blockdev.Limits{ReadBytes: 1}, 1) // the first goes into debt for more than an hour
		putAll(t, reads, depth, frontend.Read)
		takeAll(t, reads, 1)
		until(func() bool { return waiting() == depth-1 })
	}
	holdBack()
	for _, kind := range []uint32{frontend.Write, frontend.Flush} {
		if status := one(t, others, func() { others.Put(0, kind, 0, block) }); status != 0 {
			t.Errorf("a request of kind %d: status %d", kind, status)
		}
	}
	if _, err := s.Swap(openFile(t, newImage(t), os.O_RDWR), func() error { return nil }); err != nil {
		t.Error(err)
	}
	if n := waiting(); n != depth-1 {
		t.Errorf("%d reads wait", n)
	}
	s.Throttle(blockdev.Limits{}, 0)
	takeAll(t, reads, depth-1)
	holdBack()
	if base, err := f.StopQueue(0); err != nil || base != 2*depth {
		t.Errorf("stopped at %d, %v", base, err)
	}
	takeAll(t, reads, depth-1)
	if n := waiting(); n != 0 {
		t.Errorf("%d wait for nothing", n)
	}
}

// slow is a device whose syncs wait to be let go.
type slow struct {
	vhost.Device
	syncs  atomic.Int32
	let    chan struct{}
	silent chan struct{} // a sync runs
}

func (d *slow) Sync() error {
	d.syncs.Add(1)
	d.silent <- struct{}{}
	<-d.let
	return d.Device.Sync()
}

// TestFlushesShareSyncs: flushes of all queues that come while a sync runs share the
// next one; reads and writes go on meanwhile.
func TestFlushesShareSyncs(t *testing.T) {
	const depth = 4
	counts := &meter.Meter{}
	d := &slow{Device: openFile(t, newImage(t), os.O_RDWR), let: make(chan struct{}), silent: make(chan struct{})}
	_, socket := serving(t, d, vhost.Options{Queues: 3, Meter: counts})
	f := connected(t, socket, frontend.Options{Queues: 3, Depth: depth})
	first, second, third := f.Queues[0], f.Queues[1], f.Queues[2]
	first.Put(0, frontend.Flush, 0, 0)
	if err := first.Show(); err != nil {
		t.Fatal(err)
	}
	<-d.silent
	putAll(t, second, depth, frontend.Flush)
	first.Put(1, frontend.Flush, 0, 0)
	if err := first.Show(); err != nil {
		t.Fatal(err)
	}
	until(func() bool { return counts.Snapshot().Waits[meter.Flushing].Now == depth+2 })
	if status := one(t, third, func() { third.Put(0, frontend.Write, 0, block) }); status != 0 {
		t.Errorf("a write meanwhile: status %d", status)
	}
	d.let <- struct{}{}
	takeAll(t, first, 1)
	<-d.silent
	d.let <- struct{}{}
	takeAll(t, second, depth)
	takeAll(t, first, 1)
	if n := d.syncs.Load(); n != 2 {
		t.Errorf("%d syncs for the flushes of two rounds", n)
	}
}
