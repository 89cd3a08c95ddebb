package filesystem

import (
	"context"
	"errors"
	"io"
)

// Image is an unmounted filesystem that can be read and written at any byte, wherever
// the bytes lie: blockdev.Bytes is one, an open file another.
type Image interface {
	io.ReaderAt
	io.WriterAt
}

// IdentifyIn is Identify of an image of size bytes that is no file of this host.
func (x Tools) IdentifyIn(ctx context.Context, image Image, size int64, t Type, uuid string) error {
	return failed("identify", t, identify(ctx, image, size, t, uuid))
}

func identify(ctx context.Context, image Image, size int64, t Type, uuid string) error {
	id, err := parseUUID(uuid)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	switch t {
	case Ext4:
		return identifyExt4(image, id)
	case XFS:
		return identifyXFS(image, id)
	case Btrfs:
		return identifyBtrfs(image, size, id)
	}
	return errors.ErrUnsupported
}

// SizeIn is Size of an image that is no file of this host.
func (x Tools) SizeIn(ctx context.Context, image io.ReaderAt, t Type) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, failed("size", t, err)
	}
	size, err := sizeIn(image, t)
	return size, failed("size", t, err)
}

func sizeIn(image io.ReaderAt, t Type) (int64, error) {
	switch t {
	case Ext4:
		return sizeExt4(image)
	case XFS:
		return sizeXFS(image)
	case Btrfs:
		return sizeBtrfs(image)
	}
	return 0, errors.ErrUnsupported
}

// ListDirIn is ListDir of an image that is no file of this host.
func (x Tools) ListDirIn(ctx context.Context, image io.ReaderAt, t Type, dir string) ([]Entry, error) {
	r, err := newReader(image, t)
	if err != nil {
		return nil, failed("read", t, err)
	}
	entries, err := listDir(ctx, r, dir)
	return entries, failed("read", t, err)
}

// ReadFileIn is ReadFile of an image that is no file of this host.
func (x Tools) ReadFileIn(ctx context.Context, image io.ReaderAt, t Type, file string, w io.Writer) error {
	r, err := newReader(image, t)
	if err != nil {
		return failed("read", t, err)
	}
	return failed("read", t, readFile(ctx, image, r, file, w))
}
