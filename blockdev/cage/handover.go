package cage

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"holdfast/internal/sys"
)

// Where the image is, as tools see it.
const (
	imageName  = "image"
	deviceDir  = "device"
	deviceName = "image"
)

// take puts an image into the cage. No path of this host is walked there and no
// descriptor is given away: a mount is.
func (k *cage) take(image string, d device) (inside string, err error) {
	place := imageName
	var mount *os.File
	if d.block {
		place = deviceDir
		inside = "/" + deviceDir + "/" + deviceName
		mount, err = sys.NewDeviceNode(deviceName, d.number, sys.Owner{UID: firstID, GID: firstID})
	} else {
		inside = "/" + imageName
		mount, err = k.mapped(image)
	}
	if err != nil {
		return "", err
	}
	defer mount.Close()
	if err := k.limitFiles(d.size); err != nil {
		return "", err
	}
	err = sys.InMountNamespace(k.mounts, func(in sys.Inside) error {
		at, err := in.Place(place)
		if err != nil {
			return err
		}
		defer at.Close()
		return sys.MoveMount(mount, at)
	})
	return inside, err
}

// mapped makes a mount of an image file in which it belongs to the cage's root.
// (A descriptor would not do: tools open by name, and to open the magic link of a
// descriptor the cage's root has no permission.)
func (k *cage) mapped(image string) (*os.File, error) {
	mount, err := sys.CloneMount(image)
	if err != nil {
		return nil, err
	}
	err = sys.MapOwners(mount, k.users)
	if errors.Is(err, syscall.EINVAL) {
		err = fmt.Errorf("%w: the file system that holds the image cannot map owners on this kernel (%w): use a pool on XFS, btrfs or ext4 and Linux 5.19 or newer",
			ErrUnavailable, err)
	}
	if err == nil {
		err = sys.SetAttr(mount, sys.MountAttr{NoSuid: true, NoDev: true, NoExec: true}, sys.Private)
	}
	if err != nil {
		mount.Close()
		return nil, err
	}
	return mount, nil
}

// limitFiles keeps tools from making the image file longer than the volume is.
// The process is the one that is held: it lives afterwards.
func (k *cage) limitFiles(size int64) error {
	if err := sys.LimitFileSize(k.pid, uint64(size)); err != nil { //nolint:gosec // not negative
		return err
	}
	if !k.alive() {
		return fmt.Errorf("cage %s has ended", k.id)
	}
	return nil
}
