package sanitize

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// Limits of one copy, besides the size of what it goes into.
const (
	maxEntries = 2_000_000
	maxText    = 256 << 20 // bytes of names and attributes; with the entries about a GiB of memory
)

// Sanitizer copies. It is safe for concurrent use.
type Sanitizer struct {
	tools filesystem.Tools
	dir   string
}

// New takes the tools, and a directory of the pool's filesystem for files that have no
// name.
func New(tools filesystem.Tools, dir string) Sanitizer { return Sanitizer{tools, dir} }

// Copy makes an ext4 in image to, which reads as zero throughout and is used by nobody
// else, and puts the files of image from, of type t, into it. Nothing is flushed: the
// caller does that when it publishes the image. After an error to is of no use.
//
// filesystem.ErrDamaged, ErrForeign, ErrDirty and errors.ErrUnsupported for an image
// that cannot be read; filesystem.ErrUnfit for files that cannot be kept, or do not fit into to.
func (s Sanitizer) Copy(ctx context.Context, from string, t filesystem.Type, to string) (filesystem.Copied, error) {
	c, err := s.copy(ctx, from, t, to)
	return c, blockdev.Op("sanitize.Copy", "", err)
}

func (s Sanitizer) copy(ctx context.Context, from string, t filesystem.Type, to string) (c filesystem.Copied, err error) {
	image, err := os.OpenFile(to, os.O_RDWR, 0)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	size, err := image.Seek(0, io.SeekEnd) // of a file or a device
	if err != nil {
		return c, err
	}
	loose, err := nameless(s.dir)
	if err != nil {
		return c, err
	}
	defer loose.Close()
	limits := tree.Limits{Bytes: size, Entries: maxEntries, Text: maxText}
	read, left, err := s.tools.ReadTree(ctx, from, t, limits, loose)
	if err != nil {
		return c, unfit(err)
	}
	c = filesystem.Copied{Entries: int64(len(read.Nodes)), Left: left}
	if err := s.tools.Make(ctx, to, filesystem.Ext4, filesystem.MakeOptions{Inodes: c.Entries + 16}); err != nil {
		return c, unfit(err)
	}
	old, err := os.Open(from)
	if err != nil {
		return c, err
	}
	defer old.Close()
	_, err = ext4fill.Fill(ctx, image, read, ext4fill.Files{filesystem.StoreLoose: loose, filesystem.StoreImage: old})
	return c, unfit(err)
}

// nameless makes a file that is gone with its last close.
func nameless(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, "sanitize.")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// unfit marks what is wrong with files, and not with the image.
func unfit(err error) error {
	for _, kind := range []error{tree.ErrUnfit, tree.ErrNotBelow, filesystem.ErrLimit, filesystem.ErrTooSmall, ext4fill.ErrFull, ext4fill.ErrTooLarge, ext4fill.ErrInvalid} {
		if errors.Is(err, kind) {
			return fmt.Errorf("%w: %w", filesystem.ErrUnfit, err)
		}
	}
	return err
}
