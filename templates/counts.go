package templates

import (
	"fmt"

	"holdfast/blockdev/tree"
)

// counts are what a tree holds.
type counts struct {
	entries     int64 // inodes besides the root
	links       int64 // further names of inodes
	fileBytes   int64 // sizes of the files, holes included
	dataBytes   int64 // what everything occupies in blocks of 4 KiB, in any filesystem
	longestLink int64 // bytes of a symbolic link's text, at most
}

const (
	inlineLink   = 59 // bytes of a symbolic link that an ext4 inode holds itself
	inlineXattrs = 90 // bytes of attributes that an ext4 inode of 256 bytes holds itself
	nameOverhead = 8 + 3
)

func countTree(t tree.Tree) counts {
	c := counts{entries: int64(len(t.Nodes)) - 1}
	names := int64(0) // bytes of directory entries
	for i := range t.Nodes {
		n := &t.Nodes[i]
		c.links += int64(len(n.Links))
		_, name := tree.Split(n.Path)
		names += int64(len(name) + nameOverhead)
		for _, l := range n.Links {
			_, name := tree.Split(l)
			names += int64(len(name) + nameOverhead)
		}
		attrs := 0
		for _, x := range n.Xattrs {
			attrs += len(x.Name) + len(x.Value) + tree.XattrExtra
		}
		if attrs > inlineXattrs {
			c.dataBytes += tree.Block
		}
		switch n.Kind {
		case tree.Directory:
			c.dataBytes += tree.Block
		case tree.Symlink:
			c.longestLink = max(c.longestLink, int64(len(n.Target)))
			if len(n.Target) > inlineLink {
				c.dataBytes += tree.Block
			}
		case tree.Regular:
			c.fileBytes += n.Size
			for _, r := range n.Runs {
				c.dataBytes += roundUp(r.Length, tree.Block)
			}
		}
	}
	c.dataBytes += 2 * names // directory blocks are half full at least
	return c
}

func (c counts) String() string {
	return fmt.Sprintf("%d entries, %d hard links, %d bytes", c.entries, c.links, c.fileBytes)
}
