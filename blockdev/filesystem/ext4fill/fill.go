package ext4fill

import (
	"context"
	"errors"
	"fmt"
	"os"

	"holdfast/blockdev"
	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
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
// is not what Make makes; blockdev.ErrNoSpace when the pool has no room for what
// the image is to hold.
func Fill(ctx context.Context, image *os.File, t tree.Tree, c Contents) (tree.Tree, error) {
	filled, err := fill(ctx, image, t, c)
	if sys.IsNoSpace(err) && !errors.Is(err, blockdev.ErrNoSpace) {
		err = fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
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
	filled, err := b.placeFiles(ctx)
	if err != nil {
		return tree.Tree{}, err
	}
	if err := b.writeNodes(ctx, filled); err != nil {
		return tree.Tree{}, err
	}
	m := mover{im: im, c: c}
	for i := range filled.Nodes {
		if err := m.move(ctx, t.Nodes[i].Runs, filled.Nodes[i].Runs); err != nil {
			return tree.Tree{}, err
		}
	}
	if err := m.flush(ctx); err != nil {
		return tree.Tree{}, err
	}
	return filled, b.finish()
}

// mover has contents placed, what lies together at once.
type mover struct {
	im   *image
	c    Contents
	at   int64
	next tree.Run // is to come to at; length 0: nothing
}

// move has the runs of a file placed where they are to lie.
func (m *mover) move(ctx context.Context, from, to []tree.Run) error {
	for _, r := range from {
		for r.Length > 0 {
			d := to[0]
			done := r.Offset - d.Offset
			n := min(r.Length, d.Length-done)
			// Behind the end of a file the store has zeroes up to the next block.
			blocks := (n + m.im.blockSize - 1) / m.im.blockSize * m.im.blockSize
			if err := m.add(ctx, d.At+done, tree.Run{Length: blocks, Store: r.Store, At: r.At}); err != nil {
				return err
			}
			r.Offset, r.Length, r.At = r.Offset+n, r.Length-n, r.At+n
			if done+n == d.Length {
				to = to[1:]
			}
		}
	}
	return nil
}

func (m *mover) add(ctx context.Context, at int64, r tree.Run) error {
	if m.next.Store == r.Store && m.next.At+m.next.Length == r.At && m.at+m.next.Length == at {
		m.next.Length += r.Length
		return nil
	}
	err := m.flush(ctx)
	m.at, m.next = at, r
	return err
}

func (m *mover) flush(ctx context.Context) error {
	if m.next.Length == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return m.c.Place(ctx, m.im.f, m.at, m.next)
}
