package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/sparse"
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

// space tells the ledger what the pool holds besides volumes. What is asked
// under the ledger's lock reads memory and one statfs.
type space struct {
	pool     *sparse.Pool
	dir      string
	log      *slog.Logger
	failed   func(error) // ends the process
	library  atomic.Pointer[templates.Library]
	overhead atomic.Int64 // the file system's own, and what is not the pool's
}

func newSpace(pool *sparse.Pool, dir string, log *slog.Logger) *space {
	return &space{pool: pool, dir: dir, log: log, failed: failStop(log)}
}

// counts takes the library's images into the account, and measures.
func (s *space) counts(ctx context.Context, l *templates.Library) error {
	s.library.Store(l)
	return s.measure(ctx)
}

// measure compares what the file system says is occupied with what the images
// say they occupy. Shared bytes are counted once, with the library's images.
func (s *space) measure(ctx context.Context) error {
	images, err := s.pool.List(ctx)
	if err != nil {
		return err
	}
	capacity, err := s.pool.Capacity(ctx)
	if err != nil {
		return err
	}
	ours := capacity.Trash + s.library.Load().Bytes()
	for _, i := range images {
		if strings.HasPrefix(string(i.ID), blockdev.PrefixVolume+"-") {
			ours += i.Allocated - i.Shared
		}
	}
	s.overhead.Store(max(0, capacity.Allocated-ours))
	return nil
}

// other is what the pool holds besides volumes, in bytes.
func (s *space) other() int64 {
	held := s.overhead.Load()
	if l := s.library.Load(); l != nil {
		held += l.Bytes()
	}
	return held
}

func (s *space) free() int64 {
	at, err := sys.SpaceOf(s.dir)
	if err != nil {
		s.failed(fmt.Errorf("the pool's file system does not answer: %w", err))
		return 0
	}
	return at.Free
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
