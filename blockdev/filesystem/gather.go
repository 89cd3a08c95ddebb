package filesystem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"holdfast/blockdev/tree"
)

// gatherer finds where the contents of files are. Whole blocks of the image stay
// there; what does not lie so (a file's last bytes, behind which a guest may have left
// anything, small blocks, data inside of inodes) is put together in a file of its own.
type gatherer struct {
	image *os.File
	size  int64 // of the image
	loose *os.File
	at    int64 // the next block of loose
	left  int64 // bytes that may still be taken
	buf   bytes.Buffer
}

var zeroBlock [tree.Block]byte

// file gives a file's contents.
func (g *gatherer) file(ctx context.Context, r imageReader, i *inode) (*tree.Content, error) {
	c := &content{Content: tree.Content{Size: i.size}, g: g, index: -1}
	end := int64(0)
	for e, err := range r.extents(i) {
		switch {
		case err != nil:
			return nil, err
		case e.logical < end || e.length <= 0:
			return nil, damaged("data at %d overlaps what is before it", e.logical)
		}
		end = e.logical + e.length
		if e.logical >= i.size {
			break
		}
		if e.unwritten {
			continue
		}
		if err := errors.Join(ctx.Err(), c.extent(e)); err != nil {
			return nil, err
		}
	}
	return &c.Content, c.finishBlock()
}

// take accounts for bytes of contents.
func (g *gatherer) take(n int64) error {
	if g.left -= n; g.left < 0 {
		return fmt.Errorf("%w: they hold more than fits", ErrLimit)
	}
	return nil
}

const looseBuffer = MiB

// put adds a block to the loose ones and tells where it lies.
func (g *gatherer) put(block []byte) (int64, error) {
	at := g.at
	g.at += tree.Block
	g.buf.Write(block)
	if g.buf.Len() < looseBuffer {
		return at, nil
	}
	return at, g.flush()
}

func (g *gatherer) flush() error {
	_, err := g.loose.WriteAt(g.buf.Bytes(), g.at-int64(g.buf.Len()))
	g.buf.Reset()
	return err
}

// content is a file's in the making.
type content struct {
	tree.Content
	g     *gatherer
	block [tree.Block]byte // a loose one
	index int64            // which one of the file, -1 for none
}

// extent adds what an extent has of the file.
func (c *content) extent(e extent) error {
	length := min(e.length, c.Size-e.logical)
	if e.inline != nil {
		return c.bytes(e.logical, e.inline[:min(int64(len(e.inline)), length)])
	}
	if e.physical < 0 || e.physical > c.g.size-e.length {
		return damaged("data at byte %d of a device of %d", e.physical, c.g.size)
	}
	if err := c.g.take(length); err != nil {
		return err
	}
	if (e.logical|e.physical)%tree.Block == 0 {
		if whole := length / tree.Block * tree.Block; whole > 0 {
			if err := c.finishBlock(); err != nil {
				return err
			}
			c.Add(tree.Run{Offset: e.logical, Length: whole, Store: StoreImage, At: e.physical})
			e.logical, e.physical, length = e.logical+whole, e.physical+whole, length-whole
		}
	}
	return c.copied(e, length)
}

// copied adds the bytes of what is not whole blocks.
func (c *content) copied(e extent, length int64) error {
	buf := make([]byte, min(length, copyPiece))
	for done := int64(0); done < length; {
		piece := buf[:min(length-done, int64(len(buf)))]
		if _, err := c.g.image.ReadAt(piece, e.physical+done); err != nil {
			if errors.Is(err, io.EOF) {
				return damaged("file data beyond the end of the image")
			}
			return err
		}
		if err := c.bytes(e.logical+done, piece); err != nil {
			return err
		}
		done += int64(len(piece))
	}
	return nil
}

// bytes adds bytes to loose blocks.
func (c *content) bytes(at int64, b []byte) error {
	for len(b) > 0 {
		index, off := at/tree.Block, at%tree.Block
		if index != c.index {
			if err := c.finishBlock(); err != nil {
				return err
			}
			c.index = index
		}
		n := copy(c.block[off:], b)
		at, b = at+int64(n), b[n:]
	}
	return nil
}

// finishBlock puts the loose block away, if there is one.
func (c *content) finishBlock() error {
	if c.index < 0 {
		return nil
	}
	offset := c.index * tree.Block
	c.index = -1
	if c.block == zeroBlock {
		return nil
	}
	at, err := c.g.put(c.block[:])
	c.block = zeroBlock
	c.Add(tree.Run{Offset: offset, Length: min(tree.Block, c.Size-offset), Store: StoreLoose, At: at})
	return err
}
