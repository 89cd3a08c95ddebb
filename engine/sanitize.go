package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"holdfast/blockdev/filesystem"
)

// Sanitizer copies the files of an image that a guest may have written into a fresh
// filesystem. sanitize.Sanitizer is one.
type Sanitizer interface {
	// Copy makes an ext4 in image to, which reads as zero, with the files of image from.
	// filesystem.ErrDamaged, ErrForeign, ErrDirty or ErrUnfit, with the reason, when
	// that cannot be; errors.ErrUnsupported for what the reader does not know.
	Copy(ctx context.Context, from string, t filesystem.Type, to string) (filesystem.Copied, error)
}

// sanitizeTime bounds one copy: its files may have been made up to take long.
const sanitizeTime = time.Hour

// SanitizeVolume asks for a volume with the files of another one.
type SanitizeVolume struct {
	Name    string // of the new volume; empty: one is made
	SizeMiB int64  // 0: the old one's
	Actor   string
}

// sanitizing is a copy under way in this life of the process.
type sanitizing struct {
	from   Volume // its lock is held
	copied filesystem.Copied
}

// SanitizeVolume copies the files of a detached volume into a fresh ext4 of a new
// volume, which no guest has written. It is a create: what fails leaves nothing, and
// one that a crash interrupts is taken back. The old volume stays as it is, and is not
// used meanwhile.
func (e *Engine) SanitizeVolume(ctx context.Context, workspace, name string, r SanitizeVolume) (Volume, error) {
	if e.o.Sanitizer == nil {
		return Volume{}, problem(ErrUnsupported, "", "this server cannot copy the files of volumes")
	}
	return do(ctx, e, func(ctx context.Context) (Volume, error) {
		from, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Volume{}, err
		}
		defer release()
		if from, err = e.current(ctx, from); err != nil {
			return Volume{}, err
		}
		if err := from.mayBeRead("detach it first"); err != nil {
			return Volume{}, err
		}
		size := r.SizeMiB
		if size == 0 {
			size = from.SizeMiB
		}
		pool := from.Pool
		if pool == "" { // the first one, whatever the policy says
			pool = e.o.PoolName
		}
		asked := CreateVolume{Workspace: workspace, Name: r.Name, SizeMiB: &size, Region: from.Region, Pool: pool, Labels: from.Labels, Actor: r.Actor}
		v, err := e.design(ctx, asked)
		if err != nil {
			return Volume{}, err
		}
		v.SanitizedFrom = from.ID
		done, err := e.locks.acquire(ctx, v.ID)
		if err != nil {
			return Volume{}, err
		}
		defer done()
		if err := e.intend(ctx, v, "", asked); err != nil {
			return Volume{}, err
		}
		e.beginSanitizing(v, from)
		defer e.endSanitizing(v)
		if err := e.settle(ctx, &v); err != nil {
			return Volume{}, e.abandon(ctx, v, "", sanitizeError(from, err))
		}
		return v, nil
	})
}

func (e *Engine) beginSanitizing(v, from Volume) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.copies[v.ID] = &sanitizing{from: from}
}

func (e *Engine) endSanitizing(v Volume) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.copies, v.ID)
}

func (e *Engine) sanitizing(v Volume) *sanitizing {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.copies[v.ID]
}

// copyFiles makes the draft of a volume that gets the files of another one.
func (e *Engine) copyFiles(ctx context.Context, v Volume) error {
	s := e.sanitizing(v)
	if s == nil {
		return fmt.Errorf("copying files was interrupted: the old volume may have changed since")
	}
	ctx, cancel := context.WithTimeout(ctx, sanitizeTime)
	defer cancel()
	if err := e.o.Pool.Create(ctx, v.ID, v.bytes()); err != nil {
		return err
	}
	return e.asFile(ctx, s.from.ID, true, func(from string) error {
		return e.asFile(ctx, v.ID, false, func(to string) (err error) {
			if s.copied, err = e.o.Sanitizer.Copy(ctx, from, s.from.Filesystem, to); err != nil {
				return err
			}
			return e.o.Filesystems.Identify(ctx, to, v.Filesystem, v.UUID)
		})
	})
}

// String tells what was copied, for an event.
func (s *sanitizing) String() string {
	text := fmt.Sprintf("Copied the files of %s (%d entries) into a fresh ext4", s.from.Name, s.copied.Entries)
	var left []string
	for _, l := range []struct {
		n    int64
		what string
	}{{s.copied.Left.Devices, "devices"}, {s.copied.Left.Pipes, "pipes and sockets"}, {s.copied.Left.Attributes, "files' extended attributes, or some of them"}} {
		if l.n > 0 {
			left = append(left, fmt.Sprintf("%d %s", l.n, l.what))
		}
	}
	if len(left) == 0 {
		return text
	}
	return text + "; left out: " + strings.Join(left, ", ")
}

// sanitizeError says what hinders a copy. Its text is of our own readers.
func sanitizeError(from Volume, err error) error {
	kind, advice := ErrUnsupported, ""
	switch {
	case errors.Is(err, filesystem.ErrDirty):
		kind, advice = ErrConflict, ": attach it to a virtual machine, unmount it there, detach it, and try again"
	case errors.Is(err, filesystem.ErrUnfit):
		kind, advice = ErrConflict, ": give the new volume a larger size, or copy them in a virtual machine"
	case errors.Is(err, context.DeadlineExceeded):
		kind, advice = ErrConflict, fmt.Sprintf(": it took longer than %s", sanitizeTime)
	case errors.Is(err, filesystem.ErrDamaged), errors.Is(err, filesystem.ErrForeign), errors.Is(err, errors.ErrUnsupported):
		advice = ": repair or copy them in a virtual machine"
	default:
		return err
	}
	return &Problem{Kind: kind, Message: fmt.Sprintf("the files of volume %q cannot be copied: %s%s", from.Name, innermost(err), advice), Err: err}
}
