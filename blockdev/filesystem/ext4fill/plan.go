package ext4fill

import (
	"context"
	"math"
	"slices"
	"sort"
	"strings"

	"holdfast/blockdev/tree"
)

const (
	rootInode      = 2
	lostFoundInode = 11
	firstInode     = 12 // of those that mkfs leaves free

	lostFound = "lost+found"
	// keptLostFound stands for the directory that mkfs made, in place of a node.
	keptLostFound = -1

	maxName  = 255
	maxLinks = 65000 // EXT4_LINK_MAX in fs/ext4/ext4.h
)

// name is an entry of a directory: what is called so.
type name struct {
	text string
	node int32
}

// plan is a tree as directories with names and inodes with numbers.
type plan struct {
	nodes   []tree.Node
	parent  []int32 // the directory that a node is in
	own     int     // the node that the tree calls lost+found; 0: none
	names   []name  // of all directories, one after the other, each one's sorted
	from    []int32 // where a node's names begin; they end where the next one's begin
	subdirs []int32 // directories directly below a node
}

// newPlan checks the tree and finds out who is in which directory.
func newPlan(ctx context.Context, t tree.Tree) (*plan, error) {
	if len(t.Nodes) == 0 || len(t.Nodes) > math.MaxInt32-firstInode {
		return nil, invalid("%d nodes", len(t.Nodes))
	}
	p := &plan{nodes: t.Nodes, from: make([]int32, len(t.Nodes)+1), subdirs: make([]int32, len(t.Nodes))}
	links, err := p.parents(ctx)
	if err != nil {
		return nil, err
	}
	if p.own == 0 {
		links = append(links, link{parent: 0, name: name{lostFound, keptLostFound}})
		p.subdirs[0]++
	}
	return p, p.enter(links)
}

// link is a name besides a node's first.
type link struct {
	parent int32
	name
}

// parents checks each node and finds the directories that its names are in.
func (p *plan) parents(ctx context.Context) (links []link, err error) {
	p.parent = make([]int32, len(p.nodes))
	above := []int32{0} // the directories on the way to the current node
	for i := range p.nodes {
		n := &p.nodes[i]
		if i%1024 == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err := checkNode(n, i == 0); err != nil {
			return nil, about(n.Path, err)
		}
		if i > 0 {
			if above, err = p.descend(above, i); err != nil {
				return nil, about(n.Path, err)
			}
		}
		if n.Path == lostFound || slices.Contains(n.Links, lostFound) {
			p.own = i
		}
		for _, l := range n.Links {
			parent, text, err := p.linkAt(l)
			if err != nil {
				return nil, about(l, err)
			}
			links = append(links, link{parent, name{text, int32(i)}})
		}
	}
	return links, nil
}

// descend goes on from the directories above the last node to those above the
// next, and itself if it is one.
func (p *plan) descend(above []int32, i int) ([]int32, error) {
	n := &p.nodes[i]
	if tree.Compare(p.nodes[i-1].Path, n.Path) >= 0 {
		return nil, invalid("out of order")
	}
	dir, _ := tree.Split(n.Path)
	for p.nodes[above[len(above)-1]].Path != dir {
		if above = above[:len(above)-1]; len(above) == 0 {
			return nil, invalid("not in a directory of the tree")
		}
	}
	parent := above[len(above)-1]
	p.parent[i] = parent
	if n.Kind == tree.Directory {
		above = append(above, int32(i))
		p.subdirs[parent]++
	}
	return above, nil
}

// linkAt finds the directory of a further name.
func (p *plan) linkAt(path string) (parent int32, text string, err error) {
	if err := checkPath(path); err != nil {
		return 0, "", err
	}
	dir, text := tree.Split(path)
	if dir == "." {
		return 0, text, nil
	}
	i, ok := sort.Find(len(p.nodes), func(i int) int { return tree.Compare(dir, p.nodes[i].Path) })
	if !ok || p.nodes[i].Kind != tree.Directory {
		return 0, "", invalid("not in a directory of the tree")
	}
	return int32(i), text, nil
}

// enter sorts all names into their directories. Nodes come in the order of their
// names, so that only directories with further names need sorting.
func (p *plan) enter(links []link) error {
	total := len(p.nodes) - 1 + len(links)
	if total > math.MaxInt32 {
		return tooLarge("%d names", total)
	}
	for _, parent := range p.parent[1:] {
		p.from[parent+1]++
	}
	for _, l := range links {
		p.from[l.parent+1]++
	}
	for i := range p.nodes {
		p.from[i+1] += p.from[i]
	}
	p.names = make([]name, total)
	next := slices.Clone(p.from[:len(p.nodes)])
	for i, parent := range p.parent {
		if i > 0 {
			_, text := tree.Split(p.nodes[i].Path)
			p.names[next[parent]] = name{text, int32(i)}
			next[parent]++
		}
	}
	mixed := map[int32]bool{}
	for _, l := range links {
		p.names[next[l.parent]] = l.name
		next[l.parent]++
		mixed[l.parent] = true
	}
	for dir := range mixed {
		names := p.in(int(dir))
		slices.SortFunc(names, func(a, b name) int { return strings.Compare(a.text, b.text) })
		for i := 1; i < len(names); i++ {
			if names[i-1].text == names[i].text {
				return about(p.nodes[dir].Path, invalid("two entries named %q", names[i].text))
			}
		}
	}
	return nil
}

// in gives the names in a directory.
func (p *plan) in(i int) []name { return p.names[p.from[i]:p.from[i+1]] }

// inode is the number of a node's inode: in the order of the tree.
func (p *plan) inode(i int32) uint32 {
	switch {
	case i == keptLostFound || p.own != 0 && int(i) == p.own:
		return lostFoundInode
	case i == 0:
		return rootInode
	case p.own != 0 && int(i) > p.own:
		return firstInode + uint32(i) - 2
	}
	return firstInode + uint32(i) - 1
}

// inodes is how many the tree takes of those that mkfs leaves free.
func (p *plan) inodes() int64 {
	n := int64(len(p.nodes) - 1)
	if p.own != 0 {
		n--
	}
	return n
}

// links is what a node's inode counts. A directory with too many others in it
// counts 1 (feature dir_nlink).
func (p *plan) links(i int) uint16 {
	n := &p.nodes[i]
	if n.Kind != tree.Directory {
		return uint16(1 + len(n.Links))
	}
	if count := 2 + p.subdirs[i]; count <= maxLinks {
		return uint16(count)
	}
	return 1
}
