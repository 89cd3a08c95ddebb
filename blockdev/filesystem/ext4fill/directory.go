package ext4fill

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"holdfast/blockdev/filesystem/internal/ext4disk"
	"holdfast/blockdev/tree"
)

const (
	tailBytes = 12 // of a directory block: its checksum in the guise of an entry
	dotBytes  = 12 // of the entries "." and ".."
	dxTail    = 8

	typeRegular   = 1
	typeDirectory = 2
	typeSymlink   = 7
)

func fileType(k tree.Kind) byte {
	switch k {
	case tree.Directory:
		return typeDirectory
	case tree.Symlink:
		return typeSymlink
	}
	return typeRegular
}

// entryBytes is the length of a directory entry.
func entryBytes(text string) int { return 8 + (len(text)+3)&^3 }

// leafRoom is what a block of a directory has for entries.
func leafRoom(blockSize int64) int { return int(blockSize) - tailBytes }

// rootLimit and nodeLimit are the places in the root and in the other blocks of
// an index (fs/ext4/namei.c: dx_root_limit, dx_node_limit).
func rootLimit(blockSize int64) int64 { return (blockSize - 2*dotBytes - 8 - dxTail) / 8 }
func nodeLimit(blockSize int64) int64 { return (blockSize - 8 - dxTail) / 8 }

// indexBlocks is the number of blocks of an index over n leaves, its root included.
func indexBlocks(leaves, blockSize int64) (int64, error) {
	if leaves <= rootLimit(blockSize) {
		return 1, nil
	}
	nodes := (leaves + nodeLimit(blockSize) - 1) / nodeLimit(blockSize)
	if nodes > rootLimit(blockSize) {
		return 0, tooLarge("a directory of %d blocks, at most %d", leaves, rootLimit(blockSize)*nodeLimit(blockSize))
	}
	return 1 + nodes, nil
}

// oneBlock tells whether names fit a directory of one block, without index.
func oneBlock(names []name, blockSize int64) bool {
	room := leafRoom(blockSize) - 2*dotBytes
	for _, n := range names {
		if room -= entryBytes(n.text); room < 0 {
			return false
		}
	}
	return true
}

// hashed is a name in the order of an index.
type hashed struct {
	major, minor uint32
	name
}

// leaf is a block of names: where they end and the least hash in it.
type leaf struct {
	end  int
	hash uint32
}

// sortByHash orders names as an index does; its second part only places those
// that agree in the first, and the name makes the order one.
func sortByHash(names []name, h hasher) []hashed {
	sorted := make([]hashed, len(names))
	for i, n := range names {
		major, minor := h.sum(n.text)
		sorted[i] = hashed{major, minor, n}
	}
	slices.SortFunc(sorted, func(a, b hashed) int {
		if c := cmp.Compare(a.major, b.major); c != 0 {
			return c
		}
		return cmp.Or(cmp.Compare(a.minor, b.minor), strings.Compare(a.text, b.text))
	})
	return sorted
}

// leaves cuts sorted names into blocks. Where one hash goes on in the next block
// that block's mark is odd, so that a search looks there as well.
func leaves(sorted []hashed, room int) (to []leaf) {
	left := 0
	for i, n := range sorted {
		if left -= entryBytes(n.text); left >= 0 {
			to[len(to)-1].end = i + 1
			continue
		}
		hash := n.major
		if i > 0 && sorted[i-1].major == hash {
			hash |= 1
		}
		to = append(to, leaf{i + 1, hash})
		left = room - entryBytes(n.text)
	}
	return to
}

// directory writes the blocks of a directory and gives where they are. The first
// of them may have a place already.
func (b *builder) directory(ctx context.Context, i int, have []span) (spans []span, indexed bool, err error) {
	names := b.plan.in(i)
	if oneBlock(names, b.im.blockSize) {
		if len(have) == 0 {
			have, err = b.space.spans(nil, 0, 1)
		}
		if err != nil {
			return nil, false, err
		}
		return have, false, b.flat(i, names, have[0].physical)
	}
	sorted := sortByHash(names, b.im.hash)
	cut := leaves(sorted, leafRoom(b.im.blockSize))
	index, err := indexBlocks(int64(len(cut)), b.im.blockSize)
	if err != nil {
		return nil, false, err
	}
	done := int64(len(have))
	if spans, err = b.space.spans(have, done, index+int64(len(cut))-done); err != nil {
		return nil, false, err
	}
	out := &dirWriter{b: b, sum: b.im.inodeSum(b.plan.inode(int32(i))), spans: spans}
	if err := b.index(out, i, cut, index); err != nil {
		return nil, false, err
	}
	begin := 0
	for _, l := range cut {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		block := b.block()
		b.fillLeaf(block, 0, begin, l.end, func(i int) name { return sorted[i].name })
		if err := out.leaf(block); err != nil {
			return nil, false, err
		}
		begin = l.end
	}
	return spans, true, nil
}

// flat writes a directory of one block.
func (b *builder) flat(i int, names []name, at int64) error {
	block := b.block()
	used := b.dots(block, i)
	if len(names) == 0 {
		le.PutUint16(block[dotBytes+4:], uint16(leafRoom(b.im.blockSize)-dotBytes))
	}
	b.fillLeaf(block, used, 0, len(names), func(i int) name { return names[i] })
	out := &dirWriter{b: b, sum: b.im.inodeSum(b.plan.inode(int32(i))), spans: []span{{0, at, 1}}}
	return out.leaf(block)
}

// dots puts "." and "..".
func (b *builder) dots(block []byte, i int) int {
	putEntry(block, b.plan.inode(int32(i)), ".", typeDirectory)
	putEntry(block[dotBytes:], b.plan.inode(b.plan.parent[i]), "..", typeDirectory)
	return 2 * dotBytes
}

// fillLeaf puts names from..to behind what is used; the last takes the rest.
func (b *builder) fillLeaf(block []byte, used, from, to int, get func(int) name) {
	last := 0
	for i := from; i < to; i++ {
		n, kind := get(i), byte(typeDirectory)
		if n.node != keptLostFound {
			kind = fileType(b.plan.nodes[n.node].Kind)
		}
		last = used
		used += putEntry(block[used:], b.plan.inode(n.node), n.text, kind)
	}
	if to > from {
		le.PutUint16(block[last+4:], uint16(leafRoom(b.im.blockSize)-last))
	}
}

// putEntry writes a directory entry (directory.rst) and gives its length.
func putEntry(to []byte, ino uint32, text string, kind byte) int {
	n := entryBytes(text)
	le.PutUint32(to, ino)
	le.PutUint16(to[4:], uint16(n))
	to[6], to[7] = byte(len(text)), kind
	copy(to[8:], text)
	return n
}

// index writes the root of a directory's index and the nodes below it, if the
// root alone cannot hold the leaves, which follow.
func (b *builder) index(out *dirWriter, i int, cut []leaf, blocks int64) error {
	size := b.im.blockSize
	type mark struct {
		hash  uint32
		block int64
	}
	marks := make([]mark, len(cut))
	for i, l := range cut {
		marks[i] = mark{l.hash, blocks + int64(i)}
	}
	put := func(block []byte, at int, limit int64, marks []mark) error {
		for i, m := range marks {
			le.PutUint32(block[at+8*i:], m.hash)
			le.PutUint32(block[at+8*i+4:], uint32(m.block))
		}
		le.PutUint16(block[at:], uint16(limit)) // in place of the first hash, which is 0
		le.PutUint16(block[at+2:], uint16(len(marks)))
		return out.node(block, at, int(limit), len(marks))
	}
	level, below := byte(0), marks
	if blocks > 1 {
		level, marks = 1, nil
		for n, rest := int64(1), below; len(rest) > 0; n++ {
			marks = append(marks, mark{rest[0].hash, n})
			rest = rest[min(int64(len(rest)), nodeLimit(size)):]
		}
	}
	root := b.block()
	b.dots(root, i)
	le.PutUint16(root[dotBytes+4:], uint16(size)-dotBytes)
	root[28], root[29], root[30] = hashHalfMD4, 8, level
	if err := put(root, 32, rootLimit(size), marks); err != nil || level == 0 {
		return err
	}
	for len(below) > 0 {
		n := min(int64(len(below)), nodeLimit(size))
		node := b.block()
		le.PutUint16(node[4:], uint16(size))
		if err := put(node, 8, nodeLimit(size), below[:n]); err != nil {
			return err
		}
		below = below[n:]
	}
	return nil
}

// dirWriter puts the blocks of a directory, in order, where its spans say.
type dirWriter struct {
	b     *builder
	sum   uint32
	spans []span
	next  int64 // in the first span
}

func (w *dirWriter) put(block []byte) error {
	at := w.spans[0].physical + w.next
	if w.next++; w.next == w.spans[0].length {
		w.spans, w.next = w.spans[1:], 0
	}
	return w.b.meta.put(at*w.b.im.blockSize, block)
}

// leaf adds the tail that holds the checksum of a block of names.
func (w *dirWriter) leaf(block []byte) error {
	tail := block[len(block)-tailBytes:]
	le.PutUint16(tail[4:], tailBytes)
	tail[7] = 0xDE
	le.PutUint32(tail[8:], ext4disk.Sum(w.sum, block[:len(block)-tailBytes]))
	return w.put(block)
}

// node adds the checksum of a block of the index (fs/ext4/namei.c, ext4_dx_csum).
func (w *dirWriter) node(block []byte, at, limit, count int) error {
	tail := block[at+8*limit:]
	c := ext4disk.Sum(w.sum, block[:at+8*count])
	c = ext4disk.Sum(c, tail[:4])
	le.PutUint32(tail[4:], ext4disk.Sum32(c, 0))
	return w.put(block)
}
