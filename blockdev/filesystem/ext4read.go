package filesystem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"holdfast/blockdev/filesystem/internal/ext4disk"
)

const (
	ext4RootInode = 2

	ext4IncompatMetaBG = 0x10

	ext4FlagEncrypted  = 0x800
	ext4FlagExtents    = 0x80000
	ext4FlagInlineData = 0x10000000

	ext4ExtentMagic    = 0xF30A
	ext4ExtentMaxDepth = 5
	// A longer length field marks an extent that reads as zeroes.
	ext4ExtentMaxLength = 32768
	ext4BlockArea       = 60 // bytes of an inode that hold its extent tree's root
)

// ext4Reader reads an ext4 image by the kernel's
// Documentation/filesystems/ext4 (inodes.rst, ifork.rst, directory.rst).
type ext4Reader struct {
	f     io.ReaderAt
	super *ext4Super
}

func newExt4Reader(f io.ReaderAt) (*ext4Reader, error) {
	b, err := readAt(f, ext4SuperOffset, ext4SuperBytes)
	if err != nil {
		return nil, err
	}
	s, err := parseExt4Super(b)
	if err != nil {
		return nil, err
	}
	if s.dirty() {
		return nil, ErrDirty
	}
	if s.inodeSize < 128 || s.inodeSize > s.blockSize {
		return nil, damaged("ext4 inodes of %d bytes", s.inodeSize)
	}
	return &ext4Reader{f: f, super: s}, nil
}

func (r *ext4Reader) root() uint64 { return ext4RootInode }

func (r *ext4Reader) inode(number uint64) (*inode, error) {
	s := r.super
	if number == 0 || number > uint64(s.inodes) {
		return nil, damaged("inode %d of %d", number, s.inodes)
	}
	group, index := int64(number-1)/s.inodesPerGroup, int64(number-1)%s.inodesPerGroup
	table, err := r.inodeTable(group)
	if err != nil {
		return nil, err
	}
	b, err := readAt(r.f, table*s.blockSize+index*s.inodeSize, int(s.inodeSize))
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	mode, err := unixMode(le.Uint16(b))
	if err != nil {
		return nil, err
	}
	i := &inode{
		number: number,
		mode:   mode,
		uid:    int(le.Uint16(b[0x2:])) | int(le.Uint16(b[0x78:]))<<16,
		gid:    int(le.Uint16(b[0x18:])) | int(le.Uint16(b[0x7A:]))<<16,
		size:   int64(uint64(le.Uint32(b[0x4:])) | uint64(le.Uint32(b[0x6C:]))<<32),
		raw:    b,
	}
	if i.size < 0 {
		return nil, damaged("inode %d of %d bytes", number, uint64(i.size))
	}
	seconds, nanos := int64(int32(le.Uint32(b[0x10:]))), int64(0)
	if len(b) >= 0x8C && le.Uint16(b[0x80:]) >= 0xC {
		extra := le.Uint32(b[0x88:])
		seconds, nanos = seconds+int64(extra&3)<<32, int64(extra>>2)
	}
	i.modTime = time.Unix(seconds, nanos).UTC()
	return i, nil
}

// inodeTable tells the block where a group's inodes begin.
func (r *ext4Reader) inodeTable(group int64) (int64, error) {
	s := r.super
	size := int64(32)
	if s.incompat&ext4Incompat64bit != 0 {
		if size = int64(binary.LittleEndian.Uint16(s.raw[0xFE:])); size < 64 || size > s.blockSize {
			return 0, damaged("ext4 group descriptors of %d bytes", size)
		}
	}
	perBlock := s.blockSize / size
	first := int64(binary.LittleEndian.Uint32(s.raw[0x14:]))
	at := first + 1 + group/perBlock
	if s.incompat&ext4IncompatMetaBG != 0 && group/perBlock >= int64(binary.LittleEndian.Uint32(s.raw[0x104:])) {
		leader := group / perBlock * perBlock
		at = first + leader*s.blocksPerGroup
		if ext4disk.HasSuperCopy(leader) {
			at++
		}
	}
	b, err := readAt(r.f, at*s.blockSize+group%perBlock*size, int(size))
	if err != nil {
		return 0, err
	}
	table := int64(binary.LittleEndian.Uint32(b[0x8:]))
	if size >= 64 {
		table |= int64(binary.LittleEndian.Uint32(b[0x28:])) << 32
	}
	return table, r.inside(table)
}

func (r *ext4Reader) inside(block int64) error {
	if block <= 0 || block >= r.super.blocks {
		return damaged("block %d of %d", block, r.super.blocks)
	}
	return nil
}

func (r *ext4Reader) extents(i *inode) iter.Seq2[extent, error] {
	return func(yield func(extent, error) bool) {
		flags := binary.LittleEndian.Uint32(i.raw[0x20:])
		if flags&ext4FlagExtents == 0 || flags&(ext4FlagInlineData|ext4FlagEncrypted) != 0 {
			yield(extent{}, fmt.Errorf("inode %d is encrypted, inline or mapped by blocks: %w", i.number, errors.ErrUnsupported))
			return
		}
		next := int64(0)
		err := r.extentNode(i.raw[0x28:0x28+ext4BlockArea], ext4ExtentMaxDepth+1, &next, func(e extent) bool { return yield(e, nil) })
		if err != nil && !errors.Is(err, errFound) {
			yield(extent{}, err)
		}
	}
}

// extentNode gives the extents of a tree's node and what is below it. next is
// the least block that may come, so that no tree can go around in circles.
// errFound: the receiver wants no more.
func (r *ext4Reader) extentNode(b []byte, above int, next *int64, yield func(extent) bool) error {
	le := binary.LittleEndian
	entries, depth := int(le.Uint16(b[2:])), int(le.Uint16(b[6:]))
	root := above > ext4ExtentMaxDepth
	if le.Uint16(b) != ext4ExtentMagic || depth >= above || 12+12*entries > len(b) || entries == 0 && !root {
		return damaged("extent tree node with %d entries at depth %d", entries, depth)
	}
	for n := range entries {
		e := b[12+12*n : 24+12*n]
		if depth == 0 {
			if err := r.extentLeaf(e, next, yield); err != nil {
				return err
			}
			continue
		}
		child := int64(le.Uint32(e[4:])) | int64(le.Uint16(e[8:]))<<32
		if err := r.inside(child); err != nil {
			return err
		}
		block, err := readAt(r.f, child*r.super.blockSize, int(r.super.blockSize))
		if err != nil {
			return err
		}
		if int(le.Uint16(block[6:])) != depth-1 {
			return damaged("extent tree node below depth %d", depth)
		}
		if err := r.extentNode(block, depth, next, yield); err != nil {
			return err
		}
	}
	return nil
}

func (r *ext4Reader) extentLeaf(b []byte, next *int64, yield func(extent) bool) error {
	le := binary.LittleEndian
	logical, length := int64(le.Uint32(b)), int64(le.Uint16(b[4:]))
	start := int64(le.Uint32(b[8:])) | int64(le.Uint16(b[6:]))<<32
	unwritten := length > ext4ExtentMaxLength
	if unwritten {
		length -= ext4ExtentMaxLength
	}
	if length == 0 || logical < *next {
		return damaged("extent of %d blocks at block %d", length, logical)
	}
	if err := errors.Join(r.inside(start), r.inside(start+length-1)); err != nil {
		return err
	}
	*next = logical + length
	size := r.super.blockSize
	if !yield(extent{logical: logical * size, physical: start * size, length: length * size, unwritten: unwritten}) {
		return errFound
	}
	return nil
}

func (r *ext4Reader) names(i *inode, fn func(string, uint64) error) error {
	return dirPieces(r.f, r, i, r.super.blockSize, i.size, func(b []byte) error { return ext4DirBlock(b, fn) })
}

// ext4DirBlock reads one block of a directory. Blocks of its hash tree look like
// blocks without names.
func ext4DirBlock(b []byte, fn func(string, uint64) error) error {
	for len(b) >= 8 {
		number, length, name := binary.LittleEndian.Uint32(b), int(binary.LittleEndian.Uint16(b[4:])), int(b[6])
		if length == 0 || length == 0xFFFF {
			length = 65536 // a whole block of 64 KiB does not fit the field
		}
		if length < 8 || length%4 != 0 || length > len(b) || 8+name > length {
			return damaged("directory entry of %d bytes with a name of %d", length, name)
		}
		if number != 0 {
			if err := nameAllowed(b[8 : 8+name]); err != nil {
				return err
			}
			if err := fn(string(b[8:8+name]), uint64(number)); err != nil {
				return err
			}
		}
		b = b[length:]
	}
	return nil
}

func (r *ext4Reader) target(i *inode) (string, error) {
	if i.size < ext4BlockArea && binary.LittleEndian.Uint32(i.raw[0x20:])&ext4FlagExtents == 0 {
		return string(i.raw[0x28 : 0x28+i.size]), nil
	}
	return readAll(r.f, r, i)
}
