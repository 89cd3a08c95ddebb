package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/blockdev"
	"holdfast/internal/sys"
	"holdfast/templates"
)

// Of a pool a fiftieth is kept free, but no more than a GiB, which is enough
// for deletes and metadata in a pool of any size.
const (
	reservePart = 50
	reserveMost = 1 << 30
)

func reserve(c Config, total int64) int64 {
	if c.Reserve > 0 {
		return c.Reserve
	}
	return min(total/reservePart, reserveMost)
}

// space tells a pool's ledger what the pool holds besides volumes. What is asked
// under the ledger's lock reads memory, and the pool's free space from the kernel.
type space struct {
	pool     blockdev.Backend
	name     string // of a pool besides the default one
	log      *slog.Logger
	free     func() (int64, error)
	failed   func(error) // ends the process; nil: nothing fits there until it answers again
	library  atomic.Pointer[templates.Library]
	overhead atomic.Int64 // the file system's own, and what is not the pool's
}

func newSpace(pool blockdev.Backend, dir string, log *slog.Logger) *space {
	free := func() (int64, error) {
		at, err := sys.SpaceOf(dir)
		return at.Free, err
	}
	return &space{pool: pool, log: log, free: free, failed: failStop(log)}
}

// counts takes the library's images into the account, and measures.
func (s *space) counts(ctx context.Context, l *templates.Library) error {
	s.library.Store(l)
	return s.measure(ctx)
}

// images is what the library's images occupy in the pool.
func (s *space) images() int64 {
	l := s.library.Load()
	switch {
	case l == nil:
		return 0
	case s.name != "":
		return l.BytesIn(s.name)
	}
	return l.Bytes()
}

// measure compares what the pool says is occupied with what the images say they
// occupy. Shared bytes are counted once, with the library's images.
func (s *space) measure(ctx context.Context) error {
	images, err := s.pool.List(ctx)
	if err != nil {
		return err
	}
	capacity, err := s.pool.Capacity(ctx)
	if err != nil {
		return err
	}
	ours := capacity.Trash + s.images()
	for _, i := range images {
		if strings.HasPrefix(string(i.ID), blockdev.PrefixVolume+"-") || strings.HasPrefix(string(i.ID), blockdev.PrefixSnapshot+"-") {
			ours += i.Allocated - i.Shared
		}
	}
	s.overhead.Store(max(0, capacity.Allocated-ours))
	return nil
}

// other is what the pool holds besides volumes and their snapshots, in bytes.
func (s *space) other() int64 { return s.overhead.Load() + s.images() }

// left is what is free in the pool.
func (s *space) left() int64 {
	free, err := s.free()
	if err == nil {
		return free
	}
	if s.failed != nil {
		s.failed(fmt.Errorf("the pool's file system does not answer: %w", err))
	} else {
		s.log.Warn("the pool does not answer: nothing fits there", "pool", s.name, "cause", err)
	}
	return 0
}

// watch measures again each hour: on a file system that others use as well,
// what is theirs changes. It lists the whole pool, so not more often.
func (s *space) watch(ctx context.Context) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := s.measure(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("what the pool holds besides volumes could not be measured", "cause", err)
			}
		}
	}
}
