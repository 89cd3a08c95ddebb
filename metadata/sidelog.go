package metadata

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
)

// SideLog is an append-only, synced log of facts that must survive the loss of
// the database: API keys, revocations, workspaces, quotas, template heads. One
// checksummed JSON line per entry; a torn last line is cut off at Open, damage
// elsewhere is an error. The last entry for a (kind, key) wins. It is safe for
// concurrent use by one process; a second one is refused with ErrLocked.
type SideLog struct {
	path string

	mu     sync.Mutex
	file   *os.File
	size   int64  // bytes of whole lines
	next   uint64 // number of the next line
	lines  int    // in the file, header included
	values map[string]map[string]json.RawMessage
	failed error // the first failed sync: nothing is taken after it
}

// A log is compacted at Open when it is longer than this many lines and more
// than half of them are overruled by later ones.
const compactAbove = 256

// OpenSideLog opens or creates the log, and compacts it when it is mostly
// stale. The error for damage wraps ErrDamaged and names the line.
func OpenSideLog(path string) (*SideLog, error) {
	l, err := openSideLog(path)
	if err != nil {
		return nil, fmt.Errorf("side log: %w", err)
	}
	return l, nil
}

func openSideLog(path string) (*SideLog, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	l := &SideLog{path: path, file: file, values: map[string]map[string]json.RawMessage{}}
	if err := l.load(); err != nil {
		return nil, errors.Join(err, l.file.Close())
	}
	return l, nil
}

// load locks the file, reads it, cuts a torn end and compacts. What it leaves is durable.
func (l *SideLog) load() error {
	if err := lockFile(l.file); err != nil {
		return err
	}
	text, err := io.ReadAll(l.file)
	if err != nil {
		return err
	}
	whole, err := l.replay(text)
	if err != nil {
		return fmt.Errorf("%s: %w", l.path, err)
	}
	if whole < int64(len(text)) {
		if err := l.file.Truncate(whole); err != nil {
			return err
		}
	}
	l.size = whole
	live := 1 // the header
	for _, keys := range l.values {
		live += len(keys)
	}
	if l.lines == 0 || (l.lines > compactAbove && live < l.lines/2) {
		return l.rewrite()
	}
	// A line that an earlier process wrote may be read here without ever having
	// been synced; nobody may act on it before it is durable.
	return errors.Join(l.file.Sync(), syncDir(filepath.Dir(l.path)))
}

// replay takes the lines of text in and tells how many bytes of it are whole lines.
func (l *SideLog) replay(text []byte) (int64, error) {
	var whole int64
	for len(text) > 0 {
		end := bytes.IndexByte(text, '\n')
		if end < 0 {
			return whole, nil
		}
		line, rest := text[:end], text[end+1:]
		e, err := parseLine(line)
		if err == nil && l.lines > 0 && e.Number != l.next {
			err = fmt.Errorf("%w: entry %d where %d belongs", ErrDamaged, e.Number, l.next)
		}
		if err == nil && (l.lines == 0) != (e.Kind == headerKind) {
			err = fmt.Errorf("%w: a header belongs in the first line and only there", ErrDamaged)
		}
		if err != nil && len(rest) == 0 && torn(line) {
			return whole, nil
		}
		if err != nil {
			return 0, fmt.Errorf("line %d: %w", l.lines+1, err)
		}
		l.take(e)
		whole += int64(end) + 1
		text = rest
	}
	return whole, nil
}

// torn tells whether a damaged last line is one whose write a crash cut short:
// pages that never reached the disk read as zero, and no line of ours holds a
// zero. Other damage is not forgiven even there, for the line may be the
// revocation of a key.
func torn(line []byte) bool { return bytes.IndexByte(line, 0) >= 0 }

func (l *SideLog) take(e entry) {
	l.lines++
	l.next = e.Number + 1
	if e.Kind == headerKind {
		return
	}
	if e.Value == nil {
		delete(l.values[e.Kind], e.Key)
		return
	}
	if l.values[e.Kind] == nil {
		l.values[e.Kind] = map[string]json.RawMessage{}
	}
	l.values[e.Kind][e.Key] = e.Value
}

// rewrite puts a file with only the living entries in the log's place, durably.
func (l *SideLog) rewrite() error {
	temp := l.path + ".new"
	file, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	size, lines, next, err := l.writeLiving(file)
	if err == nil {
		err = lockFile(file)
	}
	if err == nil {
		err = os.Rename(temp, l.path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(l.path))
	}
	if err != nil {
		return errors.Join(err, file.Close())
	}
	err = l.file.Close()
	l.file, l.size, l.lines, l.next = file, size, lines, next
	return err
}

func (l *SideLog) writeLiving(file *os.File) (size int64, lines int, next uint64, err error) {
	w := bufio.NewWriter(file)
	next = l.next
	put := func(e entry) error {
		e.Number = next
		line, err := formatLine(e)
		if err != nil {
			return err
		}
		n, err := w.Write(line)
		size, lines, next = size+int64(n), lines+1, next+1
		return err
	}
	if err := put(entry{Kind: headerKind, Key: formatName}); err != nil {
		return 0, 0, 0, err
	}
	for _, kind := range sortedKeys(l.values) {
		for _, key := range sortedKeys(l.values[kind]) {
			if err := put(entry{Kind: kind, Key: key, Value: l.values[kind][key]}); err != nil {
				return 0, 0, 0, err
			}
		}
	}
	return size, lines, next, errors.Join(w.Flush(), file.Sync())
}

// Append durably records that (kind, key) now is value (nil: removed). After a
// failed sync every Append answers ErrFailed; a full filesystem is ErrNoSpace
// and leaves the log as it was.
func (l *SideLog) Append(kind, key string, value any) error {
	if kind == "" || kind == headerKind {
		return fmt.Errorf("side log: %q is not a kind", kind)
	}
	e := entry{Kind: kind, Key: key}
	if value != nil {
		text, err := json.Marshal(value)
		if err != nil {
			return fmt.Errorf("side log: %s %q: %w", kind, key, err)
		}
		if !bytes.Equal(text, []byte("null")) {
			e.Value = text
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.append(e); err != nil {
		return fmt.Errorf("side log: %s %q: %w", kind, key, err)
	}
	return nil
}

func (l *SideLog) append(e entry) error {
	if l.failed != nil {
		return fmt.Errorf("%w: %w", ErrFailed, l.failed)
	}
	e.Number = l.next
	line, err := formatLine(e)
	if err != nil {
		return err
	}
	if _, err := l.file.Write(line); err != nil {
		return l.unwrite(err)
	}
	if err := l.file.Sync(); err != nil {
		l.failed = err
		return fmt.Errorf("%w: %w", ErrFailed, err)
	}
	l.size += int64(len(line))
	l.take(e)
	return nil
}

// unwrite takes back what a failed write left of a line.
func (l *SideLog) unwrite(cause error) error {
	if err := l.file.Truncate(l.size); err != nil {
		l.failed = errors.Join(cause, err)
		return fmt.Errorf("%w: %w", ErrFailed, l.failed)
	}
	if errors.Is(cause, syscall.ENOSPC) || errors.Is(cause, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, cause)
	}
	return cause
}

// Each calls fn with the last value of each (kind, key) of a kind, in key order;
// removed ones are left out. fn must not keep or change value, and may append.
func (l *SideLog) Each(kind string, fn func(key string, value []byte) error) error {
	l.mu.Lock()
	keys := sortedKeys(l.values[kind])
	values := make([]json.RawMessage, len(keys))
	for i, key := range keys {
		values[i] = l.values[kind][key]
	}
	l.mu.Unlock()
	for i, key := range keys {
		if err := fn(key, values[i]); err != nil {
			return err
		}
	}
	return nil
}

// Close closes the file and lets go of its lock.
func (l *SideLog) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed == nil {
		l.failed = os.ErrClosed
	}
	return l.file.Close()
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
