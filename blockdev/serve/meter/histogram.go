package meter

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Buckets of latencies: the first holds what is below 1 µs (2^10 ns), then each
// power of two is cut in four, so that a quantile is right within a quarter; the
// last holds what is longer than a minute (2^36 ns).
const (
	firstPower = 10
	lastPower  = 36
	cuts       = 4
	// Buckets is how many there are.
	Buckets = 1 + (lastPower-firstPower)*cuts + 1
)

type histogram [Buckets]atomic.Uint64

func (h *histogram) add(ns int64) { h[bucketOf(ns)].Add(1) }

func bucketOf(ns int64) int {
	if ns < 1<<firstPower {
		return 0
	}
	power := bits.Len64(uint64(ns)) - 1
	if power >= lastPower {
		return Buckets - 1
	}
	cut := int(ns>>(power-2)) & (cuts - 1)
	return 1 + (power-firstPower)*cuts + cut
}

// UpperBound is the time below which bucket n's latencies are; the last bucket has
// none and tells where it begins.
func UpperBound(n int) time.Duration {
	switch n {
	case 0:
		return 1 << firstPower
	case Buckets - 1:
		return 1 << lastPower
	}
	power, cut := (n-1)/cuts, (n-1)%cuts
	return time.Duration(cuts+cut+1) << (power + firstPower - 2)
}

// Quantile gives the latency that a share of the counted requests (0.99) did not
// exceed, to a quarter; 0 when nothing was counted.
func Quantile(buckets *[Buckets]uint64, share float64) time.Duration {
	var total uint64
	for _, n := range buckets {
		total += n
	}
	if total == 0 {
		return 0
	}
	wanted, seen := uint64(share*float64(total)), uint64(0)
	for n, count := range buckets {
		seen += count
		if seen > wanted || seen == total {
			return UpperBound(n)
		}
	}
	return UpperBound(Buckets - 1)
}
