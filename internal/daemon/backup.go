package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	backupPrefix = "records-"
	backupSuffix = ".backup"
	backupTime   = "20060102T150405Z" // sorts by time
)

// backups writes a backup of the records at each interval until ctx ends. A
// failure is logged: the records themselves are well.
func (n *node) backups(ctx context.Context) error {
	if n.c.BackupInterval <= 0 {
		return nil
	}
	if err := makeDirs(n.at.backups()); err != nil {
		return err
	}
	timer := time.NewTimer(n.untilBackup(time.Now()))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-timer.C:
			if err := n.backup(now); err != nil {
				n.log.Error("backup of the records failed", "cause", err)
			}
			timer.Reset(n.c.BackupInterval)
		}
	}
}

// untilBackup counts from the newest backup, so that restarts do not put it off.
func (n *node) untilBackup(now time.Time) time.Duration {
	all, err := n.listBackups()
	if err != nil || len(all) == 0 {
		return n.c.BackupInterval
	}
	stamp := strings.TrimSuffix(strings.TrimPrefix(all[len(all)-1], backupPrefix), backupSuffix)
	last, err := time.Parse(backupTime, stamp)
	if err != nil {
		return n.c.BackupInterval
	}
	return min(max(0, n.c.BackupInterval-now.Sub(last)), n.c.BackupInterval)
}

// listBackups gives the names of all backups, oldest first.
func (n *node) listBackups() ([]string, error) {
	entries, err := os.ReadDir(n.at.backups())
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), backupPrefix) && strings.HasSuffix(e.Name(), backupSuffix) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, err
}

func (n *node) backup(now time.Time) (err error) {
	path := filepath.Join(n.at.backups(), backupPrefix+now.UTC().Format(backupTime)+backupSuffix)
	f, err := os.CreateTemp(n.at.backups(), ".tmp-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	w := bufio.NewWriter(f)
	if err = n.store.Backup(w); err != nil {
		return err
	}
	if err = w.Flush(); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	if err := errors.Join(f.Close(), syncDir(n.at.backups())); err != nil {
		return err
	}
	n.log.Info("records backed up", "file", path)
	return n.forgetBackups()
}

func (n *node) forgetBackups() error {
	all, err := n.listBackups()
	if err != nil {
		return err
	}
	for len(all) > max(n.c.BackupKeep, 1) {
		if err := os.Remove(filepath.Join(n.at.backups(), all[0])); err != nil {
			return fmt.Errorf("remove an old backup: %w", err)
		}
		all = all[1:]
	}
	return nil
}
