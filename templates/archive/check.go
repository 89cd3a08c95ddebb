package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"strings"
)

// Limits bound what an archive may ask for.
type Limits struct {
	Bytes   int64 // of all files together, the holes of sparse files included
	Entries int64 // inodes, directories that are only implied included
}

// chunk is the unit, in bytes, in which files are looked at for holes.
const chunk = 4096

// bufferSize is how much of a file is read at once.
const bufferSize = 1 << 20

// Check reads an archive through to its end, r to its end too, and tells what is
// in it, or refuses it (ErrRefused) with the entry and the rule. Other errors are
// r's and the context's. What it accepts Extract can write.
func Check(ctx context.Context, r io.Reader, limits Limits) (Counts, error) {
	c := checker{ctx: ctx, limits: limits, seed: maphash.MakeSeed(), nodes: map[uint64]*node{}, buffer: make([]byte, bufferSize)}
	c.root = &node{kind: directory}
	in := newReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return Counts{}, err
		}
		e, err := in.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return Counts{}, err
		}
		if err := c.add(e, in); err != nil {
			return Counts{}, err
		}
	}
	if _, err := io.Copy(io.Discard, in.tail); err != nil { // padding after the end mark
		return Counts{}, err
	}
	return c.finish(), nil
}

// node is what is known of a path while an archive is checked.
type node struct {
	kind  kind
	names int64 // directory: bytes of its entries in ext4
}

// checker follows the tree that an archive makes. Paths are kept as keyed
// hashes: two million of them are to fit in memory, and a tenant cannot choose
// colliding ones without the key. Extract does not rely on it for safety.
type checker struct {
	ctx    context.Context //nolint:containedctx // of the one Check
	limits Limits
	seed   maphash.Seed
	nodes  map[uint64]*node
	root   *node
	parent struct { // of the entry before: walks come in order
		path string
		node *node
	}
	counts Counts
	buffer []byte
}

func (c *checker) find(path string) (uint64, *node) {
	if path == "." || path == "" {
		return 0, c.root
	}
	key := maphash.String(c.seed, path)
	return key, c.nodes[key]
}

func (c *checker) add(e entry, in *reader) error {
	if e.path == "." {
		c.counts.attributes(e.attrs)
		return nil
	}
	parent, name := split(e.path)
	dir, err := c.directory(e, parent)
	if err != nil {
		return err
	}
	kind := e.kind
	if kind == hardlink {
		if kind, err = c.target(e); err != nil {
			return err
		}
	}
	key, old := c.find(e.path)
	switch {
	case old == nil:
		if err := c.insert(e, key, kind, dir, name); err != nil {
			return err
		}
	case old.kind != kind:
		return refuse(e.path, "a %s where an earlier entry is a %s", kind, old.kind)
	case kind != directory:
		c.counts.Replaced++
	}
	c.counts.attributes(e.attrs)
	switch e.kind {
	case regular:
		return c.contents(e, in)
	case symlink:
		c.counts.symlink(len(e.link))
	}
	return nil
}

// directory finds the parent of an entry; directories that no entry names are
// implied.
func (c *checker) directory(e entry, path string) (*node, error) {
	if path == "" {
		return c.root, nil
	}
	if c.parent.node != nil && c.parent.path == path {
		return c.parent.node, nil
	}
	above, dir := c.root, c.root
	for i := 0; i <= len(path); i++ {
		if i < len(path) && path[i] != '/' {
			continue
		}
		var key uint64
		part := path[:i]
		key, dir = c.find(part)
		switch {
		case dir == nil:
			_, name := split(part)
			if err := c.insert(e, key, directory, above, name); err != nil {
				return nil, err
			}
			dir = c.nodes[key]
		case dir.kind != directory:
			return nil, refuse(e.path, "it lies below %s, which is a %s", quote(part), dir.kind)
		}
		above = dir
	}
	c.parent.path, c.parent.node = path, dir
	return dir, nil
}

func (c *checker) insert(e entry, key uint64, k kind, dir *node, name string) error {
	n := &node{kind: k}
	c.nodes[key] = n
	dir.names += int64(8 + (len(name)+3)&^3)
	if e.kind == hardlink && k != directory {
		c.counts.Links++
	} else {
		c.counts.Entries++
	}
	if c.counts.Entries+c.counts.Links > c.limits.Entries {
		return refuse(e.path, "more than %d entries", c.limits.Entries)
	}
	return nil
}

// target finds what a hard link is another name of.
func (c *checker) target(e entry) (kind, error) {
	_, n := c.find(e.link)
	switch {
	case n == nil:
		return 0, refuse(e.path, "a hard link to %s, which is not an earlier entry", quote(e.link))
	case n.kind == directory:
		return 0, refuse(e.path, "a hard link to the directory %s", quote(e.link))
	}
	return n.kind, nil
}

// contents reads a file through and counts what of it is not zero.
func (c *checker) contents(e entry, in *reader) error {
	if e.size > c.limits.Bytes-c.counts.FileBytes {
		return refuse(e.path, "the files together are larger than %d bytes", c.limits.Bytes)
	}
	c.counts.FileBytes += e.size
	file := fileCount{counts: &c.counts}
	var size int64
	for {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(in, c.buffer)
		size += int64(n)
		file.add(c.buffer[:n])
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) && size == e.size {
			break
		}
		if err != nil {
			return in.damaged(err)
		}
	}
	if size != e.size {
		return refuse(e.path, "its contents are %d bytes, its header says %d", size, e.size)
	}
	file.finish()
	return nil
}

func (c *checker) finish() Counts {
	c.counts.directory(c.root.names)
	for _, n := range c.nodes {
		if n.kind == directory {
			c.counts.directory(n.names)
		}
	}
	return c.counts
}

// split gives the directory of a clean path ("" for the root) and the name in it.
func split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path
	}
	return path[:i], path[i+1:]
}

var zeroes [chunk]byte

func isZero(b []byte) bool { return b[0] == 0 && bytes.Equal(b, zeroes[:len(b)]) }

func (c Counts) String() string {
	return fmt.Sprintf("%d entries, %d hard links, %d bytes", c.Entries, c.Links, c.FileBytes)
}
