package tree

import (
	"bytes"
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
// wherever their contents lie. It takes memory for names of files with several.
func Diff(before, after Source, each func(Change) error) error {
	a, err := openNames(before)
	if err != nil {
		return err
	}
	defer a.close()
	b, err := openNames(after)
	if err != nil {
		return err
	}
	defer b.close()
	for {
		c, err := nextChange(a, b)
		if err != nil || c.Path == "" {
			return err
		}
		if c.Action == Changed && len(c.Aspects) == 0 {
			continue
		}
		if err := each(c); err != nil {
			return err
		}
	}
}

// nextChange takes the next name of either; one that is the same in both has no
// Aspects, and none no Path.
func nextChange(a, b *names) (Change, error) {
	x, y := a.peek(), b.peek()
	switch {
	case x.node == nil && y.node == nil:
		return Change{}, nil
	case y.node == nil || x.node != nil && Compare(x.path, y.path) < 0:
		return Change{Path: x.path, Action: Removed, Before: x.node}, a.next()
	case x.node == nil || Compare(x.path, y.path) > 0:
		return Change{Path: y.path, Action: Added, After: y.node}, b.next()
	}
	if err := a.next(); err != nil {
		return Change{}, err
	}
	return Change{Path: x.path, Action: Changed, Before: x.node, After: y.node, Aspects: aspects(x.node, y.node)}, b.next()
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
