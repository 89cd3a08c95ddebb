package uring_test

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev/serve/uring"
	"holdfast/internal/sys"
)

// TestSubmitAhead: as many as are worth a call are submitted, and the rest waits for
// Enter.
func TestSubmitAhead(t *testing.T) {
	for _, c := range []struct{ inflight, atOnce int }{{0, 2}, {8, 2}, {16, 4}, {32, 8}, {128, 8}} {
		r := ring(t, 16)
		var timers [8]uring.Timer
		for n := range c.atOnce {
			if uring.SubmitAhead(r, c.inflight); r.Filled() != n {
				t.Fatalf("%d in flight: %d of %d wait to be submitted", c.inflight, r.Filled(), n)
			}
			uring.Timeout(r.Next(), &timers[n], 1, uint64(n))
		}
		if uring.SubmitAhead(r, c.inflight); !r.Submitted() {
			t.Errorf("%d in flight: %d entries still wait", c.inflight, r.Filled())
		}
		results(t, r, c.atOnce)
	}
}

// TestKeeps: at most half of the processors are kept, and what is given back can be
// taken again.
func TestKeeps(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(6))
	for range 2 {
		for n := range 3 {
			if !uring.TakeKeep() {
				t.Fatalf("the half of 6 is %d", n)
			}
		}
		if uring.TakeKeep() {
			t.Error("a fourth of 6")
		}
		for range 3 {
			uring.GiveKeep()
		}
	}
}

// TestWorldStopsForKeepers: who waits with a processor of its own is interrupted by who
// stops the world.
func TestWorldStopsForKeepers(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	wake, err := sys.NewEventFD()
	must(t, err)
	defer wake.Close()
	waits, seen := make(chan struct{}), make(chan int)
	var returned atomic.Int64
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		r, err := sys.NewUring(4)
		if err != nil {
			close(waits)
			seen <- -1
			return
		}
		defer r.Close()
		r.KeepProcessor(true)
		uring.Watch(r.Next(), int(wake.Fd()), 1)
		close(waits)
		for n := 1; ; n++ {
			if err := r.Enter(1); err != nil {
				seen <- -1
				return
			}
			returned.Add(1)
			if _, ok := r.Event(); ok {
				seen <- n
				return
			}
		}
	}()
	<-waits
	done := make(chan struct{})
	go func() {
		for n := 0; n < 20 || returned.Load() == 0 && n < 10_000; n++ { // it may not have begun to wait at first
			runtime.GC() // each stops the world more than once
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Error("the world does not stop")
	}
	must(t, sys.SignalEvent(int(wake.Fd())))
	if n := <-seen; n < 2 {
		t.Errorf("the wait returned %d times; nobody has interrupted it", n)
	}
}
