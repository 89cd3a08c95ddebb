package metadata

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Reset moves the records of a store that lost some out of the way, so that
// Open makes a new one, to be filled from the volumes and the side log. It
// tells where they are now; "" when there were none. ErrLocked when the store
// is open.
func Reset(dir string, o Options) (aside string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	lock, err := lockStore(dir)
	if err != nil {
		return "", fmt.Errorf("reset metadata store: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	aside = filepath.Join(dir, recordsDir+"."+time.Now().UTC().Format("20060102T150405.000Z"))
	err = os.Rename(filepath.Join(dir, recordsDir), aside)
	if errors.Is(err, os.ErrNotExist) {
		aside, err = "", nil
	}
	if err != nil {
		return "", err
	}
	floor := o.sequenceFile(dir)
	if err := os.Remove(floor); err != nil && !errors.Is(err, os.ErrNotExist) {
		return aside, err
	}
	return aside, errors.Join(syncDir(dir), syncDir(filepath.Dir(floor)))
}
