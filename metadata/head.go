package metadata

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	badger "github.com/dgraph-io/badger/v4"
)

// headKey sorts before every table.
const headKey = "\x00head"

// head says what the store must hold. It is committed with every change, so
// that records that vanish without an error (Badger opens silently over a
// flipped bit or a shortened manifest) are missed at the next Open.
type head struct {
	Sequence uint64 `json:"sequence"` // of commits
	Records  int64  `json:"records"`
	Sum      digest `json:"sum"` // of all records
}

// digest is the sum, in each word modulo 2^64, of the hashes of a set of
// records; it does not depend on their order. It is for damage, not for forgery.
type digest [2]uint64

func hashRecord(key string, value []byte) digest {
	h := sha256.New()
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(len(key)))
	h.Write(n[:])
	h.Write([]byte(key))
	h.Write(value)
	var b [sha256.Size]byte
	h.Sum(b[:0])
	return digest{binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])}
}

func (h *head) add(key string, value []byte) {
	d := hashRecord(key, value)
	h.Records++
	h.Sum[0] += d[0]
	h.Sum[1] += d[1]
}

func (h *head) remove(key string, value []byte) {
	d := hashRecord(key, value)
	h.Records--
	h.Sum[0] -= d[0]
	h.Sum[1] -= d[1]
}

func readHead(txn *badger.Txn) (head, error) {
	var h head
	item, err := txn.Get([]byte(headKey))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return h, nil
	}
	if err != nil {
		return h, err
	}
	err = item.Value(func(b []byte) error { return json.Unmarshal(b, &h) })
	return h, err
}

func writeHead(txn *badger.Txn, h head) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	return txn.Set([]byte(headKey), b)
}

// verify reads every record and compares them with what the head says.
func verify(db *badger.DB) (head, error) {
	var said head
	err := db.View(func(txn *badger.Txn) (err error) {
		said, err = readHead(txn)
		if err != nil {
			return err
		}
		found := head{Sequence: said.Sequence}
		if err := eachRecord(txn, func(key string, value []byte) error {
			found.add(key, value)
			return nil
		}); err != nil {
			return err
		}
		if found != said {
			return fmt.Errorf("%w: the store holds %d records where its commit %d left %d, or others than it wrote",
				ErrRolledBack, found.Records, said.Sequence, said.Records)
		}
		return nil
	})
	return said, err
}

// eachRecord calls fn for every record of every table, by full key.
func eachRecord(txn *badger.Txn, fn func(key string, value []byte) error) error {
	opts := badger.DefaultIteratorOptions
	opts.PrefetchValues = false
	it := txn.NewIterator(opts)
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		key := string(it.Item().Key())
		if key == headKey {
			continue
		}
		if err := it.Item().Value(func(b []byte) error { return fn(key, b) }); err != nil {
			return err
		}
	}
	return nil
}
