package ext4fill

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"holdfast/blockdev/filesystem/internal/ext4disk"
	"holdfast/internal/sys"
)

// Offsets and bits are those of the kernel's
// Documentation/filesystems/ext4 (super.rst, group_descr.rst) and fs/ext4/ext4.h.
const (
	superMagic = 0xEF53
	inodeBytes = 256
	maxBlock   = 32768 // bytes; of larger ones directories keep lengths otherwise
	extraBytes = 32    // that mkfs gives the fixed fields behind the first 128

	stateClean = 0x1

	compatKnown      = 0x4 | 0x8 | 0x10 | 0x20 // has_journal, ext_attr, resize_inode, dir_index
	compatNeeded     = 0x8 | 0x20
	incompat64bit    = 0x80
	incompatSeed     = 0x2000
	incompatKnown    = 0x2 | 0x40 | incompat64bit | 0x200 | incompatSeed // filetype, extents, flex_bg
	incompatNeeded   = 0x2 | 0x40
	roCompatKnown    = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400 // sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum
	roCompatNeeded   = roCompatKnown
	checksumCRC32C   = 1
	hashHalfMD4      = 1
	flagUnsignedHash = 0x2

	groupInodeUninit = 0x1
	groupBlockUninit = 0x2
)

var le = binary.LittleEndian

// image is an empty ext4 as mkfs has made it.
type image struct {
	f          *os.File
	super      []byte
	gdt        []byte // all group descriptors
	blockSize  int64  // bytes
	blocks     int64
	first      int64 // the block that group 0 begins at
	perGroup   int64 // blocks
	inodes     int64 // in each group
	groups     int64
	descriptor int64 // bytes
	reserved   int64 // blocks kept for descriptors behind each copy of them
	seed       uint32
	hash       hasher
	tables     map[int64][]span // by group, what lies there of all groups' bitmaps and tables
}

func open(f *os.File) (*image, error) {
	b := make([]byte, ext4disk.SuperBytes)
	if _, err := f.ReadAt(b, ext4disk.SuperOffset); errors.Is(err, io.EOF) {
		return nil, notOurs("too short")
	} else if err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	if le.Uint16(b[0x38:]) != superMagic || b[0x175] != checksumCRC32C || le.Uint32(b[ext4disk.SuperSumAt:]) != ext4disk.SuperSum(b) {
		return nil, notOurs("no valid superblock")
	}
	if err := checkFeatures(b); err != nil {
		return nil, err
	}
	im := &image{
		f: f, super: b,
		blockSize:  1024 << min(le.Uint32(b[0x18:]), 16),
		blocks:     int64(le.Uint32(b[0x4:])),
		first:      int64(le.Uint32(b[0x14:])),
		perGroup:   int64(le.Uint32(b[0x20:])),
		inodes:     int64(le.Uint32(b[0x28:])),
		reserved:   int64(le.Uint16(b[0xCE:])),
		descriptor: 32,
	}
	if le.Uint32(b[0x60:])&incompat64bit != 0 {
		im.blocks |= int64(le.Uint32(b[0x150:])) << 32
		im.descriptor = int64(le.Uint16(b[0xFE:]))
	}
	im.seed = ext4disk.Sum(^uint32(0), b[0x68:0x78])
	if le.Uint32(b[0x60:])&incompatSeed != 0 {
		im.seed = le.Uint32(b[0x270:])
	}
	im.hash.unsigned = le.Uint32(b[0x160:])&flagUnsignedHash != 0
	for i := range im.hash.seed {
		im.hash.seed[i] = le.Uint32(b[0xEC+4*i:])
	}
	if err := im.checkShape(); err != nil {
		return nil, err
	}
	return im, im.readGroups()
}

func checkFeatures(b []byte) error {
	compat, incompat, ro := le.Uint32(b[0x5C:]), le.Uint32(b[0x60:]), le.Uint32(b[0x64:])
	switch {
	case compat&^compatKnown != 0 || compat&compatNeeded != compatNeeded ||
		incompat&^incompatKnown != 0 || incompat&incompatNeeded != incompatNeeded ||
		ro&^roCompatKnown != 0 || ro&roCompatNeeded != roCompatNeeded:
		return notOurs("features %#x %#x %#x", compat, incompat, ro)
	case le.Uint16(b[0x3A:]) != stateClean:
		return notOurs("not clean")
	case le.Uint16(b[0x58:]) != inodeBytes || le.Uint16(b[0x15E:]) != extraBytes || le.Uint32(b[0x54:]) != lostFoundInode:
		return notOurs("inodes of %d bytes", le.Uint16(b[0x58:]))
	case b[0xFC] != hashHalfMD4:
		return notOurs("directory hash %d", b[0xFC])
	case le.Uint32(b[0x0:])-le.Uint32(b[0x10:]) != lostFoundInode:
		return notOurs("%d inodes in use", le.Uint32(b[0x0:])-le.Uint32(b[0x10:]))
	}
	return nil
}

func (im *image) checkShape() error {
	if im.blockSize > maxBlock || im.blocks <= im.first || im.blocks > maxBlocks || im.perGroup != 8*im.blockSize ||
		im.inodes < firstInode || im.inodes > 8*im.blockSize || im.inodes%8 != 0 ||
		im.descriptor != 32 && im.descriptor != 64 {
		return notOurs("%d blocks of %d bytes, %d a group", im.blocks, im.blockSize, im.perGroup)
	}
	im.groups = (im.blocks - im.first + im.perGroup - 1) / im.perGroup
	status, err := sys.StatusOf(im.f)
	if err != nil {
		return err
	}
	if status.Size < im.blocks*im.blockSize {
		return notOurs("%d blocks in %d bytes", im.blocks, status.Size)
	}
	return nil
}

func (im *image) readGroups() error {
	im.gdt = make([]byte, im.groups*im.descriptor)
	if _, err := im.f.ReadAt(im.gdt, (im.first+1)*im.blockSize); err != nil {
		return fmt.Errorf("group descriptors: %w", err)
	}
	im.tables = map[int64][]span{}
	table := im.inodes * inodeBytes / im.blockSize
	for g := range im.groups {
		d := im.group(g)
		if d.u16(ext4disk.GroupSumAt) != im.groupSum(g) {
			return notOurs("checksum of group %d", g)
		}
		for _, s := range []span{{physical: d.block(0x0), length: 1}, {physical: d.block(0x4), length: 1}, {physical: d.block(0x8), length: table}} {
			if s.physical < im.first || s.physical+s.length > im.blocks {
				return notOurs("group %d at block %d", g, s.physical)
			}
			for h := im.groupOf(s.physical); h <= im.groupOf(s.physical+s.length-1); h++ {
				im.tables[h] = append(im.tables[h], s)
			}
		}
	}
	return nil
}

func (im *image) groupOf(block int64) int64 { return (block - im.first) / im.perGroup }

// start is a group's first block, size the number of its blocks.
func (im *image) start(g int64) int64 { return im.first + g*im.perGroup }
func (im *image) size(g int64) int64  { return min(im.perGroup, im.blocks-im.start(g)) }

// inodeAt is where an inode lies, in bytes.
func (im *image) inodeAt(ino uint32) int64 {
	g, index := int64(ino-1)/im.inodes, int64(ino-1)%im.inodes
	return im.group(g).block(0x8)*im.blockSize + index*inodeBytes
}

// inodeSum is what all checksums of an inode's structures begin with.
func (im *image) inodeSum(ino uint32) uint32 { return ext4disk.Sum32(ext4disk.Sum32(im.seed, ino), 0) }

// group is a descriptor. Counts and addresses of 64-byte ones have a second half.
func (im *image) group(g int64) group {
	return group(im.gdt[g*im.descriptor : (g+1)*im.descriptor])
}

type group []byte

func (d group) u16(at int) uint16      { return le.Uint16(d[at:]) }
func (d group) set16(at int, v uint16) { le.PutUint16(d[at:], v) }
func (d group) has(flag uint16) bool   { return d.u16(0x12)&flag != 0 }
func (d group) clear(flag uint16)      { d.set16(0x12, d.u16(0x12)&^flag) }
func (d group) wide() bool             { return len(d) >= 64 }
func (d group) split(v uint32, lo, hi int) {
	d.set16(lo, uint16(v))
	if d.wide() {
		d.set16(hi, uint16(v>>16))
	}
}

func (d group) joined(lo, hi int) int64 {
	v := int64(d.u16(lo))
	if d.wide() {
		v |= int64(d.u16(hi)) << 16
	}
	return v
}

// add changes a count.
func (d group) add(lo, hi int, by int64) { d.split(uint32(d.joined(lo, hi)+by), lo, hi) }

// block is an address: its low half at lo, the high one 32 bytes further.
func (d group) block(lo int) int64 {
	v := int64(le.Uint32(d[lo:]))
	if d.wide() {
		v |= int64(le.Uint32(d[lo+0x20:])) << 32
	}
	return v
}

func (im *image) groupSum(g int64) uint16 {
	return ext4disk.GroupSum(im.seed, uint32(g), im.group(g))
}
