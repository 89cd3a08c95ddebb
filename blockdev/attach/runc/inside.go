package runc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// put mounts the clone at the request's mount path, inside the namespace.
func put(in sys.Inside, clone *os.File, v attach.Volume, r attach.Request) error {
	parent, err := walk(in, path.Dir(r.MountPath), true)
	if err != nil {
		return explain(r.MountPath, err)
	}
	defer parent.Close()
	at, err := sys.OpenBeneath(parent, path.Base(r.MountPath), sys.Walk{Create: true})
	if err != nil {
		return explain(r.MountPath, err)
	}
	defer at.Close()
	all, err := mounts(in)
	if err != nil {
		return err
	}
	there, err := attach.MountOn(all, parent, at, in.MountID)
	if err != nil {
		return err
	}
	if there != nil {
		return attach.SameVolume(v, there, r)
	}
	err = sys.MoveMount(clone, at)
	if errors.Is(err, fs.ErrNotExist) { // removed since the walk
		return explain(r.MountPath, err)
	}
	return err
}

// walk opens a directory by its absolute path inside the namespace, following
// no symbolic link.
func walk(in sys.Inside, p string, create bool) (*os.File, error) {
	return sys.OpenBeneath(in.Root, relative(p), sys.Walk{Create: create})
}

// relative makes an absolute path relative to the root.
func relative(p string) string { return path.Clean("./" + p) }

// lookFor finds the mounts of the volume in the namespace. A volume that is not
// known is nowhere if nothing is mounted at the mount path.
func lookFor(in sys.Inside, v attach.Volume, mountPath string) ([]attach.Mount, error) {
	all, err := mounts(in)
	if err != nil || v.Known() {
		return v.Among(all), err
	}
	for i := range all {
		if all[i].Path == mountPath {
			return nil, attach.NotKnown(&all[i])
		}
	}
	return nil, nil
}

// takeAway unmounts all mounts of the volume in the namespace, that at the
// mount path last, so that it is still there while others cannot go.
func takeAway(ctx context.Context, in sys.Inside, v attach.Volume, r attach.Request) error {
	mountPath := r.MountPath
	found, err := lookFor(in, v, mountPath)
	if err != nil {
		return err
	}
	for _, m := range lastFirst(found, mountPath) {
		if err := unmount(ctx, in, v, m, r.Lazy); err != nil {
			return err
		}
	}
	left, err := lookFor(in, v, mountPath)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("%w: the container mounts the volume again (at %s)", blockdev.ErrBusy, left[0].Path)
	}
	return err
}

// lastFirst orders mounts: the last made first (it may lie upon an earlier one),
// those at the mount path at the end.
func lastFirst(found []attach.Mount, mountPath string) []attach.Mount {
	var first, last []attach.Mount
	for i := len(found) - 1; i >= 0; i-- {
		if found[i].Path == mountPath {
			last = append(last, found[i])
		} else {
			first = append(first, found[i])
		}
	}
	return append(first, last...)
}

// unmount takes one mount of the volume away, from where it is now: the tenant
// may have renamed a directory above it.
func unmount(ctx context.Context, in sys.Inside, v attach.Volume, m attach.Mount, lazy bool) error {
	if m.Path == "/" {
		return fmt.Errorf("%w: the volume is the container's root", blockdev.ErrBusy)
	}
	parent, err := walk(in, path.Dir(m.Path), false)
	if err != nil {
		return moved(m, err)
	}
	defer parent.Close()
	name := path.Base(m.Path)
	if err := topIs(in, v, parent, name); err != nil {
		return moved(m, err)
	}
	if lazy {
		err = in.UnmountLazyAt(parent, name)
	} else {
		err = attach.Patiently(ctx, func() error { return in.UnmountAt(parent, name) })
	}
	switch {
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%w: %s is in use in the container: %w", blockdev.ErrBusy, m.Path, err)
	case errors.Is(err, syscall.EINVAL), errors.Is(err, fs.ErrNotExist): // unmounted or renamed meanwhile
		return nil
	}
	return err
}

// topIs checks that the topmost mount at a place is of the volume.
func topIs(in sys.Inside, v attach.Volume, parent *os.File, name string) error {
	dir, err := sys.OpenBeneath(parent, name, sys.Walk{})
	if err != nil {
		return err
	}
	defer dir.Close() // else it is busy
	all, err := mounts(in)
	if err != nil {
		return err
	}
	there, err := attach.MountOn(all, parent, dir, in.MountID)
	if err != nil {
		return err
	}
	if there == nil || !v.Is(*there) {
		return fmt.Errorf("%w: the container has mounted something over it", blockdev.ErrBusy)
	}
	return nil
}

// moved explains that a mount is not where the kernel's table had it.
func moved(m attach.Mount, err error) error {
	for _, changed := range []error{fs.ErrNotExist, syscall.ELOOP, syscall.ENOTDIR, syscall.EXDEV, syscall.EAGAIN} {
		if errors.Is(err, changed) {
			return fmt.Errorf("%w: the container changes names above %s: %w", blockdev.ErrBusy, strings.ToValidUTF8(m.Path, "?"), err)
		}
	}
	return err
}
