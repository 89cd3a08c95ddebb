package meter

import (
	"sync"
	"sync/atomic"
	"time"
)

// Kind is a kind of request.
type Kind uint8

const (
	Read Kind = iota
	Write
	Flush
	Discard
	Zero
	// Kinds is how many there are.
	Kinds = int(iota)
)

func (k Kind) String() string { return [...]string{"read", "write", "flush", "discard", "zero"}[k] }

// Cause is what a request waits for.
type Cause uint8

const (
	Device    Cause = iota // the file or block device below
	Flushing               // data on its way to stable storage
	Throttle               // the volume's own rate limit
	Hydration              // blocks that are not here yet
	// Causes is how many there are.
	Causes = int(iota)
)

func (c Cause) String() string {
	return [...]string{"device", "flush", "throttle", "hydration"}[c]
}

var began = time.Now()

// Now is the time in nanoseconds since the process began; it never goes back.
func Now() int64 { return int64(time.Since(began)) }

// Meter is what was counted of one volume. The zero value is ready. Its methods may
// be called from any goroutine.
type Meter struct {
	mu     sync.Mutex
	queues map[*Queue]struct{}
	ended  Snapshot // of closed queues
}

// Queue counts for one event loop or connection. Its methods but Close may be
// called from any goroutine; they neither lock nor allocate.
type Queue struct {
	meter *Meter
	kinds [Kinds]struct {
		bytes, errors, nanos atomic.Uint64
		latency              histogram
	}
	inside atomic.Int64
	waits  [Causes]struct {
		now   atomic.Int64
		nanos atomic.Uint64
	}
}

// NewQueue adds a queue; Close it.
func (m *Meter) NewQueue() *Queue {
	q := &Queue{meter: m}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.queues == nil {
		m.queues = map[*Queue]struct{}{}
	}
	m.queues[q] = struct{}{}
	return q
}

// Close adds what was counted to the volume's past. Nothing is counted after it.
// Again is nothing.
func (q *Queue) Close() {
	q.meter.mu.Lock()
	defer q.meter.mu.Unlock()
	if _, open := q.meter.queues[q]; !open {
		return
	}
	delete(q.meter.queues, q)
	q.addTo(&q.meter.ended)
	q.meter.ended.Inside = 0
	for c := range q.meter.ended.Waits {
		q.meter.ended.Waits[c].Now = 0
	}
}

// Begin counts a request in.
func (q *Queue) Begin() { q.inside.Add(1) }

// End counts a request out that began at a time of Now, with how many bytes it
// moved or discarded, 0 when it failed.
func (q *Queue) End(k Kind, began, bytes int64, failed bool) {
	q.inside.Add(-1)
	c := &q.kinds[k]
	took := max(0, Now()-began)
	c.latency.add(took)
	c.nanos.Add(uint64(took))
	if failed {
		c.errors.Add(1)
		return
	}
	c.bytes.Add(uint64(bytes))
}

// Wait tells that a request waits from now on.
func (q *Queue) Wait(c Cause) { q.waits[c].now.Add(1) }

// Waited tells that a request that began to wait at a time of Now waits no more.
func (q *Queue) Waited(c Cause, since int64) {
	q.waits[c].now.Add(-1)
	q.waits[c].nanos.Add(uint64(max(0, Now()-since)))
}

// Snapshot is what was counted of a volume up to now, since its Meter was made.
type Snapshot struct {
	Kinds  [Kinds]Counted
	Inside int64 // requests that are being served
	Waits  [Causes]Waiting
}

// Counted is what was served of one kind.
type Counted struct {
	Requests uint64 // ended, the failed ones among them
	Errors   uint64
	Bytes    uint64
	Time     time.Duration // sum of the latencies: divided by a span of time it is the mean queue depth
	Latency  [Buckets]uint64
}

// Waiting is how much was waited for one cause.
type Waiting struct {
	Now  int64         // requests that wait for it
	Time time.Duration // of all requests together, that wait no more
}

// Snapshot adds up all queues. Each number is right; two of them may be a request
// apart, since nobody is stopped for it.
func (m *Meter) Snapshot() Snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.ended
	for q := range m.queues {
		q.addTo(&s)
	}
	return s
}

func (q *Queue) addTo(s *Snapshot) {
	for k := range q.kinds {
		from, to := &q.kinds[k], &s.Kinds[k]
		for n := range from.latency {
			count := from.latency[n].Load()
			to.Latency[n] += count
			to.Requests += count
		}
		to.Bytes += from.bytes.Load()
		to.Errors += from.errors.Load()
		to.Time += time.Duration(from.nanos.Load())
	}
	s.Inside += q.inside.Load()
	for c := range q.waits {
		s.Waits[c].Now += q.waits[c].now.Load()
		s.Waits[c].Time += time.Duration(q.waits[c].nanos.Load())
	}
}
