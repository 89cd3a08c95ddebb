package ext4fill

import (
	"math"
	"time"

	"holdfast/blockdev/filesystem/internal/ext4disk"
	"holdfast/blockdev/tree"
)

const (
	flagIndex   = 0x1000
	flagExtents = 0x80000
)

// inode is what a node's inode says besides what the node itself does.
type inode struct {
	links  uint16
	size   int64
	blocks int64 // all that it occupies
	flags  uint32
	area   [areaBytes]byte
	acl    int64 // block of extended attributes
	inside []attribute
}

var typeBits = map[tree.Kind]uint16{tree.Directory: 0o40000, tree.Regular: 0o100000, tree.Symlink: 0o120000}

// putInode writes an inode (Documentation/filesystems/ext4/inodes.rst). All times
// are the node's.
func (b *builder) putInode(ino uint32, n *tree.Node, x *inode) error {
	i := b.inode[:]
	clear(i)
	le.PutUint16(i[0x0:], typeBits[n.Kind]|uint16(n.Mode))
	le.PutUint16(i[0x2:], uint16(n.UID))
	le.PutUint16(i[0x78:], uint16(n.UID>>16))
	le.PutUint16(i[0x18:], uint16(n.GID))
	le.PutUint16(i[0x7A:], uint16(n.GID>>16))
	le.PutUint32(i[0x4:], uint32(x.size))
	le.PutUint32(i[0x6C:], uint32(x.size>>32))
	le.PutUint16(i[0x1A:], x.links)
	sectors := x.blocks * b.im.blockSize / 512
	le.PutUint32(i[0x1C:], uint32(sectors))
	le.PutUint16(i[0x74:], uint16(sectors>>32))
	le.PutUint32(i[0x20:], x.flags)
	copy(i[0x28:], x.area[:])
	le.PutUint32(i[0x68:], uint32(x.acl))
	le.PutUint16(i[0x76:], uint16(x.acl>>32))
	le.PutUint16(i[0x80:], extraBytes)
	seconds, extra := diskTime(n.ModTime)
	for _, at := range [][2]int{{0x8, 0x8C}, {0xC, 0x84}, {0x10, 0x88}, {0x90, 0x94}} { // access, change, modification, creation
		le.PutUint32(i[at[0]:], seconds)
		le.PutUint32(i[at[1]:], extra)
	}
	if len(x.inside) > 0 {
		const at = 128 + extraBytes
		le.PutUint32(i[at:], xattrMagic)
		putAttributes(i, at+4, at+4, x.inside, false)
	}
	c := ext4disk.Sum(b.im.inodeSum(ino), i)
	le.PutUint16(i[0x7C:], uint16(c))
	le.PutUint16(i[0x82:], uint16(c>>16))
	return b.table.put(b.im.inodeAt(ino), i)
}

// Seconds since 1970 that inodes can have. Two more bits beside the nanoseconds
// would reach to 2446, but e2fsck takes what is later than April 2310 for wrongly
// encoded times before 1970.
const (
	leastTime = math.MinInt32
	mostTime  = 10737418239
)

// keptTime is the nearest to t that an inode can have.
func keptTime(t time.Time) time.Time {
	if t.Unix() < leastTime {
		return time.Unix(leastTime, 0).UTC()
	}
	if t.Unix() > mostTime {
		return time.Unix(mostTime, 0).UTC()
	}
	return t.UTC()
}

func diskTime(t time.Time) (seconds, extra uint32) {
	t = keptTime(t)
	s := t.Unix()
	return uint32(s), uint32(t.Nanosecond())<<2 | uint32((s-int64(int32(s)))>>32)&3
}
