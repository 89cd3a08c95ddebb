package filesystem

import "holdfast/blockdev/filesystem/internal/ext4disk"

// Ext4Offer is what an empty ext4 has for files.
type Ext4Offer struct {
	BlockSize int64 // bytes
	Blocks    int64 // free
	Inodes    int64 // free
}

// OfferExt4 tells what an ext4 offers that Make puts on size bytes with at least
// inodes inodes for files, without making it. It computes what mke2fs computes
// (lib/ext2fs/initialize.c, ext2fs_initialize). No blocks and no inodes: Make would
// answer ErrTooSmall.
func OfferExt4(size, inodes int64) Ext4Offer {
	if size < Ext4.Minimum() {
		return Ext4Offer{}
	}
	c := ext4ClassFor(size, inodes)
	s := &ext4Super{blockSize: c.blockSize, inodeSize: ext4InodeBytes, blocksPerGroup: 8 * c.blockSize}
	first, made := int64(0), int64(1+4) // the first blocks of the root directory and lost+found
	if c.blockSize == 1024 {
		first, made = 1, 1+12
	}
	if c.room != 0 {
		s.incompat |= ext4Incompat64bit
		made++ // the block through which the resize inode finds the reserved ones
	}
	blocks := size/c.blockSize - first
	for {
		groups := ceilDiv(blocks, s.blocksPerGroup)
		s.inodesPerGroup = ext4InodesPerGroup(c, groups)
		descriptors := ceilDiv(groups*s.descriptorSize(), c.blockSize)
		if c.room != 0 {
			atMost := ceilDiv(ceilDiv(c.room/c.blockSize, s.blocksPerGroup)*s.descriptorSize(), c.blockSize)
			s.reservedGDT = max(0, min(atMost-descriptors, c.blockSize/4))
		}
		overhead := func(g int64) int64 {
			n := 2 + s.inodesPerGroup*s.inodeSize/c.blockSize
			if ext4disk.HasSuperCopy(g) {
				n += 1 + descriptors + s.reservedGDT
			}
			return n
		}
		// A last group that would hold little besides itself is left away.
		if left := blocks % s.blocksPerGroup; groups > 1 && left != 0 && left < overhead(groups-1)+50 {
			blocks -= left
			continue
		}
		o := Ext4Offer{BlockSize: c.blockSize, Blocks: blocks - made - c.journal/c.blockSize, Inodes: s.inodesPerGroup*groups - ext4ReservedInodes}
		for g := range groups {
			o.Blocks -= overhead(g)
		}
		if o.Blocks < 0 || s.inodesPerGroup > 8*c.blockSize {
			return Ext4Offer{}
		}
		return o
	}
}

// ext4InodesPerGroup fills the blocks of inode tables, to a multiple of 8.
func ext4InodesPerGroup(c ext4Class, groups int64) int64 {
	step := max(8, c.blockSize/ext4InodeBytes)
	return ceilDiv(ceilDiv(c.inodes, groups), step) * step
}

func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }
