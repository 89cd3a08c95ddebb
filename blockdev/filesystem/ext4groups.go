package filesystem

import (
	"encoding/binary"
	"os"

	"holdfast/blockdev/filesystem/internal/ext4disk"
)

const (
	ext4GroupFlagsAt    = 0x12
	ext4GroupSumAt      = ext4disk.GroupSumAt
	ext4GroupZeroedItab = 0x4
)

// markInodeTablesZeroed marks all groups as having zeroed inode tables. resize2fs
// leaves that to whichever kernel mounts the filesystem first, and it would fill
// the holes of a sparse image with 1/64 of its size in zeroes; what an image
// grew by reads as zero already. Done in the primary descriptors only, while the
// filesystem is marked not clean.
func markInodeTablesZeroed(path string) error {
	f, b, s, err := openExt4(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if s.incompat&(ext4IncompatMetaBG|ext4IncompatSeed) != ext4IncompatSeed || s.roCompat&ext4ROMetadataCsum == 0 {
		return nil // not as we make it: then it costs the space
	}
	first := int64(binary.LittleEndian.Uint32(b[0x14:]))
	groups := (s.blocks - first + s.blocksPerGroup - 1) / s.blocksPerGroup
	perBlock := s.blockSize / s.descriptorSize()
	for n := int64(0); n*perBlock < groups; n++ {
		if err := s.markBlock(f, (first+1+n)*s.blockSize, n*perBlock, min(perBlock, groups-n*perBlock)); err != nil {
			return err
		}
	}
	return f.Close()
}

// markBlock marks the count groups from group on, whose descriptors are in the
// block at off.
func (s *ext4Super) markBlock(f *os.File, off, group, count int64) error {
	block, err := readAt(f, off, int(s.blockSize))
	if err != nil {
		return err
	}
	changed := false
	for n := range count {
		d := block[n*s.descriptorSize() : (n+1)*s.descriptorSize()]
		flags := binary.LittleEndian.Uint16(d[ext4GroupFlagsAt:])
		if binary.LittleEndian.Uint16(d[ext4GroupSumAt:]) != s.groupSum(uint32(group+n), d) {
			return damaged("ext4 group %d: checksum of its descriptor", group+n)
		}
		if flags&ext4GroupZeroedItab != 0 {
			continue
		}
		changed = true
		binary.LittleEndian.PutUint16(d[ext4GroupFlagsAt:], flags|ext4GroupZeroedItab)
		binary.LittleEndian.PutUint16(d[ext4GroupSumAt:], s.groupSum(uint32(group+n), d))
	}
	if changed {
		_, err = f.WriteAt(block, off)
	}
	return err
}

// groupSum is the checksum of a group descriptor under metadata_csum with a seed.
func (s *ext4Super) groupSum(group uint32, d []byte) uint16 {
	return ext4disk.GroupSum(binary.LittleEndian.Uint32(s.raw[0x270:]), group, d)
}
