package ext4fill

import (
	"context"
	"fmt"

	"holdfast/blockdev/tree"
)

// builder writes a plan into an image.
type builder struct {
	im    *image
	plan  *plan
	space *space
	maps  *writer         // bitmaps and descriptors
	meta  *writer         // blocks of directories, extent trees, attributes, links
	table *writer         // inodes
	dirs  map[int64]int64 // directories more, by group
	root  []span          // the root directory's block
	buf   []byte          // a block; see block
	inode [inodeBytes]byte
}

func newBuilder(im *image, p *plan) (*builder, error) {
	b := &builder{
		im: im, plan: p, maps: newWriter(im.f), meta: newWriter(im.f), table: newWriter(im.f),
		dirs: map[int64]int64{}, buf: make([]byte, im.blockSize),
	}
	if free := int64(le.Uint32(im.super[0x10:])); free < p.inodes() {
		return nil, fmt.Errorf("%w: %d inodes, %d are free", ErrFull, p.inodes(), free)
	}
	var err error
	if b.root, err = im.madeDirectory(rootInode); err != nil {
		return nil, err
	}
	if b.root[0].length != 1 {
		return nil, notOurs("root directory of %d blocks", b.root[0].length)
	}
	var freed []int64
	if p.own != 0 {
		s, err := im.madeDirectory(lostFoundInode)
		if err != nil {
			return nil, err
		}
		for i := range s[0].length {
			freed = append(freed, s[0].physical+i)
		}
		if p.nodes[p.own].Kind != tree.Directory {
			b.dirs[0]--
		}
	}
	b.space, err = newSpace(im, b.maps, freed)
	return b, err
}

// madeDirectory tells where the blocks of a directory that mkfs made are: in one
// piece, in the first group.
func (im *image) madeDirectory(ino uint32) ([]span, error) {
	i := make([]byte, inodeBytes)
	if _, err := im.f.ReadAt(i, im.inodeAt(ino)); err != nil {
		return nil, fmt.Errorf("inode %d: %w", ino, err)
	}
	x := i[0x28:]
	s := span{
		logical:  int64(le.Uint32(x[12:])),
		length:   int64(le.Uint16(x[16:])),
		physical: int64(le.Uint16(x[18:]))<<32 | int64(le.Uint32(x[20:])),
	}
	if le.Uint16(x) != extentMagic || le.Uint16(x[2:]) != 1 || le.Uint16(x[6:]) != 0 || s.logical != 0 ||
		s.length == 0 || s.length > 64 || s.physical <= im.first || s.physical+s.length > im.size(0) {
		return nil, notOurs("directory of inode %d", ino)
	}
	return []span{s}, nil
}

// block gives an empty block, good until the next call.
func (b *builder) block() []byte {
	clear(b.buf)
	return b.buf
}

// placeFiles finds a place for all contents, in the order of the tree and before
// everything else, so that files lie one behind the other.
func (b *builder) placeFiles(ctx context.Context) (filled tree.Tree, err error) {
	size := b.im.blockSize
	filled.Nodes = make([]tree.Node, len(b.plan.nodes))
	var slab, runs []tree.Run
	var spans []span
	for i := range b.plan.nodes {
		if i%1024 == 0 && ctx.Err() != nil {
			return filled, ctx.Err()
		}
		n := &b.plan.nodes[i]
		if err := checkLimits(n, size); err != nil {
			return filled, about(n.Path, err)
		}
		runs = runs[:0]
		for _, r := range n.Runs {
			if spans, err = b.space.spans(spans[:0], 0, (r.Length+size-1)/size); err != nil {
				return filled, err
			}
			for _, s := range spans {
				done := s.logical * size
				piece := tree.Run{Offset: r.Offset + done, Length: min(s.length*size, r.Length-done), At: s.physical * size}
				runs = appendRun(runs, piece)
			}
		}
		filled.Nodes[i] = *n
		filled.Nodes[i].ModTime = keptTime(n.ModTime)
		if len(runs) == 0 {
			continue
		}
		if len(slab)+len(runs) > cap(slab) {
			slab = make([]tree.Run, 0, max(4096, len(runs)))
		}
		slab = append(slab, runs...)
		filled.Nodes[i].Runs = slab[len(slab)-len(runs) : len(slab) : len(slab)]
	}
	return filled, nil
}

func appendRun(to []tree.Run, r tree.Run) []tree.Run {
	if n := len(to); n > 0 {
		last := &to[n-1]
		if last.Offset+last.Length == r.Offset && last.At+last.Length == r.At {
			last.Length += r.Length
			return to
		}
	}
	return append(to, r)
}

// writeNodes writes everything but the contents of files.
func (b *builder) writeNodes(ctx context.Context, filled tree.Tree) error {
	for i := range filled.Nodes {
		if i%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		n := &filled.Nodes[i]
		if err := b.writeNode(ctx, i, n); err != nil {
			return about(n.Path, err)
		}
	}
	if err := b.meta.flush(); err != nil {
		return err
	}
	return b.table.flush()
}

func (b *builder) writeNode(ctx context.Context, i int, n *tree.Node) error {
	ino := b.plan.inode(int32(i))
	x := inode{links: b.plan.links(i)}
	inside, outside, err := attributes(n, b.im.blockSize)
	if err != nil {
		return err
	}
	x.inside = inside
	switch n.Kind {
	case tree.Directory:
		err = b.writeDirectory(ctx, i, ino, &x)
	case tree.Symlink:
		err = b.writeSymlink(n, ino, &x)
	case tree.Regular:
		err = b.writeFile(n, ino, &x)
	}
	if err != nil {
		return err
	}
	if len(outside) > 0 {
		if x.acl, err = b.attributeBlock(outside); err != nil {
			return err
		}
		x.blocks++
	}
	return b.putInode(ino, n, &x)
}

func (b *builder) writeDirectory(ctx context.Context, i int, ino uint32, x *inode) error {
	var have []span
	if i == 0 {
		have = b.root
	}
	spans, indexed, err := b.directory(ctx, i, have)
	if err != nil {
		return err
	}
	x.flags = flagExtents
	if indexed {
		x.flags |= flagIndex
	}
	if i > 0 && ino != lostFoundInode {
		b.dirs[int64(ino-1)/b.im.inodes]++
	}
	last := spans[len(spans)-1]
	x.blocks = last.logical + last.length
	x.size = x.blocks * b.im.blockSize
	nodes, err := b.extents(x.area[:], ino, spans)
	x.blocks += nodes
	return err
}

func (b *builder) writeSymlink(n *tree.Node, ino uint32, x *inode) error {
	x.size = int64(len(n.Target))
	blocks, err := targetBlocks(n, b.im.blockSize)
	if err != nil {
		return err
	}
	if blocks == 0 {
		copy(x.area[:], n.Target)
		return nil
	}
	at, _, err := b.space.take(1)
	if err != nil {
		return err
	}
	block := b.block()
	copy(block, n.Target)
	x.flags, x.blocks = flagExtents, 1
	if err := b.meta.put(at*b.im.blockSize, block); err != nil {
		return err
	}
	_, err = b.extents(x.area[:], ino, []span{{0, at, 1}})
	return err
}

func (b *builder) writeFile(n *tree.Node, ino uint32, x *inode) error {
	size := b.im.blockSize
	spans := make([]span, 0, 4)
	for _, r := range n.Runs {
		s := span{r.Offset / size, r.At / size, (r.Length + size - 1) / size}
		spans = appendSpan(spans, s)
		x.blocks += s.length
	}
	x.flags, x.size = flagExtents, n.Size
	nodes, err := b.extents(x.area[:], ino, spans)
	x.blocks += nodes
	return err
}
