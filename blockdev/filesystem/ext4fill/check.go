package ext4fill

import (
	"strings"

	"holdfast/blockdev/tree"
)

// maxFileBlocks is the number of blocks that an extent tree can address.
const maxFileBlocks = 1<<32 - 1

// noOwner is no user and no group (INVALID_UID in the kernel's uidgid.h).
const noOwner = 1<<32 - 1

// checkNode refuses what does not belong in a tree: everything else here relies
// on it. Limits that depend on the block size are looked at where they apply.
func checkNode(n *tree.Node, root bool) error {
	if root {
		if n.Path != "." || n.Kind != tree.Directory {
			return invalid("the first node is not the root directory")
		}
	} else if err := checkPath(n.Path); err != nil {
		return err
	}
	if n.Mode > 0o7777 {
		return invalid("mode %#o", n.Mode)
	}
	if n.UID == noOwner || n.GID == noOwner {
		return invalid("owner %d, group %d: the highest number means none", n.UID, n.GID)
	}
	if n.Kind != tree.Regular && (n.Size != 0 || len(n.Runs) != 0) {
		return invalid("contents of what is not a file")
	}
	switch n.Kind {
	case tree.Directory:
		if len(n.Links) != 0 {
			return invalid("a directory with two names")
		}
	case tree.Symlink:
		if n.Target == "" || strings.IndexByte(n.Target, 0) >= 0 {
			return invalid("a symbolic link to %q", n.Target)
		}
	case tree.Regular:
		if err := checkRuns(n); err != nil {
			return err
		}
	default:
		return invalid("kind %d", n.Kind)
	}
	if 1+len(n.Links) > maxLinks {
		return tooLarge("%d names for one file, at most %d", 1+len(n.Links), maxLinks)
	}
	return nil
}

func checkRuns(n *tree.Node) error {
	if n.Size < 0 {
		return invalid("%d bytes", n.Size)
	}
	end := int64(0)
	for _, r := range n.Runs {
		switch {
		case r.Offset < end || r.Offset%tree.Block != 0 || r.Length <= 0 || r.Length > n.Size-r.Offset:
			return invalid("data at %d, %d bytes, in a file of %d", r.Offset, r.Length, n.Size)
		case r.Length%tree.Block != 0 && r.Offset+r.Length != n.Size:
			return invalid("data at %d ends within a block", r.Offset)
		}
		end = r.Offset + r.Length
	}
	return nil
}

func checkPath(path string) error {
	if path == "" || strings.IndexByte(path, 0) >= 0 {
		return invalid("no path")
	}
	for part := range strings.SplitSeq(path, "/") {
		switch {
		case part == "" || part == "." || part == "..":
			return invalid("path is not clean")
		case len(part) > maxName:
			return tooLarge("a name of %d bytes, at most %d", len(part), maxName)
		}
	}
	return nil
}
