package sparse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"

	"holdfast/blockdev"
	"holdfast/blockdev/loop"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

const (
	// mkfsTime bounds the making of a filesystem of up to maxPoolBytes and more.
	mkfsTime = 5 * time.Minute
	// freshSuffix names an image that is being made.
	freshSuffix = ".new"
)

// makeImage makes a fully allocated file with a filesystem in it. It appears
// under its name whole and durable, or not at all: what a crash leaves has
// another name and is made anew.
func makeImage(ctx context.Context, path string, size int64, mkfs ...string) error {
	fresh := path + freshSuffix
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := fillImage(ctx, fresh, size, append(mkfs, fresh))
	if err == nil {
		err = sys.RenameNew(fresh, path)
	}
	if err != nil {
		_ = os.Remove(fresh) // what is left of it is removed the next time
		return err
	}
	return syncDir(filepath.Dir(path))
}

func fillImage(ctx context.Context, path string, size int64, mkfs []string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return noSpace(err)
	}
	defer f.Close()
	if err := sys.Allocate(f, 0, size); err != nil {
		return tooLarge(fmt.Errorf("allocate %d bytes for %s: %w", size, path, err))
	}
	if _, err := run.Run(ctx, run.Cmd{Args: mkfs, Timeout: mkfsTime}); err != nil {
		return err
	}
	// The tool may have given space back; what is allocated stays as it is.
	if err := sys.Allocate(f, 0, size); err != nil {
		return noSpace(err)
	}
	return syncFile(f)
}

// MountImage mounts the filesystem of type fstype in a file at the directory
// dir, which is made if needed, through a loop device with direct I/O. Mounted
// there already is success. blockdev.ErrBusy when something else is mounted at
// dir. The mount stays when the process ends.
func MountImage(ctx context.Context, image, dir, fstype string, options ...string) error {
	return blockdev.Op("sparse.MountImage", "", mountImage(ctx, image, dir, fstype, options...))
}

func mountImage(ctx context.Context, image, dir, fstype string, options ...string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	device, err := imageDevice(image)
	if err != nil {
		return err
	}
	if err := unmountDead(device, dir); err != nil {
		return err
	}
	if err := makeDir(dir); err != nil {
		return err
	}
	if err = mountDevice(device, dir, fstype, options); err == nil {
		return nil
	}
	if detachErr := device.Detach(ctx); detachErr != nil && !errors.Is(detachErr, blockdev.ErrBusy) {
		err = errors.Join(err, detachErr)
	}
	return err
}

func mountDevice(device loop.Device, dir, fstype string, options []string) error {
	mounted, err := mountedFrom(device, dir)
	if err != nil || mounted {
		return err
	}
	attr := sys.MountAttr{NoSuid: true, NoDev: true, NoExec: true}
	return sys.Mount(sys.Filesystem{Device: device.Path, Type: fstype, Options: options}, dir, attr)
}

// imageDevice finds the writable loop device of a file, or makes it.
func imageDevice(image string) (loop.Device, error) {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return loop.Device{}, notFound(err)
	}
	defer f.Close()
	devices, err := loop.Find(f)
	if err != nil {
		return loop.Device{}, err
	}
	if len(devices) == 0 {
		return loop.Attach(f, false)
	}
	device := devices[0]
	if len(devices) > 1 || device.Partial || device.ReadOnly {
		return device, fmt.Errorf("%s: %w: %s is on it, not as we make it", image, blockdev.ErrBusy, device.Path)
	}
	if device.Autoclear {
		return device, device.Keep()
	}
	return device, nil
}

// unmountDead takes a mount of the device away whose filesystem has shut down
// after an error: mounted anew it replays its log and works again, or says why
// not. blockdev.ErrBusy while something uses it.
func unmountDead(device loop.Device, dir string) error {
	if _, err := os.Lstat(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	mounted, err := mountedFrom(device, dir)
	if err != nil || !mounted {
		return err
	}
	if err := sys.Unmount(dir); err != nil {
		return fmt.Errorf("the filesystem at %s has shut down and must be mounted anew: %w", dir, busy(err))
	}
	return nil
}

// mountedFrom reports whether dir is a mount of the device. blockdev.ErrBusy
// when it is one of something else.
func mountedFrom(device loop.Device, dir string) (bool, error) {
	node, err := sys.PlaceAt(device.Path)
	if err != nil {
		return false, err
	}
	place, err := sys.PlaceAt(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return inTable(node.RDevice, dir) // one that has shut down does not answer
	}
	if err != nil || !place.MountRoot {
		return false, err
	}
	if place.Device != node.RDevice {
		return false, fmt.Errorf("%s: %w: something else is mounted there", dir, blockdev.ErrBusy)
	}
	return true, nil
}

// inTable reports whether dir is a mount of a device by the kernel's table.
func inTable(device uint64, dir string) (bool, error) {
	found, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	for _, m := range found {
		if sys.Device(m.Major, m.Minor) == device {
			return true, err
		}
	}
	return false, err
}

// UnmountImage undoes MountImage. blockdev.ErrBusy while something uses it.
func UnmountImage(ctx context.Context, image, dir string) error {
	return blockdev.Op("sparse.UnmountImage", "", unmountImage(ctx, image, dir))
}

func unmountImage(ctx context.Context, image, dir string) error {
	f, err := os.Open(image)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	devices, err := loop.Find(f)
	if err != nil {
		return err
	}
	for _, device := range devices {
		mounted, err := mountedFrom(device, dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if mounted {
			if err := sys.Unmount(dir); err != nil {
				return busy(err)
			}
		}
		if err := device.Detach(ctx); err != nil {
			return err
		}
	}
	return nil
}

func busy(err error) error {
	if errors.Is(err, syscall.EBUSY) {
		return fmt.Errorf("%w: %w", blockdev.ErrBusy, err)
	}
	return err
}

// growPool makes a mounted pool image at least size bytes large, and tells its
// size: the file, then the device, then the filesystem, each compared with the
// one before, so that growth cut short is finished by the next call.
func growPool(image, dir string, size int64) (int64, error) {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	status, err := sys.StatusOf(f)
	if err != nil {
		return 0, err
	}
	if status.Size < size {
		if err := sys.Allocate(f, 0, size); err != nil {
			return 0, tooLarge(err)
		}
		if err := syncFile(f); err != nil {
			return 0, err
		}
	}
	device, err := imageDevice(image)
	if err != nil {
		return 0, err
	}
	if device.Size < size {
		if device.Size, err = device.Grow(); err != nil {
			return 0, err
		}
	}
	return device.Size, growXFS(dir, device.Size)
}

func growXFS(dir string, size int64) error {
	at, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer at.Close()
	geometry, err := sys.XFSGeometryOf(at)
	if err != nil {
		return err
	}
	// A remainder smaller than what an allocation group needs stays unused.
	const smallest = 64 << 20
	if size-geometry.Blocks*geometry.BlockSize < smallest {
		return nil
	}
	return sys.GrowXFS(at, uint64(size/geometry.BlockSize), geometry.MaxInodes)
}
