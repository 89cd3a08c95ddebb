package filesystem

import (
	"context"
	"encoding/binary"
	"io"

	"holdfast/internal/run"
)

// The btrfs superblock, little-endian, 4096 bytes at 64 KiB, 64 MiB and 256 GiB.
// Offsets are those of the kernel's include/uapi/linux/btrfs_tree.h
// (struct btrfs_super_block).
const (
	btrfsSuperBytes = 4096
	btrfsMagic      = "_BHRfS_M"

	btrfsIncompatMetadataUUID = 1 << 10
	btrfsFlagSeeding          = 1 << 32
	btrfsFlagChanging         = 1<<35 | 1<<36 // a change of fsid was interrupted
)

var btrfsSuperOffsets = []int64{64 << 10, 64 * MiB, 256 << 30}

// btrfsSuper is what we use of a superblock, verified by its checksum.
type btrfsSuper struct {
	raw          []byte
	fsid         UUID
	metadataUUID UUID // the one that metadata carries when the feature is on
	bytenr       int64
	flags        uint64
	generation   uint64
	logRoot      uint64
	total        int64
	devices      int64
	incompat     uint64
	deviceTotal  int64
	deviceFSID   UUID
}

// parseBtrfsSuper reads the 4096 bytes of the superblock that belongs at offset at.
func parseBtrfsSuper(b []byte, at int64) (*btrfsSuper, error) {
	if len(b) != btrfsSuperBytes || string(b[0x40:0x48]) != btrfsMagic {
		return nil, damaged("no btrfs superblock at byte %d", at)
	}
	le := binary.LittleEndian
	s := &btrfsSuper{
		raw:          b,
		fsid:         UUID(b[0x20:0x30]),
		bytenr:       int64(le.Uint64(b[0x30:])),
		flags:        le.Uint64(b[0x38:]),
		generation:   le.Uint64(b[0x48:]),
		logRoot:      le.Uint64(b[0x60:]),
		total:        int64(le.Uint64(b[0x70:])),
		devices:      int64(le.Uint64(b[0x88:])),
		incompat:     le.Uint64(b[0xBC:]),
		deviceTotal:  int64(le.Uint64(b[0xC9+8:])),
		deviceFSID:   UUID(b[0xC9+82 : 0xC9+98]),
		metadataUUID: UUID(b[0x23B:0x24B]),
	}
	if kind := le.Uint16(b[0xC4:]); kind != 0 {
		return nil, damaged("btrfs checksum type %d, want CRC-32C", kind)
	}
	if want, have := btrfsSum(b), le.Uint32(b); want != have {
		return nil, damaged("btrfs superblock checksum %08x, should be %08x", have, want)
	}
	if s.bytenr != at {
		return nil, damaged("btrfs superblock at byte %d says that it is at %d", at, s.bytenr)
	}
	if s.total <= 0 || s.devices != 1 || s.deviceTotal <= 0 || s.deviceTotal > s.total {
		return nil, damaged("btrfs of %d bytes on %d devices", s.total, s.devices)
	}
	return s, nil
}

// btrfsSum is the checksum that belongs in a superblock's first four bytes.
func btrfsSum(b []byte) uint32 { return ^rawCRC32C(^uint32(0), b[0x20:]) }

func readBtrfsSuper(path string) (*btrfsSuper, error) {
	b, err := readHead(path, btrfsSuperOffsets[0], btrfsSuperBytes)
	if err != nil {
		return nil, err
	}
	return parseBtrfsSuper(b, btrfsSuperOffsets[0])
}

func btrfsSuperIn(image io.ReaderAt) (*btrfsSuper, error) {
	b, err := readAt(image, btrfsSuperOffsets[0], btrfsSuperBytes)
	if err != nil {
		return nil, err
	}
	return parseBtrfsSuper(b, btrfsSuperOffsets[0])
}

func sizeBtrfs(image io.ReaderAt) (int64, error) {
	s, err := btrfsSuperIn(image)
	if err != nil {
		return 0, err
	}
	return s.total, nil
}

// dirtyBtrfs reports a tree log to replay. btrfs is consistent without it, but
// then lacks what was synced last.
func dirtyBtrfs(path string) (bool, error) {
	s, err := readBtrfsSuper(path)
	if err != nil {
		return false, err
	}
	return s.logRoot != 0, nil
}

func (x Tools) makeBtrfs(ctx context.Context, path string, o MakeOptions) error {
	args := []string{"mkfs.btrfs", "-q", "-f", "-K", "-m", "single", "-d", "single", "--csum", "crc32c"}
	if o.UUID != "" {
		args = append(args, "-U", o.UUID)
	}
	if o.Label != "" {
		args = append(args, "-L", o.Label)
	}
	_, err := run.Run(ctx, run.Cmd{Args: append(args, path), Timeout: x.MakeTimeout})
	return err
}

// checkBtrfs only checks: btrfs-progs warns of its own repair.
func (x Tools) checkBtrfs(ctx context.Context, path string) error {
	if _, err := readBtrfsSuper(path); err != nil {
		return err
	}
	w := x.at(path)
	return w.leave(classifyCheck(w.run(ctx, nil, []string{"btrfs", "check", "--readonly"})))
}

// identifyBtrfs uses the feature metadata_uuid: the superblocks get a new fsid,
// all other metadata goes on carrying the old one, which the superblocks keep.
// The kernel tells two clones apart by the fsid.
func identifyBtrfs(image Image, size int64, id UUID) error {
	var supers []*btrfsSuper
	for _, at := range btrfsSuperOffsets {
		if at+btrfsSuperBytes > size {
			break
		}
		b, err := readAt(image, at, btrfsSuperBytes)
		if err != nil {
			return err
		}
		s, err := parseBtrfsSuper(b, at)
		if err != nil {
			return err
		}
		supers = append(supers, s)
	}
	return patchBtrfs(image, supers, id)
}

// patchBtrfs checks all superblocks, then writes them, the first one last.
func patchBtrfs(image io.WriterAt, supers []*btrfsSuper, id UUID) error {
	if len(supers) == 0 {
		return damaged("image too small for btrfs")
	}
	for _, s := range supers {
		if s.logRoot != 0 || s.flags&(btrfsFlagSeeding|btrfsFlagChanging) != 0 || s.generation != supers[0].generation {
			return ErrDirty
		}
	}
	for i := len(supers) - 1; i >= 0; i-- {
		s := supers[i]
		if s.incompat&btrfsIncompatMetadataUUID == 0 {
			copy(s.raw[0x23B:0x24B], s.fsid[:])
			binary.LittleEndian.PutUint64(s.raw[0xBC:], s.incompat|btrfsIncompatMetadataUUID)
		}
		copy(s.raw[0x20:0x30], id[:])
		binary.LittleEndian.PutUint32(s.raw, btrfsSum(s.raw))
		if _, err := image.WriteAt(s.raw, s.bytenr); err != nil {
			return err
		}
	}
	return nil
}
