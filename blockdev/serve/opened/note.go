package opened

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// Note says how an image is open at a worker.
type Note struct {
	Boot     string        `json:"boot"`
	Kind     blockdev.Kind `json:"kind"`
	ReadOnly bool          `json:"readOnly"`
	Token    string        `json:"token"` // makes the lease this opening's alone
	// Device says that the opening is a Block: a device of the kernel's NBD client, which
	// is the only client of the worker.
	Device bool `json:"device,omitempty"`
}

const (
	// socketDigits of a token name the socket of its opening.
	socketDigits = 8
	maxNote      = 4096 // bytes
)

// IsSocket reports whether a worker gives this kind.
func IsSocket(k blockdev.Kind) bool { return k == blockdev.VhostUser || k == blockdev.NBD }

// New gives the note of an opening that is to be: by the first kind that a worker
// gives, else by a device over it.
func New(w blockdev.Want) (Note, error) {
	boot, err := sys.BootID()
	var token [8]byte
	_, _ = rand.Read(token[:]) // never fails
	n := Note{Boot: boot, Kind: blockdev.NBD, ReadOnly: w.ReadOnly, Token: hex.EncodeToString(token[:]), Device: true}
	if at := slices.IndexFunc(w.Kinds, IsSocket); at >= 0 {
		n.Kind, n.Device = w.Kinds[at], false
	}
	return n, err
}

// Opened is the kind of endpoint that the opening gives.
func (n Note) Opened() blockdev.Kind {
	if n.Device {
		return blockdev.Block
	}
	return n.Kind
}

// Read reads a note; nil where there is none of this boot.
func Read(path string) (*Note, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxNote))
	if err != nil {
		return nil, err
	}
	boot, err := sys.BootID()
	if err != nil {
		return nil, err
	}
	var n Note
	if json.Unmarshal(b, &n) != nil || n.Boot != boot || !IsSocket(n.Kind) || len(n.Token) < socketDigits {
		return nil, nil
	}
	return &n, nil
}

// Write makes a file say it. One that says it already does at every moment.
func (n Note) Write(f *os.File) error {
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Truncate(int64(len(b)))
}

// Clear empties a file; none is success.
func Clear(path string) error {
	err := os.Truncate(path, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Fits is blockdev.ErrBusy, with the lease, when an opening is none that is wanted.
func (n Note) Fits(w blockdev.Want) error {
	if n.ReadOnly != w.ReadOnly || !slices.Contains(w.Kinds, n.Opened()) {
		return fmt.Errorf("open as %s: %w", n.Lease(), blockdev.ErrBusy)
	}
	return nil
}

// Lease names the opening.
func (n Note) Lease() string {
	mode := "rw"
	if n.ReadOnly {
		mode = "ro"
	}
	return fmt.Sprintf("%s-%s-%s", n.Opened(), mode, n.Token)
}

// Backend is what the opening's device is found by.
func (n Note) Backend(id blockdev.ID) string { return "holdfast/" + string(id) + "/" + n.Token }

// Socket names the opening's socket: a control.Spec's Opening.
func (n Note) Socket() string { return n.Token[:socketDigits] }

// Lock opens the file of a note, made if it is not there, and locks it (OFD): the lock
// lasts as long as a process has the file. blockdev.ErrBusy when another opening of it
// has the lock.
func Lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := sys.LockFile(f); err != nil {
		f.Close()
		if errors.Is(err, sys.ErrLocked) {
			err = fmt.Errorf("%w: %s is held by another process (%w)", blockdev.ErrBusy, path, err)
		}
		return nil, err
	}
	return f, nil
}

// Unlock gives a lock back at once, also when a process that is just being started
// still has its descriptor.
func Unlock(f *os.File) {
	_ = sys.UnlockFile(f) // closing does it too, a little later
	f.Close()
}
