package metadata

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
)

// DefaultHeadroom is the Headroom of Options that give none, in bytes.
const DefaultHeadroom = 64 << 20

// Options configure a Store.
type Options struct {
	Log *slog.Logger // nil: slog.Default()
	// OnFailure is called once, when a commit failed: the owner ends the process.
	// It must not wait for the store.
	OnFailure func(error)
	// Headroom is the free space, in bytes, below which only freeing updates are
	// taken. 0: DefaultHeadroom; negative: no bound.
	Headroom int64
	// Failpoint, in tests, is called before and after every Update's commit
	// ("metadata.commit.before", "metadata.commit.after"); an error stands for a
	// crash there and is what Update returns.
	Failpoint func(point string) error
	// SequenceFile is where the floor of the commit sequence is kept; empty:
	// "sequence" in the store's directory. In another filesystem it also notices
	// that the store's own was not mounted.
	SequenceFile string
	// ObserveCommit, if set, is told each commit's duration and how many Updates
	// shared it. It must be quick.
	ObserveCommit func(d time.Duration, updates int)
}

// recordsDir is where Badger's files are, in the store's directory.
const recordsDir = "records"

func (o Options) sequenceFile(dir string) string {
	if o.SequenceFile != "" {
		return o.SequenceFile
	}
	return filepath.Join(dir, "sequence")
}

// Open opens or creates the database in dir, and reads all of it to see that
// nothing committed is missing. ErrLocked when another process has it open;
// ErrRolledBack or ErrDamaged when it has to be rebuilt or restored.
func Open(dir string, o Options) (*Store, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Headroom == 0 {
		o.Headroom = DefaultHeadroom
	}
	s, err := open(dir, o)
	if err != nil {
		return nil, fmt.Errorf("metadata store %s: %w", dir, err)
	}
	return s, nil
}

func open(dir string, o Options) (_ *Store, err error) {
	if err := os.MkdirAll(filepath.Join(dir, recordsDir), 0o700); err != nil {
		return nil, err
	}
	lock, err := lockStore(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	floor, err := openFloor(o.sequenceFile(dir), o.Log)
	if err != nil {
		return nil, err
	}
	log := &badgerLog{log: o.Log}
	bo := badgerOptions(filepath.Join(dir, recordsDir), log)
	if err := checkTables(bo.Dir, bo); err != nil {
		return nil, err
	}
	db, err := openBadger(bo, log)
	if err != nil {
		return nil, err
	}
	h, err := verify(db)
	if err == nil && h.Sequence < floor.saved {
		err = fmt.Errorf("%w: its last commit is %d, but %d had been reached", ErrRolledBack, h.Sequence, floor.saved)
	}
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	s := newStore(dir, o, db, h, floor, lock)
	// Damaged tables are left out by Badger with nothing but a line in its log.
	if first := log.watch(func(err error) { _ = s.fail(err) }); first != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrDamaged, first), db.Close())
	}
	floor.raise(h.Sequence)
	s.tidy = startCompactor(db, func(err error) { _ = s.fail(fmt.Errorf("compaction: %w", err)) })
	return s, nil
}

// lockStore makes sure that one process has the store, and leaves its id for
// the message that the second one gets.
func lockStore(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockFile(f); err != nil {
		pid, _ := os.ReadFile(path)
		return nil, errors.Join(fmt.Errorf("%w (process %q)", err, pid), f.Close())
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(fmt.Append(nil, os.Getpid()), 0)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// openBadger tries twice: after a kill at the wrong moment Badger finds a log
// file of no length, fails, and has mended it by then.
func openBadger(o badger.Options, log *badgerLog) (*badger.DB, error) {
	db, err := tryBadger(o)
	if err == nil {
		return db, nil
	}
	log.log.Warn("the record store did not open; trying once more", "cause", err)
	log.forget()
	db, err = tryBadger(o)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return db, nil
}

// tryBadger turns a panic over damaged files into an error.
func tryBadger(o badger.Options) (db *badger.DB, err error) {
	defer func() {
		if p := recover(); p != nil {
			db, err = nil, fmt.Errorf("panic in open: %v", p)
		}
	}()
	return badger.Open(o)
}

// badgerOptions: a value always stays in the tables, so the value log stays
// empty and its failed sync (which Badger only logs) can lose nothing. Updates
// are serial (see Store), so Badger need not look for conflicts.
func badgerOptions(dir string, log badger.Logger) badger.Options {
	return badger.DefaultOptions(dir).
		WithLogger(log).
		WithSyncWrites(true).
		WithDetectConflicts(false).
		WithNumVersionsToKeep(1).
		WithChecksumVerificationMode(options.OnTableAndBlockRead).
		WithVerifyValueChecksum(true).
		WithMemTableSize(8 << 20).
		WithValueLogFileSize(16 << 20).
		WithValueThreshold(1 << 20).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithMetricsEnabled(false).
		WithNumGoroutines(2).
		WithNumCompactors(0)
}
