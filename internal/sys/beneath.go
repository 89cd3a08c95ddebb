package sys

import (
	"errors"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Walk is how OpenBeneath goes down.
type Walk struct {
	Create   bool // make missing directories, 0755 whatever the umask
	OneMount bool // EXDEV rather than cross into another mount
}

// OpenBeneath opens a directory (O_PATH) by a clean, relative path below dir,
// one component at a time: no symbolic link is followed (ELOOP, or ENOTDIR when
// it stands last), nothing outside dir is reached, whoever changes names
// meanwhile. "." is dir itself.
func OpenBeneath(dir *os.File, name string, w Walk) (*os.File, error) {
	if name != path.Clean(name) || path.IsAbs(name) {
		return nil, &os.PathError{Op: "openat2", Path: name, Err: unix.EINVAL}
	}
	at, err := openBeneathOne(dir, ".", w)
	if err != nil || name == "." {
		return at, err
	}
	for _, component := range strings.Split(name, "/") {
		next, err := openBeneathOne(at, component, w)
		at.Close()
		if err != nil {
			return nil, err
		}
		at = next
	}
	return at, nil
}

func openBeneathOne(dir *os.File, name string, w Walk) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	if w.OneMount {
		how.Resolve |= unix.RESOLVE_NO_XDEV
	}
	var fd int
	err := control(dir, func(at uintptr) error {
		err := openat2(int(at), name, &how, &fd)
		if !errors.Is(err, unix.ENOENT) || !w.Create {
			return err
		}
		if err := mkdirBeneath(int(at), name, how); err != nil {
			return err
		}
		return openat2(int(at), name, &how, &fd)
	})
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: path.Join(dir.Name(), name), Err: err}
	}
	return os.NewFile(uintptr(fd), path.Join(dir.Name(), name)), nil
}

// mkdirBeneath makes a directory that anybody may pass; it is there already is
// success. The mode is set afterwards because the process's umask cuts it.
func mkdirBeneath(at int, name string, how unix.OpenHow) error {
	switch err := unix.Mkdirat(at, name, 0o755); {
	case errors.Is(err, unix.EEXIST):
		return nil
	case err != nil:
		return err
	}
	how.Flags &^= unix.O_PATH
	var fd int
	if err := openat2(at, name, &how, &fd); err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fchmod(fd, 0o755)
}

func openat2(at int, name string, how *unix.OpenHow, fd *int) error {
	return retry(func() (err error) {
		*fd, err = unix.Openat2(at, name, how)
		return err
	})
}

// OpenSocketBeneath opens (O_PATH) a socket by its name in dir. It follows no
// symbolic link: ENOTSOCK for anything but a socket. SocketPath names what
// was opened to connect(2), whoever changes names meanwhile.
func OpenSocketBeneath(dir *os.File, name string) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	var fd int
	err := control(dir, func(at uintptr) error { return openat2(int(at), name, &how, &fd) })
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	var status unix.Stat_t
	err = control(f, func(fd uintptr) error { return unix.Fstat(int(fd), &status) })
	if err == nil && status.Mode&unix.S_IFMT != unix.S_IFSOCK {
		err = unix.ENOTSOCK
	}
	if err != nil {
		f.Close()
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return f, nil
}

// SocketPath is a name of an opened socket; it holds for as long as that is open.
func SocketPath(socket *os.File) (path string, err error) {
	err = control(socket, func(fd uintptr) error {
		path = "/proc/self/fd/" + strconv.FormatUint(uint64(fd), 10)
		return nil
	})
	return path, err
}

// PeerPid is the process that listened on the unix socket which this one is
// connected to (SO_PEERCRED, unix(7)), by its number in this pid namespace; 0 for
// one of another.
func PeerPid(conn syscall.Conn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) { cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err == nil {
		err = failed
	}
	if err != nil {
		return 0, os.NewSyscallError("SO_PEERCRED", err)
	}
	return int(cred.Pid), nil
}
