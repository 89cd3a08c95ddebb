package ext4fill_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem/ext4fill"
	"holdfast/blockdev/tree"
)

// capability is cap_net_bind_service=ep in the form without a root user.
var capability = []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

type aclEntry struct {
	tag, perm uint16
	id        uint32
}

func aclOf(entries ...aclEntry) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

const noID = 1<<32 - 1

// acl names users 1000, 1001, ... and group 7.
func acl(users uint32) []byte {
	list := []aclEntry{{1, 7, noID}}
	for i := range users {
		list = append(list, aclEntry{2, uint16(i % 8), 1000 + i})
	}
	list = append(list, aclEntry{4, 5, noID}, aclEntry{8, 1, 7}, aclEntry{16, 7, noID}, aclEntry{32, 4, noID})
	return aclOf(list...)
}

// TestXattrSizes goes around what the inode has room for (92 bytes for entries of
// 16 bytes with their names, and values, and four zeroes), and what a block has
// (4096 - 32 bytes).
func TestXattrSizes(t *testing.T) {
	blockdevtest.LeakCheck(t)
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	dir := t.TempDir()
	x := newForest(t, dir)
	attr := func(name string, size int) tree.Xattr { return tree.Xattr{Name: name, Value: pattern(int64(size), 7)} }
	for _, size := range []int{0, 1, 2, 3, 4, 5, 67, 68, 69, 72, 100, 3000, 4036, 4037, 4040} {
		x.add(tree.Node{Path: fmt.Sprintf("one-%d", size), Kind: tree.Regular, Xattrs: []tree.Xattr{attr("user.a", size)}})
	}
	for _, size := range []int{4000, 4040} {
		x.add(tree.Node{Path: fmt.Sprintf("both-%d", size), Kind: tree.Regular, Xattrs: []tree.Xattr{attr("trusted.a", 68), attr("user.b", size)}})
		x.add(tree.Node{Path: fmt.Sprintf("dir-%d", size), Kind: tree.Directory, Xattrs: []tree.Xattr{attr("trusted.a", 68), attr("user.b", size)}})
		x.add(tree.Node{Path: fmt.Sprintf("link-%d", size), Kind: tree.Symlink, Target: "x", Xattrs: []tree.Xattr{attr("security.x", 68), attr("trusted.b", size)}})
		x.add(tree.Node{Path: fmt.Sprintf("long-%d", size), Kind: tree.Symlink, Target: strings.Repeat("x", 4095), Xattrs: []tree.Xattr{attr("security.x", 68), attr("trusted.b", size)}})
	}
	x.add(tree.Node{Path: "names", Kind: tree.Regular, Xattrs: []tree.Xattr{
		attr("security.b", 40), attr("security.capability", 0), attr("trusted.aa", 40), attr("trusted.z", 40),
		attr("user."+strings.Repeat("n", 250), 40), attr("user.zz", 0), attr("user.\xff\xfe", 40)}})
	x.nodes["names"].Xattrs[1].Value = capability
	x.add(tree.Node{Path: "acl", Kind: tree.Regular, Mode: 0o674, Xattrs: []tree.Xattr{{Name: "system.posix_acl_access", Value: acl(2)}}})
	x.add(tree.Node{Path: "acls", Kind: tree.Directory, Mode: 0o2775, Xattrs: []tree.Xattr{
		{Name: "security.capability", Value: capability}, {Name: "system.posix_acl_access", Value: acl(300)}, {Name: "system.posix_acl_default", Value: acl(3)}}})
	x.filled(dir, 64*MiB)
}

func TestXattrsRefused(t *testing.T) {
	f := empty(t, t.TempDir(), 64*MiB, 10)
	regular, link, directory := tree.Regular, tree.Symlink, tree.Directory
	for _, c := range []struct {
		kind  tree.Kind
		name  string
		value []byte
		want  error
	}{
		{regular, "user.a", make([]byte, 4045), ext4fill.ErrTooLarge},
		{regular, "user." + strings.Repeat("n", 251), nil, ext4fill.ErrTooLarge},
		{regular, "user.", nil, ext4fill.ErrInvalid},
		{regular, "user.a\x00b", nil, ext4fill.ErrInvalid},
		{regular, "other.a", nil, ext4fill.ErrInvalid},
		{regular, "system.data", []byte("inline"), ext4fill.ErrInvalid},
		{regular, "system.posix_acl_default", acl(1), ext4fill.ErrInvalid},
		{link, "user.a", nil, ext4fill.ErrInvalid},
		{link, "system.posix_acl_access", acl(1), ext4fill.ErrInvalid},
		{directory, "system.posix_acl_access", acl(600), ext4fill.ErrTooLarge},
		{directory, "system.posix_acl_access", nil, ext4fill.ErrInvalid},
		{directory, "system.posix_acl_access", []byte{1, 0, 0, 0}, ext4fill.ErrInvalid},
		{directory, "system.posix_acl_access", []byte{2, 0, 0, 0}, ext4fill.ErrInvalid},
		{directory, "system.posix_acl_access", acl(1)[:10], ext4fill.ErrInvalid},
		{regular, "system.posix_acl_access", aclOf(aclEntry{1, 8, noID}, aclEntry{4, 1, noID}, aclEntry{32, 1, noID}), ext4fill.ErrInvalid},
		{regular, "system.posix_acl_access", aclOf(aclEntry{1, 7, noID}, aclEntry{32, 1, noID}), ext4fill.ErrInvalid},
		{regular, "system.posix_acl_access", aclOf(aclEntry{4, 7, noID}, aclEntry{1, 7, noID}, aclEntry{32, 1, noID}), ext4fill.ErrInvalid},
		{regular, "system.posix_acl_access", aclOf(aclEntry{1, 7, noID}, aclEntry{2, 7, 5}, aclEntry{4, 7, noID}, aclEntry{32, 1, noID}), ext4fill.ErrInvalid},
		{regular, "system.posix_acl_access", aclOf(aclEntry{1, 7, noID}, aclEntry{2, 7, 5}, aclEntry{2, 7, 5}, aclEntry{4, 7, noID}, aclEntry{16, 7, noID}, aclEntry{32, 1, noID}), ext4fill.ErrInvalid},
		{regular, "system.posix_acl_access", aclOf(aclEntry{1, 7, noID}, aclEntry{3, 7, 5}, aclEntry{4, 7, noID}, aclEntry{16, 7, noID}, aclEntry{32, 1, noID}), ext4fill.ErrInvalid},
	} {
		x := newForest(t, t.TempDir())
		n := tree.Node{Path: "the node", Kind: c.kind, Xattrs: []tree.Xattr{{Name: c.name, Value: c.value}}}
		if c.kind == link {
			n.Target = "x"
		}
		x.add(n)
		_, err := ext4fill.Fill(t.Context(), f, x.tree(), nowhere{})
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), `"the node"`) {
			t.Errorf("%q of %d bytes: %v, want %v", c.name, len(c.value), err, c.want)
		}
		if _, err := ext4fill.Need(t.Context(), x.tree(), 4096); !errors.Is(err, c.want) {
			t.Errorf("%q of %d bytes: Need: %v, want %v", c.name, len(c.value), err, c.want)
		}
	}
}
