package ext4fill

import (
	"context"
	"errors"
	"slices"

	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/tree"
)

// maxBlocks is how many a filesystem can have (Documentation/filesystems/ext4,
// blocks.rst: addresses of 48 bits).
const maxBlocks = 1 << 48

// Layout is what a tree takes of an image beside what an empty filesystem takes.
type Layout struct {
	BlockSize int64 // bytes
	Blocks    int64 // of the image's free ones
	Inodes    int64 // that files can use: MakeOptions.Inodes of package filesystem
}

// Bytes is what the blocks are in bytes.
func (l Layout) Bytes() int64 { return l.Blocks * l.BlockSize }

// Need tells what Fill takes at most of an empty filesystem with blocks of
// blockSize bytes. Filling takes less by what names of unequal length may need in
// the blocks of large directories, and by the few blocks that files are given in
// case they are interrupted by the filesystem's own blocks.
// ErrTooLarge, ErrInvalid and ErrImage as Fill.
func Need(ctx context.Context, t tree.Tree, blockSize int64) (Layout, error) {
	if blockSize < 1024 || blockSize > maxBlock || blockSize&(blockSize-1) != 0 {
		return Layout{}, failed("measure", notOurs("blocks of %d bytes", blockSize))
	}
	p, err := newPlan(ctx, t)
	if err != nil {
		return Layout{}, failed("measure", err)
	}
	l, err := p.layout(ctx, blockSize)
	if err != nil {
		return Layout{}, failed("measure", err)
	}
	return l, nil
}

// Size tells the smallest image, in bytes, of at least least and in whole MiB,
// on which Tools.Make of package filesystem makes an ext4, given the layout's
// inodes, that Fill can fill with t. Trees that fit less than 16 MiB have blocks
// of 1 KiB if least allows it. ErrTooLarge and ErrInvalid as Fill.
func Size(ctx context.Context, t tree.Tree, least int64) (size int64, l Layout, err error) {
	p, err := newPlan(ctx, t)
	if err != nil {
		return 0, l, failed("measure", err)
	}
	for _, blockSize := range []int64{1024, 4096} {
		if l, err = p.layout(ctx, blockSize); err != nil {
			if errors.Is(err, ErrTooLarge) {
				continue // for small blocks, perhaps
			}
			break
		}
		if size = l.fit(least); size != 0 {
			return size, l, nil
		}
	}
	return 0, Layout{}, failed("measure", err)
}

// fit finds the size of an image for a layout; 0: none has such blocks.
func (l Layout) fit(least int64) int64 {
	const unit = filesystem.MiB
	for size := max(least, l.Bytes(), unit); ; {
		size = (size + unit - 1) / unit * unit
		switch o := filesystem.OfferExt4(size, l.Inodes); {
		case o.BlockSize > l.BlockSize:
			return 0
		case o.BlockSize < l.BlockSize: // none for so many inodes, or small blocks
			size += max(1, size/64)
		case o.Blocks >= l.Blocks:
			return size
		default:
			size += (l.Blocks - o.Blocks) * l.BlockSize
		}
	}
}

func (p *plan) layout(ctx context.Context, blockSize int64) (Layout, error) {
	l := Layout{BlockSize: blockSize, Inodes: p.inodes()}
	for i := range p.nodes {
		if i%1024 == 0 && ctx.Err() != nil {
			return Layout{}, ctx.Err()
		}
		n, err := p.need(i, blockSize)
		if err != nil {
			return Layout{}, about(p.nodes[i].Path, err)
		}
		if l.Blocks += n; l.Blocks > maxBlocks {
			return Layout{}, tooLarge("more than %d blocks in all", int64(maxBlocks))
		}
	}
	l.Blocks-- // the root directory has its first block
	return withInterruptions(l), nil
}

// withInterruptions adds what extent trees may grow by where the filesystem's own
// blocks cut files: about once in a group of blocks.
func withInterruptions(l Layout) Layout {
	l.Blocks += 8 + l.Blocks/(8*l.BlockSize)
	return l
}

func (p *plan) need(i int, blockSize int64) (blocks int64, err error) {
	n := &p.nodes[i]
	switch n.Kind {
	case tree.Directory:
		blocks, err = dirBlocks(p.in(i), blockSize)
		if err == nil {
			blocks += treeBlocks(extentsOf(blocks), blockSize)
		}
	case tree.Symlink:
		blocks, err = targetBlocks(n, blockSize)
	case tree.Regular:
		blocks, err = fileBlocks(n, blockSize)
	}
	if err != nil {
		return 0, err
	}
	_, block, err := attributes(n, blockSize)
	if len(block) > 0 {
		blocks++
	}
	return blocks, err
}

// checkLimits refuses what blocks of this size cannot hold of a node, but for a
// directory's names.
func checkLimits(n *tree.Node, blockSize int64) (err error) {
	switch n.Kind {
	case tree.Symlink:
		_, err = targetBlocks(n, blockSize)
	case tree.Regular:
		_, err = fileBlocks(n, blockSize)
	}
	if err == nil {
		_, _, err = attributes(n, blockSize)
	}
	return err
}

// targetBlocks: a short target lies in the inode.
func targetBlocks(n *tree.Node, blockSize int64) (int64, error) {
	switch length := int64(len(n.Target)); {
	case length < areaBytes:
		return 0, nil
	case length >= blockSize:
		return 0, tooLarge("a symbolic link to %d bytes, at most %d", length, blockSize-1)
	}
	return 1, nil
}

// fileBlocks counts data and extent tree, as long as nothing is in the way.
func fileBlocks(n *tree.Node, blockSize int64) (blocks int64, err error) {
	if n.Size > maxFileBlocks*blockSize {
		return 0, tooLarge("a file of %d bytes, at most %d", n.Size, maxFileBlocks*blockSize)
	}
	extents, together, end := int64(0), int64(0), int64(-1)
	for _, r := range n.Runs {
		length := (r.Length + blockSize - 1) / blockSize
		if r.Offset != end {
			extents, together = extents+extentsOf(together), 0
		}
		together += length
		blocks += length
		end = r.Offset + r.Length
	}
	extents += extentsOf(together)
	return blocks + treeBlocks(extents, blockSize), nil
}

// dirBlocks bounds the blocks of a directory without knowing how its names will
// be hashed: each block ends where the next name does not fit, so that what is
// lost in all is less than the longest names together, and none has fewer names
// than it would have of the longest.
func dirBlocks(names []name, blockSize int64) (int64, error) {
	if oneBlock(names, blockSize) {
		return 1, nil
	}
	room, total := leafRoom(blockSize), 0
	var lengths [maxName + 16]int // how many entries are so long
	for _, n := range names {
		total += entryBytes(n.text)
		lengths[entryBytes(n.text)]++
	}
	leaves, capacity, longest := int64(1), room, 0
	for length, left := range slices.Backward(lengths[:]) {
		if longest == 0 && left > 0 {
			longest = length
		}
		for ; left > 0 && capacity < total; left-- {
			leaves++
			capacity += room - (length - 4)
		}
	}
	each := room / longest
	leaves = min(leaves, int64((len(names)+each-1)/each))
	index, err := indexBlocks(leaves, blockSize)
	return leaves + index, err
}
