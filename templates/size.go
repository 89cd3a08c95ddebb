package templates

import (
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/ext4fill"
)

// The size class of ext4 that has blocks of 1 KiB and no journal ends here; see
// filesystem.Tools.Make.
const smallExt4 = 16 * filesystem.MiB

// smallBlock is that class's block, in bytes.
const smallBlock = 1024

// classOf tells the small class (0) from the regular one (1).
func classOf(size int64) int {
	if size < smallExt4 {
		return 0
	}
	return 1
}

// smallSize is the size in bytes, in whole MiB, of a filesystem of the small
// class for what ext4fill.Need tells of blocks of 1 KiB; 0 when none will do.
func smallSize(need ext4fill.Layout) int64 {
	inodes := (need.Inodes + 16) * 256
	contents := need.Bytes()
	groups := 1 + contents/(8<<20)
	size := roundUp(contents+max(inodes, contents/(64<<10)*256, 128*256)+groups*32<<10+contents/64, filesystem.MiB)
	if classOf(size) != 0 {
		return 0
	}
	return size
}

// regularSize is the same for the regular class and blocks of 4 KiB. The builder
// tries a larger one should it be too small.
func regularSize(need ext4fill.Layout) int64 {
	contents := need.Bytes()
	size := contents
	for range 4 { // overhead is a share of the size, which it enlarges
		size = contents + ext4Overhead(size, need.Inodes+16)
	}
	return max(smallExt4, roundUp(size, filesystem.MiB))
}

// ext4Overhead is what a filesystem of a size with blocks of 4 KiB needs for
// itself: inode tables, the journal, bitmaps and descriptors for each group of
// 128 MiB, room for descriptors of later groups, and what the kernel keeps back.
func ext4Overhead(size, inodes int64) int64 {
	groups := 1 + size/(128<<20)
	inodes = max(inodes+inodes/32, min(size/(16<<10), 2*size/(32<<10)))
	kept := min(size/50, 16*filesystem.MiB)
	return inodes*256 + journalBytes(size) + groups*16<<10 + (2+groups/8)*(600<<10) + kept + size/250 + 256<<10
}

func journalBytes(size int64) int64 {
	switch {
	case size < 256*filesystem.MiB:
		return 4 * filesystem.MiB
	case size < 2<<30:
		return 8 * filesystem.MiB
	case size < 8<<30:
		return 32 * filesystem.MiB
	case size < 64<<30:
		return 64 * filesystem.MiB
	default:
		return 128 * filesystem.MiB
	}
}

// MinimumFor is the smallest size in bytes, in whole MiB, of a volume with a
// filesystem of type t that holds the revision.
func (v Revision) MinimumFor(t filesystem.Type) int64 {
	switch t {
	case filesystem.XFS:
		// Inodes of 512 bytes in chunks, a log of 64 MiB or 1/2048, free space btrees.
		data := v.DataBytes + v.Entries*600
		return max(t.Minimum(), roundUp(data+data/50+max(64*filesystem.MiB, data/2048)+8*filesystem.MiB, filesystem.MiB))
	case filesystem.Btrfs:
		// Metadata twice (DUP), in chunks of up to 256 MiB; small files live in it.
		data := v.DataBytes + v.Entries*2048
		return max(t.Minimum(), roundUp(data+data/10+80*filesystem.MiB, filesystem.MiB))
	default:
		return v.MinimumBytes
	}
}

// growsWell tells whether a volume of a size is better made by growing the
// revision's image than by copying its files: a grown one keeps the image's
// share of inode tables, which is large where files are tiny.
func (v Revision) growsWell(size int64) bool {
	const blankBytesPerInode = 16 << 10
	dense := v.Entries*blankBytesPerInode/2 > v.ImageBytes
	return size >= v.ImageBytes && !(dense && size >= 4*v.ImageBytes)
}
