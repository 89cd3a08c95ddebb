package tree

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"iter"
	"math"
	"slices"
)

// Source gives the nodes of a tree in its order, from the first, each time that it
// is called. An error is the last that it gives. So a large tree can be gone
// through, as often as need be, without being in memory.
type Source func() iter.Seq2[*Node, error]

// Source gives the nodes of a Tree.
func (t Tree) Source() Source {
	return func() iter.Seq2[*Node, error] {
		return func(yield func(*Node, error) bool) {
			for i := range t.Nodes {
				if !yield(&t.Nodes[i], nil) {
					return
				}
			}
		}
	}
}

// Scan is Decode, a node at a time. That all is as it was written is known at the
// end only: the error of a wrong checksum comes last.
func Scan(r io.Reader, limits Limits) iter.Seq2[*Node, error] {
	return func(yield func(*Node, error) bool) {
		d := newDecoder(r, limits)
		if err := d.begin(); err != nil {
			yield(nil, cutOff(err))
			return
		}
		for {
			n, err := d.next()
			if n == nil && err == nil {
				err = d.end()
			}
			if err != nil {
				yield(nil, cutOff(err))
				return
			}
			if n == nil || !yield(n, nil) {
				return
			}
		}
	}
}

func newDecoder(r io.Reader, limits Limits) *decoder {
	d := &decoder{r: bufio.NewReaderSize(r, 1<<16), sum: sha256.New(), left: limits}
	for _, left := range []*int64{&d.left.Bytes, &d.left.Entries, &d.left.Text} {
		if *left == 0 {
			*left = math.MaxInt64
		}
	}
	return d
}

func cutOff(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("it was cut off")
	}
	return err
}

func (d *decoder) begin() error {
	line := make([]byte, len(encodingLine))
	if err := d.bytes(line); err != nil {
		return err
	}
	if string(line) != encodingLine {
		return damaged("it begins with %.20q", line)
	}
	return nil
}

// next reads a node; nil after the last.
func (d *decoder) next() (*Node, error) {
	kind, err := d.number(uint64(Symlink) + 1)
	if kind == 0 || err != nil {
		return nil, err
	}
	n := &Node{Kind: Kind(kind - 1)} //nolint:gosec // at most 3
	if err := d.node(n); err != nil {
		return nil, err
	}
	if d.before == "" && n.Path != "." || d.before != "" && Compare(d.before, n.Path) >= 0 {
		return nil, damaged("%.120q is not in order", n.Path)
	}
	d.before = n.Path
	return n, nil
}

// end checks what stands behind the last node.
func (d *decoder) end() error {
	want := d.sum.Sum(nil)
	have := make([]byte, len(want)+1)
	if n, err := io.ReadFull(d.r, have); n != len(want) || !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.Equal(want, have[:n]) {
		return damaged("its checksum is wrong")
	}
	return nil
}

// named is a name and what it names; no node at the end.
type named struct {
	path string
	node *Node
}

// names gives all names of a tree in order: Path and Links of each node. A Path
// comes before its Links, and a directory before what is in it.
type names struct {
	pull  func() (*Node, error, bool) //nolint:revive // as iter.Pull2 gives it
	stop  func()
	first named   // of the nodes not given yet
	links []named // further names, in order
}

// openNames goes through a tree once, for the further names, so an error of any
// node is its error. Then it holds those, and their nodes without places.
func openNames(s Source) (*names, error) {
	n := &names{}
	for node, err := range s() {
		if err != nil {
			return nil, err
		}
		if len(node.Links) == 0 {
			continue
		}
		kept := *node
		kept.Runs = nil
		for _, l := range node.Links {
			n.links = append(n.links, named{l, &kept})
		}
	}
	slices.SortFunc(n.links, func(a, b named) int { return Compare(a.path, b.path) })
	n.pull, n.stop = iter.Pull2(s())
	return n, n.advance()
}

func (n *names) close() { n.stop() }

func (n *names) advance() error {
	node, err, ok := n.pull()
	switch {
	case err != nil:
		return err
	case !ok:
		n.first = named{}
	default:
		n.first = named{node.Path, node}
	}
	return nil
}

// peek gives the next name.
func (n *names) peek() named {
	if len(n.links) == 0 || n.first.node != nil && Compare(n.first.path, n.links[0].path) <= 0 {
		return n.first
	}
	return n.links[0]
}

// next takes what peek gives.
func (n *names) next() error {
	if n.peek() == n.first {
		return n.advance()
	}
	n.links = n.links[1:]
	return nil
}

// EachName calls each with all names of a tree and their nodes, in order: Path and
// Links of each. A Path comes before its Links, and a directory before what is in
// it. A node that comes by a further name may be without Runs. It takes memory for
// further names only.
func EachName(s Source, each func(name string, n *Node) error) error {
	all, err := openNames(s)
	if err != nil {
		return err
	}
	defer all.close()
	for next := all.peek(); next.node != nil; next = all.peek() {
		if err := each(next.path, next.node); err != nil {
			return err
		}
		if err := all.next(); err != nil {
			return err
		}
	}
	return nil
}
