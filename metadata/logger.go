package metadata

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
)

// badgerLog passes Badger's log on. Badger retries in the background what it
// could not write (a memtable, a compaction, the manifest) and only logs a
// failed value-log sync: after a failed fsync a retry may succeed and hold
// nothing, so these lines are failures of the store.
type badgerLog struct {
	log *slog.Logger

	mu     sync.Mutex
	first  error
	failed func(error) // set when the store is open
}

func (l *badgerLog) Errorf(format string, args ...any) {
	err := fmt.Errorf("badger: %s", text(format, args))
	l.log.Error("badger reports an error", "cause", err)
	l.report(err)
}

func (l *badgerLog) Warningf(format string, args ...any) {
	l.log.Warn("badger: " + text(format, args))
	if strings.HasPrefix(format, "While running doCompact") && !strings.Contains(text(format, args), nothingToDo) {
		l.report(fmt.Errorf("badger: %s", text(format, args)))
	}
}

func (l *badgerLog) Infof(format string, args ...any)  { l.log.Debug("badger: " + text(format, args)) }
func (l *badgerLog) Debugf(format string, args ...any) {}

func (l *badgerLog) report(err error) {
	l.mu.Lock()
	if l.first == nil {
		l.first = err
	}
	failed := l.failed
	l.mu.Unlock()
	if failed != nil {
		failed(err)
	}
}

// watch has every later error given to failed, and tells the first one so far.
func (l *badgerLog) watch(failed func(error)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = failed
	return l.first
}

func text(format string, args []any) string {
	return strings.TrimSpace(fmt.Sprintf(format, args...))
}

// forget drops the errors so far.
func (l *badgerLog) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.first = nil
}
