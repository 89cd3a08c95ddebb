package templates

import (
	"fmt"
	"sync"

	"holdfast/blockdev"
)

// Placer is a backend of several pools. Revisions are in the first one, sources in
// the pool of the volumes that are cloned from them. pools.Set is one.
type Placer interface {
	// Place says in which pool an image is to be made; "" is the first.
	Place(id blockdev.ID, pool string) error
}

func (l *Library) placeSource(id blockdev.ID, pool string) error {
	placer, ok := l.o.Pool.(Placer)
	if ok {
		return placer.Place(id, pool)
	}
	if pool != "" {
		return fmt.Errorf("%w: this host has one pool", blockdev.ErrUnavailable)
	}
	return nil
}

func (l *Library) spaceOf(pool string) Space {
	if s := l.o.Spaces[pool]; s != nil {
		return s
	}
	return l.o.Space
}

// elsewhere is the account of sources in other pools than the first.
type elsewhere struct {
	mu    sync.Mutex
	bytes map[blockdev.ID]int64
	pool  map[blockdev.ID]string
	sum   map[string]int64
}

func (e *elsewhere) set(id blockdev.ID, pool string, bytes int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.bytes == nil {
		e.bytes, e.pool, e.sum = map[blockdev.ID]int64{}, map[blockdev.ID]string{}, map[string]int64{}
	}
	e.sum[pool] += bytes - e.bytes[id]
	e.bytes[id], e.pool[id] = bytes, pool
}

func (e *elsewhere) forget(id blockdev.ID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.bytes[id]; !ok {
		return
	}
	e.sum[e.pool[id]] -= e.bytes[id]
	delete(e.bytes, id)
	delete(e.pool, id)
}

func (e *elsewhere) of(pool string) int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sum[pool]
}

// account counts an image in the pool that it is in.
func (l *Library) account(id blockdev.ID, d description) {
	if d.Source != nil && d.Source.Pool != "" {
		l.elsewhere.set(id, d.Source.Pool, d.Bytes)
		return
	}
	l.images.set(id, d.Bytes)
}

// BytesIn is what images occupy in another pool than the first, in bytes.
func (l *Library) BytesIn(pool string) int64 { return l.elsewhere.of(pool) }
