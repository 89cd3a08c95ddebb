package metadata

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"time"

	badger "github.com/dgraph-io/badger/v4"
)

// A backup is gzip over lines of JSON: a header, one line for each record, a
// trailer with the SHA-256 of all lines before it. It can be read without this
// program, and does not depend on Badger's files.
const backupFormat = "holdfast-metadata-1"

type backupHeader struct {
	Format string    `json:"format"`
	Time   time.Time `json:"time"`
	Head   head      `json:"head"`
}

type backupLine struct {
	Key    string          `json:"key,omitempty"` // full: table, slash, key
	Value  json.RawMessage `json:"value,omitempty"`
	SHA256 string          `json:"sha256,omitempty"` // the trailer's only field
}

// Backup writes a consistent copy of all records to w, while updates go on.
func (s *Store) Backup(w io.Writer) error {
	_, err := s.backup(w)
	return err
}

func (s *Store) backup(w io.Writer) (h head, err error) {
	if err := s.begin(); err != nil {
		return h, err
	}
	defer s.end()
	err = s.db.View(func(txn *badger.Txn) error {
		if h, err = readHead(txn); err != nil {
			return err
		}
		return writeBackup(w, txn, h)
	})
	if err != nil {
		return h, fmt.Errorf("backup: %w", err)
	}
	return h, nil
}

func writeBackup(w io.Writer, txn *badger.Txn, h head) error {
	zip, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	hash := sha256.New()
	lines := json.NewEncoder(io.MultiWriter(zip, hash))
	if err := lines.Encode(backupHeader{backupFormat, time.Now().UTC(), h}); err != nil {
		return err
	}
	written := head{Sequence: h.Sequence}
	err = eachRecord(txn, func(key string, value []byte) error {
		written.add(key, value)
		return lines.Encode(backupLine{Key: key, Value: value})
	})
	if err != nil {
		return err
	}
	if written != h {
		return fmt.Errorf("%w: %d records of %d", ErrRolledBack, written.Records, h.Records)
	}
	if err := lines.Encode(backupLine{SHA256: hex.EncodeToString(hash.Sum(nil))}); err != nil {
		return err
	}
	return zip.Close()
}

// Restore makes a store from a backup in dir, which must not hold one. On return
// the store is durable and closed; when it fails, dir holds none. A backup that
// was cut or altered is ErrDamaged.
func Restore(dir string, r io.Reader, o Options) error {
	if err := restore(dir, r, o); err != nil {
		return fmt.Errorf("restore %s: %w", dir, err)
	}
	return nil
}

func restore(dir string, r io.Reader, o Options) error {
	records := filepath.Join(dir, recordsDir)
	if _, err := os.Lstat(records); !errors.Is(err, os.ErrNotExist) {
		return errors.Join(fmt.Errorf("there is a store in the way: move %s away first", records), err)
	}
	temp := filepath.Join(dir, "restoring")
	if err := os.RemoveAll(temp); err != nil {
		return err
	}
	err := fill(temp, r, Options{Log: o.Log, Headroom: o.Headroom})
	if err == nil {
		err = os.Rename(filepath.Join(temp, recordsDir), records)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(temp))
	}
	// Measured by the floor of the store that was lost, this one looks rolled back.
	floor := o.sequenceFile(dir)
	if err := os.Remove(floor); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return errors.Join(syncDir(dir), syncDir(filepath.Dir(floor)), os.RemoveAll(temp))
}

// fill makes a store with the records of a backup.
func fill(dir string, r io.Reader, o Options) error {
	s, err := Open(dir, o)
	if err != nil {
		return err
	}
	return errors.Join(s.load(r), s.Close())
}

func (s *Store) load(r io.Reader) error {
	b, err := newBackupReader(r)
	if err != nil {
		return err
	}
	last := false
	for !last {
		err := s.Update(context.Background(), func(tx *Tx) error {
			for tx.bytes < maxBytes/2 && len(tx.own) < maxWrites/2 {
				line, err := b.next()
				if err != nil {
					return err
				}
				if last = line.SHA256 != ""; last {
					return nil
				}
				if err := tx.set(line.Key, line.Value); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	s.head.Sequence = max(s.head.Sequence, b.head.Sequence) // nobody else has the store
	if got := s.head; got.Records != b.head.Records || got.Sum != b.head.Sum {
		return fmt.Errorf("%w: %d records, its header says %d", ErrDamaged, got.Records, b.head.Records)
	}
	// One more commit carries the sequence over.
	return s.Update(context.Background(), func(tx *Tx) error { return tx.set(restoredKey, nil) })
}

// restoredKey is deleted, and never written, to make a commit that changes nothing.
const restoredKey = "\x00restored"

// backupReader reads lines and checks the whole.
type backupReader struct {
	zip   *gzip.Reader
	lines *bufio.Scanner
	hash  hash.Hash // of the lines so far
	head  head
}

func newBackupReader(r io.Reader) (*backupReader, error) {
	zip, err := gzip.NewReader(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	b := &backupReader{zip: zip, lines: bufio.NewScanner(zip), hash: sha256.New()}
	b.lines.Buffer(nil, 2*MaxRecord)
	line, err := b.line()
	if err != nil {
		return nil, err
	}
	var h backupHeader
	if err := json.Unmarshal(line, &h); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrDamaged, err)
	}
	if h.Format != backupFormat {
		return nil, fmt.Errorf("format %q is not known to this program (%s is)", h.Format, backupFormat)
	}
	b.head = h.Head
	b.count(line)
	return b, nil
}

func (b *backupReader) line() ([]byte, error) {
	if b.lines.Scan() {
		return b.lines.Bytes(), nil
	}
	err := b.lines.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
}

func (b *backupReader) count(line []byte) {
	b.hash.Write(line)
	b.hash.Write([]byte{'\n'})
}

// next gives a record, or the trailer, checked, after which nothing may follow.
func (b *backupReader) next() (backupLine, error) {
	text, err := b.line()
	if err != nil {
		return backupLine{}, err
	}
	var line backupLine
	if err := strictJSON(text, &line); err != nil {
		return line, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if line.SHA256 == "" {
		if line.Key == "" || line.Value == nil {
			return line, fmt.Errorf("%w: a line without key or value", ErrDamaged)
		}
		line.Value = append(json.RawMessage(nil), line.Value...)
		b.count(text)
		return line, nil
	}
	if got := hex.EncodeToString(b.hash.Sum(nil)); got != line.SHA256 {
		return line, fmt.Errorf("%w: SHA-256 is %s, the trailer says %s", ErrDamaged, got, line.SHA256)
	}
	if b.lines.Scan() || b.lines.Err() != nil {
		return line, fmt.Errorf("%w: something follows the trailer, or its checksum is wrong: %w", ErrDamaged, b.lines.Err())
	}
	return line, nil
}
