package templates

import (
	"cmp"
	"container/list"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// sourceCache is the bounded, least-recently-used set of sized images. A hit is
// a look into a map; a miss makes the image once however many ask for it.
type sourceCache struct {
	max    int
	make   func(context.Context, SourceSpec) (blockdev.ID, error) // publishes it
	remove func(context.Context, blockdev.ID) error
	log    *slog.Logger
	ctx    context.Context //nolint:containedctx // of makes: callers only wait for them
	work   sync.WaitGroup

	mu     sync.Mutex
	bySpec map[SourceSpec]*source
	order  *list.List // of ready ones, the least recently used first
	hits   uint64
	misses uint64
}

// source is one image, or the making of one.
type source struct {
	spec   SourceSpec
	id     blockdev.ID
	err    error
	ready  chan struct{} // closed when id or err is set
	place  *list.Element // nil: being made, or out of the cache
	refs   int
	doomed bool // out of the cache: goes with its last reference
}

// add takes in an image that is in the pool already; false if there is one for
// the same spec.
func (c *sourceCache) add(spec SourceSpec, id blockdev.ID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bySpec[spec] != nil {
		return false
	}
	s := &source{spec: spec, id: id, ready: make(chan struct{})}
	close(s.ready)
	c.bySpec[spec] = s
	s.place = c.order.PushBack(s)
	return true
}

func (c *sourceCache) get(ctx context.Context, spec SourceSpec) (blockdev.ID, func(), error) {
	c.mu.Lock()
	s := c.bySpec[spec]
	if s != nil && s.place != nil {
		c.hits++
		s.refs++
		c.order.MoveToBack(s.place)
		c.mu.Unlock()
		return s.id, c.releaser(s), nil
	}
	if s == nil {
		if err := c.ctx.Err(); err != nil {
			c.mu.Unlock()
			return "", nil, context.Cause(c.ctx)
		}
		c.misses++
		s = &source{spec: spec, ready: make(chan struct{})}
		c.bySpec[spec] = s
		c.work.Add(1)
		go c.build(s)
	}
	s.refs++
	c.mu.Unlock()
	select {
	case <-s.ready:
	case <-ctx.Done():
		c.release(s)
		return "", nil, ctx.Err()
	}
	if s.err != nil {
		return "", nil, s.err
	}
	return s.id, c.releaser(s), nil
}

func (c *sourceCache) build(s *source) {
	defer c.work.Done()
	id, err := c.make(c.ctx, s.spec)
	c.mu.Lock()
	defer c.mu.Unlock()
	s.id, s.err = id, err
	close(s.ready)
	switch {
	case err != nil:
		if c.bySpec[s.spec] == s {
			delete(c.bySpec, s.spec)
		}
	case s.doomed:
		c.removeLater(s.unused())
	default:
		s.place = c.order.PushBack(s)
		c.removeLater(c.evict(c.max))
	}
}

func (c *sourceCache) releaser(s *source) func() {
	var once sync.Once
	return func() { once.Do(func() { c.release(s) }) }
}

func (c *sourceCache) release(s *source) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.refs--
	if s.doomed {
		c.removeLater(s.unused())
	} else if s.refs == 0 {
		c.removeLater(c.evict(c.max))
	}
}

// evict takes unused images out of the cache, the least recently used first,
// until most are left, and tells which are to be removed; mu is held.
func (c *sourceCache) evict(most int) (unused []blockdev.ID) {
	for e := c.order.Front(); e != nil && c.order.Len() > most; {
		s := e.Value.(*source) //nolint:forcetypeassert // nothing else is in it
		e = e.Next()
		if s.refs == 0 {
			unused = append(unused, c.takeOut(s)...)
		}
	}
	return unused
}

// takeOut ends the use of an image and tells it when it is to be removed; mu is
// held.
func (c *sourceCache) takeOut(s *source) (unused []blockdev.ID) {
	if c.bySpec[s.spec] == s {
		delete(c.bySpec, s.spec)
	}
	if s.place != nil {
		c.order.Remove(s.place)
		s.place = nil
	}
	s.doomed = true
	return s.unused()
}

// unused gives the image of a source that is out of the cache when nobody
// refers to it, once.
func (s *source) unused() []blockdev.ID {
	if s.refs > 0 || !s.doomed || s.id == "" {
		return nil
	}
	id := s.id
	s.id = ""
	return []blockdev.ID{id}
}

// removeLater removes images in the background.
func (c *sourceCache) removeLater(ids []blockdev.ID) {
	if len(ids) == 0 {
		return
	}
	c.work.Add(1)
	go func() {
		defer c.work.Done()
		c.removeNow(ids)
	}()
}

func (c *sourceCache) removeNow(ids []blockdev.ID) {
	for _, id := range ids {
		if err := c.remove(context.WithoutCancel(c.ctx), id); err != nil {
			c.log.Error("a source image stays until the next start", "image", id, "error", err)
		}
	}
}

// forget drops all images made from a revision.
func (c *sourceCache) forget(revision blockdev.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for spec, s := range c.bySpec {
		if spec.Revision == revision {
			c.removeLater(c.takeOut(s))
		}
	}
}

// shrink removes all images that nobody uses; false when there were none.
func (c *sourceCache) shrink() bool {
	c.mu.Lock()
	unused := c.evict(0)
	c.mu.Unlock()
	c.removeNow(unused)
	if len(unused) > 0 {
		c.log.Info("the pool is full: cached images were dropped", "images", len(unused))
	}
	return len(unused) > 0
}

func (c *sourceCache) stats() (cached int, hits, misses uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.order.Len(), c.hits, c.misses
}

// close waits for what runs in the background; ctx ended before.
func (c *sourceCache) close() { c.work.Wait() }

// Source gives a published image of exactly s.Size bytes to clone, made if the
// cache has none. It is not removed until release is called. A hit costs no
// system call. ErrTooSmall, with the least size, for a size that the revision
// or the filesystem does not fit in; ErrNotFound for a revision that is not READY.
func (l *Library) Source(ctx context.Context, s SourceSpec) (id blockdev.ID, release func(), err error) {
	if !l.sources.knows(s) {
		if err := l.checkSource(s); err != nil {
			return "", nil, err
		}
	}
	id, release, err = l.sources.get(ctx, s)
	if err == nil {
		if err = l.damaged(s.Revision); err != nil { // found while it was being made
			release()
		}
	}
	if err != nil {
		return "", nil, l.poolError(err)
	}
	return id, release, nil
}

func (c *sourceCache) knows(s SourceSpec) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bySpec[s] != nil
}

func (l *Library) checkSource(s SourceSpec) error {
	if !s.Filesystem.Valid() || s.Filesystem == filesystem.None {
		return invalid("filesystem %.20q cannot be made from a template", s.Filesystem)
	}
	if least := s.Filesystem.Minimum(); s.Size < least {
		return tooSmall(fmt.Sprintf("filesystem %s", s.Filesystem), least)
	}
	if s.Revision == "" {
		return nil
	}
	v, err := l.pin(s.Revision)
	if err != nil {
		return err
	}
	defer l.unpin(s.Revision)
	if v.Remote != nil {
		return v.remoteError()
	}
	if least := v.MinimumFor(s.Filesystem); s.Size < least {
		return tooSmall(fmt.Sprintf("template %s:%s with filesystem %s", v.Template, v.Name, s.Filesystem), least)
	}
	if s.Filesystem == filesystem.XFS && v.LongestLink > longestXFSLink {
		return invalid("template %s:%s has a symbolic link of %d bytes and XFS holds at most %d: use ext4 or btrfs",
			v.Template, v.Name, v.LongestLink, longestXFSLink)
	}
	return nil
}

// longestXFSLink is the longest text of a symbolic link that XFS holds, in bytes
// (XFS_SYMLINK_MAXLEN counts one more).
const longestXFSLink = 1023

func tooSmall(what string, least int64) error {
	return fmt.Errorf("%w: %s needs at least %d MB", ErrTooSmall, what, least>>20)
}

// Sources tells which images are cached for which revision; blanks are not told.
func (l *Library) Sources() map[blockdev.ID][]SourceSpec {
	l.sources.mu.Lock()
	defer l.sources.mu.Unlock()
	of := map[blockdev.ID][]SourceSpec{}
	for spec, s := range l.sources.bySpec {
		if spec.Revision != "" && s.place != nil {
			of[spec.Revision] = append(of[spec.Revision], spec)
		}
	}
	for _, specs := range of {
		slices.SortFunc(specs, func(a, b SourceSpec) int {
			return cmp.Or(cmp.Compare(a.Filesystem, b.Filesystem), cmp.Compare(a.Size, b.Size))
		})
	}
	return of
}
