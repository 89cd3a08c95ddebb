package oci

import (
	"path"
	"slices"
	"strings"
	"time"

	"holdfast/templates/archive"
)

// Bounds of names, those of package archive, and of work.
const (
	maxPath  = 4096
	maxName  = 255
	maxDepth = 128
	maxLinks = 40         // symbolic links on the way of one path, as in the kernel (MAXSYMLINKS)
	maxSteps = 50_000_000 // names looked at for one image
)

type kind uint8

const (
	directory kind = iota + 1
	symlink
	other // files, devices, pipes: what has no meaning for names
)

// inode is an entry that may come to be in the tree. It knows where its header
// and contents are, not what they are.
type inode struct {
	kind  kind
	entry int64   // among all entries of all layers; -1: a directory that no entry names
	link  string  // text of a symbolic link
	names []*node // set by survivors, in order
	time  time.Time
}

// node is a name in the tree.
type node struct {
	*inode
	parent   *node
	name     string
	layer    int // that put it there last
	children map[string]*node
}

// tree is the names of an image's files while layers are applied.
type tree struct {
	root  *node
	layer int
	steps int64
}

func newTree() *tree {
	root := &node{inode: &inode{kind: directory, entry: -1, time: time.Unix(0, 0)}}
	root.parent = root
	return &tree{root: root}
}

// split takes a name of an archive apart. A leading "/" is the image's root.
func split(name string) ([]string, error) {
	switch {
	case name == "":
		return nil, archive.RefuseEntry(name, "an empty name")
	case len(name) > maxPath:
		return nil, archive.RefuseEntry(name, "a path longer than %d bytes", maxPath)
	case strings.IndexByte(name, 0) >= 0:
		return nil, archive.RefuseEntry(name, "a NUL byte in a name")
	}
	parts := slices.DeleteFunc(strings.Split(name, "/"), func(p string) bool { return p == "" || p == "." })
	for _, p := range parts {
		switch {
		case p == "..":
			return nil, archive.RefuseEntry(name, `a ".." in a path: paths must stay inside the image`)
		case len(p) > maxName:
			return nil, archive.RefuseEntry(name, "a name longer than %d bytes", maxName)
		}
	}
	return parts, nil
}

// find walks to a directory inside the root, through symbolic links. What is
// missing is made, with the time of the entry that needs it, or is nil.
func (t *tree) find(name string, parts []string, missing *time.Time) (*node, error) {
	at, links, depth := t.root, 0, 0
	for len(parts) > 0 {
		if t.steps++; t.steps > maxSteps {
			return nil, archive.RefuseEntry(name, "the image's names take too long to follow")
		}
		part := parts[0]
		parts = parts[1:]
		switch part {
		case "", ".":
			continue
		case "..": // of a link's text; the root's is the root
			at, depth = at.parent, max(0, depth-1)
			continue
		}
		next := at.children[part]
		if next == nil {
			if missing == nil {
				return nil, nil
			}
			if len(part) > maxName || depth+1 > maxDepth {
				return nil, archive.RefuseEntry(name, "it leads to a name longer than %d bytes, or deeper than %d directories", maxName, maxDepth)
			}
			next = t.put(at, part, &inode{kind: directory, entry: -1, time: *missing})
		}
		switch next.kind {
		case directory:
			at, depth = next, depth+1
		case symlink:
			if links++; links > maxLinks {
				return nil, archive.RefuseEntry(name, "more than %d symbolic links on its way", maxLinks)
			}
			if strings.HasPrefix(next.link, "/") {
				at, depth = t.root, 0
			}
			parts = append(strings.Split(next.link, "/"), parts...)
		default:
			if missing == nil {
				return nil, nil
			}
			return nil, archive.RefuseEntry(name, "it lies below %s, which is not a directory", archive.Quote(part))
		}
	}
	return at, nil
}

// put makes a name for an inode, in the place of what was there. A directory
// that comes over a directory keeps what is in it.
func (t *tree) put(dir *node, name string, i *inode) *node {
	if dir.children == nil {
		dir.children = map[string]*node{}
	}
	n := &node{inode: i, parent: dir, name: name, layer: t.layer}
	if old := dir.children[name]; old != nil && old.kind == directory && i.kind == directory {
		old.inode, old.layer = i, t.layer
		return old
	}
	dir.children[name] = n
	return n
}

// hide takes away what layers below the present one put at a name.
func (t *tree) hide(dir *node, name string) error {
	n := dir.children[name]
	if n == nil {
		return nil
	}
	if err := t.hideBelow(n); err != nil {
		return err
	}
	if n.layer < t.layer && len(n.children) == 0 {
		delete(dir.children, name)
	}
	return nil
}

// hideBelow takes away what lower layers put into a directory. A directory of
// theirs stays where this layer has put something into it.
func (t *tree) hideBelow(dir *node) error {
	for name := range dir.children {
		if t.steps++; t.steps > maxSteps {
			return archive.RefuseEntry(dir.path(), "the image's whiteouts take too long to follow")
		}
		if err := t.hide(dir, name); err != nil {
			return err
		}
	}
	return nil
}

func (n *node) path() string {
	if n.parent == n {
		return "."
	}
	var parts []string
	for ; n.parent != n; n = n.parent {
		parts = append(parts, n.name)
	}
	slices.Reverse(parts)
	return path.Join(parts...)
}

// survivors are the inodes that have a name in the end: by their entry, with all
// of their names in the order of their paths; and the directories without one.
func (t *tree) survivors() (byEntry map[int64]*inode, implied []*node) {
	byEntry = map[int64]*inode{}
	var walk func(n *node)
	walk = func(n *node) {
		switch {
		case n.entry >= 0:
			n.names = append(n.names, n)
			byEntry[n.entry] = n.inode
		case n != t.root:
			implied = append(implied, n)
		}
		names := make([]string, 0, len(n.children))
		for name := range n.children {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			walk(n.children[name])
		}
	}
	walk(t.root)
	return byEntry, implied
}
