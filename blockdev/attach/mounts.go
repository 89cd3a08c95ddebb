package attach

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// Mount is one line of a namespace's table of mounts, proc_pid_mountinfo(5).
type Mount struct {
	ID     uint64
	Parent uint64
	Device uint64 // of the superblock: the same in all namespaces, also for btrfs, whose st_dev differs
	Path   string // the mount point, seen from the namespace's root
	Type   string
	Source string

	ReadOnly   bool // this mount
	ReadOnlyFS bool // the filesystem itself
	Group      string
	Master     string
}

// ReadMounts parses a table of mounts.
func ReadMounts(table io.Reader) ([]Mount, error) {
	infos, err := mountinfo.GetMountsFromReader(table, nil)
	if err != nil {
		return nil, fmt.Errorf("mountinfo: %w", err)
	}
	return mountsOf(infos), nil
}

// mounts reads this process's table.
func mounts() ([]Mount, error) {
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("mountinfo: %w", err)
	}
	return mountsOf(infos), nil
}

func mountsOf(infos []*mountinfo.Info) []Mount {
	all := make([]Mount, 0, len(infos))
	for _, i := range infos {
		all = append(all, Mount{
			ID: uint64(i.ID), Parent: uint64(i.Parent), //nolint:gosec // kernel's numbers, not negative
			Device: sys.Device(i.Major, i.Minor),
			Path:   i.Mountpoint, Type: i.FSType, Source: i.Source,
			ReadOnly:   hasOption(i.Options, "ro"),
			ReadOnlyFS: hasOption(i.VFSOptions, "ro"),
			Group:      optional(i.Optional, "shared:"),
			Master:     optional(i.Optional, "master:"),
		})
	}
	return all
}

func hasOption(list, option string) bool {
	return slices.Contains(strings.Split(list, ","), option)
}

func optional(list, prefix string) string {
	for _, field := range strings.Fields(list) {
		if value, ok := strings.CutPrefix(field, prefix); ok {
			return value
		}
	}
	return ""
}

// mountAt finds what is mounted at a path of this namespace; nil when the path
// does not exist or is not a mount point.
func mountAt(path string) (*Mount, error) {
	place, err := sys.PlaceAt(path)
	if err != nil {
		return nil, ignoreNotExist(err)
	}
	if !place.MountRoot {
		return nil, nil
	}
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	m := ByID(all, place.MountID)
	if m == nil {
		return nil, fmt.Errorf("mount %d at %s is not in mountinfo", place.MountID, path)
	}
	return m, nil
}

// ByID finds a mount in a table, nil when it is not there.
func ByID(all []Mount, id uint64) *Mount {
	for i := range all {
		if all[i].ID == id {
			return &all[i]
		}
	}
	return nil
}

// Volume is how mounts of one volume are recognised in any namespace.
type Volume struct {
	Device uint64 // of the superblock, or of the block device
	// Source is set when only the block device is known: a btrfs superblock has
	// a device number of its own and is recognised by the path of its device.
	Source string
}

// VolumeOf asks the kernel for the identity of a request's volume: of the
// filesystem mounted on the stage or, when it is not mounted there, of the
// endpoint's device. blockdev.ErrInvalid when there is neither.
func VolumeOf(r Request) (Volume, error) {
	if r.Mounted != "" {
		m, err := mountAt(r.Mounted)
		if err != nil {
			return Volume{}, err
		}
		if m != nil {
			return Volume{Device: m.Device}, nil
		}
	}
	if r.Endpoint.Kind != blockdev.Block || r.Endpoint.Path == "" {
		return Volume{}, fmt.Errorf("%w: the volume is neither on the stage nor a block device", blockdev.ErrInvalid)
	}
	place, err := sys.PlaceBehind(r.Endpoint.Path)
	if err != nil {
		return Volume{}, err
	}
	if !place.IsBlock() {
		return Volume{}, fmt.Errorf("%w: %s is not a block device", blockdev.ErrInvalid, r.Endpoint.Path)
	}
	return Volume{Device: place.RDevice, Source: r.Endpoint.Path}, nil
}

// Is reports whether m is a mount of the volume.
func (v Volume) Is(m Mount) bool {
	return m.Device == v.Device || v.Source != "" && m.Type == "btrfs" && m.Source == v.Source
}

// Among gives the mounts of the volume.
func (v Volume) Among(all []Mount) []Mount {
	var found []Mount
	for _, m := range all {
		if v.Is(m) {
			found = append(found, m)
		}
	}
	return found
}
