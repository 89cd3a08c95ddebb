package sparse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"holdfast/blockdev"
	"holdfast/internal/sys"
)

// Mode is how a place for a pool, or for metadata, is made.
type Mode string

const (
	Auto    Mode = "auto"    // Reflink where the directory can, else Image
	Reflink Mode = "reflink" // the directory itself, whose filesystem shares bytes between files
	Image   Mode = "image"   // a filesystem in a fully allocated file in the directory
	Copy    Mode = "copy"    // the directory itself; clones are copied
)

// The names that Prepare and PrepareMetadata make in their directory.
const (
	poolImage  = "pool.img"
	poolMount  = "pool"
	metaImage  = "meta.img"
	metaMount  = "meta"
	metaBytes  = 256 << 20
	imageAlign = 1 << 20
)

// The bounds of a pool image's default size, in bytes. XFS takes no less.
const (
	minPoolBytes = 300 << 20
	maxPoolBytes = 20 << 30
)

// Prepared is a place that is ready to be used.
type Prepared struct {
	Dir   string // where the pool, or the metadata, is
	Mode  Mode   // what it is: Reflink, Image or Copy
	Image string // of Mode Image: the file
	Size  int64  // of Mode Image: its size in bytes
}

// Prepare makes dir/pool a place for a pool. In mode Image that is the mount
// point of dir/pool.img, an XFS with reflink of size bytes (0: a quarter of the
// free space, at least 300 MiB and at most 20 GiB), which is made if it is not
// there, grown if it is smaller than a size that is given, and mounted if it is
// not. What an earlier Prepare made is always used again: Auto finds it, any
// other mode is blockdev.ErrInvalid. Mount and device stay when the process
// ends; see Unprepare. errors.ErrUnsupported for Reflink where the filesystem
// cannot; blockdev.ErrNoSpace when the image does not fit. One caller at a time.
func Prepare(ctx context.Context, dir string, mode Mode, size int64) (Prepared, error) {
	p, err := prepare(ctx, dir, mode, size)
	return p, blockdev.Op("sparse.Prepare", "", err)
}

func prepare(ctx context.Context, dir string, mode Mode, size int64) (Prepared, error) {
	dir, err := ready(ctx, dir)
	if err != nil {
		return Prepared{}, err
	}
	have, can, err := preparedBefore(dir)
	if err != nil {
		return Prepared{}, err
	}
	switch {
	case have != "" && (mode == Auto || mode == have):
		mode = have
	case have != "":
		return Prepared{}, fmt.Errorf("%w: %s has a pool of mode %s, not %s", blockdev.ErrInvalid, dir, have, mode)
	case mode == Auto && can:
		mode = Reflink
	case mode == Auto:
		mode = Image
	}
	switch mode {
	case Image:
		return mountedPool(ctx, dir, size)
	case Reflink:
		if !can {
			return Prepared{}, fmt.Errorf("%w: the filesystem of %s cannot share bytes between files", errors.ErrUnsupported, dir)
		}
	case Copy:
	default:
		return Prepared{}, fmt.Errorf("%w: pool mode %q", blockdev.ErrInvalid, mode)
	}
	p := Prepared{Dir: filepath.Join(dir, poolMount), Mode: mode}
	return p, makeDir(p.Dir)
}

// preparedBefore tells the mode of what is there, "" for nothing, and whether
// files in dir/pool can share bytes. A directory pool is of the mode that its
// filesystem allows.
func preparedBefore(dir string) (have Mode, can bool, err error) {
	if there, err := exists(filepath.Join(dir, poolImage)); there || err != nil {
		return Image, false, err
	}
	at := filepath.Join(dir, poolMount)
	there, err := exists(at)
	if err == nil && !there {
		at = dir
	}
	if err == nil {
		can, err = CanReflink(at)
	}
	if err != nil {
		return "", false, err
	}
	there, err = exists(filepath.Join(dir, poolMount, poolFile))
	switch {
	case !there:
		return "", can, err
	case can:
		return Reflink, can, nil
	}
	return Copy, can, nil
}

// ready makes dir, and tells its absolute path.
func ready(ctx context.Context, dir string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, makeDir(dir)
}

// makeDir makes a directory for us alone, durably.
func makeDir(dir string) error {
	if there, err := exists(dir); there || err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return noSpace(err)
	}
	return syncDir(filepath.Dir(dir))
}

// CanReflink reports whether files in dir can share bytes, by trying it once.
func CanReflink(dir string) (bool, error) {
	can, err := canReflink(dir)
	return can, blockdev.Op("sparse.CanReflink", "", err)
}

func canReflink(dir string) (can bool, err error) {
	var files [2]*os.File
	for i := range files {
		if files[i], err = os.CreateTemp(dir, ".reflink-"); err != nil {
			return false, noSpace(err)
		}
		defer func() { _ = os.Remove(files[i].Name()) }() // an empty file with a name of its own
		defer files[i].Close()
	}
	if _, err := files[0].Write(make([]byte, 4096)); err != nil {
		return false, noSpace(err)
	}
	err = sys.CloneFile(files[1], files[0])
	if err != nil && sys.IsNoReflink(err) {
		return false, nil
	}
	return err == nil, noSpace(err)
}

func mountedPool(ctx context.Context, dir string, size int64) (Prepared, error) {
	p := Prepared{Dir: filepath.Join(dir, poolMount), Mode: Image, Image: filepath.Join(dir, poolImage)}
	there, err := exists(p.Image)
	if err != nil {
		return p, err
	}
	if !there {
		if place, err := sys.PlaceAt(p.Dir); err == nil && place.MountRoot {
			return p, fmt.Errorf("%s: %w: something is mounted there", p.Dir, blockdev.ErrBusy)
		}
		if size == 0 {
			if size, err = defaultPoolSize(dir); err != nil {
				return p, err
			}
		}
		if size < minPoolBytes {
			return p, fmt.Errorf("%w: a pool image of %d bytes, XFS needs %d", blockdev.ErrInvalid, size, minPoolBytes)
		}
		if err := makeImage(ctx, p.Image, size, "mkfs.xfs", "-q", "-K", "-m", "reflink=1,rmapbt=1"); err != nil {
			return p, err
		}
	}
	if err := mountImage(ctx, p.Image, p.Dir, "xfs"); err != nil {
		return p, err
	}
	p.Size, err = growPool(p.Image, p.Dir, size)
	return p, err
}

// PoolAt tells the directory of the pool that Prepare has made in dir, and whether
// it is there: made, and mounted where it is an image. It changes nothing.
func PoolAt(dir string) (at string, there bool) { return preparedAt(dir, poolMount, poolImage) }

// MetadataAt tells the same of the place that PrepareMetadata has made in dir.
func MetadataAt(dir string) (at string, there bool) { return preparedAt(dir, metaMount, metaImage) }

func preparedAt(dir, mount, image string) (at string, there bool) {
	at = filepath.Join(dir, mount)
	place, err := sys.PlaceAt(at)
	if err != nil {
		return at, false
	}
	hasImage, err := exists(filepath.Join(dir, image))
	return at, err == nil && (!hasImage || place.MountRoot)
}

func defaultPoolSize(dir string) (int64, error) {
	space, err := sys.SpaceOf(dir)
	if err != nil {
		return 0, err
	}
	return max(minPoolBytes, min(maxPoolBytes, space.Free/4/imageAlign*imageAlign)), nil
}

// PrepareMetadata makes dir/meta a place for records that must not share space
// with what volumes can fill. Where dir is on the same filesystem as poolDir,
// that is the mount point of dir/meta.img, a fully allocated ext4 of 256 MiB;
// else a plain directory. What an earlier call made is used again. As with
// Prepare, mount and device stay.
func PrepareMetadata(ctx context.Context, dir, poolDir string) (Prepared, error) {
	p, err := prepareMetadata(ctx, dir, poolDir)
	return p, blockdev.Op("sparse.PrepareMetadata", "", err)
}

func prepareMetadata(ctx context.Context, dir, poolDir string) (Prepared, error) {
	dir, err := ready(ctx, dir)
	if err != nil {
		return Prepared{}, err
	}
	p := Prepared{Dir: filepath.Join(dir, metaMount), Mode: Copy}
	image := filepath.Join(dir, metaImage)
	there, err := exists(image)
	if err != nil {
		return p, err
	}
	if !there {
		shared, err := shareSpace(dir, poolDir)
		if err != nil {
			return p, err
		}
		// Records that are there already stay where they are.
		if entries, err := os.ReadDir(p.Dir); !shared || (err == nil && len(entries) > 0) {
			return p, makeDir(p.Dir)
		}
		if err := makeImage(ctx, image, metaBytes, "mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=0"); err != nil {
			return p, err
		}
	}
	p.Mode, p.Image, p.Size = Image, image, metaBytes
	return p, mountImage(ctx, image, p.Dir, "ext4", "errors=remount-ro")
}

func shareSpace(a, b string) (bool, error) {
	sa, errA := sys.StatusAt(a)
	sb, errB := sys.StatusAt(b)
	return sa.Device == sb.Device, errors.Join(errA, errB)
}

// Unprepare unmounts what Prepare and PrepareMetadata mounted in dir and takes
// the devices away; the files stay, and can be prepared again. Nothing there is
// success. blockdev.ErrBusy, and nothing is lost, while something uses it.
func Unprepare(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return blockdev.Op("sparse.Unprepare", "", err)
	}
	return blockdev.Op("sparse.Unprepare", "", errors.Join(
		unmountImage(ctx, filepath.Join(dir, metaImage), filepath.Join(dir, metaMount)),
		unmountImage(ctx, filepath.Join(dir, poolImage), filepath.Join(dir, poolMount))))
}
