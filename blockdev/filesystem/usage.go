package filesystem

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"

	"holdfast/internal/sys"
)

// Usage is how full a filesystem is. Space is in bytes, without what the
// filesystem needs for its own structures where it says so.
type Usage struct {
	Total, Used, Free int64
	// Inodes are 0 where a filesystem has no such number (btrfs). XFS makes them as
	// it goes: its total is what would fit into the free space.
	Inodes, UsedInodes, FreeInodes int64
	// Unclean: the filesystem was not unmounted; the numbers are those of before
	// its recovery.
	Unclean bool
}

// UsageMounted asks the kernel about the filesystem mounted at dir. It never
// waits for a freeze.
func (x Tools) UsageMounted(ctx context.Context, dir string, t Type) (Usage, error) {
	if err := ctx.Err(); err != nil {
		return Usage{}, failed("stat", t, err)
	}
	root, err := openMounted(dir, t)
	if err != nil {
		return Usage{}, failed("stat", t, err)
	}
	defer root.Close()
	u, err := sys.UsageOf(root)
	if err != nil {
		return Usage{}, failed("stat", t, err)
	}
	return usage(u.Total, u.Free, u.Inodes, u.FreeInodes), nil
}

// Usage reads the numbers of an unmounted filesystem from its superblock: no
// tool, no mount, nothing of the image trusted. The kernel keeps a little more
// for itself once it is mounted (XFS up to 6 % of a small volume, btrfs its global reserve).
// ErrDamaged when the superblock is not one of type t.
func (x Tools) Usage(ctx context.Context, path string, t Type) (Usage, error) {
	if err := ctx.Err(); err != nil {
		return Usage{}, failed("stat", t, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return Usage{}, failed("stat", t, err)
	}
	defer f.Close()
	return x.UsageIn(ctx, f, t)
}

// UsageIn is Usage of an image that is no file of this host.
func (x Tools) UsageIn(ctx context.Context, image io.ReaderAt, t Type) (u Usage, err error) {
	if err := ctx.Err(); err != nil {
		return Usage{}, failed("stat", t, err)
	}
	switch t {
	case Ext4:
		u, err = usageExt4(image)
	case XFS:
		u, err = usageXFS(image)
	case Btrfs:
		u, err = usageBtrfs(image)
	default:
		err = errors.ErrUnsupported
	}
	return u, failed("stat", t, err)
}

// usage makes numbers that fit together of what an image says.
func usage(total, free, inodes, freeInodes int64) Usage {
	total, inodes = max(total, 0), max(inodes, 0)
	free, freeInodes = min(max(free, 0), total), min(max(freeInodes, 0), inodes)
	return Usage{Total: total, Used: total - free, Free: free, Inodes: inodes, UsedInodes: inodes - freeInodes, FreeInodes: freeInodes}
}

func usageExt4(image io.ReaderAt) (Usage, error) {
	_, s, err := ext4SuperIn(image)
	if err != nil {
		return Usage{}, err
	}
	u := usage((s.blocks-s.overhead())*s.blockSize, s.freeBlocks*s.blockSize, s.inodes, s.freeInodes)
	u.Unclean = !s.clean()
	return u, nil
}

// ext4OverheadAt is s_overhead_clusters, which a kernel leaves behind when it has
// mounted the filesystem.
const ext4OverheadAt = 0x248

// overhead is how many blocks the structures occupy, counted as the kernel does
// (fs/ext4/super.c, ext4_calculate_overhead): statfs leaves them out.
func (s *ext4Super) overhead() int64 {
	if known := int64(binary.LittleEndian.Uint32(s.raw[ext4OverheadAt:])); known > 0 && known < s.blocks {
		return known
	}
	first := int64(binary.LittleEndian.Uint32(s.raw[0x14:]))
	groups := (s.blocks - first + s.blocksPerGroup - 1) / s.blocksPerGroup
	descriptors := (groups*s.descriptorSize() + s.blockSize - 1) / s.blockSize
	perGroup := (s.inodesPerGroup*s.inodeSize+s.blockSize-1)/s.blockSize + 2
	return first + groups*perGroup + ext4Supers(groups)*(1+descriptors) + s.journalSize/s.blockSize
}

// ext4Supers counts the groups with a superblock under sparse_super: 0, 1, and
// the powers of 3, 5 and 7.
func ext4Supers(groups int64) int64 {
	n := min(groups, 2)
	for _, base := range []int64{3, 5, 7} {
		for g := base; g < groups; g *= base {
			n++
		}
	}
	return n
}

// Offsets in the XFS superblock; see xfs.go.
const (
	xfsMaxInodesAt  = 127 // percent
	xfsInodesAt     = 128
	xfsFreeInodesAt = 136
	xfsFreeBlocksAt = 144
)

// usageXFS follows the kernel's fs/xfs/xfs_super.c, xfs_fs_statfs.
func usageXFS(image io.ReaderAt) (Usage, error) {
	b, err := readAt(image, 0, 4096)
	if err != nil {
		return Usage{}, err
	}
	s, err := parseXFSSuper(b)
	if err != nil {
		return Usage{}, err
	}
	be := binary.BigEndian
	total, free := s.blocks, int64(be.Uint64(b[xfsFreeBlocksAt:]))
	if s.logStart != 0 {
		total -= s.logBlocks
	}
	free = min(max(free, 0), max(total, 0))
	made, unused := int64(be.Uint64(b[xfsInodesAt:])), int64(be.Uint64(b[xfsFreeInodesAt:]))
	perBlock := s.blockSize / int64(max(be.Uint16(b[104:]), 256))
	if made < 0 || unused < 0 || unused > made || made > s.blocks*perBlock {
		return Usage{}, damaged("XFS with %d inodes, %d of them free", made, unused)
	}
	inodes := made + free*perBlock
	if percent := int64(b[xfsMaxInodesAt]); percent > 0 && percent <= 100 {
		inodes = max(made, min(inodes, s.blocks*percent/100*perBlock))
	}
	u := usage(total*s.blockSize, free*s.blockSize, inodes, inodes-(made-unused))
	u.Unclean, err = uncleanXFS(image, s)
	return u, err
}

func uncleanXFS(image io.ReaderAt, s *xfsSuper) (bool, error) {
	_, err := readUnmountRecord(image, s)
	if errors.Is(err, ErrDirty) {
		return true, nil
	}
	return false, err
}

// usageBtrfs: bytes_used, at 0x78, counts data and metadata.
func usageBtrfs(image io.ReaderAt) (Usage, error) {
	s, err := btrfsSuperIn(image)
	if err != nil {
		return Usage{}, err
	}
	used := int64(binary.LittleEndian.Uint64(s.raw[0x78:]))
	if used < 0 || used > s.total {
		return Usage{}, damaged("btrfs with %d of %d bytes used", used, s.total)
	}
	u := usage(s.total, s.total-used, 0, 0)
	u.Unclean = s.logRoot != 0
	return u, nil
}
