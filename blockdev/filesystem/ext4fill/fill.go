package ext4fill

import (
	"context"
	"fmt"
	"os"

	"holdfast/blockdev/tree"
)

// Contents moves the bytes of files into an image.
type Contents interface {
	// Place makes r.Length bytes of image at byte at those of r.Store at r.At. The
	// length is a multiple of the image's block size; r.Offset means nothing. Runs
	// that touch in store and image come as one.
	Place(ctx context.Context, image *os.File, at int64, r tree.Run) error
}

// Fill writes t into image, an empty ext4 that Tools.Make of package filesystem
// has made, and gives the tree as it lies there: runs of store 0 with places in
// the image, times as inodes can have them. What is written depends on the image
// and the tree alone. The image is open for reading and writing and used by
// nobody else. Nothing is flushed: the caller does that when it publishes the
// image. After an error the image is of no use.
//
// ErrFull when image is too small, which Need tells before; ErrTooLarge and
// ErrInvalid, with the node's path, for what cannot be kept; ErrImage when image
// is not what Make makes.
func Fill(ctx context.Context, f *os.File, t tree.Tree, c Contents) (tree.Tree, error) {
	filled, err := fill(ctx, f, t, c)
	if err != nil {
		return tree.Tree{}, failed("fill", err)
	}
	return filled, nil
}

func failed(op string, err error) error { return fmt.Errorf("%s ext4 image: %w", op, err) }

func fill(ctx context.Context, f *os.File, t tree.Tree, c Contents) (tree.Tree, error) {
	p, err := newPlan(ctx, t)
	if err != nil {
		return tree.Tree{}, err
	}
	im, err := open(f)
	if err != nil {
		return tree.Tree{}, err
	}
	b, err := newBuilder(im, p)
	if err != nil {
		return tree.Tree{}, err
	}
	filled, places, err := b.placeFiles(ctx)
	if err != nil {
		return tree.Tree{}, err
	}
	if err := b.writeNodes(ctx, filled); err != nil {
		return tree.Tree{}, err
	}
	for _, x := range places {
		if err := ctx.Err(); err != nil {
			return tree.Tree{}, err
		}
		if err := c.Place(ctx, f, x.at, x.Run); err != nil {
			return tree.Tree{}, err
		}
	}
	return filled, b.finish()
}
