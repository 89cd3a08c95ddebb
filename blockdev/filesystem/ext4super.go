package filesystem

import (
	"encoding/binary"
	"io"
	"os"

	"holdfast/blockdev/filesystem/internal/ext4disk"
)

// The ext4 superblock: 1024 bytes at byte 1024, little-endian. Offsets and bits
// are those of the kernel's Documentation/filesystems/ext4/super.rst.
const (
	ext4SuperOffset = ext4disk.SuperOffset
	ext4SuperBytes  = ext4disk.SuperBytes
	ext4Magic       = 0xEF53

	ext4CompatJournal   = 0x4
	ext4IncompatRecover = 0x4
	ext4Incompat64bit   = 0x80
	ext4IncompatSeed    = 0x2000
	ext4ROMetadataCsum  = 0x400

	ext4StateClean  = 0x1
	ext4StateErrors = 0x2
)

// ext4Super is what we use of a superblock, verified by its checksum.
type ext4Super struct {
	raw            []byte
	blockSize      int64 // bytes
	blocks         int64
	freeBlocks     int64
	inodes         int64
	freeInodes     int64
	blocksPerGroup int64
	inodesPerGroup int64
	inodeSize      int64
	journalSize    int64 // bytes, as the superblock's copy of the journal's inode tells; 0: none
	reservedGDT    int64 // blocks in each descriptor copy, kept for growth
	state          uint16
	compat         uint32
	incompat       uint32
	roCompat       uint32
}

func (s *ext4Super) size() int64      { return s.blocks * s.blockSize }
func (s *ext4Super) hasJournal() bool { return s.compat&ext4CompatJournal != 0 }
func (s *ext4Super) dirty() bool      { return s.incompat&ext4IncompatRecover != 0 }

// clean reports that nothing was interrupted: unmounted, no error noted, no
// journal to replay.
func (s *ext4Super) clean() bool {
	return s.state&(ext4StateClean|ext4StateErrors) == ext4StateClean && !s.dirty()
}

// parseExt4Super reads the 1024 bytes of a superblock and verifies its checksum.
func parseExt4Super(b []byte) (*ext4Super, error) {
	s, err := parseExt4SuperUnsummed(b)
	if err != nil {
		return nil, err
	}
	if s.roCompat&ext4ROMetadataCsum != 0 {
		if want, have := ext4disk.SuperSum(b), binary.LittleEndian.Uint32(b[ext4disk.SuperSumAt:]); want != have {
			return nil, damaged("ext4 superblock checksum %08x, should be %08x", have, want)
		}
	}
	return s, nil
}

// parseExt4SuperUnsummed is for a superblock that the kernel works on.
func parseExt4SuperUnsummed(b []byte) (*ext4Super, error) {
	if len(b) != ext4SuperBytes {
		return nil, damaged("superblock of %d bytes", len(b))
	}
	le := binary.LittleEndian
	if magic := le.Uint16(b[0x38:]); magic != ext4Magic {
		return nil, damaged("no ext4 superblock (magic %#04x)", magic)
	}
	s := &ext4Super{
		raw:            b,
		inodes:         int64(le.Uint32(b[0x0:])),
		blocks:         int64(le.Uint32(b[0x4:])),
		freeBlocks:     int64(le.Uint32(b[0xC:])),
		freeInodes:     int64(le.Uint32(b[0x10:])),
		blocksPerGroup: int64(le.Uint32(b[0x20:])),
		inodesPerGroup: int64(le.Uint32(b[0x28:])),
		state:          le.Uint16(b[0x3A:]),
		inodeSize:      int64(le.Uint16(b[0x58:])),
		reservedGDT:    int64(le.Uint16(b[0xCE:])),
		compat:         le.Uint32(b[0x5C:]),
		incompat:       le.Uint32(b[0x60:]),
		roCompat:       le.Uint32(b[0x64:]),
	}
	logSize := le.Uint32(b[0x18:])
	if logSize > 6 {
		return nil, damaged("ext4 block size 1024<<%d", logSize)
	}
	s.blockSize = 1024 << logSize
	if s.incompat&ext4Incompat64bit != 0 {
		s.blocks |= int64(le.Uint32(b[0x150:])) << 32
		s.freeBlocks |= int64(le.Uint32(b[0x158:])) << 32
	}
	if s.hasJournal() {
		s.journalSize = int64(le.Uint32(b[0x14C:])) | int64(le.Uint32(b[0x148:]))<<32
	}
	if s.blocks <= 0 || s.blocks > 1<<48 || s.blocksPerGroup == 0 || s.inodesPerGroup == 0 {
		return nil, damaged("ext4 superblock with %d blocks, %d a group", s.blocks, s.blocksPerGroup)
	}
	return s, nil
}

func readExt4Super(path string) (*ext4Super, error) {
	b, err := readHead(path, ext4SuperOffset, ext4SuperBytes)
	if err != nil {
		return nil, err
	}
	return parseExt4Super(b)
}

// ext4SuperIn gives an image's superblock as bytes and as read.
func ext4SuperIn(image io.ReaderAt) (b []byte, s *ext4Super, err error) {
	if b, err = readAt(image, ext4SuperOffset, ext4SuperBytes); err == nil {
		s, err = parseExt4Super(b)
	}
	return b, s, err
}

func sizeExt4(image io.ReaderAt) (int64, error) {
	_, s, err := ext4SuperIn(image)
	if err != nil {
		return 0, err
	}
	return s.size(), nil
}

// dirtyExt4 reports a journal that must be replayed, or, without a journal, a
// filesystem that was not unmounted.
func dirtyExt4(path string) (bool, error) {
	s, err := readExt4Super(path)
	if err != nil {
		return false, err
	}
	return !s.clean(), nil
}

// openExt4 opens an image to change it, with its superblock as bytes and as read.
func openExt4(path string) (f *os.File, b []byte, s *ext4Super, err error) {
	if f, err = openExclusive(path); err != nil {
		return nil, nil, nil, err
	}
	if b, s, err = ext4SuperIn(f); err != nil {
		f.Close()
		return nil, nil, nil, err
	}
	return f, b, s, nil
}

// identifyExt4 needs metadata_csum_seed: with it no checksum but the
// superblock's own depends on the UUID. Backup superblocks keep the old UUID:
// e2fsck renews them from the primary one.
func identifyExt4(image Image, id UUID) error {
	b, s, err := ext4SuperIn(image)
	if err != nil {
		return err
	}
	if s.roCompat&ext4ROMetadataCsum == 0 || s.incompat&ext4IncompatSeed == 0 {
		return damaged("ext4 without metadata_csum_seed: its checksums depend on its UUID")
	}
	if !s.clean() {
		return ErrDirty
	}
	copy(b[0x68:0x78], id[:])
	binary.LittleEndian.PutUint32(b[ext4disk.SuperSumAt:], ext4disk.SuperSum(b))
	_, err = image.WriteAt(b, ext4SuperOffset)
	return err
}
