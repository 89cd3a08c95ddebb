package metadata

import (
	"encoding/json"
	"errors"
	"fmt"
)

var (
	// ErrNotFound is the answer for a key that a table does not have.
	ErrNotFound = errors.New("no such record")
	// ErrFailed means that a commit failed: the store takes no more updates.
	ErrFailed = errors.New("metadata store failed")
	// ErrNoSpace means that the store's filesystem is below its headroom; only
	// updates that free something (UpdateFreeing) are taken.
	ErrNoSpace = errors.New("metadata filesystem is almost full")
	// ErrTooLarge means that a record or a transaction is larger than the store takes.
	ErrTooLarge = errors.New("too large for one transaction")
	// ErrClosed means that the store was closed.
	ErrClosed = errors.New("metadata store is closed")
	// ErrLocked means that another process has the store or the log open.
	ErrLocked = errors.New("in use by another process")
	// ErrDamaged means that a file holds something that was never written to it.
	ErrDamaged = errors.New("damaged")
	// ErrRolledBack means that records are gone that had been committed: the store
	// or a part of it was lost. It has to be rebuilt.
	ErrRolledBack = errors.New("committed records are missing")
)

// Table is a named set of records of type T, stored as JSON. Keys are text;
// a table's keys sort bytewise.
type Table[T any] struct{ Name string }

func (t Table[T]) key(key string) string { return t.Name + "/" + key }

func (t Table[T]) wrap(key string, err error) error {
	return fmt.Errorf("%s %q: %w", t.Name, key, err)
}

// Get reads one record; ErrNotFound when there is none.
func (t Table[T]) Get(tx *Tx, key string) (T, error) {
	var v T
	err := tx.get(t.key(key), func(b []byte) error { return json.Unmarshal(b, &v) })
	if err != nil {
		return v, t.wrap(key, err)
	}
	return v, nil
}

// Put writes one record, at most MaxRecord bytes as JSON.
func (t Table[T]) Put(tx *Tx, key string, v T) error {
	b, err := json.Marshal(v)
	if err == nil {
		err = tx.set(t.key(key), b)
	}
	if err != nil {
		return t.wrap(key, err)
	}
	return nil
}

// Delete removes one record; absent is success.
func (t Table[T]) Delete(tx *Tx, key string) error {
	if err := tx.set(t.key(key), nil); err != nil {
		return t.wrap(key, err)
	}
	return nil
}

// Scan calls fn for each record whose key begins with prefix, in key order,
// until fn returns an error, which Scan returns. fn may write: the scan shows
// the table as it was when it began.
func (t Table[T]) Scan(tx *Tx, prefix string, fn func(key string, v T) error) error {
	return t.ScanFrom(tx, prefix, "", fn)
}

// ScanFrom is Scan that begins at start, or at the first key after it.
func (t Table[T]) ScanFrom(tx *Tx, prefix, start string, fn func(key string, v T) error) error {
	return tx.scan(t.key(prefix), t.key(start), true, func(full string, b []byte) error {
		key := full[len(t.Name)+1:]
		var v T
		if err := json.Unmarshal(b, &v); err != nil {
			return t.wrap(key, err)
		}
		return fn(key, v)
	})
}

// Keys calls fn for each key that begins with prefix, in order, without reading
// the records, until fn returns an error, which Keys returns.
func (t Table[T]) Keys(tx *Tx, prefix string, fn func(key string) error) error {
	return tx.scan(t.key(prefix), "", false, func(full string, _ []byte) error {
		return fn(full[len(t.Name)+1:])
	})
}
