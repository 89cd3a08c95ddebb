package metadata

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// floorDelay is how long a commit may be younger than the floor: losing the
// store's newest commits is noticed unless all of them are younger than this.
const floorDelay = time.Second

// floor keeps, in a small file beside the database, a sequence that the
// database has durably reached and may never again be below.
type floor struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	value   uint64      // newest durable commit
	pending *time.Timer // nil: nothing to save
	closed  bool

	saving sync.Mutex // over the writing; commits do not wait for it
	saved  uint64
	warned bool // that saving fails
}

type floorFile struct {
	Sequence uint64 `json:"sequence"`
	Sum      string `json:"sum"` // CRC-32C of the number as text
}

// openFloor reads the file; absent is 0.
func openFloor(path string, log *slog.Logger) (*floor, error) {
	f := &floor{path: path, log: log}
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return nil, err
	}
	var file floorFile
	if err := json.Unmarshal(text, &file); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, ErrDamaged, err)
	}
	if file.Sum != sum(fmt.Append(nil, file.Sequence)) {
		return nil, fmt.Errorf("%s: %w: wrong checksum", path, ErrDamaged)
	}
	f.saved, f.value = file.Sequence, file.Sequence
	return f, nil
}

// raise tells that a commit is durable. The file follows within floorDelay.
func (f *floor) raise(sequence uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.value = sequence
	if f.pending == nil && !f.closed {
		f.pending = time.AfterFunc(floorDelay, f.saveLater)
	}
}

func (f *floor) saveLater() {
	f.mu.Lock()
	f.pending = nil
	closed := f.closed
	f.mu.Unlock()
	if closed {
		return
	}
	err := f.save()
	f.saving.Lock()
	defer f.saving.Unlock()
	if err != nil && !f.warned {
		f.log.Warn("the store's sequence could not be saved; a loss of its newest commits would not be noticed", "cause", err)
	}
	f.warned = err != nil
}

func (f *floor) save() error {
	f.saving.Lock()
	defer f.saving.Unlock()
	f.mu.Lock()
	value := f.value
	f.mu.Unlock()
	if f.saved == value {
		return nil
	}
	text, err := json.Marshal(floorFile{value, sum(fmt.Append(nil, value))})
	if err == nil {
		err = writeFile(f.path, append(text, '\n'))
	}
	if err == nil {
		f.saved = value
	}
	return err
}

// close saves and ends the floor.
func (f *floor) close() error {
	f.mu.Lock()
	f.closed = true
	if f.pending != nil {
		f.pending.Stop()
	}
	f.mu.Unlock()
	return f.save()
}

// writeFile durably puts text in the place of the file at path, or leaves the
// old one.
func writeFile(path string, text []byte) error {
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
