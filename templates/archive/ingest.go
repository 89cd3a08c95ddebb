package archive

import (
	"context"
	"errors"
	"io"

	"holdfast/blockdev/tree"
)

// Limits bound what an archive may ask for.
type Limits struct {
	Bytes   int64 // of all files together, the holes of sparse files included
	Entries int64 // names, those of directories that are only implied included
}

const (
	// maxText bounds, in bytes, what names, targets and attributes take together:
	// with the entries' number it bounds the memory that an archive costs.
	maxText = 512 << 20
	// maxNames is how many names ext4 allows one file (EXT4_LINK_MAX).
	maxNames = 65000
)

// Contents takes the contents of files, one after the other. A *tree.Store is one.
type Contents interface {
	Add(ctx context.Context, r io.Reader) (*tree.Content, error)
	Flush() (int64, error)
}

// Read reads an archive through to its end, r to its end too, gives the contents
// of its files to c, and tells the tree that it makes; or refuses it (ErrRefused)
// with the entry and the rule. Other errors are r's, c's and the context's. Of two
// entries of one name the later counts. Memory is bounded by the limits: about 600
// bytes for each entry, 32 for each piece of a sparse file, and maxText.
func Read(ctx context.Context, r io.Reader, limits Limits, c Contents) (tree.Tree, error) {
	g := ingest{ctx: ctx, limits: limits, contents: c, b: tree.NewBuilder()}
	in := newReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return tree.Tree{}, err
		}
		e, err := in.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return tree.Tree{}, err
		}
		if err := g.add(e, in); err != nil {
			return tree.Tree{}, err
		}
	}
	if _, err := io.Copy(io.Discard, in.tail); err != nil { // padding after the end mark
		return tree.Tree{}, err
	}
	if _, err := c.Flush(); err != nil {
		return tree.Tree{}, err
	}
	return g.b.Tree(), nil
}

// ingest follows the tree that an archive makes.
type ingest struct {
	ctx      context.Context //nolint:containedctx // of the one Read
	limits   Limits
	contents Contents
	b        *tree.Builder
	bytes    int64
	parent   string // of the entry before: a directory
}

func (g *ingest) add(e entry, in *reader) error {
	if err := g.place(e); err != nil {
		return err
	}
	attrs := tree.Attributes{Mode: e.mode, UID: uint32(e.uid), GID: uint32(e.gid), ModTime: e.time, Xattrs: e.attrs} //nolint:gosec // checked
	var err error
	switch e.kind {
	case directory:
		err = g.b.Directory(e.path, attrs)
	case symlink:
		err = g.b.Symlink(e.path, attrs, e.link)
	case hardlink:
		err = g.link(e)
	case regular:
		var c *tree.Content
		if c, err = g.file(e, in); err == nil {
			err = g.b.File(e.path, attrs, c)
		}
	}
	switch {
	case err != nil:
		return err
	case int64(g.b.Names()) > g.limits.Entries:
		return refuse(e.path, "more than %d entries", g.limits.Entries)
	case g.b.Text() > maxText:
		return refuse(e.path, "names, targets and attributes together are longer than %d MiB", maxText>>20)
	}
	return nil
}

// place looks whether an entry may stand where it wants to.
func (g *ingest) place(e entry) error {
	for i := range e.path {
		if e.path[i] != '/' || e.path[:i] == g.parent {
			continue
		}
		if k := g.b.Kind(e.path[:i]); k != 0 && k != tree.Directory {
			return refuse(e.path, "it lies below %s, which is a %s", Quote(e.path[:i]), kindOf(k))
		}
	}
	g.parent, _ = tree.Split(e.path)
	kind := e.kind
	if kind == hardlink {
		k := g.b.Kind(e.link)
		switch k {
		case 0:
			return refuse(e.path, "a hard link to %s, which is not an earlier entry", Quote(e.link))
		case tree.Directory:
			return refuse(e.path, "a hard link to the directory %s", Quote(e.link))
		}
		kind = kindOf(k)
	}
	if old := kindOf(g.b.Kind(e.path)); old != 0 && old != kind {
		return refuse(e.path, "a %s where an earlier entry is a %s", kind, old)
	}
	return nil
}

func kindOf(k tree.Kind) kind {
	return [...]kind{tree.Directory: directory, tree.Regular: regular, tree.Symlink: symlink}[k]
}

func (g *ingest) link(e entry) error {
	if g.b.NamesOf(e.link) >= maxNames {
		return refuse(e.path, "more than %d names for one file", maxNames)
	}
	return g.b.Link(e.path, e.link)
}

func (g *ingest) file(e entry, in *reader) (*tree.Content, error) {
	if e.size > g.limits.Bytes-g.bytes {
		return nil, refuse(e.path, "the files together are larger than %d bytes", g.limits.Bytes)
	}
	g.bytes += e.size
	body := &body{in: in}
	c, err := g.contents.Add(g.ctx, body)
	switch {
	case body.err != nil:
		return nil, in.damaged(body.err)
	case err != nil:
		return nil, err
	case c.Size != e.size:
		return nil, refuse(e.path, "its contents are %d bytes, its header says %d", c.Size, e.size)
	}
	return c, nil
}

// body reads one file of an archive and remembers what was wrong with the archive.
type body struct {
	in  *reader
	err error
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.in.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}
