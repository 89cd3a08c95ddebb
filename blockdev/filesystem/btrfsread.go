package filesystem

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"time"
)

// Offsets and formats are those of the kernel's include/uapi/linux/btrfs_tree.h.
const (
	btrfsNodeHeader  = 101
	btrfsItemBytes   = 25 // of a leaf's item: key, offset, size
	btrfsChildBytes  = 33 // of a node's child: key, block, generation
	btrfsKeyBytes    = 17
	btrfsMaxLevel    = 8
	btrfsChunkHeader = 48
	btrfsStripeBytes = 32
	btrfsChunkArray  = 0x32B // in the superblock
	btrfsStriped     = 1<<3 | 1<<6 | 1<<7 | 1<<8

	btrfsTreeFiles = 5 // the tree of the top subvolume
	btrfsFirstFile = 256

	btrfsTypeInode  = 1
	btrfsTypeName   = 96
	btrfsTypeExtent = 108
	btrfsTypeRoot   = 132
	btrfsTypeChunk  = 228

	// A file's number here is its subvolume's place in btrfsReader.trees and, in
	// the low bits, its number there.
	btrfsTreeShift = 40
	btrfsMaxTrees  = 1 << 16
)

type btrfsKey struct {
	object uint64
	kind   uint8
	offset uint64
}

func (k btrfsKey) compare(o btrfsKey) int {
	return cmp.Or(cmp.Compare(k.object, o.object), cmp.Compare(k.kind, o.kind), cmp.Compare(k.offset, o.offset))
}

func parseBtrfsKey(b []byte) btrfsKey {
	return btrfsKey{binary.LittleEndian.Uint64(b), b[8], binary.LittleEndian.Uint64(b[9:])}
}

// btrfsTree is where a tree's root is.
type btrfsTree struct {
	id    uint64
	block uint64 // logical byte
	level uint8
}

// btrfsChunk maps logical bytes to the image.
type btrfsChunk struct{ logical, length, physical int64 }

// btrfsReader reads a btrfs image of one device.
type btrfsReader struct {
	f        io.ReaderAt
	nodeSize int
	chunks   []btrfsChunk
	roots    btrfsTree
	trees    []btrfsTree // of the subvolumes met so far; the first is the top one
}

func newBtrfsReader(f io.ReaderAt) (*btrfsReader, error) {
	b, err := readAt(f, btrfsSuperOffsets[0], btrfsSuperBytes)
	if err != nil {
		return nil, err
	}
	s, err := parseBtrfsSuper(b, btrfsSuperOffsets[0])
	if err != nil {
		return nil, err
	}
	if s.logRoot != 0 {
		return nil, ErrDirty
	}
	le := binary.LittleEndian
	r := &btrfsReader{f: f, nodeSize: int(le.Uint32(b[0x94:]))}
	if r.nodeSize < 4096 || r.nodeSize > 65536 {
		return nil, damaged("btrfs nodes of %d bytes", r.nodeSize)
	}
	if err := r.bootChunks(b[btrfsChunkArray:], int(le.Uint32(b[0xA0:]))); err != nil {
		return nil, err
	}
	chunks := btrfsTree{block: le.Uint64(b[0x58:]), level: b[0xC7]}
	err = r.scan(chunks, btrfsKey{btrfsFirstFile, btrfsTypeChunk, 0}, func(k btrfsKey, item []byte) error {
		_, err := r.addChunk(k, item)
		return err
	})
	if err != nil {
		return nil, err
	}
	r.roots = btrfsTree{block: le.Uint64(b[0x50:]), level: b[0xC6]}
	_, err = r.tree(btrfsTreeFiles)
	return r, err
}

// bootChunks reads the superblock's own list of chunks, with which the tree of
// all chunks is found.
func (r *btrfsReader) bootChunks(b []byte, size int) error {
	if size < 0 || size > 2048 || size > len(b) {
		return damaged("btrfs chunk array of %d bytes", size)
	}
	for b = b[:size]; len(b) > btrfsKeyBytes; {
		n, err := r.addChunk(parseBtrfsKey(b), b[btrfsKeyBytes:])
		if err != nil {
			return err
		}
		b = b[btrfsKeyBytes+n:]
	}
	return nil
}

// addChunk tells the chunk item's length. Of copies (DUP) the first is used.
func (r *btrfsReader) addChunk(k btrfsKey, b []byte) (int, error) {
	if len(b) < btrfsChunkHeader+btrfsStripeBytes {
		return 0, damaged("btrfs chunk of %d bytes", len(b))
	}
	le := binary.LittleEndian
	c := btrfsChunk{logical: int64(k.offset), length: int64(le.Uint64(b)), physical: int64(le.Uint64(b[btrfsChunkHeader+8:]))}
	size := btrfsChunkHeader + btrfsStripeBytes*int(le.Uint16(b[44:]))
	const most = int64(1) << 60
	if size > len(b) || c.logical < 0 || c.logical > most || c.length <= 0 || c.length > most || c.physical < 0 || c.physical > most {
		return 0, damaged("btrfs chunk at %d of %d bytes", c.logical, c.length)
	}
	if le.Uint64(b[24:])&btrfsStriped != 0 {
		return 0, fmt.Errorf("btrfs with stripes: %w", errors.ErrUnsupported)
	}
	at, known := slices.BinarySearchFunc(r.chunks, c, func(a, b btrfsChunk) int { return cmp.Compare(a.logical, b.logical) })
	if !known {
		r.chunks = slices.Insert(r.chunks, at, c)
	}
	return size, nil
}

// physical translates n logical bytes, which one chunk must hold.
func (r *btrfsReader) physical(logical, n uint64) (int64, error) {
	at, exact := slices.BinarySearchFunc(r.chunks, int64(logical), func(c btrfsChunk, l int64) int { return cmp.Compare(c.logical, l) })
	if !exact {
		at--
	}
	if at < 0 || logical > 1<<60 || n > 1<<60 || int64(logical+n) > r.chunks[at].logical+r.chunks[at].length {
		return 0, damaged("btrfs bytes %d+%d are in no chunk", logical, n)
	}
	return r.chunks[at].physical + int64(logical) - r.chunks[at].logical, nil
}

// node reads and verifies a block of a tree.
func (r *btrfsReader) node(block uint64, level uint8) (b []byte, items int, err error) {
	at, err := r.physical(block, uint64(r.nodeSize))
	if err != nil {
		return nil, 0, err
	}
	if b, err = readAt(r.f, at, r.nodeSize); err != nil {
		return nil, 0, err
	}
	le := binary.LittleEndian
	items, size := int(le.Uint32(b[96:])), btrfsItemBytes
	if level > 0 {
		size = btrfsChildBytes
	}
	if btrfsSum(b) != le.Uint32(b) || le.Uint64(b[48:]) != block || b[100] != level || level >= btrfsMaxLevel {
		return nil, 0, damaged("btrfs block %d is not a node of level %d", block, level)
	}
	if items > (r.nodeSize-btrfsNodeHeader)/size {
		return nil, 0, damaged("btrfs node with %d items", items)
	}
	return b, items, nil
}

// scan calls fn for the items of one object and type, in order, from a key on.
func (r *btrfsReader) scan(t btrfsTree, from btrfsKey, fn func(btrfsKey, []byte) error) error {
	last := from
	last.offset = ^uint64(0)
	s := btrfsScan{r, from, last, fn}
	return s.node(t.block, t.level, nil, nil)
}

// btrfsScan is one scan under way.
type btrfsScan struct {
	r          *btrfsReader
	from, last btrfsKey
	fn         func(btrfsKey, []byte) error
}

// node scans below a block whose keys begin with first and end before limit, as
// the block above says (nil: it says nothing). So no block is met twice.
func (s *btrfsScan) node(block uint64, level uint8, first, limit *btrfsKey) error {
	b, items, err := s.r.node(block, level)
	if err != nil {
		return err
	}
	keys, err := btrfsKeys(b, items, level, first, limit)
	if err != nil {
		return err
	}
	if level == 0 {
		return scanLeaf(b, keys, s.from, s.last, s.fn)
	}
	for n := range keys {
		end := limit
		if n+1 < items {
			end = &keys[n+1]
			if end.compare(s.from) <= 0 {
				continue
			}
		}
		if keys[n].compare(s.last) > 0 {
			return nil
		}
		child := binary.LittleEndian.Uint64(b[btrfsNodeHeader+n*btrfsChildBytes+btrfsKeyBytes:])
		if err := s.node(child, level-1, &keys[n], end); err != nil {
			return err
		}
	}
	return nil
}

// btrfsKeys reads a node's keys and makes sure of their order.
func btrfsKeys(b []byte, items int, level uint8, first, limit *btrfsKey) ([]btrfsKey, error) {
	size := btrfsItemBytes
	if level > 0 {
		size = btrfsChildBytes
	}
	keys := make([]btrfsKey, items)
	for n := range keys {
		keys[n] = parseBtrfsKey(b[btrfsNodeHeader+n*size:])
		if n > 0 && keys[n-1].compare(keys[n]) >= 0 || n == 0 && first != nil && *first != keys[0] || limit != nil && keys[n].compare(*limit) >= 0 {
			return nil, damaged("btrfs node whose keys are not in order")
		}
	}
	if items == 0 && first != nil {
		return nil, damaged("btrfs node without items")
	}
	return keys, nil
}

func scanLeaf(b []byte, keys []btrfsKey, from, last btrfsKey, fn func(btrfsKey, []byte) error) error {
	data := b[btrfsNodeHeader:]
	for n, k := range keys {
		if k.compare(from) < 0 || k.compare(last) > 0 {
			continue
		}
		item := data[n*btrfsItemBytes:]
		at, size := binary.LittleEndian.Uint32(item[17:]), binary.LittleEndian.Uint32(item[21:])
		if uint64(at)+uint64(size) > uint64(len(data)) {
			return damaged("btrfs item of %d bytes at %d", size, at)
		}
		if err := fn(k, data[at:at+size]); err != nil {
			return err
		}
	}
	return nil
}

// tree finds a subvolume's tree and gives its place in r.trees.
func (r *btrfsReader) tree(id uint64) (int, error) {
	if at := slices.IndexFunc(r.trees, func(t btrfsTree) bool { return t.id == id }); at >= 0 {
		return at, nil
	}
	found := btrfsTree{}
	err := r.scan(r.roots, btrfsKey{id, btrfsTypeRoot, 0}, func(_ btrfsKey, b []byte) error {
		if len(b) < 239 {
			return damaged("btrfs root of %d bytes", len(b))
		}
		found = btrfsTree{id: id, block: binary.LittleEndian.Uint64(b[176:]), level: b[238]}
		return nil
	})
	if err == nil && (found.id == 0 || len(r.trees) >= btrfsMaxTrees) {
		err = damaged("btrfs subvolume %d is not there", id)
	}
	r.trees = append(r.trees, found)
	return len(r.trees) - 1, err
}

// place splits a file's number.
func (r *btrfsReader) place(number uint64) (btrfsTree, uint64, error) {
	at := number >> btrfsTreeShift
	if at >= uint64(len(r.trees)) {
		return btrfsTree{}, 0, damaged("btrfs file %d", number)
	}
	return r.trees[at], number & (1<<btrfsTreeShift - 1), nil
}

func (r *btrfsReader) root() uint64 { return btrfsFirstFile }

func (r *btrfsReader) inode(number uint64) (*inode, error) {
	tree, object, err := r.place(number)
	if err != nil {
		return nil, err
	}
	var i *inode
	err = r.scan(tree, btrfsKey{object, btrfsTypeInode, 0}, func(_ btrfsKey, b []byte) error {
		if len(b) < 160 {
			return damaged("btrfs inode of %d bytes", len(b))
		}
		le := binary.LittleEndian
		mode, err := unixMode(uint16(le.Uint32(b[52:])))
		i = &inode{
			number: number, mode: mode, size: int64(le.Uint64(b[16:])),
			uid: int(le.Uint32(b[44:])), gid: int(le.Uint32(b[48:])),
			modTime: time.Unix(int64(le.Uint64(b[136:])), int64(le.Uint32(b[144:]))).UTC(),
		}
		return err
	})
	if err == nil && (i == nil || i.size < 0) {
		err = damaged("no btrfs inode %d", object)
	}
	return i, err
}

func (r *btrfsReader) names(i *inode, fn func(string, uint64) error) error {
	tree, object, err := r.place(i.number)
	if err != nil {
		return err
	}
	return r.scan(tree, btrfsKey{object, btrfsTypeName, 0}, func(_ btrfsKey, b []byte) error {
		le := binary.LittleEndian
		if len(b) < 30 || len(b) < 30+int(le.Uint16(b[27:])) {
			return damaged("btrfs name of %d bytes", len(b))
		}
		name, to := b[30:30+int(le.Uint16(b[27:]))], parseBtrfsKey(b)
		if err := nameAllowed(name); err != nil {
			return err
		}
		number := i.number>>btrfsTreeShift<<btrfsTreeShift | to.object
		if to.kind == btrfsTypeRoot {
			at, err := r.tree(to.object)
			if err != nil {
				return err
			}
			to.object, number = btrfsFirstFile, uint64(at)<<btrfsTreeShift|btrfsFirstFile
		}
		if to.object >= 1<<btrfsTreeShift {
			return damaged("btrfs file %d", to.object)
		}
		return fn(string(name), number)
	})
}

func (r *btrfsReader) extents(i *inode) iter.Seq2[extent, error] {
	return func(yield func(extent, error) bool) {
		tree, object, err := r.place(i.number)
		if err == nil {
			next := int64(0)
			err = r.scan(tree, btrfsKey{object, btrfsTypeExtent, 0}, func(k btrfsKey, b []byte) error {
				e, err := r.extent(k, b)
				if err != nil {
					return err
				}
				if e.logical < next {
					return damaged("btrfs extent at byte %d again", e.logical)
				}
				next = e.logical + e.length
				if !yield(e, nil) {
					return errFound
				}
				return nil
			})
		}
		if err != nil && !errors.Is(err, errFound) {
			yield(extent{}, err)
		}
	}
}

func (r *btrfsReader) extent(k btrfsKey, b []byte) (extent, error) {
	le := binary.LittleEndian
	e := extent{logical: int64(k.offset)}
	if len(b) < 21 || e.logical < 0 {
		return e, damaged("btrfs extent of %d bytes", len(b))
	}
	if b[16] != 0 || b[17] != 0 || le.Uint16(b[18:]) != 0 {
		return e, fmt.Errorf("btrfs file that is compressed or encrypted: %w", errors.ErrUnsupported)
	}
	if b[20] == 0 { // in the item itself
		e.inline = bytes.Clone(b[21:])
		e.length = int64(len(e.inline))
		return e, nil
	}
	if len(b) < 53 || b[20] > 2 {
		return e, damaged("btrfs extent of type %d", b[20])
	}
	disk, size, offset, length := le.Uint64(b[21:]), le.Uint64(b[29:]), le.Uint64(b[37:]), le.Uint64(b[45:])
	const most = 1 << 60
	if length == 0 || length > most || k.offset > most || offset > most || size > most {
		return e, damaged("btrfs extent of %d bytes at byte %d", length, k.offset)
	}
	e.length = int64(length)
	if e.unwritten = disk == 0 || b[20] == 2; e.unwritten {
		return e, nil
	}
	if offset+length > size {
		return e, damaged("btrfs extent uses %d+%d of %d bytes", offset, length, size)
	}
	at, err := r.physical(disk, size)
	e.physical = at + int64(offset)
	return e, err
}

func (r *btrfsReader) target(i *inode) (string, error) { return readAll(r.f, r, i) }
