package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"holdfast/blockdev"
)

// The map file is made of sectors of 512 bytes, which disks write whole or not at
// all. Sector 0 is the header; sector 1+n holds the bits of the blocks
// n*4064 … n*4064+4063 as 127 little-endian words, the lowest block in the lowest
// bit of the first word, and the CRC-32C of these 508 bytes. A sector of zeroes, or
// one that the file does not reach, holds no bit. Bits are only ever set, so a map
// that was written in part is an older one in part, never a wrong one.
//
// A map of version 2 is loose: the layer also holds each block that is no hole in its
// data. It is one of version 1 again once it has caught up.
const (
	sectorSize   = 512
	checksumSize = 4
	mapMagic     = "HFOVMAP\x00"
	mapVersion   = 1
	looseVersion = 2

	// maxSize bounds what a header can make us allocate: 2^62 is far above the
	// largest volume, 64 TiB, whose pointers take 33 MiB.
	maxSize = 64 << 40
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func seal(sector []byte) {
	binary.LittleEndian.PutUint32(sector[sectorSize-checksumSize:], crc32.Checksum(sector[:sectorSize-checksumSize], castagnoli))
}

func intact(sector []byte) bool {
	return binary.LittleEndian.Uint32(sector[sectorSize-checksumSize:]) == crc32.Checksum(sector[:sectorSize-checksumSize], castagnoli)
}

// header is sector 0: the magic, the version, the block size, the volume's size.
func header(size int64, loose bool) []byte {
	sector := make([]byte, sectorSize)
	copy(sector, mapMagic)
	binary.LittleEndian.PutUint32(sector[8:], mapVersion)
	if loose {
		binary.LittleEndian.PutUint32(sector[8:], looseVersion)
	}
	binary.LittleEndian.PutUint32(sector[12:], BlockSize)
	binary.LittleEndian.PutUint64(sector[16:], uint64(size)) //nolint:gosec // sizes are positive
	seal(sector)
	return sector
}

func parseHeader(sector []byte) (size int64, loose bool, err error) {
	version := binary.LittleEndian.Uint32(sector[8:])
	switch {
	case string(sector[:8]) != mapMagic || !intact(sector):
		return 0, false, fmt.Errorf("%w: the map has no valid header", blockdev.ErrCorrupt)
	case version != mapVersion && version != looseVersion:
		return 0, false, fmt.Errorf("%w: map of version %d, this program knows %d", blockdev.ErrCorrupt, version, looseVersion)
	case binary.LittleEndian.Uint32(sector[12:]) != BlockSize:
		return 0, false, fmt.Errorf("%w: map of blocks of %d bytes", blockdev.ErrCorrupt, binary.LittleEndian.Uint32(sector[12:]))
	}
	large := binary.LittleEndian.Uint64(sector[16:])
	if large == 0 || large > maxSize || large%sectorSize != 0 {
		return 0, false, fmt.Errorf("%w: map of a volume of %d bytes", blockdev.ErrCorrupt, large)
	}
	return int64(large), version == looseVersion, nil
}

func sectorAt(leaf int64) int64 { return (1 + leaf) * sectorSize }

// loadedMap is what a map file tells.
type loadedMap struct {
	bits  *bitmap
	size  int64 // of the volume, bytes
	loose bool
}

func loadMap(f File) (m loadedMap, err error) {
	if m.size, m.loose, err = readHeader(f); err != nil {
		return m, err
	}
	m.bits = newBitmap(blocksOf(m.size))
	const atOnce = 256
	buf := make([]byte, atOnce*sectorSize)
	for i := int64(0); i < int64(len(m.bits.leaves)); i += atOnce {
		n := min(atOnce, int64(len(m.bits.leaves))-i)
		if err := readWhole(f, buf[:n*sectorSize], sectorAt(i)); err != nil {
			return m, err
		}
		for j := range n {
			sector := buf[j*sectorSize : (j+1)*sectorSize]
			err := m.bits.load(i+j, sector)
			if err != nil {
				err = readAgain(f, sector, sectorAt(i+j), func() error { return m.bits.load(i+j, sector) })
			}
			if err != nil {
				return m, err
			}
		}
	}
	return m, nil
}

func readHeader(f File) (size int64, loose bool, err error) {
	sector := make([]byte, sectorSize)
	parse := func() error { size, loose, err = parseHeader(sector); return err }
	if err = readWhole(f, sector, 0); err == nil && parse() != nil {
		err = readAgain(f, sector, 0, parse)
	}
	return size, loose, err
}

// rereads is how often a sector that makes no sense is read again.
const rereads = 3

// readAgain reads a sector that makes no sense: another process may have written it just
// then, and nothing keeps a file's readers from seeing half of that.
func readAgain(f File, sector []byte, at int64, parse func() error) (err error) {
	for range rereads {
		if err = readWhole(f, sector, at); err == nil {
			err = parse()
		}
		if err == nil {
			return nil
		}
	}
	return err
}

// Survey tells of the layer with this map the size of its volume and how much of it
// the layer holds, both in bytes; of a layer that was not closed it may hold more, and
// something if anything. blockdev.ErrCorrupt for a map that is none.
func Survey(f File) (size, held int64, err error) {
	m, err := loadMap(f)
	if err != nil {
		return 0, 0, blockdev.Op("overlay.Survey", "", err)
	}
	held = m.bits.count.Load() * BlockSize
	if m.loose {
		held = max(held, BlockSize)
	}
	return m.size, min(m.size, held), nil
}

// SizeOf tells the size of the volume that this map is of, in bytes.
// blockdev.ErrCorrupt for a map that is none.
func SizeOf(f File) (int64, error) {
	size, _, err := readHeader(f)
	return size, blockdev.Op("overlay.SizeOf", "", err)
}

// load takes the bits of one sector.
func (b *bitmap) load(at int64, sector []byte) error {
	if empty(sector) {
		return nil
	}
	if !intact(sector) {
		return fmt.Errorf("%w: sector %d of the map", blockdev.ErrCorrupt, 1+at)
	}
	l := new(leaf)
	for w := range l.words {
		l.words[w] = binary.LittleEndian.Uint32(sector[4*w:])
	}
	b.leaves[at].Store(l)
	b.count.Add(l.count())
	return nil
}

// encode writes the bits of one leaf into a sector.
func (b *bitmap) encode(at int64, sector []byte) {
	for w, word := range b.leafFor(at).words {
		binary.LittleEndian.PutUint32(sector[4*w:], word)
	}
	seal(sector)
}

// writeLeaves writes the sectors of these leaves, neighbours together.
func (b *bitmap) writeLeaves(f File, leaves []int64) error {
	slices.Sort(leaves)
	leaves = slices.Compact(leaves)
	for len(leaves) > 0 {
		n := 1
		for n < len(leaves) && n < 256 && leaves[n] == leaves[0]+int64(n) {
			n++
		}
		buf := make([]byte, n*sectorSize)
		for i := range n {
			b.encode(leaves[i], buf[i*sectorSize:(i+1)*sectorSize])
		}
		if err := writeWhole(f, buf, sectorAt(leaves[0])); err != nil {
			return err
		}
		leaves = leaves[n:]
	}
	return nil
}

func empty(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// readWhole fills p from f; what is behind the end of the file reads as zero.
func readWhole(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}

// writeWhole writes all of p: a short write is never success.
func writeWhole(f io.WriterAt, p []byte, off int64) error {
	n, err := f.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}
