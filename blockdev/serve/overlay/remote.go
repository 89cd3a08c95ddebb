package overlay

import (
	"container/list"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"holdfast/blockdev"
)

// Fetch fills p with the bytes at off of what is far away, or fails. It is called
// by several at once.
type Fetch func(ctx context.Context, p []byte, off int64) error

// RemoteOptions bound a Remote; zero values are the defaults.
type RemoteOptions struct {
	Cache     int64         // bytes of chunks kept for the next reader; 8 MiB
	Try       time.Duration // for one fetch; 30 s
	LeastWait time.Duration // after the first failure in a row; 100 ms
	MostWait  time.Duration // between later ones; 10 s
	Bulk      Fetch         // for Fill: connections that readers' fetches do not wait for; nil: the same
}

const (
	// fetchAtOnce bounds one fetch of neighbouring chunks, in bytes.
	fetchAtOnce = 4 << 20
	// maxFree bounds the buffers of chunks that are kept for the next ones: misses make
	// no garbage.
	maxFree = 16
)

// Remote is a Source that is far away. A byte of it is given when its chunk has
// been verified. While the store fails or sends something else readers wait, and it
// is asked again with growing pauses, without end; see Status.
type Remote struct {
	c     Chunks
	fetch Fetch
	o     RemoteOptions
	ctx   context.Context //nolint:containedctx // its life: readers wait as long as it is open
	stop  context.CancelFunc
	slots chan struct{} // has one for each try of readers' fetches that is under way

	mu      sync.Mutex
	pending map[int64]*entry
	cached  map[int64]*list.Element // of lru, whose values are *entry
	lru     *list.List              // the least recently used first
	bytes   int64                   // of kept ones
	free    [][]byte                // each of a whole chunk
	status  Status
	address context.Context //nolint:containedctx // ends when the store is asked at another address
	moved   context.CancelFunc
}

// entry is a chunk that is being fetched, or was.
type entry struct {
	i       int64
	batch   *batch
	done    chan struct{}
	p       []byte // when done; nil: closed meanwhile
	readers int    // who have p, or will
	evicted bool   // it is kept no longer
}

// batch is one fetch of neighbours. It ends when all have come, though by Fill.
type batch struct {
	entries []*entry
	left    int // of them that have not come
	ctx     context.Context
	cancel  context.CancelFunc
}

// Status is how a base that is far away does.
type Status struct {
	Fetched int64     // bytes that were verified
	Failing time.Time // since when every try has failed; zero: the last one succeeded
	Tries   int64     // that failed since then
	Err     error     // of the last of them
}

// NewRemote opens a source. Close ends it.
func NewRemote(c Chunks, fetch Fetch, o RemoteOptions) (*Remote, error) {
	err := c.check()
	if err == nil && c.zeroes == nil {
		err = c.findZeroes(nil)
	}
	if err != nil {
		return nil, blockdev.Op("overlay.NewRemote", "", err)
	}
	for _, d := range []struct{ set, value *time.Duration }{
		{&o.Try, new(30 * time.Second)}, {&o.LeastWait, new(100 * time.Millisecond)}, {&o.MostWait, new(10 * time.Second)},
	} {
		if *d.set <= 0 {
			*d.set = *d.value
		}
	}
	if o.Cache <= 0 {
		o.Cache = 8 << 20
	}
	if o.Bulk == nil {
		o.Bulk = fetch
	}
	r := &Remote{c: c, fetch: fetch, o: o, slots: make(chan struct{}, maxStoreConns), pending: map[int64]*entry{}, cached: map[int64]*list.Element{}, lru: list.New()}
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.address, r.moved = context.WithCancel(r.ctx)
	return r, nil
}

// Close ends all fetches; readers that wait get ErrClosed.
func (r *Remote) Close() { r.stop() }

// Moved tells that fetches go to another address from now on: what waits for an answer
// from the one before, or for its next try, is fetched anew at once.
func (r *Remote) Moved() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.moved()
	r.address, r.moved = context.WithCancel(r.ctx)
	r.status = Status{Fetched: r.status.Fetched}
}

// Size implements Source.
func (r *Remote) Size() int64 { return r.c.Size }

// Status tells how the store does.
func (r *Remote) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}

// Next implements Source.
func (r *Remote) Next(off int64) (from, to int64, err error) {
	i := off / r.c.Chunk
	for i < r.c.count() && r.c.zero(i) {
		i++
	}
	if off >= r.c.Size || i == r.c.count() {
		return 0, 0, io.EOF
	}
	from = max(off, i*r.c.Chunk)
	for i < r.c.count() && !r.c.zero(i) {
		i++
	}
	return from, min(i*r.c.Chunk, r.c.Size), nil
}

// Absent tells whether some of a range is neither zeroes nor kept.
func (r *Remote) Absent(off, n int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := off / r.c.Chunk; i*r.c.Chunk < min(off+n, r.c.Size); i++ {
		if !r.c.zero(i) && r.cached[i] == nil {
			return true
		}
	}
	return false
}

// ReadAt implements Source. It waits for the store as long as the source is open.
func (r *Remote) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= r.c.Size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), r.c.Size-off))
	first, last := off/r.c.Chunk, (off+int64(n)-1)/r.c.Chunk
	for i := first; i <= last; {
		end := min(last+1, i+max(1, fetchAtOnce/r.c.Chunk)) // so that a long read holds little
		if err := r.readChunks(p[:n], off, i, end); err != nil {
			return 0, blockdev.Op("overlay.Remote.ReadAt", "", err)
		}
		i = end
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// readChunks copies the part of p at off that chunks [first, end) have.
func (r *Remote) readChunks(p []byte, off, first, end int64) error {
	entries, batches := r.acquire(first, end)
	defer r.release(entries)
	for n, b := range batches {
		if n < len(batches)-1 {
			go r.fetchBatch(b)
		} else {
			r.fetchBatch(b) // others' threads would only have to be woken
		}
	}
	for i := first; i < end; i++ {
		from := max(0, i*r.c.Chunk-off)
		to := min(int64(len(p)), i*r.c.Chunk+r.c.length(i)-off)
		e := entries[i-first]
		if e == nil {
			clear(p[from:to])
			continue
		}
		<-e.done
		if e.p == nil {
			return ErrClosed
		}
		copy(p[from:to], e.p[off+from-i*r.c.Chunk:])
	}
	return nil
}

// acquire finds the chunks [first, end), those of zeroes as nil, and what has to be
// fetched of them because nobody has it. release ends the use of them.
func (r *Remote) acquire(first, end int64) (entries []*entry, batches []*batch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	entries = make([]*entry, 0, end-first)
	for i := first; i < end; i++ {
		e := r.pending[i]
		if known := r.cached[i]; known != nil {
			r.lru.MoveToBack(known)
			e = known.Value.(*entry) //nolint:forcetypeassert // only entries are in it
		}
		if e == nil && !r.c.zero(i) {
			e = &entry{i: i, done: make(chan struct{})}
			r.pending[i] = e
			if last := len(batches) - 1; last >= 0 && batches[last].end() == i {
				batches[last].add(e)
			} else {
				b := &batch{}
				b.ctx, b.cancel = context.WithCancel(r.ctx)
				b.add(e)
				batches = append(batches, b)
			}
		}
		if e != nil {
			e.readers++
		}
		entries = append(entries, e)
	}
	return entries, batches
}

func (b *batch) add(e *entry) {
	e.batch = b
	b.entries = append(b.entries, e)
	b.left++
}

// end is the number of the chunk behind the last.
func (b *batch) end() int64 { return b.entries[len(b.entries)-1].i + 1 }

func (r *Remote) release(entries []*entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range entries {
		if e == nil {
			continue
		}
		if e.readers--; e.readers == 0 && e.evicted {
			r.putBuffer(e.p)
		}
	}
}

// buffer gives room for a chunk, or more. The caller has the lock.
func (r *Remote) buffer(n int64) []byte {
	if last := len(r.free) - 1; n == r.c.Chunk && last >= 0 {
		p := r.free[last]
		r.free = r.free[:last]
		return p
	}
	return make([]byte, n)
}

// putBuffer takes one back. The caller has the lock.
func (r *Remote) putBuffer(p []byte) {
	if int64(len(p)) == r.c.Chunk && len(r.free) < maxFree {
		r.free = append(r.free, p)
	}
}

// fetchBatch fetches neighbouring chunks until they are right, have come by Fill, or the
// source is closed.
func (r *Remote) fetchBatch(b *batch) {
	first := b.entries[0].i
	n := r.c.lengthOf(first, b.end())
	var p []byte
	err := r.retry(b.ctx, n, func(ctx context.Context) (err error) {
		p, err = r.tryReader(ctx, n, first)
		return err
	})
	r.complete(b, p, err)
}

// tryReader tries once to fetch n bytes of chunks. Who waits for a connection, or for the
// next try, has no room for them: many may wait, and a chunk may be large.
func (r *Remote) tryReader(ctx context.Context, n, first int64) ([]byte, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	p := r.buffer(n)
	r.mu.Unlock()
	err := r.try(ctx, r.o.Try, r.fetch, p, first)
	if err == nil {
		return p, nil
	}
	r.mu.Lock()
	r.putBuffer(p)
	r.mu.Unlock()
	return nil, err
}

// retry tries until n bytes have come, or ctx ends; at another address it begins anew.
func (r *Remote) retry(ctx context.Context, n int64, try func(ctx context.Context) error) error {
	for wait := r.o.LeastWait; ; wait = min(2*wait, r.o.MostWait) {
		r.mu.Lock()
		address := r.address
		r.mu.Unlock()
		here, cancel := context.WithCancel(ctx)
		stop := context.AfterFunc(address, cancel)
		err := try(here)
		stop()
		cancel()
		switch {
		case err == nil:
			r.succeeded(n)
			return nil
		case ctx.Err() != nil:
			return err
		case address.Err() != nil:
			wait = r.o.LeastWait / 2
			continue
		}
		r.failed(address, err)
		select {
		case <-time.After(wait):
		case <-address.Done():
			wait = r.o.LeastWait / 2
		case <-ctx.Done():
		}
	}
}

func (r *Remote) try(ctx context.Context, try time.Duration, fetch Fetch, p []byte, first int64) error {
	ctx, cancel := context.WithTimeout(ctx, try)
	defer cancel()
	if err := fetch(ctx, p, first*r.c.Chunk); err != nil {
		return err
	}
	for i := first; len(p) > 0; i++ {
		want, err := r.c.digest(i)
		if err != nil {
			return err
		}
		n := r.c.length(i)
		if sha256.Sum256(p[:n]) != want {
			return fmt.Errorf("%w: chunk %d is not what it should be", blockdev.ErrCorrupt, i)
		}
		p = p[n:]
	}
	return nil
}

func (r *Remote) succeeded(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = Status{Fetched: r.status.Fetched + n}
}

// failed notes why a try at an address has failed, if the store is still there.
func (r *Remote) failed(address context.Context, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if address.Err() != nil {
		return
	}
	if r.status.Failing.IsZero() {
		r.status.Failing = time.Now()
	}
	r.status.Tries++
	r.status.Err = err
}

// complete gives chunks to who waits, and keeps them for a while.
func (r *Remote) complete(b *batch, p []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	used := false
	for _, e := range b.entries {
		if r.pending[e.i] != e { // Fill was quicker
			continue
		}
		if at := (e.i - b.entries[0].i) * r.c.Chunk; err == nil && len(b.entries) == 1 {
			e.p, used = p, true
		} else if err == nil { // one that is kept must not keep its neighbours' bytes
			e.p = r.buffer(r.c.length(e.i))
			copy(e.p, p[at:])
		}
		r.finish(e)
	}
	if !used {
		r.putBuffer(p)
	}
}

// finish ends the fetch of an entry, with bytes or without. The caller has the lock.
func (r *Remote) finish(e *entry) {
	delete(r.pending, e.i)
	if e.p != nil {
		r.cached[e.i] = r.lru.PushBack(e)
		r.bytes += int64(len(e.p))
		r.evict(r.o.Cache, 1)
	}
	close(e.done)
	if e.batch.left--; e.batch.left == 0 {
		e.batch.cancel()
	}
}

// evict lets the least recently used chunks go until so many bytes or chunks are left.
// The caller has the lock.
func (r *Remote) evict(most int64, least int) {
	for r.bytes > most && r.lru.Len() > least {
		e := r.lru.Remove(r.lru.Front()).(*entry) //nolint:forcetypeassert // only entries are in it
		delete(r.cached, e.i)
		r.bytes -= int64(len(e.p))
		if e.evicted = true; e.readers == 0 {
			r.putBuffer(e.p)
		}
	}
}

// Forget gives back the memory of what was kept for the next reader.
func (r *Remote) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.evict(0, 0)
	r.free = nil
}

// ErrClosed: a base far away was closed while somebody waited for bytes of it.
var ErrClosed = errors.New("the base is closed")

// errStore: a store did not send what it was asked for.
var errStore = errors.New("the store's answer is of no use")
