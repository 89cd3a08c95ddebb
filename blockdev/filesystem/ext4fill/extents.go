package ext4fill

import "holdfast/blockdev/filesystem/internal/ext4disk"

const (
	extentMagic = 0xF30A
	extentMost  = 32768 // blocks of one extent that holds data
	areaBytes   = 60    // of an inode, for the root of its extent tree
	areaExtents = 4
)

// span is a piece of a file in the image, in blocks.
type span struct{ logical, physical, length int64 }

// appendSpan adds a piece, to the last one where it continues it.
func appendSpan(to []span, s span) []span {
	if n := len(to); n > 0 {
		last := &to[n-1]
		if last.logical+last.length == s.logical && last.physical+last.length == s.physical {
			last.length += s.length
			return to
		}
	}
	return append(to, s)
}

// nodeExtents is how many extents a block of the tree holds.
func nodeExtents(blockSize int64) int64 { return (blockSize - 12) / 12 }

// treeBlocks is the number of blocks that a tree over n extents takes besides
// its root.
func treeBlocks(n, blockSize int64) (blocks int64) {
	for n > areaExtents {
		n = (n + nodeExtents(blockSize) - 1) / nodeExtents(blockSize)
		blocks += n
	}
	return blocks
}

func extentsOf(blocks int64) int64 { return (blocks + extentMost - 1) / extentMost }

// extents makes the extent tree of an inode (Documentation/filesystems/ext4,
// ifork.rst): the root in area, the nodes, filled to the last place, in blocks
// that it takes, whose number it gives.
func (b *builder) extents(area []byte, ino uint32, spans []span) (blocks int64, err error) {
	var entries []extentEntry
	for _, s := range spans {
		for s.length > 0 {
			n := min(s.length, extentMost)
			entries = append(entries, extentEntry{uint32(s.logical), s.physical, uint16(n)})
			s = span{s.logical + n, s.physical + n, s.length - n}
		}
	}
	depth, most := 0, int(nodeExtents(b.im.blockSize))
	for ; len(entries) > areaExtents; depth++ {
		var above []extentEntry
		for len(entries) > 0 {
			n := min(len(entries), most)
			at, _, err := b.space.take(1)
			if err != nil {
				return 0, err
			}
			if err := b.extentBlock(at, ino, entries[:n], depth); err != nil {
				return 0, err
			}
			above = append(above, extentEntry{entries[0].logical, at, 0})
			entries, blocks = entries[n:], blocks+1
		}
		entries = above
	}
	extentNode(area, entries, depth, areaExtents)
	return blocks, nil
}

// extentEntry is a piece of a file or, above the lowest level, a node.
type extentEntry struct {
	logical  uint32
	physical int64
	length   uint16
}

func (b *builder) extentBlock(at int64, ino uint32, entries []extentEntry, depth int) error {
	block := b.block()
	most := int(nodeExtents(b.im.blockSize))
	extentNode(block, entries, depth, most)
	tail := 12 + 12*most
	le.PutUint32(block[tail:], ext4disk.Sum(b.im.inodeSum(ino), block[:tail]))
	return b.meta.put(at*b.im.blockSize, block)
}

func extentNode(to []byte, entries []extentEntry, depth, most int) {
	le.PutUint16(to[0:], extentMagic)
	le.PutUint16(to[2:], uint16(len(entries)))
	le.PutUint16(to[4:], uint16(most))
	le.PutUint16(to[6:], uint16(depth))
	for i, e := range entries {
		x := to[12+12*i:]
		le.PutUint32(x, e.logical)
		if depth > 0 {
			le.PutUint32(x[4:], uint32(e.physical))
			le.PutUint16(x[8:], uint16(e.physical>>32))
			continue
		}
		le.PutUint16(x[4:], e.length)
		le.PutUint16(x[6:], uint16(e.physical>>32))
		le.PutUint32(x[8:], uint32(e.physical))
	}
}
