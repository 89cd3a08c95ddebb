package filesystem

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"

	"holdfast/blockdev/tree"
)

// Where XFS keeps extended attributes in the inode (xfs_attr_sf_hdr and its entries,
// fs/xfs/libxfs/xfs_da_format.h). Others lie in blocks, which are not read here.
const (
	xfsForkOffset = 82 // byte of an inode: where the attributes' fork begins, in units of 8
	xfsForkFormat = 83
	xfsLocal      = 1
	xfsAttrRoot   = 0x2
	xfsAttrSecure = 0x4
)

// xattrs reads those that lie in the inode.
func (r *xfsReader) xattrs(i *inode) (all []tree.Xattr, complete bool, err error) {
	begin := xfsForkAt + int(i.raw[xfsForkOffset])*8
	if begin == xfsForkAt {
		return nil, true, nil
	}
	if i.raw[xfsForkFormat] != xfsLocal {
		return nil, xfsNoAttributes(i.raw), nil
	}
	if begin+4 > len(i.raw) {
		return nil, false, damaged("XFS inode %d has no room for its attributes", i.number)
	}
	b, count := i.raw[begin:], int(i.raw[begin+2])
	complete = true
	for b = b[4:]; count > 0; count-- {
		if len(b) < 3 || len(b) < 3+int(b[0])+int(b[1]) {
			return nil, false, damaged("XFS inode %d has an attribute beyond its end", i.number)
		}
		name, value, flags := string(b[3:3+b[0]]), b[3+int(b[0]):3+int(b[0])+int(b[1])], b[2]
		b = b[3+int(b[0])+int(b[1]):]
		first := map[byte]string{0: "user.", xfsAttrRoot: "trusted.", xfsAttrSecure: "security."}[flags]
		switch {
		case first+name == "security.selinux":
		case first == "", name == "", strings.HasPrefix(name, "SGI_ACL"):
			complete = false
		default:
			all = append(all, tree.Xattr{Name: first + name, Value: bytes.Clone(value)})
		}
	}
	return fitting(i, all, complete)
}

// xfsNoAttributes reports whether an inode's fork for attributes is there and has no
// extents: the kernel makes room early.
func xfsNoAttributes(raw []byte) bool {
	const extents, nrext64 = 2, 1 << 4
	be := binary.BigEndian
	if raw[xfsForkFormat] != extents {
		return false
	}
	if be.Uint64(raw[120:])&nrext64 != 0 {
		return be.Uint32(raw[76:]) == 0
	}
	return be.Uint16(raw[80:]) == 0
}

const btrfsTypeXattr = 24

// btrfsXattrs are what btrfs names attributes that a tree keeps.
var btrfsXattrs = []string{"user.", "trusted.", "security.", "system.posix_acl_access", "system.posix_acl_default"}

// xattrs reads a file's; their items are like those of names.
func (r *btrfsReader) xattrs(i *inode) (all []tree.Xattr, complete bool, err error) {
	t, object, err := r.place(i.number)
	if err != nil {
		return nil, false, err
	}
	complete = true
	err = r.scan(t, btrfsKey{object, btrfsTypeXattr, 0}, func(_ btrfsKey, b []byte) error {
		for len(b) > 0 { // names of one hash share an item
			if len(b) < 30 {
				return damaged("btrfs attribute of %d bytes", len(b))
			}
			size, name := int(binary.LittleEndian.Uint16(b[25:])), int(binary.LittleEndian.Uint16(b[27:]))
			if len(b) < 30+name+size {
				return damaged("btrfs attribute of %d bytes", len(b))
			}
			text, value := string(b[30:30+name]), b[30+name:30+name+size]
			b = b[30+name+size:]
			switch {
			case text == "security.selinux":
			case !slices.ContainsFunc(btrfsXattrs, func(p string) bool { return strings.HasPrefix(text, p) }):
				complete = false
			default:
				all = append(all, tree.Xattr{Name: text, Value: bytes.Clone(value)})
			}
		}
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	return fitting(i, all, complete)
}
