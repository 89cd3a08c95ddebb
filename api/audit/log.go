package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"holdfast/api"
)

// Options bound a Log. The zero value is usable.
type Options struct {
	MaxBytes int64 // of a file, after which it is rotated; 0: 64 MiB
	Keep     int   // rotated files; 0: 8
	// OnFailure is told of every entry that could not be written, and of every
	// rotation that failed. The entry's request is not affected.
	OnFailure func(error)
}

const (
	defaultMaxBytes = 64 << 20
	defaultKeep     = 8
	maxField        = 512 // bytes of one text field
)

// Log is an open audit log. It is safe for concurrent use.
type Log struct {
	path string
	o    Options

	mu     sync.Mutex
	file   *os.File // nil: closed
	size   int64
	torn   bool // the file does not end with a newline
	recent recent
}

var _ api.Auditor = (*Log)(nil)

// line is an entry in the file.
type line struct {
	Time      time.Time `json:"time"`
	Request   string    `json:"request,omitempty"`
	Workspace string    `json:"workspace,omitempty"`
	KeyID     string    `json:"keyId,omitempty"`
	Principal string    `json:"principal,omitempty"`
	Action    string    `json:"action"`
	Resource  string    `json:"resource,omitempty"`
	Remote    string    `json:"remote,omitempty"`
	Status    int       `json:"status"`
	Error     string    `json:"error,omitempty"`
}

// Open opens or creates the log at path and reads the newest entries.
func Open(path string, o Options) (*Log, error) {
	if o.MaxBytes <= 0 {
		o.MaxBytes = defaultMaxBytes
	}
	if o.Keep <= 0 {
		o.Keep = defaultKeep
	}
	l := &Log{path: path, o: o}
	for _, p := range []string{l.rotated(1), path} {
		if err := l.remember(p); err != nil {
			return nil, fmt.Errorf("audit log: %w", err)
		}
	}
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	return l, nil
}

func (l *Log) rotated(n int) string { return fmt.Sprintf("%s.%d", l.path, n) }

// open opens the file to append to. One whose last line a power cut has torn
// gets a newline first: what is left of it stays as it is.
func (l *Log) open() error {
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.file, l.size, l.torn = f, info.Size(), false
	if l.size > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, l.size-1); err != nil {
			return errors.Join(err, f.Close())
		}
		l.torn = last[0] != '\n'
	}
	return nil
}

// Record appends an entry. On error it is still among the recent ones.
func (l *Log) Record(_ context.Context, e api.Entry) error {
	e = clipped(e)
	text, err := json.Marshal(line(e))
	if err != nil {
		return fmt.Errorf("audit log: %w", err) // a time that is no RFC 3339
	}
	l.mu.Lock()
	err = l.append(append(text, '\n'))
	l.recent.add(e)
	l.mu.Unlock()
	return l.failed(err)
}

func clipped(e api.Entry) api.Entry {
	for _, field := range []*string{&e.Request, &e.Workspace, &e.KeyID, &e.Principal, &e.Action, &e.Resource, &e.Remote, &e.Error} {
		if len(*field) > maxField {
			*field = strings.ToValidUTF8((*field)[:maxField], "") + "..."
		}
	}
	return e
}

func (l *Log) failed(err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("audit log: %w", err)
	if l.o.OnFailure != nil {
		l.o.OnFailure(err)
	}
	return err
}

func (l *Log) append(text []byte) error {
	if l.file == nil {
		return fs.ErrClosed
	}
	var rotation error
	if l.size > 0 && l.size+int64(len(text)) > l.o.MaxBytes {
		rotation = l.rotate() // when it fails, the file grows on
	}
	if l.file == nil {
		return rotation
	}
	if l.torn {
		text = append([]byte{'\n'}, text...)
	}
	n, err := l.file.Write(text)
	l.size += int64(n)
	if n > 0 {
		l.torn = n < len(text)
	}
	return errors.Join(rotation, err)
}

// rotate moves each file one on and begins a new one.
func (l *Log) rotate() error {
	if err := l.file.Sync(); err != nil {
		return err
	}
	for n := l.o.Keep - 1; n >= 1; n-- {
		err := os.Rename(l.rotated(n), l.rotated(n+1))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.Rename(l.path, l.rotated(1)); err != nil {
		return err
	}
	old := l.file
	if err := l.open(); err != nil {
		l.file = old // under its new name, better than nowhere
		return err
	}
	return errors.Join(old.Close(), syncDir(filepath.Dir(l.path)))
}

// Recent gives the newest entries of a workspace (empty: of all), newest first.
func (l *Log) Recent(_ context.Context, workspace string, limit int) ([]api.Entry, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.recent.list(workspace, limit), nil
}

// Close syncs and closes the file. Again is success.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := errors.Join(l.file.Sync(), l.file.Close())
	l.file = nil
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
