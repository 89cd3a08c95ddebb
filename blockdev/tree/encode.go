package tree

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
	"io"
)

// The encoding of a Tree, version 1: a line of text, then for each node, all
// numbers as varints (encoding/binary), "text" meaning a length and bytes:
//
//	kind + 1 (a 0 ends the nodes)
//	path: bytes shared with the path before, the rest as text
//	mode, uid, gid, seconds (signed), nanoseconds
//	further names: count, each as path
//	attributes: count, each name and value as text
//	target as text (symbolic link)
//	size (file), digests: numbers of zero and of other chunks in turn, and the others
//	runs: count, each the gap in blocks to the run before, length in bytes, store,
//	      and where it begins in it less where the run before ended, in blocks (signed)
//
// Last comes the SHA-256 of all before. A Tree's identity is the SHA-256 of the
// same without runs: where the contents lie does not matter, the digests say what
// they are.
const encodingLine = "holdfast tree 1\n"

// Encode writes a Tree with its checksum.
func Encode(w io.Writer, t Tree) error {
	e := newEncoder(w)
	e.tree(t, true)
	if err := e.w.Flush(); err != nil {
		return err
	}
	_, err := w.Write(e.sum.Sum(nil))
	return err
}

// Identity is "sha256:..." of what the Tree holds: equal for equal trees, wherever
// their contents lie.
func (t Tree) Identity() string {
	e := newEncoder(io.Discard)
	e.tree(t, false)
	_ = e.w.Flush() // a hash takes everything
	return "sha256:" + hex.EncodeToString(e.sum.Sum(nil))
}

type encoder struct {
	w    *bufio.Writer
	sum  hash.Hash
	num  [binary.MaxVarintLen64]byte
	last string // path written before
}

func newEncoder(w io.Writer) *encoder {
	sum := sha256.New()
	return &encoder{w: bufio.NewWriterSize(io.MultiWriter(sum, w), 1<<16), sum: sum}
}

// Errors of the writer stick to it and come with Flush.

func (e *encoder) number(n uint64) { _, _ = e.w.Write(binary.AppendUvarint(e.num[:0], n)) }
func (e *encoder) signed(n int64)  { _, _ = e.w.Write(binary.AppendVarint(e.num[:0], n)) }
func (e *encoder) size(n int64)    { e.number(uint64(n)) } //nolint:gosec // never negative

func (e *encoder) text(s string) {
	e.number(uint64(len(s)))
	_, _ = e.w.WriteString(s)
}

func (e *encoder) path(p string) {
	n := 0
	for n < min(len(p), len(e.last)) && p[n] == e.last[n] {
		n++
	}
	e.number(uint64(n)) //nolint:gosec // never negative
	e.text(p[n:])
	e.last = p
}

func (e *encoder) tree(t Tree, runs bool) {
	_, _ = e.w.WriteString(encodingLine)
	for i := range t.Nodes {
		e.node(&t.Nodes[i], runs)
	}
	e.number(0)
}

func (e *encoder) node(n *Node, runs bool) {
	e.number(uint64(n.Kind) + 1)
	e.path(n.Path)
	e.number(uint64(n.Mode))
	e.number(uint64(n.UID))
	e.number(uint64(n.GID))
	e.signed(n.ModTime.Unix())
	e.number(uint64(n.ModTime.Nanosecond())) //nolint:gosec // below 10^9
	e.number(uint64(len(n.Links)))
	for _, l := range n.Links {
		e.path(l)
	}
	e.last = n.Path
	e.number(uint64(len(n.Xattrs)))
	for _, x := range n.Xattrs {
		e.text(x.Name)
		e.text(string(x.Value))
	}
	switch n.Kind {
	case Symlink:
		e.text(n.Target)
	case Regular:
		e.size(n.Size)
		e.digests(n.Digests)
		if runs {
			e.runs(n.Runs)
		}
	case Directory:
	}
}

func (e *encoder) digests(list []Digest) {
	for len(list) > 0 {
		zeroes, others := 0, 0
		for zeroes < len(list) && list[zeroes] == (Digest{}) {
			zeroes++
		}
		for zeroes+others < len(list) && list[zeroes+others] != (Digest{}) {
			others++
		}
		e.number(uint64(zeroes)) //nolint:gosec // never negative
		e.number(uint64(others)) //nolint:gosec // never negative
		for _, d := range list[zeroes : zeroes+others] {
			_, _ = e.w.Write(d[:])
		}
		list = list[zeroes+others:]
	}
}

func (e *encoder) runs(list []Run) {
	e.number(uint64(len(list)))
	var end, at int64
	for _, r := range list {
		e.size((r.Offset - end) / Block)
		e.size(r.Length)
		e.size(int64(r.Store))
		e.signed((r.At - at) / Block)
		end, at = r.Offset+roundUp64(r.Length), r.At+roundUp64(r.Length)
	}
}

func roundUp64(n int64) int64 { return (n + Block - 1) / Block * Block }
