package throttle_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/throttle"
)

const second = int64(time.Second)

// served counts what a queue that waits as told gets through in some time.
func served(take func(now, bytes int64) int64, bytes, from, to int64) (requests int64) {
	for now := from; ; requests++ {
		now += take(now, bytes)
		if now >= to {
			return requests
		}
	}
}

func near(t *testing.T, what string, got, want, slack int64) {
	t.Helper()
	if got < want-slack || got > want+slack {
		t.Errorf("%s: %d requests went through, want %d ± %d", what, got, want, slack)
	}
}

func TestRates(t *testing.T) {
	for _, c := range []struct {
		name   string
		limits blockdev.Limits
		bytes  int64
		reads  int64 // in ten seconds, the burst of 0.1 s included
		writes int64
	}{
		{"reads", blockdev.Limits{ReadIOPS: 200, WriteIOPS: 50}, 4096, 2020, 505},
		{"bytes", blockdev.Limits{ReadBytes: 1 << 20, WriteBytes: 4 << 20}, 64 << 10, 161, 646},
		{"the tighter one", blockdev.Limits{ReadIOPS: 1000, ReadBytes: 4096 * 100, WriteIOPS: 10, WriteBytes: 1 << 40}, 4096, 1010, 101},
		{"larger than the burst", blockdev.Limits{ReadBytes: 1 << 20, WriteBytes: 1 << 20}, 32 << 20, 1, 1},
		{"one a second", blockdev.Limits{ReadIOPS: 1, WriteIOPS: 3}, 1, 10, 30},
	} {
		t.Run(c.name, func(t *testing.T) {
			var l throttle.Limiter
			l.Set(c.limits, 0)
			near(t, "reads", served(l.TakeRead, c.bytes, 0, 10*second), c.reads, 1)
			near(t, "writes", served(l.TakeWrite, c.bytes, 0, 10*second), c.writes, 1)
		})
	}
}

func TestBurstAfterARest(t *testing.T) {
	var l throttle.Limiter
	l.Set(blockdev.Limits{ReadIOPS: 100}, 2*time.Second)
	near(t, "at once", served(l.TakeRead, 1, 0, 1), 201, 1)
	near(t, "no more than the burst after a long rest", served(l.TakeRead, 1, 1000*second, 1000*second+1), 201, 1)
}

func TestUnlimitedAndChanged(t *testing.T) {
	var l throttle.Limiter
	for range 1000 {
		if l.TakeRead(0, 1<<30)+l.TakeWrite(0, 1<<30) != 0 {
			t.Fatal("a limiter without limits made its caller wait")
		}
	}
	l.Set(blockdev.Limits{ReadIOPS: 1}, 0)
	l.TakeRead(0, 1)
	l.TakeRead(0, 1)
	if l.TakeRead(0, 1) == 0 {
		t.Error("a limit that was set does not hold")
	}
	if l.TakeWrite(0, 1) != 0 {
		t.Error("a limit of reads holds for writes")
	}
	l.Set(blockdev.Limits{}, 0)
	if l.TakeRead(0, 1) != 0 {
		t.Error("a limit that was lifted holds")
	}
}

// TestSharedByQueues takes from many goroutines at one moment: together they get
// what one would.
func TestSharedByQueues(t *testing.T) {
	var l throttle.Limiter
	l.Set(blockdev.Limits{WriteIOPS: 1000}, time.Second)
	var now atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				if l.TakeWrite(0, 4096) == 0 {
					now.Add(1)
				}
			}
		})
	}
	wg.Wait()
	near(t, "eight queues", now.Load(), 1001, 1)
}

func TestAllocatesNothing(t *testing.T) {
	var l throttle.Limiter
	l.Set(blockdev.Limits{ReadIOPS: 1 << 30, ReadBytes: 1 << 40}, 0)
	if n := testing.AllocsPerRun(1000, func() { l.TakeRead(1, 4096) }); n != 0 {
		t.Errorf("a take allocates %v times", n)
	}
}

func BenchmarkTake(b *testing.B) {
	for name, limits := range map[string]blockdev.Limits{"unlimited": {}, "limited": {ReadIOPS: 1 << 40, ReadBytes: 1 << 50}} {
		b.Run(name, func(b *testing.B) {
			var l throttle.Limiter
			l.Set(limits, 0)
			for n := range b.N {
				l.TakeRead(int64(n), 4096)
			}
		})
	}
}
