package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/templates"
)

// CaptureVolume asks for a template revision of what a volume holds.
type CaptureVolume struct {
	Template string // is made if it is not there
	Version  string // empty: its number
	Actor    string
}

// CaptureResult is the revision, and how it came about.
type CaptureResult struct {
	templates.Captured
	Online bool
	Frozen time.Duration // how long the writes to the volume's device were held; 0: they were not
}

// captureLimit bounds the freeze of a capture, should the pool hang.
const captureLimit = 10 * time.Second

// CaptureVolume makes a revision of a template from a volume's contents as they
// are at one moment: everything that was written before the request is in it. The
// writes of an attached volume are held for as long as the pool needs to share its
// bytes, and go on before the revision is built. Needs a pool that can share bytes
// when the volume is attached: a copy would hold them for as long as it takes.
func (e *Engine) CaptureVolume(ctx context.Context, workspace, name string, r CaptureVolume) (CaptureResult, error) {
	return do(ctx, e, func(ctx context.Context) (CaptureResult, error) {
		v, err := e.Volume(workspace, name)
		if err != nil {
			return CaptureResult{}, err
		}
		if v.Phase == Ready { // else it is waited for, under the lock
			if err := v.hostMay("read"); err != nil {
				return CaptureResult{}, err
			}
		}
		var out CaptureResult
		out.Captured, err = e.o.Library.Capture(ctx, workspace, templates.Capture{
			Template: r.Template, Version: r.Version, Filesystem: v.Filesystem, Actor: r.Actor,
			Clone: func(ctx context.Context, dst blockdev.ID) error {
				out.Online, out.Frozen, err = e.cloneNow(ctx, v.ID, v.Name, dst)
				return err
			},
		})
		if err != nil {
			return CaptureResult{}, userError(err)
		}
		e.noteCapture(ctx, v.ID, fmt.Sprintf("Captured as %s:%s", out.Revision.Template, out.Revision.Name))
		return out, nil
	})
}

// noteCapture is an event, no more: the revision is there whether or not it is told.
func (e *Engine) noteCapture(ctx context.Context, id blockdev.ID, message string) {
	release, err := e.locks.acquire(ctx, id)
	if err != nil {
		return
	}
	defer release()
	if v, ok := e.catalog.get(id); ok {
		v = v.clone()
		e.happened(&v, "capture", "%s", message)
		if err := e.commit(ctx, v); err != nil {
			_ = e.inspect(err)
			e.o.Log.Warn("a capture's event is not recorded", "volume", id, "err", err)
		}
	}
}

// cloneNow makes a draft with the volume's bytes, consistent for its filesystem.
func (e *Engine) cloneNow(ctx context.Context, id blockdev.ID, name string, dst blockdev.ID) (online bool, held time.Duration, err error) {
	release, err := e.locks.acquire(ctx, id)
	if err != nil {
		return false, 0, err
	}
	defer release()
	v, ok := e.catalog.get(id)
	if !ok {
		return false, 0, problem(ErrNotFound, "", "volume %.60q not found", name)
	}
	if v, err = e.current(ctx, v); err == nil {
		err = v.hostMay("read")
	}
	if err != nil {
		return false, 0, err
	}
	if len(v.Attachments) == 0 {
		if v, err = e.prepare(ctx, v, true); err != nil {
			return false, 0, err
		}
		err = e.share(ctx, v, dst)
		if errors.Is(err, errors.ErrUnsupported) {
			err = e.o.Library.Copy(ctx, dst, v.ID, v.bytes())
		}
		return false, 0, errors.Join(err, e.ownIdentity(ctx, v, dst, err))
	}
	if held, err = e.cloneOnline(ctx, v, dst); err != nil {
		return true, held, err
	}
	return true, held, e.ownIdentity(ctx, v, dst, nil)
}

// share clones copy-on-write.
func (e *Engine) share(ctx context.Context, v Volume, dst blockdev.ID) error {
	cloner, ok := e.o.Pool.(blockdev.Cloner)
	if !ok {
		return errors.ErrUnsupported
	}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if err != nil {
		return err
	}
	return cloner.Clone(ctx, dst, v.ID, info.Size)
}

// ownIdentity lets the clone of a btrfs be mounted beside its original: the kernel
// tells filesystems of this type apart by their UUID.
func (e *Engine) ownIdentity(ctx context.Context, v Volume, dst blockdev.ID, failed error) error {
	if failed != nil || v.Filesystem != filesystem.Btrfs {
		return nil
	}
	return e.identify(ctx, dst, v.Filesystem, newUUID())
}

// cloneOnline clones a volume that is in use. A freeze that is there already does.
// Without one the pool shares the bytes at one moment, while it holds all writes to
// them: what a filesystem with a journal recovers from. That is shorter than any
// freeze, for which the kernel waits two RCU grace periods; one without a journal
// has to be frozen.
func (e *Engine) cloneOnline(ctx context.Context, v Volume, dst blockdev.ID) (held time.Duration, err error) {
	if v.frozenAt(e.o.Now()) || v.Attachments[0].ReadOnly {
		err = e.share(ctx, v, dst)
	} else {
		held, err = e.cloneWritten(ctx, v, dst)
	}
	if errors.Is(err, errors.ErrUnsupported) && !isProblem(err) {
		err = &Problem{Kind: ErrUnsupported, Err: err,
			Message: fmt.Sprintf("volume %q is attached, and this pool cannot share bytes: a copy would hold its writers too long; detach it first", v.Name)}
	}
	return held, err
}

func (e *Engine) cloneWritten(ctx context.Context, v Volume, dst blockdev.ID) (held time.Duration, err error) {
	at, err := e.writable(ctx, v, "read")
	if err != nil {
		return 0, err
	}
	recovers, err := e.o.Filesystems.Recovers(ctx, at.dir, v.Filesystem)
	if err != nil {
		return 0, err
	}
	if !recovers {
		return e.cloneFrozen(ctx, v, at, dst)
	}
	if err := e.flush(ctx, v, at); err != nil {
		return 0, err
	}
	err = e.timed("capture.hold", func() error {
		start := time.Now()
		err := e.share(ctx, v, dst)
		held = time.Since(start)
		return err
	})
	return held, err
}

// cloneFrozen freezes, clones and thaws.
func (e *Engine) cloneFrozen(ctx context.Context, v Volume, at mounted, dst blockdev.ID) (held time.Duration, err error) {
	return e.whileFrozen(ctx, v, at, "capture", func() error { return e.share(ctx, v, dst) })
}

// whileFrozen freezes, acts and thaws. As with every freeze the record says so
// first, and the deadline holds whatever the pool does.
func (e *Engine) whileFrozen(ctx context.Context, v Volume, at mounted, why string, act func() error) (held time.Duration, err error) {
	v = v.clone()
	v.Frozen = &Freeze{Until: e.now().Add(captureLimit), By: why}
	if err := e.commit(ctx, v); err != nil {
		return 0, err
	}
	if err = e.flush(ctx, v, at); err == nil {
		err = e.timed(why+".hold", func() error {
			start := time.Now()
			err := e.hold(ctx, at, captureLimit)
			if err != nil {
				return freezeError(v, err)
			}
			err = act()
			if thaw := e.letRun(ctx, v.ID); thaw != nil {
				err = errors.Join(err, thaw, e.letRun(ctx, v.ID))
			}
			held = time.Since(start)
			return err
		})
	}
	if e.freezes.get(v.ID) != nil {
		return held, err // its timer goes on trying
	}
	v.Frozen = nil
	return held, errors.Join(err, e.commitFreeing(ctx, v))
}
