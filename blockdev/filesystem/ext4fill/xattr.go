package ext4fill

import (
	"slices"
	"strings"

	"holdfast/blockdev/filesystem/internal/ext4disk"
	"holdfast/blockdev/tree"
)

// Extended attributes (Documentation/filesystems/ext4/attributes.rst,
// fs/ext4/xattr.c): in the inode behind its fields as far as they fit, the others
// in one block.
const (
	xattrMagic  = 0xEA020000
	xattrHeader = 32 // bytes of a block
	inodeRoom   = inodeBytes - 128 - extraBytes - 4
)

// attribute is an extended attribute as ext4 keeps it.
type attribute struct {
	index byte // stands for the first part of the name
	name  string
	value []byte
}

func (a attribute) bytes() int {
	return a.entryBytes() + (len(a.value)+3)&^3
}

func (a attribute) entryBytes() int { return 16 + (len(a.name)+3)&^3 }

var prefixes = []struct {
	text  string
	index byte
}{{"user.", 1}, {"trusted.", 4}, {"security.", 6}}

// attributes translates a node's and shares them out.
func attributes(n *tree.Node, blockSize int64) (inode, block []attribute, err error) {
	if len(n.Xattrs) == 0 {
		return nil, nil, nil
	}
	inodeLeft, blockLeft := inodeRoom-4, int(blockSize)-xattrHeader-4 // four zeroes end the list
	for i, x := range n.Xattrs {
		if i > 0 && n.Xattrs[i-1].Name >= x.Name {
			return nil, nil, invalid("extended attribute %q is out of order", x.Name)
		}
		a, err := translate(n.Kind, x)
		switch {
		case err != nil:
			return nil, nil, err
		case a.bytes() <= inodeLeft:
			inode, inodeLeft = append(inode, a), inodeLeft-a.bytes()
		case a.bytes() <= blockLeft:
			block, blockLeft = append(block, a), blockLeft-a.bytes()
		default:
			return nil, nil, tooLarge("extended attributes of more than %d bytes with their names", blockSize)
		}
	}
	slices.SortFunc(block, func(a, b attribute) int {
		switch {
		case a.index != b.index:
			return int(a.index) - int(b.index)
		case len(a.name) != len(b.name):
			return len(a.name) - len(b.name)
		}
		return strings.Compare(a.name, b.name)
	})
	return inode, block, nil
}

func translate(k tree.Kind, x tree.Xattr) (attribute, error) {
	switch x.Name {
	case "system.posix_acl_access":
		if k == tree.Symlink {
			return attribute{}, invalid("an ACL of a symbolic link")
		}
		value, err := diskACL(x.Value)
		return attribute{2, "", value}, err
	case "system.posix_acl_default":
		if k != tree.Directory {
			return attribute{}, invalid("a default ACL of what is not a directory")
		}
		value, err := diskACL(x.Value)
		return attribute{3, "", value}, err
	}
	for _, p := range prefixes {
		name, ok := strings.CutPrefix(x.Name, p.text)
		switch {
		case !ok:
			continue
		case name == "" || strings.IndexByte(name, 0) >= 0:
			return attribute{}, invalid("extended attribute %q", x.Name)
		case p.index == 1 && k == tree.Symlink:
			return attribute{}, invalid("extended attribute %q of a symbolic link", x.Name)
		case len(x.Name) > maxName:
			return attribute{}, tooLarge("the name of an extended attribute has %d bytes, at most %d", len(x.Name), maxName)
		}
		return attribute{p.index, name, x.Value}, nil
	}
	return attribute{}, invalid("extended attribute %q is of no kind that ext4 keeps", x.Name)
}

// putAttributes writes entries from at on and values down from the end of to.
// Offsets of values count from base.
func putAttributes(to []byte, at, base int, list []attribute, hashed bool) {
	end := len(to)
	for _, a := range list {
		e := to[at:]
		e[0], e[1] = byte(len(a.name)), a.index
		copy(e[16:], a.name)
		if len(a.value) > 0 {
			end -= (len(a.value) + 3) &^ 3
			copy(to[end:], a.value)
			le.PutUint16(e[2:], uint16(end-base))
			le.PutUint32(e[8:], uint32(len(a.value)))
		}
		if hashed {
			le.PutUint32(e[12:], a.hash(to[end:end+(len(a.value)+3)&^3]))
		}
		at += a.entryBytes()
	}
}

// hash is ext4_xattr_hash_entry: over the name and the padded value.
func (a attribute) hash(padded []byte) (h uint32) {
	for i := range len(a.name) {
		h = h<<5 ^ h>>27 ^ uint32(a.name[i])
	}
	for ; len(padded) > 0; padded = padded[4:] {
		h = h<<16 ^ h>>16 ^ le.Uint32(padded)
	}
	return h
}

// attributeBlock writes the block with those that the inode has no room for.
func (b *builder) attributeBlock(list []attribute) (at int64, err error) {
	if at, _, err = b.space.take(1); err != nil {
		return 0, err
	}
	block := b.block()
	le.PutUint32(block, xattrMagic)
	le.PutUint32(block[4:], 1) // inodes that use it
	le.PutUint32(block[8:], 1) // blocks
	putAttributes(block, xattrHeader, 0, list, true)
	var all uint32
	for at := xattrHeader; le.Uint32(block[at:]) != 0; at += 16 + (int(block[at])+3)&^3 {
		h := le.Uint32(block[at+12:])
		if h == 0 {
			all = 0
			break
		}
		all = all<<16 ^ all>>16 ^ h
	}
	le.PutUint32(block[12:], all)
	var number [8]byte
	le.PutUint64(number[:], uint64(at))
	le.PutUint32(block[16:], ext4disk.Sum(ext4disk.Sum(b.im.seed, number[:]), block)) // the field counts as 0
	return at, b.meta.put(at*b.im.blockSize, block)
}
