package tree

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The mode of directories that are only implied, and of a root without an entry.
const impliedMode = 0o755

// ErrNotBelow: a path leads through something that is not a directory, or a name
// would change its kind.
var ErrNotBelow = errors.New("not below a directory")

// Attributes are what an inode has besides contents.
type Attributes struct {
	Mode    uint32 // at most 07777
	UID     uint32
	GID     uint32
	ModTime time.Time
	Xattrs  []Xattr // in any order
}

// Builder makes a Tree of entries in any order: of two entries of one name the
// later counts, a name that is taken over leaves the other names of its inode
// alone. Directories that no entry names are implied by what is below them: 0755,
// of root, with the newest time of what is below. So is the root. What a caller
// must refuse it asks Kind about first. Not safe for concurrent use.
type Builder struct {
	names  map[string]int32 // clean paths; "." is the root
	inodes []inode
	text   int64
	parent string // of the entry before, which exists: walks come in order
}

// inode is a Node that is not finished: as few bytes as will do, for there may be
// millions.
type inode struct {
	seconds  int64
	nanos    int32
	mode     uint16
	kind     Kind
	implied  bool
	uid, gid uint32
	names    int32
	content  *Content
	target   string
	xattrs   []Xattr
}

// NewBuilder gives a Builder that knows the root.
func NewBuilder() *Builder {
	b := &Builder{names: map[string]int32{}, parent: "."}
	b.imply(".")
	return b
}

// Kind tells what a path is by now; 0 for nothing.
func (b *Builder) Kind(path string) Kind {
	i, ok := b.names[path]
	if !ok {
		return 0
	}
	return b.inodes[i].kind
}

// Names counts all names but the root's, those of implied directories too.
func (b *Builder) Names() int { return len(b.names) - 1 }

// Text is how many bytes of paths, targets and attributes it has taken.
func (b *Builder) Text() int64 { return b.text }

// NamesOf counts the names of the inode that a path leads to.
func (b *Builder) NamesOf(path string) int {
	i, ok := b.names[path]
	if !ok {
		return 0
	}
	return int(b.inodes[i].names)
}

// Directory adds a directory, or gives the one that is there other attributes.
func (b *Builder) Directory(path string, a Attributes) error {
	return b.put(path, newInode(Directory, a))
}

// File adds a file. c may still grow until Tree is called.
func (b *Builder) File(path string, a Attributes, c *Content) error {
	n := newInode(Regular, a)
	n.content = c
	return b.put(path, n)
}

// Symlink adds a symbolic link with a text. Linux knows one mode for them.
func (b *Builder) Symlink(path string, a Attributes, target string) error {
	a.Mode = 0o777
	n := newInode(Symlink, a)
	n.target = strings.Clone(target)
	return b.put(path, n)
}

// Link gives the file or symbolic link at target another name.
func (b *Builder) Link(path, target string) error {
	i, ok := b.names[target]
	if !ok || b.inodes[i].kind == Directory {
		return fmt.Errorf("%w: no file for a hard link at %.120q", ErrNotBelow, target)
	}
	if old := b.Kind(path); old != 0 && old != b.inodes[i].kind {
		return fmt.Errorf("%w: %.120q would change its kind", ErrNotBelow, path)
	}
	if err := b.parents(path); err != nil {
		return err
	}
	b.set(path, i)
	return nil
}

func (b *Builder) weigh(n inode) {
	b.text += int64(len(n.target))
	for _, x := range n.xattrs {
		b.text += int64(len(x.Name) + len(x.Value))
	}
}

func newInode(k Kind, a Attributes) inode {
	return inode{
		kind: k, mode: uint16(a.Mode & 0o7777), uid: a.UID, gid: a.GID, //nolint:gosec // masked
		seconds: a.ModTime.Unix(), nanos: int32(a.ModTime.Nanosecond()), xattrs: sortedXattrs(a.Xattrs), //nolint:gosec // below 10^9
	}
}

func sortedXattrs(list []Xattr) []Xattr {
	if len(list) == 0 {
		return nil
	}
	c := make([]Xattr, len(list))
	for i, x := range list {
		c[i] = Xattr{Name: strings.Clone(x.Name), Value: slices.Clone(x.Value)}
	}
	slices.SortFunc(c, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return c
}

func (b *Builder) put(path string, n inode) error {
	b.weigh(n)
	if i, ok := b.names[path]; ok {
		switch old := &b.inodes[i]; {
		case old.kind != n.kind:
			return fmt.Errorf("%w: %.120q would change its kind", ErrNotBelow, path)
		case n.kind == Directory || old.names == 1: // nothing else needs the old one
			n.names = 1
			*old = n
			return nil
		}
	}
	if err := b.parents(path); err != nil {
		return err
	}
	b.set(path, b.add(n))
	return nil
}

func (b *Builder) add(n inode) int32 {
	b.inodes = append(b.inodes, n)
	return int32(len(b.inodes) - 1) //nolint:gosec // fewer than 2^31 fit in memory
}

// set keeps a copy of the path: it may be part of something much larger.
func (b *Builder) set(path string, i int32) {
	if old, ok := b.names[path]; ok {
		b.inodes[old].names--
	} else {
		path = strings.Clone(path)
		b.text += int64(len(path))
	}
	b.inodes[i].names++
	b.names[path] = i
}

// parents makes sure of the directories above a path.
func (b *Builder) parents(path string) error {
	dir, _ := Split(path)
	if dir == b.parent {
		return nil
	}
	for i := 0; i <= len(dir) && dir != "."; i++ {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		switch b.Kind(dir[:i]) {
		case 0:
			b.imply(dir[:i])
		case Directory:
		default:
			return fmt.Errorf("%w: %.120q", ErrNotBelow, dir[:i])
		}
	}
	b.parent = strings.Clone(dir)
	return nil
}

func (b *Builder) imply(path string) {
	b.set(path, b.add(inode{kind: Directory, mode: impliedMode, implied: true}))
}

// nameOf is a name and the inode behind it.
type nameOf struct {
	path  string
	inode int32
}

// Tree finishes: the Builder is of no use afterwards. All contents are complete.
func (b *Builder) Tree() Tree {
	names := make([]nameOf, 0, len(b.names))
	for path, i := range b.names {
		names = append(names, nameOf{path, i})
	}
	b.names = nil
	slices.SortFunc(names, func(x, y nameOf) int { return Compare(x.path, y.path) })
	b.dateImplied(names)
	inodes := 0
	at := make([]int32, len(b.inodes)) // of each inode's node in the tree, one more
	for _, n := range names {
		if at[n.inode] == 0 {
			inodes++
			at[n.inode] = -1
		}
	}
	t := Tree{Nodes: make([]Node, 0, inodes)}
	for _, n := range names {
		if i := at[n.inode]; i > 0 {
			t.Nodes[i-1].Links = append(t.Nodes[i-1].Links, n.path)
			continue
		}
		t.Nodes = append(t.Nodes, b.inodes[n.inode].node(n.path))
		at[n.inode] = int32(len(t.Nodes)) //nolint:gosec // fewer than 2^31 fit in memory
	}
	b.inodes = nil
	return t
}

func (n *inode) node(path string) Node {
	node := Node{
		Path: path, Kind: n.kind, Mode: uint32(n.mode), UID: n.uid, GID: n.gid,
		ModTime: time.Unix(n.seconds, int64(n.nanos)).UTC(), Xattrs: n.xattrs, Target: n.target,
	}
	if n.content != nil {
		node.Size, node.Runs, node.Digests = n.content.Size, n.content.Runs, n.content.Digests
	}
	return node
}

func (n *inode) after(m *inode) bool {
	return n.seconds > m.seconds || n.seconds == m.seconds && n.nanos > m.nanos
}

// dateImplied gives implied directories the newest time of what is below them;
// names are sorted.
func (b *Builder) dateImplied(names []nameOf) {
	type open struct {
		path   string
		dir    *inode
		newest *inode
	}
	var stack []open
	leave := func() {
		last := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if last.dir.implied && last.newest != nil {
			last.dir.seconds, last.dir.nanos = last.newest.seconds, last.newest.nanos
		}
		newest := last.newest
		if newest == nil || !last.dir.implied && last.dir.after(newest) {
			newest = last.dir
		}
		if len(stack) > 0 {
			above := &stack[len(stack)-1]
			if above.newest == nil || newest.after(above.newest) {
				above.newest = newest
			}
		}
	}
	for _, name := range names {
		for len(stack) > 0 && !Within(name.path, stack[len(stack)-1].path) {
			leave()
		}
		n := &b.inodes[name.inode]
		if n.kind == Directory {
			stack = append(stack, open{path: name.path, dir: n})
			continue
		}
		if above := &stack[len(stack)-1]; above.newest == nil || n.after(above.newest) {
			above.newest = n
		}
	}
	for len(stack) > 0 {
		leave()
	}
}
