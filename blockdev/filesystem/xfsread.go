package filesystem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"
)

// Offsets and formats are those of the kernel's fs/xfs/libxfs/xfs_format.h and
// xfs_da_format.h, version 5 only.
const (
	xfsInodeMagic = 0x494E // "IN"
	xfsForkAt     = 176    // bytes of a version 3 inode before its data fork

	xfsFormatLocal   = 1
	xfsFormatExtents = 2
	xfsFormatBtree   = 3

	xfsFlagRealtime  = 1 << 0 // di_flags
	xfsFlag2BigTime  = 1 << 3 // di_flags2
	xfsFlag2BigCount = 1 << 4

	xfsMapMagic      = 0x424D4133 // "BMA3": a block of a file's extent tree
	xfsMapHeader     = 72
	xfsMapMaxDepth   = 9
	xfsDirBlockMagic = 0x58444233 // "XDB3": a directory of one block
	xfsDirDataMagic  = 0x58444433 // "XDD3"
	xfsDirHeader     = 64
	xfsDirDataEnd    = 32 << 30 // byte of a directory's file where its index begins
	xfsLinkMagic     = 0x58534C4D
	xfsLinkHeader    = 56
)

// xfsReader reads an XFS image.
type xfsReader struct {
	f         io.ReaderAt
	super     *xfsSuper
	rootInode uint64
	inodeSize int64
	inodeLog  uint // bits of an inode number that count within a block
}

func newXFSReader(f io.ReaderAt) (*xfsReader, error) {
	b, err := readAt(f, 0, 4096)
	if err != nil {
		return nil, err
	}
	s, err := parseXFSSuper(b)
	if err != nil {
		return nil, err
	}
	if _, err := readUnmountRecord(f, s); err != nil {
		return nil, err
	}
	r := &xfsReader{
		f: f, super: s,
		rootInode: binary.BigEndian.Uint64(b[56:]),
		inodeSize: int64(binary.BigEndian.Uint16(b[104:])),
		inodeLog:  uint(b[123]),
	}
	if r.inodeSize < 256 || r.inodeSize > 2048 || r.inodeLog > 16 || r.inodeSize<<r.inodeLog != s.blockSize {
		return nil, damaged("XFS inodes of %d bytes, %d bits", r.inodeSize, r.inodeLog)
	}
	if b[192] != 0 {
		return nil, fmt.Errorf("XFS with large directory blocks: %w", errors.ErrUnsupported)
	}
	return r, nil
}

func (r *xfsReader) root() uint64 { return r.rootInode }

// block translates a filesystem block number to a byte of the image.
func (r *xfsReader) block(number uint64) (int64, error) {
	s := r.super
	group, in := int64(number>>s.agBlockLog), int64(number&(1<<s.agBlockLog-1))
	if group >= s.agCount || group < 0 || in >= s.agBlocks || group*s.agBlocks+in >= s.blocks {
		return 0, damaged("XFS block %d", number)
	}
	return (group*s.agBlocks + in) * s.blockSize, nil
}

func (r *xfsReader) inode(number uint64) (*inode, error) {
	at, err := r.block(number >> r.inodeLog)
	if err != nil {
		return nil, err
	}
	at += int64(number&(1<<r.inodeLog-1)) * r.inodeSize
	b, err := readAt(r.f, at, int(r.inodeSize))
	if err != nil {
		return nil, err
	}
	be := binary.BigEndian
	if be.Uint16(b) != xfsInodeMagic || b[4] != 3 || be.Uint64(b[152:]) != number {
		return nil, damaged("no XFS inode %d", number)
	}
	mode, err := unixMode(be.Uint16(b[2:]))
	if err != nil {
		return nil, err
	}
	i := &inode{
		number: number, mode: mode, raw: b,
		uid: int(be.Uint32(b[8:])), gid: int(be.Uint32(b[12:])),
		size: int64(be.Uint64(b[56:])), modTime: xfsTime(b[40:48], be.Uint64(b[120:])),
	}
	if i.size < 0 || int64(b[82])*8 > r.inodeSize-xfsForkAt {
		return nil, damaged("XFS inode %d of %d bytes", number, uint64(i.size))
	}
	return i, nil
}

func xfsTime(b []byte, flags2 uint64) time.Time {
	be := binary.BigEndian
	if flags2&xfsFlag2BigTime == 0 {
		return time.Unix(int64(int32(be.Uint32(b))), int64(be.Uint32(b[4:]))).UTC()
	}
	// Nanoseconds since 2^31 seconds before the epoch.
	ns := be.Uint64(b)
	return time.Unix(int64(ns/1e9)-1<<31, int64(ns%1e9)).UTC()
}

// fork gives the data fork: what follows the inode's core, up to the
// attributes' fork.
func (r *xfsReader) fork(i *inode) []byte {
	if size := int(i.raw[82]) * 8; size != 0 {
		return i.raw[xfsForkAt : xfsForkAt+size]
	}
	return i.raw[xfsForkAt:]
}

func (r *xfsReader) extents(i *inode) iter.Seq2[extent, error] {
	return func(yield func(extent, error) bool) {
		if err := r.mapped(i, func(e extent) bool { return yield(e, nil) }); err != nil && !errors.Is(err, errFound) {
			yield(extent{}, err)
		}
	}
}

func (r *xfsReader) mapped(i *inode, yield func(extent) bool) error {
	be := binary.BigEndian
	if be.Uint16(i.raw[90:])&xfsFlagRealtime != 0 {
		return fmt.Errorf("XFS file on a realtime device: %w", errors.ErrUnsupported)
	}
	fork := r.fork(i)
	next := int64(0)
	switch i.raw[5] {
	case xfsFormatExtents:
		count := uint64(be.Uint32(i.raw[76:]))
		if be.Uint64(i.raw[120:])&xfsFlag2BigCount != 0 {
			count = be.Uint64(i.raw[24:])
		}
		if count > uint64(len(fork)/16) {
			return damaged("XFS inode %d with %d extents", i.number, count)
		}
		return r.records(fork[:16*count], &next, yield)
	case xfsFormatBtree:
		level, count, most := int(be.Uint16(fork)), int(be.Uint16(fork[2:])), (len(fork)-4)/16
		if level == 0 || level > xfsMapMaxDepth || count == 0 || count > most {
			return damaged("XFS extent tree of %d levels, %d entries", level, count)
		}
		return r.children(fork[4+8*most:], count, level, &next, yield)
	}
	return damaged("XFS inode %d has no extents (format %d)", i.number, i.raw[5])
}

// children reads the count nodes below one at level, whose pointers are in b.
func (r *xfsReader) children(b []byte, count, level int, next *int64, yield func(extent) bool) error {
	be := binary.BigEndian
	for n := range count {
		at, err := r.block(be.Uint64(b[8*n:]))
		if err != nil {
			return err
		}
		block, err := readAt(r.f, at, int(r.super.blockSize))
		if err != nil {
			return err
		}
		entries, most := int(be.Uint16(block[6:])), (len(block)-xfsMapHeader)/16
		if be.Uint32(block) != xfsMapMagic || int(be.Uint16(block[4:])) != level-1 || entries == 0 || entries > most {
			return damaged("XFS extent tree node with %d entries at level %d", entries, level-1)
		}
		if level == 1 {
			err = r.records(block[xfsMapHeader:xfsMapHeader+16*entries], next, yield)
		} else {
			err = r.children(block[xfsMapHeader+8*most:], entries, level-1, next, yield)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// records gives packed extent records: 1 bit unwritten, 54 bits of file block,
// 52 bits of filesystem block, 21 bits of length. next is the least file block
// that may come, so that no tree can go around in circles.
func (r *xfsReader) records(b []byte, next *int64, yield func(extent) bool) error {
	size := r.super.blockSize
	for ; len(b) > 0; b = b[16:] {
		high, low := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
		logical, length := int64(high&(1<<63-1)>>9), int64(low&(1<<21-1))
		start := high&0x1FF<<43 | low>>21
		if length == 0 || logical < *next || logical > 1<<62/size {
			return damaged("XFS extent of %d blocks at block %d", length, logical)
		}
		at, err := r.block(start)
		if err != nil {
			return err
		}
		if int64(start&(1<<r.super.agBlockLog-1))+length > r.super.agBlocks {
			return damaged("XFS extent of %d blocks leaves its group", length)
		}
		*next = logical + length
		if !yield(extent{logical: logical * size, physical: at, length: length * size, unwritten: high>>63 != 0}) {
			return errFound
		}
	}
	return nil
}

func (r *xfsReader) names(i *inode, fn func(string, uint64) error) error {
	if i.raw[5] == xfsFormatLocal {
		return xfsShortDir(r.fork(i), i.size, fn)
	}
	return dirPieces(r.f, r, i, r.super.blockSize, xfsDirDataEnd, func(b []byte) error { return xfsDirBlock(b, fn) })
}

// xfsShortDir reads a directory that is inside its inode.
func xfsShortDir(b []byte, size int64, fn func(string, uint64) error) error {
	if size < 6 || size > int64(len(b)) {
		return damaged("XFS directory of %d bytes", size)
	}
	b = b[:size]
	count, width := int(b[0]), 4
	if b[1] != 0 {
		count, width = int(b[1]), 8
	}
	if len(b) < 2+width {
		return damaged("XFS directory of %d bytes", size)
	}
	for b = b[2+width:]; count > 0; count-- {
		// Length of the name, 2 bytes of offset, the name, its type, the inode.
		if len(b) < 1 || len(b) < 4+int(b[0])+width {
			return damaged("XFS directory entry beyond its end")
		}
		name := b[3 : 3+int(b[0])]
		tail := b[4+len(name):]
		number := uint64(binary.BigEndian.Uint32(tail))
		if width == 8 {
			number = binary.BigEndian.Uint64(tail)
		}
		if err := nameAllowed(name); err != nil {
			return err
		}
		if err := fn(string(name), number); err != nil {
			return err
		}
		b = tail[width:]
	}
	return nil
}

// xfsDirBlock reads one data block of a directory.
func xfsDirBlock(b []byte, fn func(string, uint64) error) error {
	be := binary.BigEndian
	switch be.Uint32(b) {
	case xfsDirDataMagic:
	case xfsDirBlockMagic:
		// Its index is at its end: 8 bytes an entry, then the count in 8.
		count := int64(be.Uint32(b[len(b)-8:]))
		if count > int64(len(b)-xfsDirHeader-8)/8 {
			return damaged("XFS directory block with an index of %d", count)
		}
		b = b[:int64(len(b))-8-8*count]
	default:
		return damaged("XFS directory block with magic %08x", be.Uint32(b))
	}
	for b = b[xfsDirHeader:]; len(b) >= 8; {
		if be.Uint16(b) == 0xFFFF { // unused
			length := int(be.Uint16(b[2:]))
			if length < 8 || length%8 != 0 || length > len(b) {
				return damaged("XFS directory gap of %d bytes", length)
			}
			b = b[length:]
			continue
		}
		// Inode, length of the name, the name, its type, 2 bytes of offset.
		name := 0
		if len(b) > 8 {
			name = int(b[8])
		}
		length := (12 + name + 7) &^ 7
		if length > len(b) || name == 0 {
			return damaged("XFS directory entry of %d bytes", length)
		}
		if err := nameAllowed(b[9 : 9+name]); err != nil {
			return err
		}
		if err := fn(string(b[9:9+name]), be.Uint64(b)); err != nil {
			return err
		}
		b = b[length:]
	}
	return nil
}

func (r *xfsReader) target(i *inode) (string, error) {
	if i.raw[5] == xfsFormatLocal {
		fork := r.fork(i)
		if i.size > int64(len(fork)) {
			return "", damaged("symbolic link of %d bytes", i.size)
		}
		return string(fork[:i.size]), nil
	}
	var target []byte
	err := dirPieces(r.f, r, i, r.super.blockSize, maxLinkBytes*2, func(b []byte) error {
		n := int(binary.BigEndian.Uint32(b[8:]))
		if binary.BigEndian.Uint32(b) != xfsLinkMagic || n < 0 || n > len(b)-xfsLinkHeader {
			return damaged("symbolic link block of %d bytes", n)
		}
		target = append(target, b[xfsLinkHeader:xfsLinkHeader+n]...)
		return nil
	})
	if err == nil && int64(len(target)) != i.size {
		err = damaged("symbolic link of %d bytes has %d", i.size, len(target))
	}
	return string(target), err
}
