package metadata

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	backupName   = "metadata-20060102T150405.000Z.jsonl.gz" // sorts by time
	backupFiles  = "metadata-*.jsonl.gz"
	backupUnmade = ".metadata-unfinished"
)

// RunBackups writes a backup into dir now and then every so often, when
// anything has changed since the last, and keeps the newest keep files. It
// returns when ctx ends, with nil; a backup that fails is logged and tried
// again the next time.
func (s *Store) RunBackups(ctx context.Context, dir string, every time.Duration, keep int) error {
	if every <= 0 || keep < 1 {
		return fmt.Errorf("backups every %v, %d kept: both must be positive", every, keep)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	var done uint64 // the sequence that the last backup holds
	for {
		if now := s.Sequence(); now != done || now == 0 {
			path, sequence, err := s.BackupTo(dir, keep)
			if errors.Is(err, ErrClosed) {
				return err
			}
			if err != nil {
				s.o.Log.Error("the metadata could not be backed up", "error", err)
			} else {
				s.o.Log.Info("metadata backed up", "file", path, "sequence", sequence)
				done = sequence
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Sequence tells the newest commit.
func (s *Store) Sequence() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats.Sequence
}

// BackupTo writes a backup into a new file in dir, durably, and then removes
// all but the newest keep. It tells the file and the commit that it holds.
func (s *Store) BackupTo(dir string, keep int) (path string, sequence uint64, err error) {
	temp := filepath.Join(dir, backupUnmade)
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", 0, err
	}
	w := bufio.NewWriterSize(f, 1<<16)
	h, err := s.backup(w)
	if err == nil {
		err = errors.Join(w.Flush(), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", 0, errors.Join(err, os.Remove(temp))
	}
	path = filepath.Join(dir, time.Now().UTC().Format(backupName))
	if err := os.Rename(temp, path); err != nil {
		return "", 0, err
	}
	if err := syncDir(dir); err != nil {
		return "", 0, err
	}
	return path, h.Sequence, prune(dir, keep)
}

// Backups lists the backups in dir, newest first.
func Backups(dir string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, backupFiles))
	slices.Sort(files)
	slices.Reverse(files)
	return files, err
}

func prune(dir string, keep int) error {
	files, err := Backups(dir)
	if err != nil {
		return err
	}
	for _, old := range files[min(keep, len(files)):] {
		if err := os.Remove(old); err != nil {
			return err
		}
	}
	return nil
}
