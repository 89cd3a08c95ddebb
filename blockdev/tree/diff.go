package tree

import (
	"bytes"
	"iter"
	"slices"
)

// Action says what became of a name between two trees.
type Action string

// The actions.
const (
	Added   Action = "added"
	Removed Action = "removed"
	Changed Action = "changed"
)

// Aspect is a part of an inode that can differ.
type Aspect string

// The aspects, in the order in which a Change has them.
const (
	KindAspect     Aspect = "kind"     // nothing else is compared then
	ContentsAspect Aspect = "contents" // of a file, its size included
	TargetAspect   Aspect = "target"   // of a symbolic link
	ModeAspect     Aspect = "mode"
	OwnerAspect    Aspect = "owner"
	TimeAspect     Aspect = "mtime"
	XattrsAspect   Aspect = "xattrs"
	LinksAspect    Aspect = "links" // which other names the inode has
)

// Change is what became of one name.
type Change struct {
	Path    string
	Action  Action
	Aspects []Aspect // of a Changed one
	Before  *Node    // nil: Added
	After   *Node    // nil: Removed
}

// Diff calls each with the names that are not the same in two trees, in the order
// of a Tree, until it returns an error, which Diff returns. Every name counts:
// those of a file with several too. There is none exactly if the trees are equal,
// wherever their contents lie. Beside the trees it needs memory for names of files
// with several.
func Diff(before, after Tree, each func(Change) error) error {
	a, b := namesOf(before), namesOf(after)
	for {
		x, y := a.peek(), b.peek()
		var c Change
		switch {
		case x.node == nil && y.node == nil:
			return nil
		case y.node == nil || x.node != nil && Compare(x.path, y.path) < 0:
			a.next()
			c = Change{Path: x.path, Action: Removed, Before: x.node}
		case x.node == nil || Compare(x.path, y.path) > 0:
			b.next()
			c = Change{Path: y.path, Action: Added, After: y.node}
		default:
			a.next()
			b.next()
			c = Change{Path: x.path, Action: Changed, Before: x.node, After: y.node, Aspects: aspects(x.node, y.node)}
			if len(c.Aspects) == 0 {
				continue
			}
		}
		if err := each(c); err != nil {
			return err
		}
	}
}

func aspects(a, b *Node) (all []Aspect) {
	if a.Kind != b.Kind {
		return []Aspect{KindAspect}
	}
	for _, is := range []struct {
		aspect Aspect
		same   bool
	}{
		{ContentsAspect, a.Size == b.Size && slices.Equal(a.Digests, b.Digests)},
		{TargetAspect, a.Target == b.Target},
		{ModeAspect, a.Mode == b.Mode},
		{OwnerAspect, a.UID == b.UID && a.GID == b.GID},
		{TimeAspect, a.ModTime.Equal(b.ModTime)},
		{XattrsAspect, slices.EqualFunc(a.Xattrs, b.Xattrs, func(x, y Xattr) bool { return x.Name == y.Name && bytes.Equal(x.Value, y.Value) })},
		{LinksAspect, len(a.Links)+len(b.Links) == 0 || a.Path == b.Path && slices.Equal(a.Links, b.Links)},
	} {
		if !is.same {
			all = append(all, is.aspect)
		}
	}
	return all
}

// named is a name and what it names.
type named struct {
	path string
	node *Node
}

// names gives all names of a tree in order.
type names struct {
	nodes []Node
	links []named // further names, in order
}

func namesOf(t Tree) *names {
	n := &names{nodes: t.Nodes}
	for i := range t.Nodes {
		for _, l := range t.Nodes[i].Links {
			n.links = append(n.links, named{l, &t.Nodes[i]})
		}
	}
	slices.SortFunc(n.links, func(a, b named) int { return Compare(a.path, b.path) })
	return n
}

// Names gives all names with their nodes, in order: Path and Links of each. A
// node's Path comes before its Links, and a directory before what is in it.
func (t Tree) Names() iter.Seq2[string, *Node] {
	return func(yield func(string, *Node) bool) {
		for n := namesOf(t); ; n.next() {
			if next := n.peek(); next.node == nil || !yield(next.path, next.node) {
				return
			}
		}
	}
}

// peek gives the next name; no node at the end.
func (n *names) peek() named {
	switch {
	case len(n.nodes) == 0 && len(n.links) == 0:
		return named{}
	case len(n.links) == 0 || len(n.nodes) > 0 && Compare(n.nodes[0].Path, n.links[0].path) < 0:
		return named{n.nodes[0].Path, &n.nodes[0]}
	}
	return n.links[0]
}

func (n *names) next() {
	if next := n.peek(); len(n.nodes) > 0 && next.node == &n.nodes[0] && next.path == n.nodes[0].Path {
		n.nodes = n.nodes[1:]
	} else if len(n.links) > 0 {
		n.links = n.links[1:]
	}
}
