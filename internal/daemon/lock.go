package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"holdfast/internal/sys"
)

// ErrHeld means that another process holds the state directory.
var ErrHeld = errors.New("state directory is in use")

// Holder says who holds a state directory.
type Holder struct {
	Pid     int       `json:"pid"`
	Started time.Time `json:"started"`
	Listen  string    `json:"listen,omitempty"`
	Command string    `json:"command"` // "serve", "rebuild"
}

// Lock is the claim of one process on a state directory. The kernel drops it
// when the process ends, however it ends; the file stays.
type Lock struct {
	f      *os.File
	holder Holder
}

// LockState claims dir, which exists. ErrHeld, with the holder, when another
// process has it.
func LockState(dir, command string) (*Lock, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockPatiently(f); err != nil {
		defer f.Close()
		if !errors.Is(err, sys.ErrLocked) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %s %s", ErrHeld, dir, whoHolds(f))
	}
	l := &Lock{f: f, holder: Holder{Pid: os.Getpid(), Started: time.Now().UTC(), Command: command}}
	return l, l.write()
}

// startingWait is how long the lock of a daemon that was killed may linger: a
// tool that it was just starting holds a copy of its files until it executes.
const startingWait = 500 * time.Millisecond

func lockPatiently(f *os.File) error {
	deadline := time.Now().Add(startingWait)
	for {
		err := sys.LockFile(f)
		if !errors.Is(err, sys.ErrLocked) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(startingWait / 50)
	}
}

func whoHolds(f *os.File) string {
	var h Holder
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil || json.Unmarshal(b, &h) != nil {
		return "is held by another process that has not said who it is"
	}
	text := fmt.Sprintf("is held by process %d (holdfastd %s) since %s", h.Pid, h.Command, h.Started.Format(time.RFC3339))
	if h.Listen != "" {
		text += ", listening on " + h.Listen
	}
	return text
}

// Listening adds the address to what a second daemon is told.
func (l *Lock) Listening(address string) error {
	l.holder.Listen = address
	return l.write()
}

// write is for human readers only: the lock itself is the kernel's, so the
// note needs no durability.
func (l *Lock) write() error {
	b, err := json.Marshal(l.holder)
	if err != nil {
		return err
	}
	if err := l.f.Truncate(0); err != nil {
		return err
	}
	_, err = l.f.WriteAt(append(b, '\n'), 0)
	return err
}

// Release gives the directory free.
func (l *Lock) Release() error { return errors.Join(sys.UnlockFile(l.f), l.f.Close()) }
