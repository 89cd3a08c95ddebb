package engine

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev/filesystem"
)

// growsTainted reports whether a volume that a guest has written waits for a growth of
// its filesystem that this host can do: of ext4, by tools in the cage, while nobody
// has it.
func (v Volume) growsTainted() bool {
	return v.Tainted && v.Filesystem == filesystem.Ext4 && v.Phase == Ready && len(v.Attachments) == 0 && (v.CheckFirst || v.SizeMiB > v.GuestMiB)
}

// askTainted asks a volume's superblock for its size, by code of ours. What is no
// such filesystem any more is the guest's: it is left alone, and said.
func (e *Engine) askTainted(ctx context.Context, v Volume, f facts) (facts, error) {
	if !v.growsTainted() {
		return f, nil
	}
	var err error
	f.filesystem, err = e.sizeUnmounted(ctx, v)
	if errors.Is(err, filesystem.ErrDamaged) {
		f.strange = err.Error()
		return f, nil
	}
	f.ours = err == nil
	return f, err
}

// preen makes a volume that a guest has written ready to be grown. Not ready, with the
// reason in what is pending, when that would take a decision of its owner: nothing is
// repaired behind its back.
func (e *Engine) preen(ctx context.Context, v Volume) (ready bool, err error) {
	err = e.asFile(ctx, v.ID, false, func(path string) error { return e.o.Filesystems.Preen(ctx, path) })
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, filesystem.ErrForeign), errors.Is(err, filesystem.ErrDamaged), errors.Is(err, filesystem.ErrNeedsRepair):
		e.o.Log.Warn("a volume that a guest has written is not grown", "volume", v.ID, "workspace", v.Workspace, "err", err)
		e.setPending(v.ID, v.guestsOwn(innermostOf(err)))
		return false, nil
	}
	return false, err
}

// guestsOwn is what is pending when this host can not grow what a guest has written.
func (v Volume) guestsOwn(why string) string {
	return fmt.Sprintf("%s, and it is not grown here: %s. Repair or grow it in a virtual machine", v.guestGrows(), why)
}

// innermostOf is which of filesystem's sentinels an error is, without a tool's text.
func innermostOf(err error) string {
	for _, sentinel := range []error{filesystem.ErrNeedsRepair, filesystem.ErrForeign, filesystem.ErrDamaged} {
		if errors.Is(err, sentinel) {
			return sentinel.Error()
		}
	}
	return err.Error()
}

// noteGrown records that nothing of a growth is left to a guest.
func (e *Engine) noteGrown(ctx context.Context, v *Volume) error {
	v.CheckFirst, v.GuestMiB = false, v.SizeMiB
	return e.save(ctx, v)
}
