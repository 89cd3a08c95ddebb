package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// ErrNeedsRecovery: the filesystem was not unmounted cleanly and the device is
// read-only, so its journal cannot be replayed. Mount it writable once first.
var ErrNeedsRecovery = errors.New("the filesystem must be recovered by a writable mount first")

// ErrCannotFence: nothing proves that the sandbox would not write any more.
var ErrCannotFence = errors.New("the sandbox cannot be fenced")

// classifyMount reads why the kernel refused to mount a filesystem.
func classifyMount(err error) error {
	var refused *sys.MountError
	if !errors.As(err, &refused) {
		return err
	}
	switch {
	case errors.Is(err, syscall.EROFS), strings.Contains(refused.Text, "recovery required"):
		return fmt.Errorf("%w (%w): %w", ErrNeedsRecovery, blockdev.ErrBusy, err)
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%w: %w", blockdev.ErrBusy, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENXIO):
		return fmt.Errorf("%w: %w", blockdev.ErrNotFound, err)
	case errors.Is(err, syscall.ENOTBLK):
		return fmt.Errorf("%w: %w", blockdev.ErrInvalid, err)
	case errors.Is(err, syscall.ENODEV): // no such filesystem type
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	case refused.Call == "fsconfig": // an option that this kernel does not know
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	case errors.Is(err, syscall.EUCLEAN), errors.Is(err, syscall.EBADMSG), errors.Is(err, syscall.EINVAL):
		return fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	return err
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
