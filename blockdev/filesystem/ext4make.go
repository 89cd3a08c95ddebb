package filesystem

import (
	"context"
	"encoding/binary"
	"fmt"
	"strconv"

	"holdfast/blockdev/filesystem/internal/ext4disk"
	"holdfast/internal/run"
)

// All features are named, so that the host's mke2fs.conf changes nothing and
// kernels since 4.4 can mount the result.
const ext4Features = "none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file," +
	"huge_file,dir_nlink,extra_isize,metadata_csum,metadata_csum_seed"

// ext4Class is how an ext4 filesystem of a size is laid out.
type ext4Class struct {
	blockSize int64 // bytes
	inodes    int64
	journal   int64 // bytes; 0: none
	room      int64 // bytes up to which it grows without moving blocks; 0: not prepared
}

const (
	// Below, volumes have no journal and 1 KiB blocks, and 32-byte group
	// descriptors: with 64 bytes resize2fs refuses to reach 1 TiB.
	// A journal of the least 1024 blocks of 4 KiB would take a quarter of them.
	ext4JournalFrom = 16 * MiB
	ext4InodeBytes  = 256
)

// ext4ClassFor chooses a layout for size bytes. Two rules shape it: a 512 MiB
// volume offers 95 % of its bytes to files (the kernel takes 2 % more than the
// layout shows), and after any growth there is an inode for
// each 64 KiB (inodes per group never change, so that a small filesystem begins
// with enough for its later groups).
func ext4ClassFor(size, inodes int64) ext4Class {
	c := ext4Class{blockSize: 4096, journal: ext4JournalFor(size)}
	switch {
	case size < ext4JournalFrom:
		c.blockSize = 1024
		c.inodes = max(128, size/(64<<10))
	case size < 1<<30:
		c.inodes = max(size/(32<<10), min(2048, size/(8<<10)))
	default:
		c.inodes = size / (16 << 10)
	}
	c.inodes = max(c.inodes, inodes+ext4ReservedInodes)
	if c.blockSize == 1024 { // mke2fs rounds down to 8 in each group
		step := 8 * ceilDiv(size/c.blockSize-1, 8*c.blockSize)
		c.inodes = ceilDiv(c.inodes, step) * step
	}
	if c.blockSize == 4096 {
		c.room = max(1<<40, 2*size)
	}
	return c
}

// The first ten inodes and lost+found are not for files.
const ext4ReservedInodes = 11

// ext4JournalFor is the size in bytes of the journal for a filesystem of size
// bytes; larger ones let more be written between two checkpoints.
func ext4JournalFor(size int64) int64 {
	switch {
	case size < ext4JournalFrom:
		return 0
	case size < 256*MiB:
		return 4 * MiB
	case size < 2<<30:
		return 8 * MiB
	case size < 8<<30:
		return 32 * MiB
	case size < 64<<30:
		return 64 * MiB
	default:
		return 128 * MiB
	}
}

func (x Tools) makeExt4(ctx context.Context, path string, size int64, o MakeOptions) error {
	args, err := ext4MakeArgs(path, size, o)
	if err != nil {
		return err
	}
	// With an empty configuration mke2fs warns about it and takes our word for all.
	env := []string{"MKE2FS_CONFIG=/dev/null"}
	if !o.Time.IsZero() {
		sec := strconv.FormatInt(o.Time.Unix(), 10)
		env = append(env, "SOURCE_DATE_EPOCH="+sec, "E2FSPROGS_FAKE_TIME="+sec)
	}
	if _, err = run.Run(ctx, run.Cmd{Args: args, Env: env, Timeout: x.MakeTimeout}); err != nil {
		return err
	}
	return signExt4Names(path)
}

const (
	ext4FlagsAt       = 0x160
	ext4FlagSigned    = 0x1
	ext4FlagUnsigned  = 0x2
	ext4FlagsOfHashes = ext4FlagSigned | ext4FlagUnsigned
)

// signExt4Names has an empty filesystem hash names as bytes with a sign, as x86
// does: mke2fs goes by what char is on its machine, and images should not tell.
func signExt4Names(path string) error {
	f, b, _, err := openExt4(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := binary.LittleEndian.Uint32(b[ext4FlagsAt:])
	if flags&ext4FlagsOfHashes == ext4FlagSigned {
		return nil
	}
	binary.LittleEndian.PutUint32(b[ext4FlagsAt:], flags&^ext4FlagsOfHashes|ext4FlagSigned)
	binary.LittleEndian.PutUint32(b[ext4disk.SuperSumAt:], ext4disk.SuperSum(b))
	if _, err := f.WriteAt(b, ext4SuperOffset); err != nil {
		return err
	}
	return f.Close()
}

func ext4MakeArgs(path string, size int64, o MakeOptions) ([]string, error) {
	c := ext4ClassFor(size, o.Inodes)
	if OfferExt4(size, o.Inodes) == (Ext4Offer{}) {
		return nil, fmt.Errorf("%w: %d MiB cannot hold %d inodes", ErrTooSmall, size/MiB, o.Inodes)
	}
	features := ext4Features
	extended := "nodiscard,assume_storage_prezeroed=1,root_owner=0:0"
	if c.room != 0 {
		features += ",64bit,resize_inode"
		extended += fmt.Sprintf(",resize=%d", c.room/c.blockSize)
	}
	args := []string{"mke2fs", "-F", "-q", "-t", "ext4", "-m", "0", "-e", "remount-ro",
		"-b", strconv.FormatInt(c.blockSize, 10), "-I", strconv.Itoa(ext4InodeBytes), "-N", strconv.FormatInt(c.inodes, 10)}
	if c.journal != 0 {
		features += ",has_journal"
		args = append(args, "-J", fmt.Sprintf("size=%d", c.journal/MiB))
	}
	if o.UUID != "" {
		args = append(args, "-U", o.UUID)
		extended += ",hash_seed=" + o.UUID
	}
	if o.Label != "" {
		args = append(args, "-L", o.Label)
	}
	args = append(args, "-O", features, "-E", extended, path, strconv.FormatInt(size/1024, 10)+"k")
	return args, nil
}
