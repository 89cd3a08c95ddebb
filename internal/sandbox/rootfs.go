package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// rootfs is a sandbox's root filesystem in the making: an image that nobody
// writes to below, and a layer in memory above it that is this sandbox's alone
// and is charged to it.
//
// With a user namespace the image is seen through a mount that maps owners, so
// one image serves sandboxes with different ranges of users.
type rootfs struct {
	dir     string // of the sandbox
	image   string // directory
	firstID int    // 0: no user namespace
	scratch int64  // bytes of the upper layer
}

func (r rootfs) path() string  { return filepath.Join(r.dir, "rootfs") }
func (r rootfs) lower() string { return filepath.Join(r.dir, "image") }
func (r rootfs) layer() string { return filepath.Join(r.dir, "layer") }

// assemble mounts the root filesystem at path.
func (r rootfs) assemble() error {
	for _, dir := range []string{r.path(), r.lower(), r.layer()} {
		if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := r.placeImage(); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if err := r.placeLayer(); err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	err := sys.Mount(sys.Filesystem{Device: "overlay", Type: "overlay", Options: []string{
		"lowerdir=" + r.lower(), "upperdir=" + filepath.Join(r.layer(), "upper"), "workdir=" + filepath.Join(r.layer(), "work"),
	}}, r.path(), sys.MountAttr{NoDev: true})
	if err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	return nil
}

// placeImage mounts the image where overlay finds it, with its owners mapped.
func (r rootfs) placeImage() error {
	mount, err := sys.CloneMount(r.image)
	if err != nil {
		return err
	}
	defer mount.Close()
	if err := sys.SetAttr(mount, sys.MountAttr{ReadOnly: true, NoDev: true}, sys.Private); err != nil {
		return err
	}
	if r.firstID > 0 {
		ns, err := run.UserNamespace(r.firstID, idRange)
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := sys.MapOwners(mount, ns); err != nil {
			return err
		}
	}
	return place(mount, r.lower())
}

// placeLayer makes the upper layer. Its root is the root directory of the
// sandbox, so it has that one's mode and owner.
func (r rootfs) placeLayer() error {
	mount, err := sys.NewMount(sys.Filesystem{Device: "tmpfs", Type: "tmpfs", Options: []string{
		fmt.Sprintf("size=%d", r.scratch), "nr_inodes=262144", "mode=0711",
	}}, sys.MountAttr{NoDev: true})
	if err != nil {
		return err
	}
	defer mount.Close()
	if err := place(mount, r.layer()); err != nil {
		return err
	}
	upper, work := filepath.Join(r.layer(), "upper"), filepath.Join(r.layer(), "work")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o700)); err != nil {
		return err
	}
	return errors.Join(os.Chmod(upper, 0o755), os.Chown(upper, r.firstID, r.firstID)) //nolint:gosec // the sandbox's own root directory
}

func place(mount *os.File, dir string) error {
	at, err := sys.OpenPath(dir)
	if err != nil {
		return err
	}
	defer at.Close()
	return sys.MoveMount(mount, at)
}

// makeDirs makes the directories of a mount path that are missing, owned by the
// sandbox's root. Symbolic links of the image are not followed: a mount path that
// leads through one is refused when the volume is attached.
func (r rootfs) makeDirs(mountPath string) error {
	root, err := os.OpenRoot(r.path())
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // a place, nothing written
	done := ""
	for _, part := range strings.Split(strings.Trim(mountPath, "/"), "/") {
		done = filepath.Join(done, part)
		if _, err := root.Lstat(done); err == nil {
			continue
		}
		if err := root.Mkdir(done, 0o755); err != nil {
			return err
		}
		if err := root.Lchown(done, r.firstID, r.firstID); err != nil {
			return err
		}
	}
	return nil
}

// release takes the mounts away from the host: the container has its own copies.
// It is done already is success.
func (r rootfs) release() error {
	var errs []error
	for _, dir := range []string{r.path(), r.lower(), r.layer()} {
		for {
			err := sys.UnmountLazy(dir)
			if err == nil {
				continue // one may lie upon another after a crash
			}
			if !notMounted(err) {
				errs = append(errs, err)
			}
			break
		}
	}
	return errors.Join(errs...)
}
