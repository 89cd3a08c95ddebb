package sys

import (
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Dir is an open directory through which a tree is written. Every method takes
// one name in it, never a path, and follows no symbolic link: nothing outside
// of the directory can be reached. It is not safe for concurrent use.
type Dir struct{ fd int }

// Owner is the owner of an inode.
type Owner struct{ UID, GID int }

// TreeRoot gives the directory that f is, with a descriptor of its own.
func TreeRoot(f *os.File) (Dir, error) {
	d := Dir{fd: -1}
	err := control(f, func(fd uintptr) (err error) {
		d.fd, err = unix.Openat(int(fd), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	return d, wrap("open", f.Name(), err)
}

// OpenMount opens the root directory of a mount that NewMount gave, which
// itself is only a place. Both descriptors keep the mount.
func OpenMount(mount *os.File) (*os.File, error) {
	d, err := TreeRoot(mount)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(d.fd), mount.Name()), nil
}

// Close gives the descriptor back.
func (d Dir) Close() error { return os.NewSyscallError("close", unix.Close(d.fd)) }

// Open opens a directory in d.
func (d Dir) Open(name string) (Dir, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	return Dir{fd: fd}, wrap("open", name, err)
}

// Make makes a directory, with mode 0700. It is there already is an error (os.ErrExist).
func (d Dir) Make(name string) error { return wrap("mkdir", name, unix.Mkdirat(d.fd, name, 0o700)) }

// OpenBelow opens the directory at path, which goes down from d through
// directories only: no link, no "..", no other mount.
func (d Dir) OpenBelow(path string) (Dir, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat2(d.fd, path, &how)
		return err
	})
	return Dir{fd: fd}, wrap("open", path, err)
}

// Create makes a regular file that must not be there (os.ErrExist), mode 0600.
func (d Dir) Create(name string) (TreeFile, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(d.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	return TreeFile{fd: fd}, wrap("create", name, err)
}

// Symlink makes a symbolic link with exactly this text.
func (d Dir) Symlink(text, name string) error {
	return wrap("symlink", name, unix.Symlinkat(text, d.fd, name))
}

// Link makes name in d another name of target in from.
func (d Dir) Link(from Dir, target, name string) error {
	return wrap("link", name, unix.Linkat(from.fd, target, d.fd, name, 0))
}

// RemoveDir removes an empty directory.
func (d Dir) RemoveDir(name string) error {
	return wrap("rmdir", name, unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR))
}

// Chown changes the owner of a name, of a link itself.
func (d Dir) Chown(name string, o Owner) error {
	return wrap("chown", name, unix.Fchownat(d.fd, name, o.UID, o.GID, unix.AT_SYMLINK_NOFOLLOW))
}

// SetTimes sets the access and modification time of a name, of a link itself.
func (d Dir) SetTimes(name string, at time.Time) error {
	ts := times(at)
	return wrap("utimensat", name, unix.UtimesNanoAt(d.fd, name, ts[:], unix.AT_SYMLINK_NOFOLLOW))
}

// SetXattr sets an extended attribute of a name, of a link itself.
func (d Dir) SetXattr(name, attr string, value []byte) error {
	// The magic link stands for the open directory itself, so the path that is
	// resolved from there on is the one name.
	path := "/proc/self/fd/" + strconv.Itoa(d.fd) + "/" + name
	return wrap("setxattr "+attr, name, unix.Lsetxattr(path, attr, value, 0))
}

// Self gives the directory itself as a file whose attributes can be set.
func (d Dir) Self() TreeFile { return TreeFile(d) }

// TreeFile is an open file or directory of a tree that is being written.
type TreeFile struct{ fd int }

// Close gives the descriptor back.
func (f TreeFile) Close() error { return os.NewSyscallError("close", unix.Close(f.fd)) }

// File gives the file with a descriptor of its own.
func (f TreeFile) File() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "file of a tree"), nil
}

// WriteAt writes all of b at an offset.
func (f TreeFile) WriteAt(b []byte, offset int64) (int, error) {
	done := 0
	for done < len(b) {
		var n int
		err := retry(func() (err error) {
			n, err = unix.Pwrite(f.fd, b[done:], offset+int64(done))
			return err
		})
		if err != nil {
			return done, os.NewSyscallError("pwrite", err)
		}
		done += n
	}
	return done, nil
}

// Truncate sets the size, in bytes.
func (f TreeFile) Truncate(size int64) error {
	return os.NewSyscallError("ftruncate", retry(func() error { return unix.Ftruncate(f.fd, size) }))
}

// Chown sets the owner.
func (f TreeFile) Chown(o Owner) error {
	return os.NewSyscallError("fchown", unix.Fchown(f.fd, o.UID, o.GID))
}

// Chmod sets the permission bits, setuid, setgid and sticky included (07777).
func (f TreeFile) Chmod(mode uint32) error {
	return os.NewSyscallError("fchmod", unix.Fchmod(f.fd, mode))
}

// SetTimes sets the access and modification time.
func (f TreeFile) SetTimes(at time.Time) error {
	ts := times(at)
	// With an empty path the call is about the descriptor itself.
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(f.fd, "", ts[:], unix.AT_EMPTY_PATH))
}

// SetXattr sets an extended attribute.
func (f TreeFile) SetXattr(attr string, value []byte) error {
	return os.NewSyscallError("fsetxattr "+attr, unix.Fsetxattr(f.fd, attr, value, 0))
}

// times is at for both times, as seconds and nanoseconds (also before 1970).
func times(at time.Time) [2]unix.Timespec {
	ts := unix.Timespec{Sec: at.Unix(), Nsec: int64(at.Nanosecond())}
	return [2]unix.Timespec{ts, ts}
}
