package attach

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
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

// Mounts reads the table of this process's namespace.
func Mounts() ([]Mount, error) {
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

func mountOf(i sys.MountInfo) Mount {
	group := func(number uint64) string {
		if number == 0 {
			return ""
		}
		return strconv.FormatUint(number, 10)
	}
	return Mount{
		ID: i.ID, Parent: i.Parent, Device: i.Device, Path: i.Path, Type: i.Type, Source: i.Source,
		ReadOnly: i.ReadOnly, ReadOnlyFS: i.ReadOnlyFS, Group: group(i.Group), Master: group(i.Master),
	}
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

// mountAt finds what is mounted at a path of this namespace that leads through
// no symbolic link; nil when the path does not exist or is not a mount point.
func mountAt(path string) (*Mount, error) {
	// Asked first because it is quick. A filesystem that has shut down answers
	// with an error, and so does an older kernel: only the table tells then.
	info, root, err := sys.MountAt(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && !root:
		return nil, nil
	case err == nil && info.Path == path:
		m := mountOf(info)
		return &m, nil
	case errors.Is(err, errors.ErrUnsupported):
		err = nil
	}
	all, tableErr := Mounts()
	if tableErr != nil {
		return nil, tableErr
	}
	for i := len(all) - 1; i >= 0; i-- { // the last one covers the others
		if all[i].Path == path {
			return &all[i], nil
		}
	}
	return nil, err
}

// MountOnHere is MountOn in this process's own namespace. It costs the same
// however many mounts there are, where the kernel can tell of one.
func MountOnHere(parent, dir *os.File) (*Mount, error) {
	below, err := sys.MountOf(parent)
	if err == nil {
		var info sys.MountInfo
		if info, err = sys.MountOf(dir); err == nil && info.ID != below.ID {
			m := mountOf(info)
			return &m, nil
		}
	}
	if err == nil {
		return nil, nil
	}
	all, err := Mounts()
	if err != nil {
		return nil, err
	}
	return MountOn(all, parent, dir, sys.MountID)
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

// Volume is how mounts of one volume are recognised in any namespace. The zero
// value is a volume that is not known, and is recognised nowhere.
type Volume struct {
	Device uint64 // of the superblock, or of the block device
	// Source is set when only the block device is known: a btrfs superblock has
	// a device number of its own and is recognised by the path of its device.
	Source string
}

// VolumeOf asks the kernel for the identity of a request's volume: of the
// filesystem mounted on the stage or, when it is not mounted there, of the
// endpoint's device. A volume that is neither mounted nor open is not known.
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
	if r.Endpoint.Path == "" {
		return Volume{}, nil
	}
	place, err := sys.PlaceBehind(r.Endpoint.Path)
	if err != nil {
		return Volume{}, err
	}
	if r.Endpoint.Kind != blockdev.Block || !place.IsBlock() {
		return Volume{}, fmt.Errorf("%w: %s is not a block device", blockdev.ErrInvalid, r.Endpoint.Path)
	}
	return Volume{Device: place.RDevice, Source: r.Endpoint.Path}, nil
}

// Known reports whether the volume can be recognised.
func (v Volume) Known() bool { return v != Volume{} }

// NotKnown is why nobody can say whether what is mounted at a path is a volume
// that is not known. It does not happen in the life of an attachment: while one
// exists, its volume is on the stage.
func NotKnown(there *Mount) error {
	return fmt.Errorf("%w: something (%s) is mounted at %s, and the volume is not on the stage to be compared with it",
		blockdev.ErrBusy, there.Type, there.Path)
}

// Is reports whether m is a mount of the volume.
func (v Volume) Is(m Mount) bool {
	return v.Known() && m.Device == v.Device ||
		v.Source != "" && m.Type == "btrfs" && m.Source == v.Source
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

// MountOn tells what is mounted on a directory, in the namespace whose table is
// all; nil for nothing. It goes by the mount's numbers, as told by mountID, of the
// directory, opened as it shows itself, and of its parent.
func MountOn(all []Mount, parent, dir *os.File, mountID func(*os.File) (uint64, error)) (*Mount, error) {
	below, err := mountID(parent)
	if err != nil {
		return nil, err
	}
	id, err := mountID(dir)
	if err != nil || id == below {
		return nil, err
	}
	m := ByID(all, id)
	if m == nil {
		return nil, fmt.Errorf("mount %d at %s is not in mountinfo", id, dir.Name())
	}
	return m, nil
}

// Covered reports whether the volume is mounted at the same path as there, which
// is not it, and so lies below it.
func (v Volume) Covered(all []Mount, there *Mount) bool {
	return slices.ContainsFunc(v.Among(all), func(m Mount) bool { return m.Path == there.Path })
}

// SameVolume checks that what is mounted where a request wants its volume is
// that volume, as the request wants it. blockdev.ErrBusy when it is not.
func SameVolume(v Volume, there *Mount, r Request) error {
	if !v.Is(*there) {
		return fmt.Errorf("%w: something else (%s) is mounted at %s", blockdev.ErrBusy, there.Type, there.Path)
	}
	if there.ReadOnly != r.ReadOnly {
		return fmt.Errorf("%w: the volume is mounted at %s with read-only=%t: detach it first", blockdev.ErrBusy, there.Path, there.ReadOnly)
	}
	return nil
}

// Clone makes a mount of the volume on the stage that is nowhere yet: nosuid,
// nodev, private, read-only when the request is.
func Clone(r Request) (*os.File, error) {
	place, err := sys.PlaceAt(r.Mounted)
	if err != nil {
		return nil, err
	}
	if !place.MountRoot { // a clone would show a directory of ours
		return nil, fmt.Errorf("%w: the volume is not mounted at %q", blockdev.ErrInvalid, r.Mounted)
	}
	clone, err := sys.CloneMount(r.Mounted)
	if err != nil {
		return nil, err
	}
	attr := sys.MountAttr{NoSuid: true, NoDev: true, ReadOnly: r.ReadOnly}
	if err := sys.SetAttr(clone, attr, sys.Private); err != nil {
		clone.Close()
		return nil, err
	}
	return clone, nil
}
