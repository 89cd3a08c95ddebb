package filesystem

import (
	"context"
	"errors"
	"io"
)

// imageReader reads one type's unmounted filesystem, by inode number.
type imageReader interface {
	root() uint64
	list(ctx context.Context, dir uint64) ([]node, error)
	read(ctx context.Context, file node, w io.Writer) error
}

// node is an entry and where it is.
type node struct {
	Entry
	inode uint64
}

func (x Tools) reader(path string, t Type) (imageReader, error) {
	return nil, errors.ErrUnsupported
}

func listDir(ctx context.Context, r imageReader, dir string) ([]Entry, error) {
	return nil, errors.ErrUnsupported
}

func readFile(ctx context.Context, r imageReader, file string, w io.Writer) error {
	return errors.ErrUnsupported
}
