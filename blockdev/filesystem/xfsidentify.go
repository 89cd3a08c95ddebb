package filesystem

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// identifyXFS uses the feature meta_uuid: the superblocks of all groups get a new
// UUID, all other metadata goes on carrying the old one, which the superblocks
// keep in sb_meta_uuid. The log is the exception: the kernel wants the new UUID
// in the record that it finds at the log's head, and of a clean log looks at no
// other.
func identifyXFS(image Image, id UUID) error {
	supers, err := readXFSSupers(image)
	if err != nil {
		return err
	}
	record, err := readUnmountRecord(image, supers[0])
	if err != nil {
		return err
	}
	if record != nil {
		record.identify(id)
		if _, err := image.WriteAt(record.head, record.at); err != nil {
			return err
		}
	}
	for n := len(supers) - 1; n >= 0; n-- {
		s := supers[n]
		s.identify(id)
		if _, err := image.WriteAt(s.raw, int64(n)*s.agBlocks*s.blockSize); err != nil {
			return err
		}
	}
	return nil
}

// readXFSSupers reads and compares the superblocks of all allocation groups.
func readXFSSupers(f io.ReaderAt) ([]*xfsSuper, error) {
	b, err := readAt(f, 0, 4096)
	if err != nil {
		return nil, err
	}
	first, err := parseXFSSuper(b)
	if err != nil {
		return nil, err
	}
	if first.raw[xfsInProgressAt] != 0 {
		return nil, damaged("XFS was not made to the end")
	}
	supers := []*xfsSuper{first}
	for n := int64(1); n < first.agCount; n++ {
		b, err := readAt(f, n*first.agBlocks*first.blockSize, int(first.sectorSize))
		if err != nil {
			return nil, err
		}
		s, err := parseXFSSuper(b)
		if err != nil {
			return nil, err
		}
		if s.uuid != first.uuid || s.agBlocks != first.agBlocks || s.blockSize != first.blockSize ||
			s.incompat != first.incompat || s.sectorSize != first.sectorSize {
			return nil, damaged("XFS superblock of group %d is not like the first", n)
		}
		supers = append(supers, s)
	}
	return supers, nil
}

const (
	xfsUUIDAt       = 32
	xfsInProgressAt = 126
	xfsIncompatAt   = 216
	xfsMetaUUIDAt   = 248
)

// identify gives the superblock a new UUID in memory.
func (s *xfsSuper) identify(id UUID) {
	if s.incompat&xfsFeatureMetaUUID == 0 {
		copy(s.raw[xfsMetaUUIDAt:], s.uuid[:])
		binary.BigEndian.PutUint32(s.raw[xfsIncompatAt:], s.incompat|xfsFeatureMetaUUID)
	}
	copy(s.raw[xfsUUIDAt:], id[:])
	binary.LittleEndian.PutUint32(s.raw[xfsSuperSumAt:], xfsSum(s.raw, xfsSuperSumAt))
}

// The log: basic blocks of 512 bytes, each marked with the cycle in which it was
// written, in records that begin with a header. Offsets are those of the
// kernel's fs/xfs/libxfs/xfs_log_format.h (struct xlog_rec_header).
const (
	logBlockBytes   = 512
	logMagic        = 0xFEEDBABE
	logHeaderSumAt  = 32
	logHeaderUUIDAt = 304
	logUnmountFlag  = 0x20
)

// logRecord is the record that a clean unmount (or mkfs) leaves at the log's
// head: a header and a body with one operation.
type logRecord struct {
	at      int64 // byte in the image
	head    []byte
	body    []byte
	sumSize int // header bytes that the checksum covers; 0: no checksum
}

// readUnmountRecord finds the record at the log's head; nil for a log that was
// never written. ErrDirty when the log does not end with an unmount.
func readUnmountRecord(f io.ReaderAt, s *xfsSuper) (*logRecord, error) {
	log, err := s.internalLog()
	if err != nil {
		return nil, err
	}
	head, err := log.find(f)
	if err != nil || head == 0 && log.empty {
		return nil, err
	}
	for length := int64(2); length <= min(logRecordBlocks, log.blocks); length++ {
		at := (head - length + log.blocks) % log.blocks
		if at+length > log.blocks {
			continue // a record that wraps around; an unmount's is never so long that it must
		}
		b, err := readAt(f, log.offset+at*logBlockBytes, int(length*logBlockBytes))
		if err != nil {
			return nil, err
		}
		if binary.BigEndian.Uint32(b) == logMagic {
			r := &logRecord{at: log.offset + at*logBlockBytes, head: b[:logBlockBytes], body: b[logBlockBytes:]}
			return r, r.verify(s.uuid)
		}
	}
	return nil, notClean("a longer record than an unmount's")
}

// logRecordBlocks bounds an unmount's record: one operation, padded to the log's
// stripe, which is a sector here.
const logRecordBlocks = 64

// verify makes sure that r is a clean unmount's record of the filesystem id.
func (r *logRecord) verify(id UUID) error {
	be := binary.BigEndian
	length := int(be.Uint32(r.head[12:]))
	switch {
	case length < 10 || (length+logBlockBytes-1)/logBlockBytes*logBlockBytes != len(r.body):
		return notClean("a record of %d bytes", length)
	case be.Uint32(r.head[40:]) != 1:
		return notClean("a record of %d operations", be.Uint32(r.head[40:]))
	case r.body[9]&logUnmountFlag == 0:
		return notClean("a record that is not an unmount's")
	case !bytes.Equal(r.head[logHeaderUUIDAt:logHeaderUUIDAt+16], id[:]):
		return damaged("XFS log belongs to another filesystem")
	}
	sum := binary.LittleEndian.Uint32(r.head[logHeaderSumAt:])
	if sum == 0 {
		return nil
	}
	// What the sum covers of the header depends on the kernel's architecture and
	// version (the structure's size there).
	for _, size := range []int{328, 324, 512} {
		if r.sum(size) == sum {
			r.sumSize = size
			return nil
		}
	}
	return damaged("XFS log record checksum %08x", sum)
}

// notClean is what an image that was cut off while mounted shows.
func notClean(format string, args ...any) error {
	return fmt.Errorf("%w: the log ends with %s", ErrDirty, fmt.Sprintf(format, args...))
}

// sum is the checksum over the first size bytes of the header and the body.
func (r *logRecord) sum(size int) uint32 {
	c := rawCRC32C(^uint32(0), r.head[:logHeaderSumAt])
	c = rawCRC32C(c, make([]byte, 4))
	c = rawCRC32C(c, r.head[logHeaderSumAt+4:size])
	return ^rawCRC32C(c, r.body[:binary.BigEndian.Uint32(r.head[12:])])
}

// identify gives the record a new UUID in memory.
func (r *logRecord) identify(id UUID) {
	copy(r.head[logHeaderUUIDAt:], id[:])
	if r.sumSize != 0 {
		binary.LittleEndian.PutUint32(r.head[logHeaderSumAt:], r.sum(r.sumSize))
	}
}

// logArea is where the log is in the image.
type logArea struct {
	offset int64 // bytes
	blocks int64 // basic blocks
	empty  bool  // set by find: nothing was ever written
}

func (s *xfsSuper) internalLog() (*logArea, error) {
	if s.logStart == 0 {
		return nil, damaged("XFS with an external log")
	}
	group, block := s.logStart>>s.agBlockLog, s.logStart&(1<<s.agBlockLog-1)
	if group >= s.agCount || s.logBlocks <= 0 || block+s.logBlocks > s.agBlocks {
		return nil, damaged("XFS log at block %d, %d blocks", s.logStart, s.logBlocks)
	}
	return &logArea{
		offset: (group*s.agBlocks + block) * s.blockSize,
		blocks: s.logBlocks * s.blockSize / logBlockBytes,
	}, nil
}

// find gives the log's head: the block after the last that was written. Blocks
// before it carry a cycle, those after it the cycle before (0: never written).
func (l *logArea) find(f io.ReaderAt) (int64, error) {
	first, err := l.cycle(f, 0)
	if err != nil {
		return 0, err
	}
	last, err := l.cycle(f, l.blocks-1)
	if err != nil {
		return 0, err
	}
	if first == 0 {
		l.empty = true
		return 0, nil
	}
	if first == last {
		return 0, nil
	}
	if last != first-1 {
		return 0, damaged("XFS log with cycle %d at its begin and %d at its end", first, last)
	}
	low, high := int64(0), l.blocks-1
	for high-low > 1 {
		middle := (low + high) / 2
		cycle, err := l.cycle(f, middle)
		if err != nil {
			return 0, err
		}
		if cycle == first {
			low = middle
		} else {
			high = middle
		}
	}
	return high, nil
}

// cycle reads the cycle number of a log block.
func (l *logArea) cycle(f io.ReaderAt, block int64) (uint32, error) {
	b, err := readAt(f, l.offset+block*logBlockBytes, 8)
	if err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint32(b) == logMagic {
		return binary.BigEndian.Uint32(b[4:]), nil
	}
	return binary.BigEndian.Uint32(b), nil
}
