package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"holdfast/blockdev/attach/guest"
	"holdfast/internal/sys"
)

// longestFreeze bounds a freeze, whatever the host asks: everything that writes
// stands still for as long.
const longestFreeze = 10 * time.Minute

// freezes are the filesystems that this agent froze. Each has a note in a
// directory, made before the freeze, so that an agent that dies is followed by
// one that thaws.
type freezes struct {
	dir string

	mu   sync.Mutex
	held map[string]*held // by serial
}

// held is a frozen filesystem, with a file on it that stays open: it is thawed by
// that, wherever it is mounted by then. mu is held while it is being frozen.
type held struct {
	mu    sync.Mutex
	root  *os.File
	timer *time.Timer
	ended bool
}

func newFreezes(dir string) *freezes { return &freezes{dir: dir, held: map[string]*held{}} }

func (f *freezes) note(serial string) string { return filepath.Join(f.dir, "frozen-"+serial) }

func (f *freezes) get(serial string) *held {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.held[serial]
}

// forget ends what is known of a freeze.
func (f *freezes) forget(serial string) error {
	f.mu.Lock()
	delete(f.held, serial)
	f.mu.Unlock()
	return ignoreMissing(os.Remove(f.note(serial)))
}

func (f *freezes) frozen(serial string) bool { return f.get(serial) != nil }

// freeze freezes the filesystem that is mounted at a path, until thaw or a time. One
// that takes longer than that ends as soon as it begins.
func (f *freezes) freeze(serial, path string, timeout time.Duration) error {
	if f.frozen(serial) {
		return failed(guest.CodeBusy, "it is frozen")
	}
	root, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := errors.Join(os.MkdirAll(f.dir, 0o700), os.WriteFile(f.note(serial), nil, 0o600)); err != nil {
		return errors.Join(err, root.Close())
	}
	h := &held{root: root}
	h.mu.Lock()
	defer h.mu.Unlock()
	f.mu.Lock()
	f.held[serial] = h
	f.mu.Unlock()
	h.timer = time.AfterFunc(timeout, func() { f.expire(serial, h) })
	if err = sys.Freeze(root); err == nil {
		return nil
	}
	h.end()
	if errors.Is(err, sys.ErrFrozen) { // by somebody else, who will thaw it
		err = failed(guest.CodeBusy, "something else in the guest has frozen it")
	}
	return errors.Join(err, f.forget(serial))
}

func (h *held) end() {
	h.ended = true
	h.timer.Stop()
	h.root.Close()
}

// thaw ends a freeze of ours; none is success.
func (f *freezes) thaw(serial string) error {
	h := f.get(serial)
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		return nil
	}
	if err := sys.Thaw(h.root); err != nil {
		return err
	}
	h.end()
	return f.forget(serial)
}

func (f *freezes) expire(serial string, h *held) {
	if f.get(serial) != h {
		return
	}
	if err := f.thaw(serial); err != nil {
		fmt.Fprintln(os.Stderr, "holdfast-guest: thaw:", err)
		h.mu.Lock()
		h.timer.Reset(time.Second)
		h.mu.Unlock()
	}
}

// thawAll ends every freeze, for the agent's own end.
func (f *freezes) thawAll() {
	f.mu.Lock()
	serials := make([]string, 0, len(f.held))
	for serial := range f.held {
		serials = append(serials, serial)
	}
	f.mu.Unlock()
	for _, serial := range serials {
		if err := f.thaw(serial); err != nil {
			fmt.Fprintln(os.Stderr, "holdfast-guest: thaw:", err)
		}
	}
}

// thawFound ends the freezes that an agent before this one has left.
func (f *freezes) thawFound() error {
	notes, err := filepath.Glob(f.note("*"))
	if err != nil {
		return err
	}
	for _, note := range notes {
		serial := filepath.Base(note)[len("frozen-"):]
		if d, err := find(serial); err == nil {
			if err := d.thaw(); err != nil {
				fmt.Fprintln(os.Stderr, "holdfast-guest: thaw:", err)
				continue // the note stays for the next start
			}
		}
		if err := ignoreMissing(os.Remove(note)); err != nil {
			return err
		}
	}
	return nil
}

// thaw ends a freeze of a disk's filesystem, by whomever.
func (d disk) thaw() error {
	all, err := d.mounts()
	if err != nil || len(all) == 0 {
		return err
	}
	root, err := os.Open(all[0].Path)
	if err != nil {
		return err
	}
	defer root.Close()
	return sys.Thaw(root)
}
