package sys

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// MountAttr are the attributes of one mount (not of the filesystem below it).
type MountAttr struct {
	ReadOnly bool
	NoSuid   bool
	NoDev    bool
	NoExec   bool
}

func (a MountAttr) bits() int {
	var bits int
	for _, attr := range []struct {
		on  bool
		bit int
	}{
		{a.ReadOnly, unix.MOUNT_ATTR_RDONLY},
		{a.NoSuid, unix.MOUNT_ATTR_NOSUID},
		{a.NoDev, unix.MOUNT_ATTR_NODEV},
		{a.NoExec, unix.MOUNT_ATTR_NOEXEC},
	} {
		if attr.on {
			bits |= attr.bit
		}
	}
	return bits
}

// Filesystem says what to mount, and how.
type Filesystem struct {
	Device   string   // block device
	Type     string   // for example "ext4"
	ReadOnly bool     // of the filesystem itself: nothing writes, the journal neither
	Options  []string // of the type: "flag" or "key=value"
}

// MountError is a mount that the kernel refused, with its own words about why.
type MountError struct {
	Call   string
	Device string
	Type   string
	Text   string // what the kernel wrote to the context; may be empty
	Err    error
}

func (e *MountError) Error() string {
	msg := fmt.Sprintf("%s %s on %s: %v", e.Call, e.Type, e.Device, e.Err)
	if e.Text != "" {
		msg += ": " + e.Text
	}
	return msg
}

func (e *MountError) Unwrap() error { return e.Err }

// Mount mounts a block device's filesystem at the directory dir, whose last
// component is not followed when it is a symbolic link. *MountError when the
// kernel refuses the filesystem.
func Mount(fs Filesystem, dir string, attr MountAttr) error {
	mount, err := NewMount(fs, attr)
	if err != nil {
		return err
	}
	defer mount.Close()
	at, err := OpenPath(dir)
	if err != nil {
		return err
	}
	defer at.Close()
	return MoveMount(mount, at)
}

// NewMount makes a mount that is nowhere yet: it goes with its descriptor
// unless MoveMount gives it a place. The filesystem is shared with other mounts
// of the same device.
func NewMount(fs Filesystem, attr MountAttr) (*os.File, error) {
	fail := func(call, text string, err error) (*os.File, error) {
		return nil, &MountError{Call: call, Device: fs.Device, Type: fs.Type, Text: text, Err: err}
	}
	ctx, err := unix.Fsopen(fs.Type, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fail("fsopen", "", err)
	}
	defer unix.Close(ctx)
	if err := configure(ctx, fs); err != nil {
		return fail("fsconfig", contextText(ctx), err)
	}
	if err := retry(func() error { return unix.FsconfigCreate(ctx) }); err != nil {
		return fail("mount", contextText(ctx), err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, attr.bits())
	if err != nil {
		return fail("fsmount", contextText(ctx), err)
	}
	return os.NewFile(uintptr(fd), "mount of "+fs.Device), nil
}

func configure(ctx int, fs Filesystem) error {
	if err := unix.FsconfigSetString(ctx, "source", fs.Device); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	options := fs.Options
	if fs.ReadOnly {
		options = append([]string{"ro"}, options...)
	}
	for _, option := range options {
		key, value, hasValue := strings.Cut(option, "=")
		var err error
		if hasValue {
			err = unix.FsconfigSetString(ctx, key, value)
		} else {
			err = unix.FsconfigSetFlag(ctx, key)
		}
		if err != nil {
			return fmt.Errorf("option %s: %w", option, err)
		}
	}
	return nil
}

// contextText reads what the kernel has to say about a filesystem context: one
// message per read, each with a level ("e ", "w ", "i ") before it.
func contextText(ctx int) string {
	var messages []string
	buf := make([]byte, 4096)
	for range 16 {
		n, err := unix.Read(ctx, buf)
		if err != nil || n <= 0 {
			break
		}
		msg := strings.TrimSpace(string(buf[:n]))
		if len(msg) > 2 && msg[1] == ' ' {
			msg = msg[2:]
		}
		messages = append(messages, msg)
	}
	return strings.Join(messages, "; ")
}

// OpenPath opens a directory as a place (O_PATH): for MoveMount and the like. A
// symbolic link as its last component is not followed (ENOTDIR).
func OpenPath(dir string) (*os.File, error) {
	return open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
}

func open(path string, flags int) (*os.File, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// CloneMount makes a second mount of what the mount at dir shows, without the
// mounts below it. It is nowhere yet: see NewMount.
func CloneMount(dir string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), "clone of "+dir), nil
}

// NewDeviceNode makes a filesystem in memory that holds nothing but a block
// device's node, which nobody but owner may open. The mount is nowhere yet: see
// NewMount.
func NewDeviceNode(name string, device uint64, owner Owner) (*os.File, error) {
	memory, err := NewMount(Filesystem{Device: "none", Type: "tmpfs", Options: []string{"size=64k", "nr_inodes=8", "mode=755"}},
		MountAttr{NoSuid: true, NoExec: true})
	if err != nil {
		return nil, err
	}
	err = control(memory, func(dir uintptr) error {
		if err := unix.Mknodat(int(dir), name, unix.S_IFBLK|0o600, int(device)); err != nil { //nolint:gosec // a device number
			return wrap("mknod", name, err)
		}
		return wrap("chown", name, unix.Fchownat(int(dir), name, owner.UID, owner.GID, unix.AT_SYMLINK_NOFOLLOW))
	})
	if err != nil {
		memory.Close()
		return nil, err
	}
	return memory, nil
}

// SetAttr adds attributes to a mount and makes its propagation p.
func SetAttr(mount *os.File, add MountAttr, p Propagation) error {
	attr := unix.MountAttr{Attr_set: uint64(add.bits()), Propagation: uint64(p)} //nolint:gosec // bit masks
	err := control(mount, func(fd uintptr) error {
		return unix.MountSetattr(int(fd), "", unix.AT_EMPTY_PATH, &attr)
	})
	return wrap("mount_setattr", mount.Name(), err)
}

// MapOwners makes a mount that is nowhere yet show owners as a user namespace
// does: who is user 0 on the filesystem is user 0 in there. EINVAL when the
// filesystem's type cannot.
func MapOwners(mount, userNS *os.File) error {
	err := control(userNS, func(ns uintptr) error {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns)}
		return control(mount, func(fd uintptr) error {
			return unix.MountSetattr(int(fd), "", unix.AT_EMPTY_PATH, &attr)
		})
	})
	return wrap("mount_setattr(idmap)", mount.Name(), err)
}

// MoveMount puts a mount at a place. A mount that is there already is covered.
func MoveMount(mount, at *os.File) error {
	err := control(mount, func(from uintptr) error {
		return control(at, func(to uintptr) error {
			return unix.MoveMount(int(from), "", int(to), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		})
	})
	return wrap("move_mount", at.Name(), err)
}

// Propagation says how mounts made below a mount show in other namespaces.
type Propagation uint64

// The kinds of propagation, as mount_namespaces(7) names them.
const (
	KeepPropagation Propagation = 0
	Private         Propagation = unix.MS_PRIVATE
	Shared          Propagation = unix.MS_SHARED
	Slave           Propagation = unix.MS_SLAVE
)

// SetPropagation changes the propagation of the mount at dir.
func SetPropagation(dir string, p Propagation) error {
	return wrap("mount_setattr", dir, unix.MountSetattr(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW,
		&unix.MountAttr{Propagation: uint64(p)}))
}

// Unmount takes the topmost mount at path away. A symbolic link as the last
// component is not followed. EBUSY while it is in use, EINVAL when nothing is
// mounted there.
func Unmount(path string) error {
	return wrap("umount", path, retry(func() error { return unix.Unmount(path, unix.UMOUNT_NOFOLLOW) }))
}

// UnmountLazy takes the mount out of the namespace at once, with all below it;
// the filesystem lives on until its last user is done.
func UnmountLazy(path string) error {
	return wrap("umount", path, unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH))
}

// SyncFilesystem flushes the filesystem that f is on. An error means that
// something written since before f was opened may be lost.
func SyncFilesystem(f *os.File) error {
	return wrap("syncfs", f.Name(), control(f, func(fd uintptr) error { return unix.Syncfs(int(fd)) }))
}

// DeviceHeld reports whether the kernel (a mounted filesystem, in whatever
// namespace) or another process holds a block device exclusively. A device that
// is not there any more is not held.
func DeviceHeld(device string) (bool, error) {
	f, err := open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_NONBLOCK)
	switch {
	case err == nil:
		return false, f.Close()
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO):
		return false, nil
	}
	return false, err
}

// Place is what the kernel tells of an opened file's mount and filesystem.
type Place struct {
	MountRoot bool   // it is the root of a mount
	Device    uint64 // st_dev
	RDevice   uint64 // of a device node: the device
	Inode     uint64
	Mode      uint32
}

// MountID is the number of the mount that an opened file is on, as mountinfo
// has it. The filesystem is not asked: one that has shut down would refuse.
func MountID(f *os.File) (uint64, error) {
	return mountID(f, func(path string) (*os.File, error) { return open("/proc/"+path, unix.O_RDONLY) })
}

// mountID reads the file's fdinfo, below a /proc.
func mountID(f *os.File, openProc func(path string) (*os.File, error)) (id uint64, err error) {
	err = control(f, func(fd uintptr) error {
		info, err := openProc(fmt.Sprintf("thread-self/fdinfo/%d", fd))
		if err != nil {
			return err
		}
		defer info.Close()
		text := make([]byte, 512) // mnt_id is the third line
		n, err := info.Read(text)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text[:n])) {
			if value, ok := strings.CutPrefix(line, "mnt_id:"); ok {
				id, err = strconv.ParseUint(strings.TrimSpace(value), 10, 64)
				return err
			}
		}
		return errors.New("no mnt_id")
	})
	return id, wrap("fdinfo", f.Name(), err)
}

// IsBlock reports whether it is a block device's node.
func (p Place) IsBlock() bool { return p.Mode&unix.S_IFMT == unix.S_IFBLK }

// IsSocket reports whether it is a socket, or the file of one.
func (p Place) IsSocket() bool { return p.Mode&unix.S_IFMT == unix.S_IFSOCK }

// PlaceOf asks about f.
func PlaceOf(f *os.File) (Place, error) {
	var p Place
	err := control(f, func(fd uintptr) (err error) {
		p, err = statx(int(fd), "", unix.AT_EMPTY_PATH)
		return err
	})
	return p, wrap("statx", f.Name(), err)
}

// PlaceAt asks about a path; a symbolic link as its last component is not
// followed.
func PlaceAt(path string) (Place, error) {
	p, err := statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW)
	return p, wrap("statx", path, err)
}

// PlaceBehind is PlaceAt that follows links, also those of /proc, and never
// waits for a server of the filesystem.
func PlaceBehind(path string) (Place, error) {
	p, err := statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC)
	return p, wrap("statx", path, err)
}

func statx(fd int, path string, flags int) (Place, error) {
	var st unix.Statx_t
	err := retry(func() error {
		return unix.Statx(fd, path, flags|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE|unix.STATX_INO, &st)
	})
	if err != nil {
		return Place{}, err
	}
	return placeOf(&st), nil
}

func placeOf(st *unix.Statx_t) Place {
	return Place{
		MountRoot: st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0,
		Device:    unix.Mkdev(st.Dev_major, st.Dev_minor),
		RDevice:   unix.Mkdev(st.Rdev_major, st.Rdev_minor),
		Inode:     st.Ino,
		Mode:      uint32(st.Mode),
	}
}

// Device is the number of a device, as st_dev and st_rdev hold it.
func Device(major, minor int) uint64 {
	return unix.Mkdev(uint32(major), uint32(minor)) //nolint:gosec // kernel's numbers, not negative
}

// MajorMinor is the reverse of Device.
func MajorMinor(device uint64) (major, minor uint32) {
	return unix.Major(device), unix.Minor(device)
}

// retry repeats a call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// wrap names the call and the object; nil stays nil.
func wrap(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}
