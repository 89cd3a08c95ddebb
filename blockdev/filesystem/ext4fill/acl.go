package ext4fill

// POSIX ACLs: as extended attributes show them
// (include/uapi/linux/posix_acl_xattr.h) and as ext4 keeps them (fs/ext4/acl.h).
const (
	aclShown = 2
	aclKept  = 1

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// diskACL translates an ACL, refusing what the kernel would not have set
// (fs/posix_acl.c, posix_acl_valid): it would not show it again.
func diskACL(value []byte) ([]byte, error) {
	if len(value) < 4 || (len(value)-4)%8 != 0 || le.Uint32(value) != aclShown {
		return nil, invalid("an ACL that is none")
	}
	disk := le.AppendUint32(nil, aclKept)
	seen, last := uint16(0), uint16(0)
	var lastID uint32
	for e := value[4:]; len(e) > 0; e = e[8:] {
		tag, perm, id := le.Uint16(e), le.Uint16(e[2:]), le.Uint32(e[4:])
		named := tag == aclUser || tag == aclGroup
		switch {
		case perm > 7, tag < last, tag == last && (!named || id <= lastID), named && id == 1<<32-1:
			return nil, invalid("an ACL that is none")
		}
		switch tag {
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			disk = append(disk, e[:4]...)
		case aclUser, aclGroup:
			disk = append(disk, e[:8]...)
		default:
			return nil, invalid("an ACL that is none")
		}
		seen, last, lastID = seen|tag, tag, id
	}
	const all = aclUserObj | aclGroupObj | aclOther
	if seen&all != all || seen&(aclUser|aclGroup) != 0 && seen&aclMask == 0 {
		return nil, invalid("an ACL that is none")
	}
	return disk, nil
}
