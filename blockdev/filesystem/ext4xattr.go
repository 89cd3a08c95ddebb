package filesystem

import (
	"bytes"
	"encoding/binary"
	"slices"

	"holdfast/blockdev/tree"
)

// Extended attributes of ext4 (the kernel's
// Documentation/filesystems/ext4/attributes.rst; ACLs: fs/ext4/acl.h).
const (
	ext4XattrMagic  = 0xEA020000
	ext4XattrHeader = 32 // bytes of a block before its entries
	ext4XattrEntry  = 16 // bytes of an entry before its name
)

// ext4XattrNames are the first parts of names that stand as numbers. 7 is a file's
// data, 8 richacl: neither is an attribute that a tree keeps.
var ext4XattrNames = map[byte]string{1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}

// xattrs reads those in the inode and in its block.
func (r *ext4Reader) xattrs(i *inode) (all []tree.Xattr, complete bool, err error) {
	le := binary.LittleEndian
	complete = true
	if len(i.raw) > 0x82 {
		at := 128 + int(le.Uint16(i.raw[0x80:]))
		if at+4 < len(i.raw) && le.Uint32(i.raw[at:]) == ext4XattrMagic {
			if err := ext4Xattrs(i.raw[at+4:], 0, &all, &complete); err != nil {
				return nil, false, err
			}
		}
	}
	if block := int64(le.Uint32(i.raw[0x68:])) | int64(le.Uint16(i.raw[0x76:]))<<32; block != 0 {
		if err := r.inside(block); err != nil {
			return nil, false, err
		}
		b, err := readAt(r.f, block*r.super.blockSize, int(r.super.blockSize))
		if err != nil {
			return nil, false, err
		}
		if le.Uint32(b) != ext4XattrMagic {
			return nil, false, damaged("block %d is not one of extended attributes", block)
		}
		if err := ext4Xattrs(b, ext4XattrHeader, &all, &complete); err != nil {
			return nil, false, err
		}
	}
	return fitting(i, all, complete)
}

// fitting leaves out what the tree does not take, and refuses what no kernel makes.
func fitting(i *inode, all []tree.Xattr, complete bool) ([]tree.Xattr, bool, error) {
	slices.SortFunc(all, func(a, b tree.Xattr) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) })
	total := 0
	for n, x := range all {
		if n > 0 && all[n-1].Name == x.Name {
			return nil, false, damaged("inode %d has %.60q twice", i.number, x.Name)
		}
		total += len(x.Name) + len(x.Value) + tree.XattrExtra
	}
	if total > tree.MaxXattrs {
		return nil, false, nil
	}
	return all, complete, nil
}

// ext4Xattrs reads a list of entries from at on; values lie at offsets in b.
func ext4Xattrs(b []byte, at int, all *[]tree.Xattr, complete *bool) error {
	le := binary.LittleEndian
	for at+4 <= len(b) && le.Uint32(b[at:]) != 0 {
		if at+ext4XattrEntry > len(b) {
			return damaged("extended attribute beyond its block")
		}
		length, index, offset := int(b[at]), b[at+1], int(le.Uint16(b[at+2:]))
		inode, size := le.Uint32(b[at+4:]), int64(le.Uint32(b[at+8:]))
		end := at + ext4XattrEntry + length
		if end > len(b) || inode == 0 && int64(offset)+size > int64(len(b)) {
			return damaged("extended attribute of %d bytes beyond its block", size)
		}
		name := string(b[at+ext4XattrEntry : end])
		at = (end + 3) &^ 3
		first, known := ext4XattrNames[index]
		acl := index == 2 || index == 3
		if !known || inode != 0 || acl == (name != "") || first+name == "security.selinux" {
			*complete = *complete && first+name == "security.selinux" // a host's policy, not the tree's
			continue
		}
		value := bytes.Clone(b[offset : int64(offset)+size])
		if acl {
			if value = shownACL(value); value == nil {
				*complete = false
				continue
			}
		}
		*all = append(*all, tree.Xattr{Name: first + name, Value: value})
	}
	return nil
}

// shownACL makes of an ACL as ext4 keeps it (version 1, numbers only where they mean
// something) one as the kernel shows it (version 2); nil for none.
func shownACL(b []byte) []byte {
	const kept, shown, user, group, noID = 1, 2, 0x02, 0x08, 1<<32 - 1
	le := binary.LittleEndian
	if len(b) < 4 || le.Uint32(b) != kept {
		return nil
	}
	out := le.AppendUint32(nil, shown)
	for b = b[4:]; len(b) > 0; {
		size, id := 4, uint32(noID)
		if len(b) < size {
			return nil
		}
		if tag := le.Uint16(b); tag == user || tag == group {
			if size = 8; len(b) < size {
				return nil
			}
			id = le.Uint32(b[4:])
		}
		out = le.AppendUint32(append(out, b[:4]...), id)
		b = b[size:]
	}
	return out
}
