package metadata

import (
	"errors"
	"fmt"
	"maps"
	"time"

	badger "github.com/dgraph-io/badger/v4"
)

// maxUpdates bounds how many Updates share a commit, so that the first does not
// wait too long for the last.
const maxUpdates = 256

// batch is what several Updates commit together.
type batch struct {
	txn     *badger.Txn // read-only: the store as the batch found it
	head    head        // with the batch's writes
	writes  writes
	bytes   int
	updates int           // that ran in it
	writers int           // of these, that wrote
	done    chan struct{} // closed when it is durable, or has failed
	err     error         // read after done
}

func (s *Store) newBatch() *batch {
	return &batch{txn: s.db.NewTransaction(false), head: s.head, writes: writes{}, done: make(chan struct{})}
}

func (b *batch) room() bool { return b.updates < maxUpdates && b.bytes < maxBytes/2 }

func (b *batch) fits(tx *Tx) bool {
	return b.bytes+tx.bytes <= maxBytes && len(b.writes)+len(tx.own) <= maxWrites
}

// join runs fn in the open batch, adds its writes and passes the turn on, also
// when fn panics. The batch is the one to wait for; nil: there is none.
func (s *Store) join(fn func(*Tx) error) (b *batch, wrote bool, err error) {
	defer s.passTurn()
	if err := s.failure(); err != nil {
		return nil, false, err
	}
	if s.batch == nil {
		s.batch = s.newBatch()
	}
	b = s.batch
	b.updates++
	tx := &Tx{txn: b.txn, batch: b.writes, own: writes{}}
	if err := fn(tx); err != nil {
		return b, false, err
	}
	if err := tx.fits(); err != nil {
		return b, false, err
	}
	if len(tx.own) == 0 {
		return b, false, nil
	}
	if err := s.failpoint("metadata.commit.before"); err != nil {
		return b, false, err
	}
	if !b.fits(tx) {
		// What fn saw is what the next batch begins with: nobody comes between.
		if err := s.commit(); err != nil {
			return nil, false, err
		}
		b = s.newBatch()
		b.updates = 1
		s.batch = b
	}
	if err := b.add(tx); err != nil {
		return b, false, err
	}
	return b, true, nil
}

// add takes the writes of a transaction over, all or none of them.
func (b *batch) add(tx *Tx) error {
	h := b.head
	before := &Tx{txn: b.txn, batch: b.writes}
	for key, value := range tx.own {
		err := before.get(key, func(old []byte) error {
			h.remove(key, old)
			return nil
		})
		if err != nil && !errors.Is(err, ErrNotFound) {
			return fmt.Errorf("read %q: %w", key, err)
		}
		if value != nil {
			h.add(key, value)
		}
	}
	maps.Copy(b.writes, tx.own)
	b.head = h
	b.bytes += tx.bytes
	b.writers++
	return nil
}

// passTurn lets the next waiting Update into the batch. When nobody waits or
// the batch is full, it is committed first.
func (s *Store) passTurn() {
	if s.batch != nil && s.batch.room() && s.turn.passIfWanted() {
		return
	}
	if s.batch != nil {
		_ = s.commit() // its members find the error in the batch
	}
	s.turn.pass()
}

// commit makes the open batch durable and lets its members go.
func (s *Store) commit() error {
	b := s.batch
	s.batch = nil
	defer close(b.done)
	b.txn.Discard()
	if len(b.writes) == 0 {
		return nil
	}
	b.head.Sequence++
	start := time.Now()
	err := s.write(b)
	if err == nil {
		// Badger may have logged, and not returned, that a part of this failed.
		err = s.failure()
	}
	if err != nil {
		b.err = s.fail(fmt.Errorf("commit: %w", err))
		return b.err
	}
	s.head = b.head
	s.floor.raise(b.head.Sequence)
	s.tidy.wrote(b.bytes)
	s.count(b, time.Since(start))
	return nil
}

// write commits a batch in Badger. It fits, so that every error is the store's.
func (s *Store) write(b *batch) error {
	txn := s.db.NewTransaction(true)
	defer txn.Discard()
	for key, value := range b.writes {
		var err error
		if value == nil {
			err = txn.Delete([]byte(key))
		} else {
			err = txn.Set([]byte(key), value)
		}
		if err != nil {
			return err
		}
	}
	if err := writeHead(txn, b.head); err != nil {
		return err
	}
	return txn.Commit()
}

func (s *Store) count(b *batch, d time.Duration) {
	s.mu.Lock()
	s.stats.Updates += int64(b.writers)
	s.stats.Commits++
	s.stats.CommitTime += d
	s.stats.Sequence, s.stats.Records = b.head.Sequence, b.head.Records
	s.mu.Unlock()
	if s.o.ObserveCommit != nil {
		s.o.ObserveCommit(d, b.writers)
	}
}
