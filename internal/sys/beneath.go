package sys

import (
	"errors"
	"os"
	"path"
	"strings"

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
