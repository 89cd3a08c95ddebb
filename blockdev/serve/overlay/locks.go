package overlay

import "sync"

const (
	chunkBlocks = 16 // of a lock: 64 KiB
	stripes     = 1024
)

// chunkLocks keep who fills blocks up (alone) and who writes them whole (shared)
// apart. Locks are taken in the order of their places, so nobody waits in a ring.
type chunkLocks struct{ stripes [stripes]sync.RWMutex }

// lock locks the chunks of a run and gives what unlocks them.
func (c *chunkLocks) lock(r run, alone bool) (unlock func()) {
	first, last := r.first/chunkBlocks, (r.end-1)/chunkBlocks
	if last-first >= stripes-1 {
		return c.lockPlaces(0, stripes, 0, 0, alone)
	}
	from, to := first%stripes, last%stripes
	if from <= to {
		return c.lockPlaces(from, to+1, 0, 0, alone)
	}
	return c.lockPlaces(0, to+1, from, stripes, alone)
}

// shareAtMost bounds the chunks that tryShare takes.
const shareAtMost = 64

// tryShare locks the chunks of a run as lock does for one of many, unless that has to
// wait or there are too many of them. unshare unlocks them.
func (c *chunkLocks) tryShare(r run) bool {
	first, last := r.first/chunkBlocks, (r.end-1)/chunkBlocks
	if last-first >= shareAtMost {
		return false
	}
	for i := first; i <= last; i++ {
		if !c.stripes[i%stripes].TryRLock() {
			for i--; i >= first; i-- {
				c.stripes[i%stripes].RUnlock()
			}
			return false
		}
	}
	return true
}

func (c *chunkLocks) unshare(r run) {
	for i := r.first / chunkBlocks; i <= (r.end-1)/chunkBlocks; i++ {
		c.stripes[i%stripes].RUnlock()
	}
}

// lockPlaces locks two ranges of stripes, the lower one first.
func (c *chunkLocks) lockPlaces(from, to, from2, to2 int64, alone bool) func() {
	each := func(do func(*sync.RWMutex)) {
		for i := from; i < to; i++ {
			do(&c.stripes[i])
		}
		for i := from2; i < to2; i++ {
			do(&c.stripes[i])
		}
	}
	if alone {
		each((*sync.RWMutex).Lock)
		return func() { each((*sync.RWMutex).Unlock) }
	}
	each((*sync.RWMutex).RLock)
	return func() { each((*sync.RWMutex).RUnlock) }
}

// flushes lets many that want the same thing done share the doing.
type flushes struct {
	mu      sync.Mutex
	running bool
	next    *flushRound
}

type flushRound struct {
	done chan struct{}
	err  error
}

// join returns when a do has ended that began after the call.
func (f *flushes) join(do func() error) error {
	f.mu.Lock()
	if f.next == nil {
		f.next = &flushRound{done: make(chan struct{})}
	}
	mine := f.next
	if f.running {
		f.mu.Unlock()
		<-mine.done
		return mine.err
	}
	f.running = true
	f.mu.Unlock()
	f.lead(do)
	<-mine.done
	return mine.err
}

// lead does rounds until nobody waits for one. Later rounds go on by themselves:
// whoever leads has its answer after its own.
func (f *flushes) lead(do func() error) {
	f.mu.Lock()
	round := f.next
	f.next = nil
	if round == nil {
		f.running = false
		f.mu.Unlock()
		return
	}
	f.mu.Unlock()
	round.err = do()
	close(round.done)
	f.mu.Lock()
	more := f.next != nil
	if !more {
		f.running = false
	}
	f.mu.Unlock()
	if more {
		go f.lead(do)
	}
}
