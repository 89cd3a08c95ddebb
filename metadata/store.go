package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	badger "github.com/dgraph-io/badger/v4"
)

// Store is an open database. It is safe for concurrent use.
//
// Updates run one after the other, each on its caller's goroutine, while it
// holds the turn. Those that wait while a commit is under way then run one
// after the other in the next batch, which is committed, and synced, as one.
// So there are no conflicts, and 32 clients cost as many syncs as two.
type Store struct {
	dir   string
	o     Options
	db    *badger.DB
	floor *floor
	lock  *os.File
	tidy  *compactor

	turn  turn
	batch *batch // open for more updates; nil: none. The turn's holder's
	head  head   // after the last commit. The turn's holder's

	mu     sync.Mutex
	idle   *sync.Cond // active is 0
	active int        // Updates and Views under way
	closed bool
	failed error
	stats  Stats
}

func newStore(dir string, o Options, db *badger.DB, h head, f *floor, lock *os.File) *Store {
	s := &Store{dir: dir, o: o, db: db, head: h, floor: f, lock: lock}
	s.idle = sync.NewCond(&s.mu)
	s.stats.Sequence, s.stats.Records = h.Sequence, h.Records
	return s
}

// Update runs fn in a read-write transaction and commits it; it is durable on
// return, whatever fn answered: what fn saw is durable as well. An error of fn
// is returned and nothing is written. fn has no side effects, does not block
// and calls no other Update. When ctx ends before fn has begun, Update gives up.
//
// ErrFailed after a commit failed, ErrNoSpace below the headroom, ErrTooLarge
// when fn writes too much, ErrClosed.
func (s *Store) Update(ctx context.Context, fn func(*Tx) error) error {
	return s.update(ctx, fn, false)
}

// UpdateFreeing is Update for what frees space in the end (deletes, detaches):
// it is taken below the headroom too.
func (s *Store) UpdateFreeing(ctx context.Context, fn func(*Tx) error) error {
	return s.update(ctx, fn, true)
}

func (s *Store) update(ctx context.Context, fn func(*Tx) error, freeing bool) error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.end()
	if !freeing {
		if err := s.checkHeadroom(); err != nil {
			return err
		}
	}
	if err := s.turn.take(ctx, s.passTurn); err != nil {
		return err
	}
	b, wrote, err := s.join(fn)
	if b == nil {
		return err
	}
	<-b.done
	if b.err != nil {
		return b.err
	}
	if err == nil && wrote {
		err = s.failpoint("metadata.commit.after")
	}
	return err
}

// View runs fn in a read-only transaction, which shows durable records only.
func (s *Store) View(fn func(*Tx) error) error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.end()
	txn := s.db.NewTransaction(false)
	defer txn.Discard()
	return fn(&Tx{txn: txn})
}

func (s *Store) checkHeadroom() error {
	if s.o.Headroom < 0 {
		return nil
	}
	free, err := freeBytes(s.dir)
	if err != nil {
		return err
	}
	if free < s.o.Headroom {
		return fmt.Errorf("%w: %d bytes free, %d are kept", ErrNoSpace, free, s.o.Headroom)
	}
	return nil
}

func (s *Store) failpoint(point string) error {
	if s.o.Failpoint == nil {
		return nil
	}
	return s.o.Failpoint(point)
}

// begin counts a user of the database in; Close waits for end.
func (s *Store) begin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return ErrClosed
	case s.failed != nil:
		return s.failed
	}
	s.active++
	return nil
}

func (s *Store) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active--
	if s.active == 0 {
		s.idle.Broadcast()
	}
}

// fail makes the store answer ErrFailed from now on, and tells the owner the
// first time.
func (s *Store) fail(cause error) error {
	s.mu.Lock()
	first := s.failed == nil && !s.closed
	if s.failed == nil {
		s.failed = fmt.Errorf("%w: %w", ErrFailed, cause)
	}
	failed := s.failed
	s.mu.Unlock()
	if first {
		s.o.Log.Error("the metadata store failed and takes no more updates", "cause", cause)
		if s.o.OnFailure != nil {
			s.o.OnFailure(failed)
		}
	}
	return failed
}

// Close ends the store; updates and views under way finish first. Again is success.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	for s.active > 0 {
		s.idle.Wait()
	}
	s.mu.Unlock()
	s.tidy.stop()
	err := errors.Join(s.floor.close(), s.db.Close(), s.lock.Close())
	if err != nil {
		return fmt.Errorf("close metadata store: %w", err)
	}
	return nil
}

// Stats are the store's figures since it was opened.
type Stats struct {
	Updates    int64         // that wrote something and are durable
	Commits    int64         // each shared by one or more Updates
	CommitTime time.Duration // sum over the commits
	Sequence   uint64        // of the last commit, over the store's life
	Records    int64         // in all tables
	TableBytes int64         // allocated by Badger's tables
	LogBytes   int64         // allocated by Badger's logs
	FreeBytes  int64         // of the store's filesystem
	Failed     bool          // the store takes no more updates
}

// Stats tells the figures; reading the bytes costs a directory listing.
func (s *Store) Stats() (Stats, error) {
	s.mu.Lock()
	st := s.stats
	st.Failed = s.failed != nil
	s.mu.Unlock()
	var err error
	st.TableBytes, st.LogBytes, err = recordBytes(s.dir)
	if err != nil {
		return st, err
	}
	st.FreeBytes, err = freeBytes(s.dir)
	return st, err
}

func (s *Store) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}
