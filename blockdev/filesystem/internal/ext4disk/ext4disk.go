package ext4disk

import "hash/crc32"

const (
	// SuperOffset and SuperBytes say where the superblock is in an image.
	SuperOffset = 1024
	SuperBytes  = 1024

	// SuperSumAt and GroupSumAt say where in a superblock and in a group's
	// descriptor their checksums are.
	SuperSumAt = 0x3FC
	GroupSumAt = 0x1E

	groupSumEnd = GroupSumAt + 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Sum continues a CRC-32C, without inverting it at both ends.
func Sum(c uint32, b []byte) uint32 { return ^crc32.Update(^c, castagnoli, b) }

// Sum32 continues it with a number, little-endian.
func Sum32(c, v uint32) uint32 {
	c ^= v
	for range 4 {
		c = castagnoli[byte(c)] ^ c>>8
	}
	return c
}

// SuperSum is the checksum that belongs in a superblock's last four bytes.
func SuperSum(super []byte) uint32 { return Sum(^uint32(0), super[:SuperSumAt]) }

// GroupSum is the checksum of a group's descriptor under metadata_csum; seed is
// that of the filesystem.
func GroupSum(seed, group uint32, descriptor []byte) uint16 {
	c := Sum(Sum32(seed, group), descriptor[:GroupSumAt])
	c = Sum(c, []byte{0, 0})
	return uint16(Sum(c, descriptor[groupSumEnd:]))
}

// HasSuperCopy tells which groups hold a copy of the superblock under
// sparse_super: 0, 1 and the powers of 3, 5 and 7.
func HasSuperCopy(group int64) bool {
	if group <= 1 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		n := group
		for n%base == 0 {
			n /= base
		}
		if n == 1 {
			return true
		}
	}
	return false
}
