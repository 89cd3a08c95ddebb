package archive

// Counts are what an archive holds: exact numbers, for sizing a filesystem.
type Counts struct {
	Entries   int64 // inodes besides the root: files, directories, symbolic links
	Links     int64 // further names of inodes
	Replaced  int64 // entries that a later one of the same name replaces
	FileBytes int64 // sizes of the files, holes included

	// The needs in blocks of 1 KiB (index 0) and 4 KiB (index 1): file contents
	// without holes, directories, long symbolic links, attributes, extent trees.
	Blocks [2]int64

	LargestAttributes int64 // bytes of extended attributes of one entry, at most
	LongestLink       int64 // bytes of a symbolic link's text, at most
}

// Bytes are the needs of all inodes' contents in blocks of a size (1024 or 4096).
func (c Counts) Bytes(blockSize int64) int64 {
	for i, size := range blockSizes {
		if size == blockSize {
			return c.Blocks[i] * size
		}
	}
	return c.Blocks[1] * blockSizes[1]
}

var blockSizes = [2]int64{1024, 4096}

const (
	inlineLink    = 59 // bytes of a symbolic link that an ext4 inode holds itself
	inlineAttrs   = 90 // bytes of attributes that an ext4 inode of 256 bytes holds itself
	inlineExtents = 4  // extents that an inode holds itself
	extentBytes   = 12
	longestExtent = 1 << 27      // bytes, with blocks of 4 KiB (and a quarter of it with 1 KiB)
	dotEntries    = 12 + 12 + 12 // ".", ".." and the checksum of a directory block
)

func (c *Counts) blocks(bytes int64) {
	for i, size := range blockSizes {
		c.Blocks[i] += (bytes + size - 1) / size
	}
}

func (c *Counts) attributes(attrs []attr) {
	var total int64
	for _, a := range attrs {
		total += int64(len(a.name) + len(a.value) + attrOverhead)
	}
	if total > inlineAttrs {
		c.Blocks[0]++
		c.Blocks[1]++
	}
	c.LargestAttributes = max(c.LargestAttributes, total)
}

func (c *Counts) symlink(length int) {
	c.LongestLink = max(c.LongestLink, int64(length))
	if length > inlineLink {
		c.blocks(int64(length) + 1)
	}
}

// directory counts a directory whose entries take so many bytes. Blocks are
// split in halves as names come, so they end at least half full.
func (c *Counts) directory(names int64) {
	for i, size := range blockSizes {
		if names+dotEntries <= size {
			c.Blocks[i]++
			continue
		}
		leaves := 2 * (names + size - 1) / (size - dotEntries)
		c.Blocks[i] += 1 + leaves + leaves*8/size
	}
}

// fileCount follows one file's contents.
type fileCount struct {
	counts  *Counts
	length  [2]int64 // of the file, in blocks that hold something
	extents int64
	hole    bool // the chunk before was one
	started bool
}

// add takes the next bytes; all but the last call's are whole chunks.
func (f *fileCount) add(b []byte) {
	for len(b) > 0 {
		n := min(chunk, len(b))
		zero := isZero(b[:n])
		if !zero {
			if f.hole || !f.started {
				f.extents++
			}
			for i, size := range blockSizes {
				f.length[i] += (int64(n) + size - 1) / size
			}
		}
		f.hole, f.started = zero, true
		b = b[n:]
	}
}

func (f *fileCount) finish() {
	for i, size := range blockSizes {
		f.counts.Blocks[i] += f.length[i]
		extents := f.extents + f.length[i]*size/(longestExtent*size/blockSizes[1])
		if extents > inlineExtents {
			perBlock := size/extentBytes - 1
			leaves := (2*extents + perBlock - 1) / perBlock // splits leave them half full
			f.counts.Blocks[i] += leaves + leaves/perBlock
		}
	}
}
