package metadata

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// ErrLocked means that another process has the file or directory open.
var ErrLocked = errors.New("in use by another process")

// lockFile takes the whole-file lock that says "open here"; it ends with the
// descriptor, so also with the process.
func lockFile(f *os.File) error {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w", f.Name(), ErrLocked)
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
