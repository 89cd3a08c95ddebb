package sparse

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// noSpace gives a full pool its sentinel. A flush that failed for want of space
// has lost bytes and stays blockdev.ErrFailed.
func noSpace(err error) error {
	if err != nil && sys.IsNoSpace(err) && !errors.Is(err, blockdev.ErrNoSpace) && !errors.Is(err, blockdev.ErrFailed) {
		return fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	return err
}

// notFound gives an absent image its sentinel.
func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (%w)", blockdev.ErrNotFound, err)
	}
	return err
}

// syncFile flushes a file. An error is never to be answered by another flush.
func syncFile(f *os.File) error {
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
	}
	return nil
}

// syncDir makes a directory's entries durable.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return syncFile(dir)
}

func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// tooLarge gives a size beyond what the filesystem can address its sentinel.
func tooLarge(err error) error {
	if errors.Is(err, syscall.EFBIG) || errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("%w: %w", blockdev.ErrInvalid, err)
	}
	return noSpace(err)
}
