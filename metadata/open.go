package metadata

import (
	"fmt"
	"log/slog"
	"os"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
)

// Options configure a Store.
type Options struct {
	Log *slog.Logger
	// OnFailure is called once, when a commit failed: the owner ends the process.
	OnFailure func(error)
	// Headroom is the free space, in bytes, below which only freeing updates are taken.
	Headroom int64
	// Failpoint, in tests, is called before and after every commit; an error
	// stands for a crash there.
	Failpoint func(point string) error
}

// Open opens or creates the database in dir.
func Open(dir string, o Options) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	db, err := badger.Open(badgerOptions(dir))
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	return &Store{db: db}, nil
}

func badgerOptions(dir string) badger.Options {
	return badger.DefaultOptions(dir).
		WithLogger(nil).
		WithSyncWrites(true).
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
		WithNumCompactors(2)
}

// Close ends the store; updates under way finish first.
func (s *Store) Close() error { return s.db.Close() }
