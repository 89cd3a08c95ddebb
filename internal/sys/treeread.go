package sys

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// NodeKind is what an inode is.
type NodeKind uint8

const (
	NodeOther NodeKind = iota // a device, pipe or socket
	NodeDirectory
	NodeRegular
	NodeSymlink
)

// NodeStatus is what lstat tells of an inode in a tree.
type NodeStatus struct {
	FileID
	Kind    NodeKind
	Mode    uint32 // 07777
	Owner   Owner
	Links   uint64
	Size    int64
	ModTime time.Time // UTC

	IsDevice bool // of NodeOther: a block or character device
}

// Names lists a directory, in no order, without "." and "..".
func (d Dir) Names() ([]string, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, os.NewSyscallError("openat", err)
	}
	f := os.NewFile(uintptr(fd), ".")
	names, err := f.Readdirnames(-1)
	return names, errors.Join(err, f.Close())
}

// Status describes a name in d, a link itself; "." is d.
func (d Dir) Status(name string) (NodeStatus, error) {
	var st unix.Stat_t
	flags := unix.AT_SYMLINK_NOFOLLOW
	if name == "." {
		name, flags = "", unix.AT_EMPTY_PATH
	}
	if err := retry(func() error { return unix.Fstatat(d.fd, name, &st, flags) }); err != nil {
		return NodeStatus{}, wrap("fstatat", name, err)
	}
	s := NodeStatus{
		FileID: FileID{Device: uint64(st.Dev), Inode: st.Ino}, Mode: st.Mode & 0o7777, Owner: Owner{UID: int(st.Uid), GID: int(st.Gid)}, //nolint:unconvert // types differ by architecture
		Links: uint64(st.Nlink), Size: st.Size, ModTime: time.Unix(st.Mtim.Unix()).UTC(), //nolint:unconvert // types differ by architecture
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		s.Kind = NodeDirectory
	case unix.S_IFREG:
		s.Kind = NodeRegular
	case unix.S_IFLNK:
		s.Kind = NodeSymlink
	case unix.S_IFBLK, unix.S_IFCHR:
		s.IsDevice = true
	}
	return s, nil
}

// OpenFile opens a regular file in d for reading; ELOOP for a link.
func (d Dir) OpenFile(name string) (*os.File, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, wrap("open", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Target reads the text of a symbolic link in d.
func (d Dir) Target(name string) (string, error) {
	b := make([]byte, unix.PathMax)
	var n int
	err := retry(func() (err error) {
		n, err = unix.Readlinkat(d.fd, name, b)
		return err
	})
	if err != nil {
		return "", wrap("readlink", name, err)
	}
	return string(b[:n]), nil
}

// Xattrs reads the extended attributes of a name in d, of a link itself; "." is d.
// None, on file systems that have none at all.
func (d Dir) Xattrs(name string) (map[string][]byte, error) {
	// See SetXattr for the path.
	path := "/proc/self/fd/" + strconv.Itoa(d.fd) + "/" + name
	names, err := sized(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if errors.Is(err, unix.ENOTSUP) || err == nil && len(names) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, wrap("llistxattr", name, err)
	}
	attrs := map[string][]byte{}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		v, err := sized(func(b []byte) (int, error) { return unix.Lgetxattr(path, attr, b) })
		if err != nil {
			return nil, wrap("lgetxattr "+attr, name, err)
		}
		attrs[attr] = v
	}
	return attrs, nil
}
