package ext4fill

import (
	"fmt"
	"math/bits"

	"holdfast/blockdev/filesystem/internal/ext4disk"
)

// space gives out the free blocks of an image, ascending. It holds one group's
// bitmap at a time and never looks beyond the group that it is in.
type space struct {
	im     *image
	out    *writer
	group  int64
	bitmap []byte // of group
	next   int64  // where to go on, in group
	taken  int64  // of group; below 0 when more was given back
	given  map[int64][]int64
}

// newSpace begins with the free blocks of the image, and those of freed.
func newSpace(im *image, out *writer, freed []int64) (*space, error) {
	s := &space{im: im, out: out, given: map[int64][]int64{}}
	for _, b := range freed {
		g := im.groupOf(b)
		s.given[g] = append(s.given[g], b)
	}
	return s, s.enter(0)
}

func (s *space) enter(g int64) error {
	b, err := s.im.blockBitmap(g)
	if err != nil {
		return err
	}
	s.group, s.bitmap, s.next, s.taken = g, b, 0, 0
	for _, block := range s.given[g] {
		at := block - s.im.start(g)
		if b[at/8]&(1<<(at%8)) == 0 {
			return notOurs("block %d is in use and free", block)
		}
		b[at/8] &^= 1 << (at % 8)
		s.taken--
	}
	return nil
}

// leave writes the bitmap of the group that it is in, if it changed.
func (s *space) leave() error {
	if s.taken == 0 && len(s.given[s.group]) == 0 {
		return nil
	}
	return s.im.putBlockBitmap(s.out, s.group, s.bitmap, s.taken)
}

// take gives the next free blocks that lie together, at most n. ErrFull when
// there are none.
func (s *space) take(n int64) (start, count int64, err error) {
	for {
		size := s.im.size(s.group)
		at := s.next
		for at < size && s.bitmap[at/8]&(1<<(at%8)) != 0 {
			at += int64(bits.TrailingZeros8(^(s.bitmap[at/8] >> (at % 8)))) // to the next 0, or the next byte
		}
		if at < size {
			end := at
			for end < size && end-at < n && s.bitmap[end/8]&(1<<(end%8)) == 0 {
				if end%8 == 0 && s.bitmap[end/8] == 0 && n-(end-at) >= 8 && size-end >= 8 {
					s.bitmap[end/8] = 0xFF
					end += 8
					continue
				}
				s.bitmap[end/8] |= 1 << (end % 8)
				end++
			}
			s.next, s.taken = end, s.taken+end-at
			return s.im.start(s.group) + at, end - at, nil
		}
		if err := s.leave(); err != nil {
			return 0, 0, err
		}
		if s.group+1 == s.im.groups {
			return 0, 0, fmt.Errorf("%w: no free blocks", ErrFull)
		}
		if err := s.enter(s.group + 1); err != nil {
			return 0, 0, err
		}
	}
}

// spans takes n blocks for the blocks of a file from logical on and appends
// where they are, continuing the last piece where they lie behind it.
func (s *space) spans(to []span, logical, n int64) ([]span, error) {
	for n > 0 {
		start, count, err := s.take(n)
		if err != nil {
			return nil, err
		}
		to = appendSpan(to, span{logical, start, count})
		logical, n = logical+count, n-count
	}
	return to, nil
}

// blockBitmap gives the bitmap of a group as mkfs left it. One that is not there
// yet has only what mkfs placed in the group by rule.
func (im *image) blockBitmap(g int64) ([]byte, error) {
	d := im.group(g)
	b := make([]byte, im.blockSize)
	if !d.has(groupBlockUninit) {
		if _, err := im.f.ReadAt(b, d.block(0x0)*im.blockSize); err != nil {
			return nil, fmt.Errorf("bitmap of group %d: %w", g, err)
		}
		if !d.agrees(im.bitmapSum(b), 0x18, 0x38) {
			return nil, notOurs("checksum of the bitmap of group %d", g)
		}
		return b, nil
	}
	if ext4disk.HasSuperCopy(g) {
		setBits(b, 0, 1+(im.groups*im.descriptor+im.blockSize-1)/im.blockSize+im.reserved)
	}
	start, end := im.start(g), im.start(g)+im.size(g)
	for _, s := range im.tables[g] {
		setBits(b, max(s.physical, start)-start, min(s.physical+s.length, end)-start)
	}
	setBits(b, end-start, 8*im.blockSize)
	return b, nil
}

// putBlockBitmap writes the bitmap of a group in which taken blocks came into use.
func (im *image) putBlockBitmap(out *writer, g int64, b []byte, taken int64) error {
	d := im.group(g)
	if taken > d.joined(0xC, 0x2C) {
		return notOurs("group %d has fewer free blocks than its bitmap shows", g)
	}
	d.add(0xC, 0x2C, -taken)
	d.clear(groupBlockUninit)
	d.split(im.bitmapSum(b), 0x18, 0x38)
	return out.put(d.block(0x0)*im.blockSize, b)
}

func (im *image) bitmapSum(b []byte) uint32 { return ext4disk.Sum(im.seed, b[:im.perGroup/8]) }

// agrees compares a checksum with the descriptor's, of which 32-byte ones have
// half.
func (d group) agrees(c uint32, lo, hi int) bool {
	return uint16(c) == d.u16(lo) && (!d.wide() || uint16(c>>16) == d.u16(hi))
}

func setBits(b []byte, from, to int64) {
	for ; from < to && from%8 != 0; from++ {
		b[from/8] |= 1 << (from % 8)
	}
	for ; to-from >= 8; from += 8 {
		b[from/8] = 0xFF
	}
	for ; from < to; from++ {
		b[from/8] |= 1 << (from % 8)
	}
}
