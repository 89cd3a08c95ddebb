package meter

import (
	"sync"
	"testing"
	"time"
)

func TestBucketsAreInOrder(t *testing.T) {
	for n := 1; n < Buckets-1; n++ {
		low, high := int64(UpperBound(n-1)), int64(UpperBound(n))
		if low >= high || bucketOf(low) != n || bucketOf(high-1) != n {
			t.Errorf("bucket %d holds %d to %d, and they go to %d and %d", n, low, high, bucketOf(low), bucketOf(high-1))
		}
	}
	for ns, want := range map[int64]int{-1: 0, 0: 0, 1023: 0, 1024: 1, 1 << 36: Buckets - 1, 1 << 62: Buckets - 1} {
		if got := bucketOf(ns); got != want {
			t.Errorf("%d ns go to bucket %d, want %d", ns, got, want)
		}
	}
	if UpperBound(Buckets-1) != 1<<lastPower {
		t.Errorf("the last bucket begins at %v", UpperBound(Buckets-1))
	}
}

func TestQuantile(t *testing.T) {
	var buckets [Buckets]uint64
	if got := Quantile(&buckets, 0.5); got != 0 {
		t.Errorf("the median of nothing is %v", got)
	}
	buckets[bucketOf(int64(100*time.Microsecond))] = 989
	buckets[bucketOf(int64(5*time.Millisecond))] = 11
	for share, want := range map[float64]time.Duration{0.5: 100 * time.Microsecond, 0.99: 5 * time.Millisecond, 1: 5 * time.Millisecond} {
		if got := Quantile(&buckets, share); got < want || got > want*5/4 {
			t.Errorf("the quantile %v is %v, want %v to a quarter", share, got, want)
		}
	}
}

func TestCounts(t *testing.T) {
	var m Meter
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			q := m.NewQueue()
			defer q.Close()
			for range 100 {
				began := Now()
				q.Begin()
				q.Wait(Device)
				m.Snapshot()
				q.Waited(Device, began-5)
				q.End(Write, began, 4096, false)
			}
			q.Begin()
			q.End(Read, Now(), 4096, true)
		})
	}
	wg.Wait()
	s := m.Snapshot()
	w, r := s.Kinds[Write], s.Kinds[Read]
	if w.Requests != 400 || w.Bytes != 400*4096 || w.Errors != 0 || r.Requests != 4 || r.Errors != 4 || r.Bytes != 0 {
		t.Errorf("counted %+v and %+v", w, r)
	}
	if s.Inside != 0 || s.Waits[Device].Now != 0 || s.Waits[Device].Time < 400*5 {
		t.Errorf("left inside: %d; waiting: %+v", s.Inside, s.Waits)
	}
}

func TestWhoWaitsNow(t *testing.T) {
	var m Meter
	q := m.NewQueue()
	q.Begin()
	q.Wait(Throttle)
	if s := m.Snapshot(); s.Inside != 1 || s.Waits[Throttle].Now != 1 {
		t.Errorf("one request waits, and %d are inside, %d wait", s.Inside, s.Waits[Throttle].Now)
	}
	q.Close()
	q.Close()
	if s := m.Snapshot(); s.Inside != 0 || s.Waits[Throttle].Now != 0 {
		t.Error("a closed queue still waits")
	}
}

func TestAllocatesNothing(t *testing.T) {
	var m Meter
	q := m.NewQueue()
	if n := testing.AllocsPerRun(1000, func() {
		q.Begin()
		q.Wait(Device)
		q.Waited(Device, 0)
		q.End(Read, 0, 4096, false)
	}); n != 0 {
		t.Errorf("counting a request allocates %v times", n)
	}
}

func BenchmarkRequest(b *testing.B) {
	var m Meter
	q := m.NewQueue()
	for range b.N {
		q.Begin()
		q.Wait(Device)
		q.Waited(Device, 0)
		q.End(Read, 0, 4096, false)
	}
}
