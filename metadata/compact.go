package metadata

import (
	"strings"

	badger "github.com/dgraph-io/badger/v4"
)

// Badger's own compactors wake 20 times a second each, which costs an idle node
// 1 % of a CPU. So they are off, and the store compacts when as many tables have
// come as Badger would compact at: all levels into one, which also drops what
// was overwritten and deleted. At the size of a node's records (tens of MB) that
// rewrites no more than level by level.
const (
	compactAt    = 5                       // tables in level 0; Badger stops taking writes at 15
	compactCheck = 4 << 20                 // bytes written between two looks
	nothingToDo  = "Unable to fill tables" // Badger's words for it; the error is not exported
)

// compactor compacts in the background.
type compactor struct {
	db    *badger.DB
	wake  chan struct{} // closed: end
	done  chan struct{}
	since int // bytes written since the last look. The turn's holder's
}

// startCompactor looks at once: every kill and every close leaves a table.
func startCompactor(db *badger.DB, failed func(error)) *compactor {
	c := &compactor{db: db, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go func() {
		defer close(c.done)
		for range c.wake {
			if err := compact(db); err != nil {
				failed(err)
				return
			}
		}
	}()
	c.wake <- struct{}{}
	return c
}

func compact(db *badger.DB) error {
	if db.Levels()[0].NumTables < compactAt {
		return nil
	}
	err := db.Flatten(1)
	if err != nil && strings.Contains(err.Error(), nothingToDo) {
		return nil
	}
	return err
}

// wrote tells how much was committed.
func (c *compactor) wrote(bytes int) {
	if c.since += bytes; c.since < compactCheck {
		return
	}
	c.since = 0
	select {
	case c.wake <- struct{}{}:
	default: // it is busy and will look again
	}
}

// stop waits for a compaction under way.
func (c *compactor) stop() {
	close(c.wake)
	<-c.done
}
