package metadata

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	badger "github.com/dgraph-io/badger/v4"
)

var (
	// ErrNotFound is the answer for a key that a table does not have.
	ErrNotFound = errors.New("no such record")
	// ErrFailed means that a commit failed: the store takes no more updates.
	ErrFailed = errors.New("metadata store failed")
	// ErrNoSpace means that the store's filesystem is below its headroom; only
	// updates that free something (UpdateFreeing) are taken.
	ErrNoSpace = errors.New("metadata filesystem is almost full")
)

// Tx is a transaction: a consistent view, and in an Update also writes.
type Tx struct{ txn *badger.Txn }

// Table is a named set of records of type T, stored as JSON. Keys are text;
// a table's keys sort bytewise.
type Table[T any] struct{ Name string }

func (t Table[T]) key(key string) []byte { return []byte(t.Name + "/" + key) }

// Get reads one record; ErrNotFound when there is none.
func (t Table[T]) Get(tx *Tx, key string) (T, error) {
	var v T
	item, err := tx.txn.Get(t.key(key))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return v, fmt.Errorf("%s %q: %w", t.Name, key, ErrNotFound)
	}
	if err != nil {
		return v, fmt.Errorf("%s %q: %w", t.Name, key, err)
	}
	err = item.Value(func(b []byte) error { return json.Unmarshal(b, &v) })
	if err != nil {
		return v, fmt.Errorf("%s %q: %w", t.Name, key, err)
	}
	return v, nil
}

// Put writes one record.
func (t Table[T]) Put(tx *Tx, key string, v T) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s %q: %w", t.Name, key, err)
	}
	return tx.txn.Set(t.key(key), b)
}

// Delete removes one record; absent is success.
func (t Table[T]) Delete(tx *Tx, key string) error { return tx.txn.Delete(t.key(key)) }

// Scan calls fn for each record whose key begins with prefix, in key order,
// until fn returns an error, which Scan returns.
func (t Table[T]) Scan(tx *Tx, prefix string, fn func(key string, v T) error) error {
	opts := badger.DefaultIteratorOptions
	opts.Prefix = t.key(prefix)
	it := tx.txn.NewIterator(opts)
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		item := it.Item()
		var v T
		if err := item.Value(func(b []byte) error { return json.Unmarshal(b, &v) }); err != nil {
			return fmt.Errorf("%s %q: %w", t.Name, item.Key(), err)
		}
		if err := fn(string(item.Key()[len(t.Name)+1:]), v); err != nil {
			return err
		}
	}
	return nil
}

// Store is an open database. It is safe for concurrent use.
type Store struct{ db *badger.DB }

// Update runs fn in a read-write transaction and commits it; it is durable on
// return. fn may run several times (conflicts are retried), so it has no side
// effects. An error of fn is returned and nothing is written.
func (s *Store) Update(ctx context.Context, fn func(*Tx) error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := s.db.Update(func(txn *badger.Txn) error { return fn(&Tx{txn}) })
		if !errors.Is(err, badger.ErrConflict) {
			return err
		}
	}
}

// View runs fn in a read-only transaction.
func (s *Store) View(fn func(*Tx) error) error {
	return s.db.View(func(txn *badger.Txn) error { return fn(&Tx{txn}) })
}
