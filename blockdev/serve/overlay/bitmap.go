package overlay

import (
	"math/bits"
	"sync/atomic"
)

const (
	// BlockSize is the granularity of the map, in bytes: that of the filesystems on
	// volumes, so that their writes are whole blocks.
	BlockSize = 4096

	wordBits  = 32
	leafWords = (sectorSize - checksumSize) / 4 // a leaf is what one sector of the map file holds
	leafBits  = leafWords * wordBits
)

// bitmap has a bit for each block. Leaves exist where a bit was set: a volume that
// holds nothing takes a pointer for each 15.9 MiB. Bits are set and read by many at
// once; they are never cleared. grow must be alone.
type bitmap struct {
	leaves []atomic.Pointer[leaf]
	count  atomic.Int64 // of set bits
}

type leaf struct{ words [leafWords]uint32 }

func leavesFor(blocks int64) int64 { return (blocks + leafBits - 1) / leafBits }

func newBitmap(blocks int64) *bitmap {
	return &bitmap{leaves: make([]atomic.Pointer[leaf], leavesFor(blocks))}
}

// grow makes room for more blocks.
func (b *bitmap) grow(blocks int64) {
	if leavesFor(blocks) <= int64(len(b.leaves)) {
		return
	}
	larger := make([]atomic.Pointer[leaf], leavesFor(blocks))
	for i := range b.leaves {
		larger[i].Store(b.leaves[i].Load())
	}
	b.leaves = larger
}

func (b *bitmap) leafFor(i int64) *leaf {
	if l := b.leaves[i].Load(); l != nil {
		return l
	}
	b.leaves[i].CompareAndSwap(nil, new(leaf))
	return b.leaves[i].Load()
}

// mask has the bits of a word from bit lo to below bit hi.
func mask(lo, hi int64) uint32 {
	return uint32((uint64(1)<<hi - 1) &^ (uint64(1)<<lo - 1)) //nolint:gosec // hi is at most 32
}

// words calls fn for each word that holds a block of [first, end), with the bits
// of those blocks, until fn says stop.
func (b *bitmap) words(first, end int64, fn func(leafAt, word int64, bits uint32) bool) {
	for first < end {
		at, in := first/leafBits, first%leafBits
		w, lo := in/wordBits, in%wordBits
		hi := min(wordBits, lo+end-first)
		if !fn(at, w, mask(lo, hi)) {
			return
		}
		first += hi - lo
	}
}

// set sets the bits of the blocks [first, end).
func (b *bitmap) set(first, end int64) {
	var fresh int64
	b.words(first, end, func(at, w int64, m uint32) bool {
		old := atomic.OrUint32(&b.leafFor(at).words[w], m)
		fresh += int64(bits.OnesCount32(m &^ old))
		return true
	})
	b.count.Add(fresh)
}

// all reports whether every block of [first, end) is set.
func (b *bitmap) all(first, end int64) bool {
	held := true
	b.words(first, end, func(at, w int64, m uint32) bool {
		l := b.leaves[at].Load()
		held = l != nil && atomic.LoadUint32(&l.words[w])&m == m
		return held
	})
	return held
}

// exceeds reports whether some block of [first, end) is set here and not in other.
func (b *bitmap) exceeds(other *bitmap, first, end int64) (found bool) {
	b.words(first, end, func(at, w int64, m uint32) bool {
		if l := b.leaves[at].Load(); l != nil {
			set := atomic.LoadUint32(&l.words[w]) & m
			if l := other.leaves[at].Load(); l != nil {
				set &^= atomic.LoadUint32(&l.words[w])
			}
			found = set != 0
		}
		return !found
	})
	return found
}

// run tells whether block first is set, and where below end the first block is
// that is not like it.
func (b *bitmap) run(first, end int64) (set bool, to int64) {
	set = b.all(first, first+1)
	to = end
	b.words(first, end, func(at, w int64, m uint32) bool {
		var word uint32
		if l := b.leaves[at].Load(); l != nil {
			word = atomic.LoadUint32(&l.words[w])
		}
		if set {
			word = ^word
		}
		if other := word & m; other != 0 {
			to = at*leafBits + w*wordBits + int64(bits.TrailingZeros32(other))
			return false
		}
		return true
	})
	return set, to
}

func (l *leaf) count() (n int64) {
	for _, w := range l.words {
		n += int64(bits.OnesCount32(w))
	}
	return n
}

// clone copies the bits; it must be alone.
func (b *bitmap) clone() *bitmap {
	c := &bitmap{leaves: make([]atomic.Pointer[leaf], len(b.leaves))}
	for i := range b.leaves {
		if l := b.leaves[i].Load(); l != nil {
			same := *l
			c.leaves[i].Store(&same)
		}
	}
	c.count.Store(b.count.Load())
	return c
}
