package metadata

import "log/slog"

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
func Open(dir string, o Options) (*Store, error) { return nil, ErrFailed }

// Close ends the store; updates under way finish first.
func (s *Store) Close() error { return s.db.Close() }
