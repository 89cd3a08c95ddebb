package tarball

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"holdfast/blockdev/extent"
	"holdfast/blockdev/tree"
)

// ErrNoTree means that the directory holds what a tree cannot say; the archive
// may be able to, or the server says what is wrong with it.
var ErrNoTree = errors.New("cannot be sent in parts")

const attrRecord = "SCHILY.xattr."

// Tree reads all files and makes the tree that the archive makes, with the digests
// of their chunks and without places. progress, which may be nil, is told the
// bytes read so far, holes included. ErrChanged names a file that is not what it was.
func (p *Plan) Tree(ctx context.Context, progress func(int64)) (tree.Tree, error) {
	d := &digester{ctx: ctx, buf: make([]byte, tree.Chunk), progress: progress}
	b := tree.NewBuilder()
	for _, e := range p.entries {
		if err := ctx.Err(); err != nil {
			return tree.Tree{}, err
		}
		if err := p.addTo(b, e, d); err != nil {
			return tree.Tree{}, err
		}
	}
	return b.Tree(), nil
}

func (p *Plan) addTo(b *tree.Builder, e entry, d *digester) error {
	h := e.header
	name := strings.TrimSuffix(h.Name, "/")
	a := tree.Attributes{Mode: uint32(h.Mode & 0o7777), UID: uint32(h.Uid), GID: uint32(h.Gid), ModTime: h.ModTime} //nolint:gosec // of a file
	for key, value := range h.PAXRecords {
		a.Xattrs = append(a.Xattrs, tree.Xattr{Name: strings.TrimPrefix(key, attrRecord), Value: []byte(value)})
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return b.Directory(name, a)
	case tar.TypeSymlink:
		return b.Symlink(name, a, h.Linkname)
	case tar.TypeLink:
		return b.Link(name, h.Linkname)
	case tar.TypeReg:
		f, err := p.openEntry(e)
		if err != nil {
			return err
		}
		defer f.Close()
		c, err := d.content(f, h.Size)
		if err != nil {
			return err
		}
		if err := unchanged(f, e.info); err != nil {
			return err
		}
		return b.File(name, a, c)
	}
	return fmt.Errorf("%s: %w", p.path(e), ErrNoTree)
}

func (p *Plan) path(e entry) string { return filepath.Join(p.root, filepath.FromSlash(e.header.Name)) }

// openEntry opens a regular file that is still the one that was planned.
func (p *Plan) openEntry(e entry) (*os.File, error) {
	f, err := open(p.path(e))
	if missing(err) {
		return nil, fmt.Errorf("%s: %w", p.path(e), ErrChanged)
	}
	if err != nil {
		return nil, err
	}
	if err := unchanged(f, e.info); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// digester reads files a chunk at a time.
type digester struct {
	ctx      context.Context //nolint:containedctx // of the one Tree
	buf      []byte
	progress func(int64)
	done     int64
}

// content digests a file; its holes are not read.
func (d *digester) content(f *os.File, size int64) (*tree.Content, error) {
	c := &tree.Content{Size: size, Digests: make([]tree.Digest, (size+tree.Chunk-1)/tree.Chunk)}
	err := extent.Each(d.ctx, f, func(data extent.Range) error {
		for k := data.Offset / tree.Chunk; k*tree.Chunk < min(data.End(), size); k++ {
			if c.Digests[k] != (tree.Digest{}) {
				continue // the range before began in it
			}
			b := d.buf[:min(tree.Chunk, size-k*tree.Chunk)]
			if err := readAll(f, b, k*tree.Chunk); err != nil {
				return err
			}
			c.Digests[k] = tree.DigestOf(b)
		}
		return nil
	})
	d.done += size
	if d.progress != nil {
		d.progress(d.done)
	}
	return c, err
}

func readAll(f *os.File, b []byte, at int64) error {
	_, err := io.ReadFull(io.NewSectionReader(f, at, int64(len(b))), b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%s: %w", f.Name(), ErrChanged)
	}
	return err
}

// Chunks reads chunks of the files of a Tree, fastest in its order.
type Chunks struct {
	p      *Plan
	byName map[string]entry
	open   *os.File
	name   string
}

// Chunks gives what reads the files again, for those chunks that are sent. The
// caller closes it.
func (p *Plan) Chunks() *Chunks {
	c := &Chunks{p: p, byName: make(map[string]entry, len(p.entries))}
	for _, e := range p.entries {
		if e.header.Typeflag == tar.TypeReg {
			c.byName[e.header.Name] = e
		}
	}
	return c
}

// Read fills b with chunk k of a node. ErrChanged when it is not what its digest
// says any more.
func (c *Chunks) Read(n *tree.Node, k int, b []byte) error {
	if c.open == nil || c.name != n.Path {
		e, ok := c.find(n)
		if !ok {
			return fmt.Errorf("%s: %w", n.Path, ErrChanged)
		}
		if err := c.Close(); err != nil {
			return err
		}
		f, err := c.p.openEntry(e)
		if err != nil {
			return err
		}
		c.open, c.name = f, n.Path
	}
	if err := readAll(c.open, b, int64(k)*tree.Chunk); err != nil {
		return err
	}
	if tree.DigestOf(b) != n.Digests[k] {
		return fmt.Errorf("%s: %w", c.open.Name(), ErrChanged)
	}
	return nil
}

// find gives the entry of a node: of the name that was walked first, which need
// not be the first in a tree's order.
func (c *Chunks) find(n *tree.Node) (entry, bool) {
	e, ok := c.byName[n.Path]
	for i := 0; !ok && i < len(n.Links); i++ {
		e, ok = c.byName[n.Links[i]]
	}
	return e, ok
}

// Close closes what is open. Read may be used again.
func (c *Chunks) Close() error {
	if c.open == nil {
		return nil
	}
	f := c.open
	c.open = nil
	return f.Close()
}
