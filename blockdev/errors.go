package blockdev

import (
	"errors"
	"fmt"
)

// Sentinels, matched by errors.Is. Every error of this package's children is
// one of these, errors.ErrUnsupported, a context error or an unexpected one.
var (
	ErrNotFound = errors.New("no such image")
	ErrExists   = errors.New("image exists")
	ErrBusy     = errors.New("image is in use")
	ErrNoSpace  = errors.New("pool is full")
	ErrCorrupt  = errors.New("image or description is damaged")
	ErrInvalid  = errors.New("invalid argument")
	// ErrLayered means that an image's bytes do not lie in one file (yet): see
	// Flattener.
	ErrLayered = errors.New("image is layered")
	// ErrNeedsRepair means that the pool takes no changes until an operator has
	// repaired it; the text says what to do.
	ErrNeedsRepair = errors.New("pool needs repair")
	// ErrUnavailable means that the pool of the image is not open, or this host has
	// no such pool.
	ErrUnavailable = errors.New("pool is not available")
	// ErrUnreachable means that bytes of an image are far away and did not come as long
	// as they were waited for; the text has the store's reason.
	ErrUnreachable = errors.New("the store of the image's base does not answer")
	// ErrFailed means that a flush failed: what it covered may be lost and the
	// process must stop acknowledging (fail-stop).
	ErrFailed = errors.New("flush failed")
	// ErrGone means that the sandbox or device at the other end no longer exists.
	ErrGone = errors.New("sandbox is gone")
)

// OpError is an error with the operation and the object, added once at a
// package's edge.
type OpError struct {
	Op  string // for example "sparse.Clone"
	ID  ID
	Err error
}

func (e *OpError) Error() string {
	if e.ID == "" {
		return fmt.Sprintf("%s: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("%s %s: %v", e.Op, e.ID, e.Err)
}

func (e *OpError) Unwrap() error { return e.Err }

// Op wraps err for an exported function's return; nil stays nil.
func Op(op string, id ID, err error) error {
	if err == nil {
		return nil
	}
	return &OpError{Op: op, ID: id, Err: err}
}
