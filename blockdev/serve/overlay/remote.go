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
	// spareMost bounds the buffers of chunks that are kept for the next ones: misses make
	// no garbage.
	spareMost = 16
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
	tries chan struct{} // has one for each try of readers' fetches that is under way

	mu     sync.Mutex
	flying map[int64]*flight
	kept   map[int64]*list.Element // of order, whose values are *flight
	order  *list.List              // the least recently used first
	bytes  int64                   // of kept ones
	spare  [][]byte                // each of a whole chunk
	status Status
}

// flight is a chunk that is being fetched, or was.
type flight struct {
	i       int64
	by      *voyage
	done    chan struct{}
	p       []byte // when done; nil: closed meanwhile
	readers int    // who have p, or will
	dropped bool   // it is kept no longer
}

// voyage is one fetch of neighbours. It ends when all have come, though by Fill.
type voyage struct {
	flights []*flight
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
	r := &Remote{c: c, fetch: fetch, o: o, tries: make(chan struct{}, maxStoreConns), flying: map[int64]*flight{}, kept: map[int64]*list.Element{}, order: list.New()}
	r.ctx, r.stop = context.WithCancel(context.Background())
	return r, nil
}

// Close ends all fetches; readers that wait get ErrClosed.
func (r *Remote) Close() { r.stop() }

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
		if !r.c.zero(i) && r.kept[i] == nil {
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
	flights, voyages := r.board(first, end)
	defer r.leave(flights)
	for n, v := range voyages {
		if n < len(voyages)-1 {
			go r.fly(v)
		} else {
			r.fly(v) // others' threads would only have to be woken
		}
	}
	for i := first; i < end; i++ {
		from := max(0, i*r.c.Chunk-off)
		to := min(int64(len(p)), i*r.c.Chunk+r.c.length(i)-off)
		f := flights[i-first]
		if f == nil {
			clear(p[from:to])
			continue
		}
		<-f.done
		if f.p == nil {
			return ErrClosed
		}
		copy(p[from:to], f.p[off+from-i*r.c.Chunk:])
	}
	return nil
}

// board finds the chunks [first, end), those of zeroes as nil, and what has to be
// fetched of them because nobody has it. leave ends the use of them.
func (r *Remote) board(first, end int64) (flights []*flight, voyages []*voyage) {
	r.mu.Lock()
	defer r.mu.Unlock()
	flights = make([]*flight, 0, end-first)
	for i := first; i < end; i++ {
		f := r.flying[i]
		if e := r.kept[i]; e != nil {
			r.order.MoveToBack(e)
			f = e.Value.(*flight) //nolint:forcetypeassert // only flights are in it
		}
		if f == nil && !r.c.zero(i) {
			f = &flight{i: i, done: make(chan struct{})}
			r.flying[i] = f
			if last := len(voyages) - 1; last >= 0 && voyages[last].end() == i {
				voyages[last].take(f)
			} else {
				v := &voyage{}
				v.ctx, v.cancel = context.WithCancel(r.ctx)
				v.take(f)
				voyages = append(voyages, v)
			}
		}
		if f != nil {
			f.readers++
		}
		flights = append(flights, f)
	}
	return flights, voyages
}

func (v *voyage) take(f *flight) {
	f.by = v
	v.flights = append(v.flights, f)
	v.left++
}

// end is the number of the chunk behind the last.
func (v *voyage) end() int64 { return v.flights[len(v.flights)-1].i + 1 }

func (r *Remote) leave(flights []*flight) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range flights {
		if f == nil {
			continue
		}
		if f.readers--; f.readers == 0 && f.dropped {
			r.putBuffer(f.p)
		}
	}
}

// buffer gives room for a chunk, or more. The caller has the lock.
func (r *Remote) buffer(n int64) []byte {
	if last := len(r.spare) - 1; n == r.c.Chunk && last >= 0 {
		p := r.spare[last]
		r.spare = r.spare[:last]
		return p
	}
	return make([]byte, n)
}

// putBuffer takes one back. The caller has the lock.
func (r *Remote) putBuffer(p []byte) {
	if int64(len(p)) == r.c.Chunk && len(r.spare) < spareMost {
		r.spare = append(r.spare, p)
	}
}

// fly fetches neighbouring chunks until they are right, have come by Fill, or the
// source is closed.
func (r *Remote) fly(v *voyage) {
	first := v.flights[0].i
	n := r.c.lengthOf(first, v.end())
	var p []byte
	err := r.persist(v.ctx, n, func() (err error) {
		p, err = r.tryReader(v.ctx, n, first)
		return err
	})
	r.land(v, p, err)
}

// tryReader tries once to fetch n bytes of chunks. Who waits for a connection, or for the
// next try, has no room for them: many may wait, and a chunk may be large.
func (r *Remote) tryReader(ctx context.Context, n, first int64) ([]byte, error) {
	select {
	case r.tries <- struct{}{}:
		defer func() { <-r.tries }()
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

// persist tries until n bytes have come, or ctx ends.
func (r *Remote) persist(ctx context.Context, n int64, try func() error) error {
	for wait := r.o.LeastWait; ; wait = min(2*wait, r.o.MostWait) {
		err := try()
		if err == nil {
			r.came(n)
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		r.note(err)
		select {
		case <-time.After(wait):
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

func (r *Remote) came(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = Status{Fetched: r.status.Fetched + n}
}

func (r *Remote) note(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.status.Failing.IsZero() {
		r.status.Failing = time.Now()
	}
	r.status.Tries++
	r.status.Err = err
}

// land gives chunks to who waits, and keeps them for a while.
func (r *Remote) land(v *voyage, p []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	used := false
	for _, f := range v.flights {
		if r.flying[f.i] != f { // Fill was quicker
			continue
		}
		if at := (f.i - v.flights[0].i) * r.c.Chunk; err == nil && len(v.flights) == 1 {
			f.p, used = p, true
		} else if err == nil { // one that is kept must not keep its neighbours' bytes
			f.p = r.buffer(r.c.length(f.i))
			copy(f.p, p[at:])
		}
		r.settle(f)
	}
	if !used {
		r.putBuffer(p)
	}
}

// settle ends a flight, with bytes or without. The caller has the lock.
func (r *Remote) settle(f *flight) {
	delete(r.flying, f.i)
	if f.p != nil {
		r.kept[f.i] = r.order.PushBack(f)
		r.bytes += int64(len(f.p))
		r.drop(r.o.Cache, 1)
	}
	close(f.done)
	if f.by.left--; f.by.left == 0 {
		f.by.cancel()
	}
}

// drop lets the least recently used chunks go until so many bytes or chunks are left.
// The caller has the lock.
func (r *Remote) drop(most int64, least int) {
	for r.bytes > most && r.order.Len() > least {
		f := r.order.Remove(r.order.Front()).(*flight) //nolint:forcetypeassert // only flights are in it
		delete(r.kept, f.i)
		r.bytes -= int64(len(f.p))
		if f.dropped = true; f.readers == 0 {
			r.putBuffer(f.p)
		}
	}
}

// Forget gives back the memory of what was kept for the next reader.
func (r *Remote) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.drop(0, 0)
	r.spare = nil
}

// ErrClosed: a base far away was closed while somebody waited for bytes of it.
var ErrClosed = errors.New("the base is closed")

// errStore: a store did not send what it was asked for.
var errStore = errors.New("the store's answer is of no use")
