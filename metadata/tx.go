package metadata

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	badger "github.com/dgraph-io/badger/v4"
)

// Bounds of what one Update may write.
const (
	// MaxRecord is the largest record, in bytes of JSON.
	MaxRecord = 512 << 10
	maxBytes  = 1 << 20 // keys and values of one commit
	maxWrites = 8000    // records of one commit
	perWrite  = 64      // what Badger adds to a record, in bytes, rounded up
)

// writes are what is to be committed, by full key; nil is a delete.
type writes map[string][]byte

// Tx is a transaction: a consistent view, and in an Update also writes. It is
// for the goroutine and the call that it was given to.
//
// The writes of an Update are held aside until its function has succeeded:
// several Updates share one commit, and a failed one must leave nothing in it.
type Tx struct {
	txn   *badger.Txn // read-only: what is committed
	batch writes      // of the Updates before this one in its batch
	own   writes      // nil: read-only
	bytes int         // of own
}

// pending finds what is written and not committed yet.
func (tx *Tx) pending(key string) (value []byte, ok bool) {
	if value, ok = tx.own[key]; !ok {
		value, ok = tx.batch[key]
	}
	return value, ok
}

// get calls fn with a value that is valid until fn returns.
func (tx *Tx) get(key string, fn func([]byte) error) error {
	if value, ok := tx.pending(key); ok {
		if value == nil {
			return ErrNotFound
		}
		return fn(value)
	}
	item, err := tx.txn.Get([]byte(key))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return ErrNotFound
	}
	if err != nil {
		return err
	}
	return item.Value(fn)
}

// set writes, or with a nil value deletes.
func (tx *Tx) set(key string, value []byte) error {
	if tx.own == nil {
		return errors.New("write in a read-only transaction")
	}
	if len(key)+len(value) > MaxRecord {
		return fmt.Errorf("record of %d bytes, at most %d: %w", len(key)+len(value), MaxRecord, ErrTooLarge)
	}
	if old, ok := tx.own[key]; ok {
		tx.bytes -= cost(key, old)
	}
	tx.own[key] = value
	tx.bytes += cost(key, value)
	return tx.fits()
}

func (tx *Tx) fits() error {
	if tx.bytes > maxBytes || len(tx.own) > maxWrites {
		return fmt.Errorf("%d records, %d bytes: %w", len(tx.own), tx.bytes, ErrTooLarge)
	}
	return nil
}

func cost(key string, value []byte) int { return len(key) + len(value) + perWrite }

// scan merges what is pending, as it is now, into what is committed.
func (tx *Tx) scan(prefix, start string, values bool, fn func(key string, value []byte) error) error {
	pending := tx.pendingFrom(prefix, start)
	opts := badger.DefaultIteratorOptions
	opts.Prefix = []byte(prefix)
	opts.PrefetchValues = false // they stand in the tables, beside the keys
	it := tx.txn.NewIterator(opts)
	defer it.Close()
	for it.Seek([]byte(max(prefix, start))); it.Valid(); it.Next() {
		item := it.Item()
		key := string(item.Key())
		for len(pending) > 0 && pending[0].key < key {
			if err := pending[0].show(fn); err != nil {
				return err
			}
			pending = pending[1:]
		}
		if len(pending) > 0 && pending[0].key == key {
			continue // overruled: shown when the next key comes
		}
		if !values {
			if err := fn(key, nil); err != nil {
				return err
			}
			continue
		}
		if err := item.Value(func(b []byte) error { return fn(key, b) }); err != nil {
			return err
		}
	}
	for _, w := range pending {
		if err := w.show(fn); err != nil {
			return err
		}
	}
	return nil
}

type write struct {
	key   string
	value []byte
}

func (w write) show(fn func(string, []byte) error) error {
	if w.value == nil {
		return nil
	}
	return fn(w.key, w.value)
}

// pendingFrom gives what is written under prefix and not committed, from start on, in order.
func (tx *Tx) pendingFrom(prefix, start string) []write {
	var ws []write
	for key := range tx.batch {
		if _, overruled := tx.own[key]; !overruled && strings.HasPrefix(key, prefix) && key >= start {
			ws = append(ws, write{key, tx.batch[key]})
		}
	}
	for key, value := range tx.own {
		if strings.HasPrefix(key, prefix) && key >= start {
			ws = append(ws, write{key, value})
		}
	}
	slices.SortFunc(ws, func(a, b write) int { return strings.Compare(a.key, b.key) })
	return ws
}
