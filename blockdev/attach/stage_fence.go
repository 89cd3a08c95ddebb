package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// Shutdown makes the volume's filesystem refuse everything from now on, with EIO,
// whoever has it open and in whatever namespace. With flush, what is dirty is
// written first, which takes as long as it takes; without, it is lost as in a power
// cut. Shut down already, or not mounted, is success. errors.ErrUnsupported for
// types that cannot (btrfs): nothing has changed then.
func (s *Stage) Shutdown(ctx context.Context, id blockdev.ID, flush bool) error {
	return blockdev.Op("attach.Shutdown", id, s.shutdown(ctx, id, flush))
}

func (s *Stage) shutdown(ctx context.Context, id blockdev.ID, flush bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !id.Valid() {
		return fmt.Errorf("%w: id %q", blockdev.ErrInvalid, id)
	}
	m, err := mountAt(s.path(id))
	if err != nil || m == nil {
		return err
	}
	dir, err := os.Open(s.path(id))
	if errors.Is(err, syscall.EIO) { // XFS that has shut down lets nobody in
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	how := sys.ShutdownNow
	if flush {
		how = sys.ShutdownFlushed
	}
	return sys.Shutdown(dir, how)
}

// Abandon unmounts a volume whose filesystem was shut down: no flush, and at once,
// whoever has files open. It returns nil when the kernel has let go of the device;
// blockdev.ErrBusy, saying who holds it, while the dead filesystem lives on. Not
// mounted is success, if nothing holds the device.
func (s *Stage) Abandon(ctx context.Context, id blockdev.ID, device string) error {
	return blockdev.Op("attach.Abandon", id, s.abandon(ctx, id, device))
}

func (s *Stage) abandon(ctx context.Context, id blockdev.ID, device string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !id.Valid() {
		return fmt.Errorf("%w: id %q", blockdev.ErrInvalid, id)
	}
	dir := s.path(id)
	m, err := mountAt(dir)
	if err != nil {
		return err
	}
	var place sys.Place
	if m != nil {
		place, _ = sys.PlaceAt(dir) // only to name who uses it
		if err := sys.UnmountLazy(dir); err != nil {
			return err
		}
	}
	if err := ignoreNotExist(os.Remove(dir)); err != nil {
		return err
	}
	if err := released(ctx, device, abandonWait); err != nil {
		return fmt.Errorf("%w%s", err, Holders(place.Device))
	}
	return nil
}
