package oci

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"slices"
	"strings"

	"holdfast/templates/archive"
)

// Whiteouts of image-spec, layer.md; the longer prefix marks what AUFS kept for
// itself.
const (
	whiteout     = ".wh."
	whiteoutMeta = ".wh..wh."
	opaque       = ".wh..wh..opq"
)

// WriteTar applies the layers and writes the tree as one plain tar (PAX), in an
// order that depends on the layers alone. Errors: archive.ErrRefused for what is
// the image's fault, with the layer or the entry; else those of where the image
// is, of staging, of w, and the context's. Nothing is written before every blob
// has been verified.
func (im *Image) WriteTar(ctx context.Context, w io.Writer) error {
	if err := im.blobs.prepare(ctx, im.layers); err != nil {
		return err
	}
	t := newTree()
	err := im.each(ctx, func(layer int, entry int64, h *tar.Header, _ io.Reader) error {
		t.layer = layer
		return t.apply(entry, h)
	})
	if err != nil {
		return err
	}
	out := writer{Writer: tar.NewWriter(w), omit: im.o.OmitDevices}
	var implied []*node
	out.left, implied = t.survivors()
	for _, n := range implied {
		if err := out.WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeDir, Name: n.path() + "/", Mode: 0o755, ModTime: n.time}); err != nil {
			return out.fault(n.path(), err)
		}
	}
	err = im.each(ctx, func(_ int, entry int64, h *tar.Header, r io.Reader) error { return out.write(ctx, entry, h, r) })
	if err != nil {
		return err
	}
	return out.Close()
}

// each reads all entries of all layers, in order, and verifies the layers.
func (im *Image) each(ctx context.Context, fn func(layer int, entry int64, h *tar.Header, r io.Reader) error) error {
	var unpacked, entry int64
	for i := range im.layers {
		r, err := im.read(ctx, i, &unpacked)
		if err != nil {
			return err
		}
		err = im.eachOf(ctx, r, &entry, func(h *tar.Header, body io.Reader) error { return fn(i, entry, h, body) })
		if err == nil {
			err = r.verify()
		}
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
	}
	return nil
}

func (im *Image) eachOf(ctx context.Context, r *layerReader, entry *int64, fn func(*tar.Header, io.Reader) error) error {
	in, last := tar.NewReader(r), ""
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := in.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case r.err != nil:
			return r.err
		case err != nil:
			return archive.Refuse("layer %s: %w after %s", archive.Quote(r.what), err, archive.Quote(last))
		}
		last = h.Name
		*entry++
		if *entry > im.o.Limits.Entries {
			return archive.RefuseEntry(h.Name, "the layers have more than %d entries", im.o.Limits.Entries)
		}
		if h.Size < 0 || h.Size > im.o.Limits.Bytes {
			return archive.RefuseEntry(h.Name, "a file of %d bytes: the most is %d", h.Size, im.o.Limits.Bytes)
		}
		if err := fn(h, in); err != nil {
			if r.err != nil {
				return r.err
			}
			return err
		}
	}
}

// apply does to the tree what an entry says.
func (t *tree) apply(entry int64, h *tar.Header) error {
	i := inode{kind: other, entry: entry}
	switch h.Typeflag {
	case tar.TypeXGlobalHeader: // comments, as of git archive
		return nil
	case tar.TypeDir:
		i.kind = directory
	case tar.TypeSymlink:
		i.kind, i.link = symlink, h.Linkname
		if h.Linkname == "" || len(h.Linkname) >= maxPath {
			return archive.RefuseEntry(h.Name, "a symbolic link's target must have 1 to %d bytes", maxPath-1)
		}
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse, tar.TypeLink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		return archive.RefuseEntry(h.Name, "entries of type %q are not known", h.Typeflag)
	}
	parts, err := split(h.Name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		if i.kind != directory {
			return archive.RefuseEntry(h.Name, "only a directory can be the root")
		}
		t.root.inode = &i
		return nil
	}
	name := parts[len(parts)-1]
	if slices.ContainsFunc(parts, func(p string) bool { return strings.HasPrefix(p, whiteoutMeta) && p != opaque }) {
		return nil
	}
	if strings.HasPrefix(name, whiteout) {
		return t.whiteout(h.Name, parts[:len(parts)-1], name)
	}
	dir, err := t.find(h.Name, parts[:len(parts)-1], &h.ModTime)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		target, err := t.target(h)
		if err != nil {
			return err
		}
		if dir.children[name] != target {
			t.put(dir, name, target.inode)
		}
		return nil
	}
	t.put(dir, name, &i)
	return nil
}

func (t *tree) whiteout(full string, parent []string, name string) error {
	hidden := strings.TrimPrefix(name, whiteout)
	if hidden == "" || hidden == "." || hidden == ".." {
		return archive.RefuseEntry(full, "a whiteout of nothing")
	}
	dir, err := t.find(full, parent, nil)
	switch {
	case err != nil:
		return err
	case dir == nil: // nothing to hide
		return nil
	case name == opaque:
		return t.hideBelow(dir)
	}
	return t.hide(dir, hidden)
}

// target finds what a hard link is another name of: in this layer or a lower one.
func (t *tree) target(h *tar.Header) (*node, error) {
	parts, err := split(h.Linkname)
	if err != nil {
		return nil, archive.RefuseEntry(h.Name, "target of a hard link: %w", err)
	}
	if len(parts) == 0 {
		return nil, archive.RefuseEntry(h.Name, "a hard link to the root")
	}
	dir, err := t.find(h.Name, parts[:len(parts)-1], nil)
	if err != nil {
		return nil, err
	}
	var n *node
	if dir != nil {
		n = dir.children[parts[len(parts)-1]]
	}
	switch {
	case n == nil:
		return nil, archive.RefuseEntry(h.Name, "a hard link to %s, which is not an earlier entry", archive.Quote(h.Linkname))
	case n.kind == directory:
		return nil, archive.RefuseEntry(h.Name, "a hard link to the directory %s", archive.Quote(h.Linkname))
	}
	return n, nil
}

// writer writes the entries that are left.
type writer struct {
	*tar.Writer
	left map[int64]*inode
	omit bool // devices
}

func (w *writer) write(ctx context.Context, entry int64, h *tar.Header, r io.Reader) error {
	i := w.left[entry]
	if i == nil {
		return nil
	}
	out := &tar.Header{
		Format: tar.FormatPAX, Typeflag: h.Typeflag, Name: i.names[0].path(), Linkname: h.Linkname, Mode: h.Mode & 0o7777,
		Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor, PAXRecords: map[string]string{},
	}
	for key, value := range h.PAXRecords {
		if strings.HasPrefix(key, "SCHILY.xattr.") {
			out.PAXRecords[key] = value
		}
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		out.Typeflag, out.Size, out.Linkname = tar.TypeReg, h.Size, ""
	case tar.TypeDir:
		if out.Name != "." {
			out.Name += "/"
		} else {
			out.Name = "./"
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if w.omit {
			return nil
		}
	}
	if err := w.WriteHeader(out); err != nil {
		return w.fault(h.Name, err)
	}
	if out.Typeflag == tar.TypeReg {
		if err := copyAll(ctx, w, r); err != nil {
			return err
		}
	}
	for _, n := range i.names[1:] {
		link := &tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeLink, Name: n.path(), Linkname: i.names[0].path(), Mode: out.Mode, Uid: out.Uid, Gid: out.Gid, ModTime: out.ModTime}
		if err := w.WriteHeader(link); err != nil {
			return w.fault(link.Name, err)
		}
	}
	return nil
}

// fault tells an entry that no tar can hold from a writer that failed.
func (w *writer) fault(name string, err error) error {
	if errors.Is(err, tar.ErrHeader) {
		return archive.RefuseEntry(name, "%w", err)
	}
	return err
}

func copyAll(ctx context.Context, w io.Writer, r io.Reader) error {
	buf := make([]byte, 128<<10)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.Read(buf)
		if _, werr := w.Write(buf[:n]); werr != nil {
			return werr
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
