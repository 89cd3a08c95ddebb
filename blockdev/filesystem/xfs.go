package filesystem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// The XFS superblock, big-endian, in the first sector of each allocation group.
// Offsets are those of the kernel's fs/xfs/libxfs/xfs_format.h (struct xfs_dsb).
const (
	xfsMagic     = "XFSB"
	xfsReadBytes = 512

	xfsFeatureMetaUUID = 1 << 2 // incompat: metadata carries sb_meta_uuid instead of sb_uuid
)

// xfsSuper is what we use of a version 5 superblock, verified by its checksum.
type xfsSuper struct {
	raw        []byte // one sector
	blockSize  int64
	blocks     int64
	agBlocks   int64
	agCount    int64
	agBlockLog int64 // bits of a filesystem block number that count within a group
	sectorSize int64
	logStart   int64 // filesystem block number, 0: external
	logBlocks  int64
	incompat   uint32
	uuid       UUID
}

func (s *xfsSuper) size() int64 { return s.blocks * s.blockSize }

// parseXFSSuper reads one sector that begins with a superblock.
func parseXFSSuper(b []byte) (*xfsSuper, error) {
	if len(b) < xfsReadBytes || string(b[:4]) != xfsMagic {
		return nil, damaged("no XFS superblock")
	}
	be := binary.BigEndian
	if v := be.Uint16(b[100:]) & 0xF; v != 5 {
		return nil, damaged("XFS version %d, want 5", v)
	}
	s := &xfsSuper{
		raw:        b,
		blockSize:  int64(be.Uint32(b[4:])),
		blocks:     int64(be.Uint64(b[8:])),
		logStart:   int64(be.Uint64(b[48:])),
		agBlocks:   int64(be.Uint32(b[84:])),
		agCount:    int64(be.Uint32(b[88:])),
		agBlockLog: int64(b[124]),
		logBlocks:  int64(be.Uint32(b[96:])),
		sectorSize: int64(be.Uint16(b[102:])),
		incompat:   be.Uint32(b[216:]),
		uuid:       UUID(b[32:48]),
	}
	if err := s.plausible(); err != nil {
		return nil, err
	}
	if int64(len(b)) < s.sectorSize {
		return nil, damaged("XFS sector of %d bytes", s.sectorSize)
	}
	s.raw = b[:s.sectorSize]
	if want, have := xfsSum(s.raw, xfsSuperSumAt), binary.LittleEndian.Uint32(b[xfsSuperSumAt:]); want != have {
		return nil, damaged("XFS superblock checksum %08x, should be %08x", have, want)
	}
	return s, nil
}

const xfsSuperSumAt = 224

func (s *xfsSuper) plausible() error {
	power2 := func(n, low, high int64) bool { return n >= low && n <= high && n&(n-1) == 0 }
	if !power2(s.blockSize, 512, 65536) || !power2(s.sectorSize, 512, 32768) || s.sectorSize > s.blockSize {
		return damaged("XFS blocks of %d bytes, sectors of %d", s.blockSize, s.sectorSize)
	}
	if s.blocks <= 0 || s.blocks > 1<<50 || s.agBlocks <= 0 || s.agCount <= 0 ||
		s.blocks > s.agCount*s.agBlocks || s.blocks <= (s.agCount-1)*s.agBlocks {
		return damaged("XFS of %d blocks in %d groups of %d", s.blocks, s.agCount, s.agBlocks)
	}
	if s.agBlockLog > 40 || 1<<s.agBlockLog < s.agBlocks {
		return damaged("XFS groups of %d blocks, %d bits", s.agBlocks, s.agBlockLog)
	}
	return nil
}

// xfsSum is the checksum of a metadata block whose own field at at counts as 0.
func xfsSum(b []byte, at int) uint32 {
	c := rawCRC32C(^uint32(0), b[:at])
	c = rawCRC32C(c, make([]byte, 4))
	return ^rawCRC32C(c, b[at+4:])
}

func readXFSSuper(path string) (*xfsSuper, error) {
	b, err := readHead(path, 0, 4096)
	if err != nil {
		return nil, err
	}
	return parseXFSSuper(b)
}

func sizeXFS(image io.ReaderAt) (int64, error) {
	b, err := readAt(image, 0, 4096)
	if err != nil {
		return 0, err
	}
	s, err := parseXFSSuper(b)
	if err != nil {
		return 0, err
	}
	return s.size(), nil
}

func (x Tools) makeXFS(ctx context.Context, path string, size int64, o MakeOptions) error {
	// Sectors of 4 KiB are the pool's blocks: a smaller write to a shared block
	// would be a read, a copy and a write there.
	args := []string{"mkfs.xfs", "-q", "-f", "-K", "-s", "size=4096", "-d", "noalign",
		"-m", "crc=1,finobt=1,reflink=1,bigtime=1,rmapbt=0", "-l", fmt.Sprintf("size=%dm", xfsLogFor(size)/MiB)}
	if o.UUID != "" {
		args = append(args, "-m", "uuid="+o.UUID)
	}
	if o.Label != "" {
		args = append(args, "-L", o.Label)
	}
	if _, err := run.Run(ctx, run.Cmd{Args: append(args, path), Timeout: x.MakeTimeout}); err != nil {
		return err
	}
	return punchXFSLog(path)
}

// xfsLogFor is the size in bytes of the log; mkfs.xfs refuses less than 64 MiB.
func xfsLogFor(size int64) int64 {
	if size < 256<<30 {
		return 64 * MiB
	}
	return 256 * MiB
}

// punchXFSLog gives back the space of the log, which mkfs.xfs fills with zeroes
// but for its first record.
func punchXFSLog(path string) error {
	s, err := readXFSSuper(path)
	if err != nil {
		return err
	}
	log, err := s.internalLog()
	if err != nil {
		return err
	}
	f, err := openExclusive(path)
	if err != nil {
		return err
	}
	defer f.Close()
	const piece = 64 << 10
	size := log.blocks * logBlockBytes
	for at := int64(piece); at < size; at += piece {
		b, err := readAt(f, log.offset+at, int(min(piece, size-at)))
		if err != nil {
			return err
		}
		if !allZero(b) {
			return damaged("XFS log of a new filesystem is not empty")
		}
	}
	err = sys.PunchHole(f, log.offset+piece, size-piece)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil // the space is all that it would have saved
	}
	return err
}

// checkXFS leaves a dirty log alone (ErrDirty): only a mount recovers it.
func (x Tools) checkXFS(ctx context.Context, path string, repair bool) error {
	dirty, err := dirtyXFS(path)
	if err != nil && (!repair || !errors.Is(err, ErrDamaged)) {
		return err
	}
	if dirty {
		return ErrDirty
	}
	args := []string{"xfs_repair"}
	if !repair {
		args = append(args, "-n")
	}
	w := x.at(path)
	return w.leave(classifyCheck(w.run(ctx, nil, args)))
}

// dirtyXFS reports a log whose last record is not that of an unmount.
func dirtyXFS(path string) (bool, error) {
	s, err := readXFSSuper(path)
	if err != nil {
		return false, err
	}
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = readUnmountRecord(f, s)
	if errors.Is(err, ErrDirty) {
		return true, nil
	}
	return false, err
}
