package throttle

import (
	"sync/atomic"
	"time"

	"holdfast/blockdev"
)

// DefaultBurst is how much of a second's worth may come at once after a rest: long
// enough for a queue of requests, short enough that a second's count is right.
const DefaultBurst = 100 * time.Millisecond

// Limiter bounds one volume. The zero value bounds nothing. All methods may be
// called from any goroutine.
type Limiter struct {
	rules atomic.Pointer[rules] // nil: nothing is bounded
}

// rules are one setting of limits with what has been taken under it.
type rules struct {
	readIOPS, writeIOPS, readBytes, writeBytes bucket
}

// Set replaces the limits from now on; buckets begin full. The burst is the time
// whose worth may be taken at once after a rest, 0 for DefaultBurst.
func (l *Limiter) Set(limits blockdev.Limits, burst time.Duration) {
	if limits.None() {
		l.rules.Store(nil)
		return
	}
	if burst <= 0 {
		burst = DefaultBurst
	}
	r := &rules{}
	r.readIOPS.set(limits.ReadIOPS, burst)
	r.writeIOPS.set(limits.WriteIOPS, burst)
	r.readBytes.set(limits.ReadBytes, burst)
	r.writeBytes.set(limits.WriteBytes, burst)
	l.rules.Store(r)
}

// TakeRead takes a read of some bytes at a time now, in nanoseconds of any clock
// that never goes back and never begins below 0 (meter.Now). It gives how many
// nanoseconds to wait before serving it; 0 is at once. What was taken stays taken.
func (l *Limiter) TakeRead(now, bytes int64) (wait int64) {
	r := l.rules.Load()
	if r == nil {
		return 0
	}
	return max(r.readIOPS.take(now, 1), r.readBytes.take(now, bytes))
}

// TakeWrite is TakeRead for a write, or for a discard or zeroes with 0 bytes, which
// move none.
func (l *Limiter) TakeWrite(now, bytes int64) (wait int64) {
	r := l.rules.Load()
	if r == nil {
		return 0
	}
	return max(r.writeIOPS.take(now, 1), r.writeBytes.take(now, bytes))
}

// bucket is a token bucket kept as one number, the time at which all that was
// taken is paid for: nobody has to fill it.
type bucket struct {
	rate  int64 // units a second; 0: no bound
	burst int64 // nanoseconds
	paid  atomic.Int64
}

func (b *bucket) set(rate int64, burst time.Duration) {
	b.rate, b.burst = rate, int64(burst)
	b.paid.Store(-int64(burst))
}

// take goes into debt rather than wait for all of a request's tokens: a request
// larger than the burst is served, and the next ones wait for it.
func (b *bucket) take(now, units int64) (wait int64) {
	if b.rate <= 0 || units == 0 {
		return 0
	}
	price := b.price(units)
	for {
		paid := b.paid.Load()
		from := max(paid, now-b.burst)
		if b.paid.CompareAndSwap(paid, from+price) {
			return max(0, from-now)
		}
	}
}

// price is how many nanoseconds of the rate some units cost. Whole seconds come
// first: 4 GiB times a thousand million still fits, more would not.
func (b *bucket) price(units int64) int64 {
	return units/b.rate*int64(time.Second) + units%b.rate*1000/b.rate*int64(time.Millisecond) +
		units%b.rate*1000%b.rate*int64(time.Millisecond)/b.rate
}
