package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"holdfast/internal/run"
)

// yardsticks are what a user would do instead, in the same pool.
type yardsticks struct {
	dir    string // on the pool's filesystem
	image  string // a formatted image, to clone
	target *os.File
	block  []byte
	n      int
}

func newYardsticks(ctx context.Context, state string) (*yardsticks, error) {
	dir := filepath.Join(state, "pool", "bench-yardstick")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	y := &yardsticks{dir: dir, image: filepath.Join(dir, "image"), block: make([]byte, 4096)}
	if err := y.format(ctx, y.image); err != nil {
		return nil, err
	}
	var err error
	y.target, err = os.OpenFile(filepath.Join(dir, "target"), os.O_CREATE|os.O_RDWR, 0o600)
	return y, err
}

func (y *yardsticks) close() {
	_ = y.target.Close() // a scratch file
	_ = os.RemoveAll(y.dir)
}

// format makes a 512 MiB ext4 image as a user would.
func (y *yardsticks) format(ctx context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(512<<20), f.Close()); err != nil {
		return err
	}
	_, err = run.Run(ctx, run.Cmd{Args: []string{"mkfs.ext4", "-q", "-F", path}})
	return err
}

// reflink is cp --reflink of a formatted image, then fsync of file and directory.
func (y *yardsticks) reflink(ctx context.Context) error {
	y.n++
	to := filepath.Join(y.dir, fmt.Sprintf("clone-%d", y.n))
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"cp", "--reflink=always", y.image, to}}); err != nil {
		return err
	}
	return errors.Join(syncPath(to), syncPath(y.dir))
}

// write is one synced 4 KiB write.
func (y *yardsticks) write() error {
	y.n++
	y.block[0] = byte(y.n)
	if _, err := y.target.WriteAt(y.block, 0); err != nil {
		return err
	}
	return y.target.Sync()
}

// byHand is mkfs, losetup and mount, and the way back (which counts as well:
// there is no time between the two for a user either).
func (y *yardsticks) byHand(ctx context.Context) error {
	image, at := filepath.Join(y.dir, "by-hand"), filepath.Join(y.dir, "mnt")
	if err := errors.Join(y.format(ctx, image), os.MkdirAll(at, 0o700)); err != nil {
		return err
	}
	made, err := run.Run(ctx, run.Cmd{Args: []string{"losetup", "--find", "--show", "--direct-io=on", image}})
	if err != nil {
		return err
	}
	device := strings.TrimSpace(string(made.Stdout))
	_, err = run.Run(ctx, run.Cmd{Args: []string{"mount", device, at}})
	if err == nil {
		_, err = run.Run(ctx, run.Cmd{Args: []string{"umount", at}})
	}
	_, detach := run.Run(ctx, run.Cmd{Args: []string{"losetup", "--detach", device}})
	return errors.Join(err, detach, os.Remove(image))
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// copyTree is cp -r and sync of the filesystem.
func copyTree(ctx context.Context, from, to string) error {
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"cp", "-r", from, to}}); err != nil {
		return err
	}
	return syncFilesystem(ctx, to)
}

func syncFilesystem(ctx context.Context, path string) error {
	_, err := run.Run(ctx, run.Cmd{Args: []string{"sync", "--file-system", path}})
	return err
}
