package export

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

const field = "target.socket"

// errTaken is a blockdev.ErrBusy.
var errTaken = fmt.Errorf("%w: there is something else at target.socket", blockdev.ErrBusy)

// named runs do with a name for a link: by its opened directory, whoever changes names
// above it meanwhile.
func (a *Attacher) named(link string, do func(name string) error) error {
	dir, name, err := a.door.Directory(field, link)
	if err != nil {
		return err
	}
	defer dir.Close()
	at, err := sys.SocketPath(dir)
	if err != nil {
		return err
	}
	return do(at + "/" + name)
}

// linked tells where a link leads, "" for none. errTaken for what is no link.
func (a *Attacher) linked(link string) (to string, err error) {
	err = a.named(link, func(name string) error {
		to, err = os.Readlink(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case errors.Is(err, syscall.EINVAL):
			return errTaken
		}
		return err
	})
	return to, err
}

// ours reports whether a link leads to a socket of the volume's workers, perhaps one of
// an opening that a boot of the host has ended. Of an opening that has ended by force
// there is no endpoint: the directory has the volume's name.
func ours(to string, r attach.Request) bool {
	if r.Endpoint.Path == "" {
		return filepath.Base(filepath.Dir(to)) == string(r.Volume)
	}
	return to != "" && filepath.Dir(to) == filepath.Dir(r.Endpoint.Path)
}

// link makes the target's link lead to the endpoint. One that leads elsewhere, but for
// an earlier socket of the volume, is not touched.
func (a *Attacher) link(r attach.Request) error {
	to, err := a.linked(r.Target.Socket)
	switch {
	case err != nil:
		return err
	case to == r.Endpoint.Path:
		return nil
	case to != "" && !ours(to, r):
		return errTaken
	}
	return a.named(r.Target.Socket, func(name string) error {
		if to != "" {
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		err := os.Symlink(r.Endpoint.Path, name)
		if errors.Is(err, fs.ErrExist) {
			return errTaken
		}
		return err
	})
}

// unlink takes the target's link away, if it is there and leads to the volume.
func (a *Attacher) unlink(r attach.Request) error {
	to, err := a.linked(r.Target.Socket)
	if errors.Is(err, blockdev.ErrInvalid) || errors.Is(err, errTaken) { // its directory, or it itself, is not ours any more
		return nil
	}
	if err != nil || !ours(to, r) {
		return err
	}
	return a.named(r.Target.Socket, func(name string) error {
		if err := os.Remove(name); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

// ownerOf is the user of a socket, and nothing but a socket.
func ownerOf(path string) (int, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return 0, err
	}
	status, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode()&fs.ModeSocket == 0 {
		return 0, fmt.Errorf("%w: the volume is not served by a socket", blockdev.ErrInvalid)
	}
	return int(status.Uid), nil
}
