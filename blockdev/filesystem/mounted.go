package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"holdfast/internal/sys"
)

// GrowMounted grows the filesystem mounted at dir to its device; it is there
// already is success. ErrCannotGrowMounted, with the reason, where the kernel
// refuses; ErrReadOnly where it is mounted so. The growth is durable when it returns, as far as the device is.
func (x Tools) GrowMounted(ctx context.Context, dir string, t Type) error {
	if err := ctx.Err(); err != nil {
		return failed("grow", t, err)
	}
	root, err := openMounted(dir, t)
	if err != nil {
		return failed("grow", t, err)
	}
	defer root.Close()
	switch t {
	case Ext4:
		err = growMountedExt4(root)
	case XFS:
		err = growMountedXFS(root)
	case Btrfs:
		err = sys.GrowBtrfs(root)
	}
	switch {
	case err == nil:
		err = sys.SyncFilesystem(root)
	case errors.Is(err, syscall.EROFS):
		err = fmt.Errorf("%w: %w", ErrReadOnly, err)
	}
	return failed("grow", t, err)
}

// SizeMounted asks the kernel for the size in bytes of the filesystem mounted
// at dir. The backing file of its device may still show an older one.
func (x Tools) SizeMounted(ctx context.Context, dir string, t Type) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, failed("size", t, err)
	}
	root, err := openMounted(dir, t)
	if err != nil {
		return 0, failed("size", t, err)
	}
	defer root.Close()
	size, err := sizeMounted(root, t)
	return size, failed("size", t, err)
}

func sizeMounted(root *os.File, t Type) (int64, error) {
	switch t {
	case Ext4:
		s, _, err := mountedExt4Super(root)
		if err != nil {
			return 0, err
		}
		return s.size(), nil
	case XFS:
		g, err := sys.XFSGeometryOf(root)
		return g.Blocks * g.BlockSize, err
	default:
		return sys.BtrfsSize(root)
	}
}

// openMounted opens the root of a mounted filesystem and makes sure of its type,
// since each type's calls mean something else to another.
func openMounted(dir string, t Type) (*os.File, error) {
	magic, ok := map[Type]int64{Ext4: sys.MagicExt4, XFS: sys.MagicXFS, Btrfs: sys.MagicBtrfs}[t]
	if !ok {
		return nil, errors.ErrUnsupported
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	have, err := sys.FilesystemMagic(f)
	if err == nil && have != magic {
		err = fmt.Errorf("what is mounted at %s is of type %#x, not %s", dir, have, t)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// mountedDevice opens the block device under a mounted ext4 or XFS.
func mountedDevice(root *os.File) (*os.File, error) {
	place, err := sys.PlaceOf(root)
	if err != nil {
		return nil, err
	}
	major, minor := sys.MajorMinor(place.Device)
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", major, minor))
	if err != nil {
		return nil, err
	}
	return os.Open("/dev/" + filepath.Base(link))
}

// mountedExt4Super reads the superblock through the block device, whose cache
// the mounted ext4 works in, and tells the device's size.
func mountedExt4Super(root *os.File) (*ext4Super, int64, error) {
	dev, err := mountedDevice(root)
	if err != nil {
		return nil, 0, err
	}
	defer dev.Close()
	b, err := readAt(dev, ext4SuperOffset, ext4SuperBytes)
	if err != nil {
		return nil, 0, err
	}
	// The kernel brings the checksum up to date only when it writes the block.
	s, err := parseExt4SuperUnsummed(b)
	if err != nil {
		return nil, 0, err
	}
	size, err := dev.Seek(0, io.SeekEnd)
	return s, size, err
}

func growMountedExt4(root *os.File) error {
	s, device, err := mountedExt4Super(root)
	if err != nil || s.fills(device) {
		return err
	}
	err = sys.GrowExt4(root, uint64(device/s.blockSize))
	switch {
	case errors.Is(err, fs.ErrPermission):
		if cannot := canGrowExt4(); cannot != nil {
			return cannot
		}
		return fmt.Errorf("%w: it has errors or is otherwise barred from it (%w)", ErrCannotGrowMounted, err)
	case errors.Is(err, errors.ErrUnsupported):
		return fmt.Errorf("%w: %w", ErrCannotGrowMounted, err)
	}
	return err
}

func growMountedXFS(root *os.File) error {
	dev, err := mountedDevice(root)
	if err != nil {
		return err
	}
	defer dev.Close()
	device, err := dev.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	g, err := sys.XFSGeometryOf(root)
	if err != nil {
		return err
	}
	blocks := device / g.BlockSize
	if blocks <= g.Blocks {
		return nil
	}
	return sys.GrowXFS(root, uint64(blocks), g.MaxInodes)
}

// Recovers reports whether a copy of the device at one moment can be used like the
// device after a power cut: consistent, with all that was flushed. ext4 needs a
// journal for that, which small ones do not have. A copy of a mounted btrfs needs a
// UUID of its own before it can be mounted, and can be given one only when its log
// is empty, as after a freeze.
func (x Tools) Recovers(ctx context.Context, dir string, t Type) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, failed("read", t, err)
	}
	root, err := openMounted(dir, t)
	if err != nil {
		return false, failed("read", t, err)
	}
	defer root.Close()
	if t != Ext4 {
		return t == XFS, nil
	}
	s, _, err := mountedExt4Super(root)
	if err != nil {
		return false, failed("read", t, err)
	}
	return s.hasJournal(), nil
}

// Freeze flushes the filesystem mounted at dir and holds all writes to it until
// Thaw, so that its device can be copied. ErrFrozen when it is frozen.
func (x Tools) Freeze(dir string) error {
	err := withDir("freeze", dir, sys.Freeze)
	if errors.Is(err, sys.ErrFrozen) {
		return ErrFrozen
	}
	return err
}

// Thaw ends a Freeze; not frozen is success.
func (x Tools) Thaw(dir string) error { return withDir("thaw", dir, sys.Thaw) }

func withDir(op, dir string, fn func(*os.File) error) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("%s filesystem: %w", op, err)
	}
	defer f.Close()
	if err := fn(f); err != nil {
		return fmt.Errorf("%s filesystem: %w", op, err)
	}
	return nil
}

// growUnmounted is the offline growth of types that only grow mounted: being
// grown already is success.
func growUnmounted(path string, t Type) error {
	device, err := deviceSize(path)
	if err != nil {
		return err
	}
	size, err := sizeAt(path, t)
	if err != nil {
		return err
	}
	if size > device {
		return damaged("filesystem of %d bytes on a device of %d bytes", size, device)
	}
	if device-size < growthUnit {
		return nil
	}
	return fmt.Errorf("%w: it has %d of %d bytes", ErrNeedsMount, size, device)
}

// growthUnit is the least growth that is asked for, in bytes.
const growthUnit = MiB
