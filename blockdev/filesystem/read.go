package filesystem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"slices"
	"strings"
	"time"
)

// Bounds of what a damaged or hostile image can make a reader do.
const (
	maxDirBytes   = 256 * MiB // of one directory
	maxDirEntries = 1 << 20
	maxPathParts  = 512
	maxLinkBytes  = 4096
	copyPiece     = MiB
)

// imageReader understands one type's structures in an unmounted image. Nothing
// in the image is trusted: what does not fit together is ErrDamaged.
type imageReader interface {
	root() uint64
	inode(number uint64) (*inode, error)
	// extents gives where a file's bytes are, in order and without overlap.
	extents(i *inode) iter.Seq2[extent, error]
	// names calls fn for each name in a directory, "." and ".." perhaps included,
	// until fn returns an error, which names returns.
	names(i *inode, fn func(name string, number uint64) error) error
	target(i *inode) (string, error)
}

// inode is a file as its filesystem describes it.
type inode struct {
	number   uint64
	mode     fs.FileMode
	uid, gid int
	size     int64
	modTime  time.Time
	raw      []byte // the structure itself, for its reader
}

// extent says where bytes of a file are in the image.
type extent struct {
	logical   int64  // byte in the file
	physical  int64  // byte in the image
	length    int64  // bytes
	unwritten bool   // reads as zeroes
	inline    []byte // the bytes themselves, where they are not in blocks of their own
}

// openReader opens an image for reading. ErrDirty when it must be recovered
// first, since a journal holds what was written last.
func openReader(path string, t Type) (imageReader, *os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	r, err := newReader(f, t)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return r, f, nil
}

func newReader(image io.ReaderAt, t Type) (imageReader, error) {
	switch t {
	case Ext4:
		return newExt4Reader(image)
	case XFS:
		return newXFSReader(image)
	case Btrfs:
		return newBtrfsReader(image)
	}
	return nil, errors.ErrUnsupported
}

// ListDir lists a directory of an unmounted filesystem, sorted by name, without
// "." and "..". dir is a slash-separated path from the filesystem's root;
// symbolic links in it are not followed. ErrNoFile when there is no such
// directory, ErrDirty when the filesystem must be recovered first (Check).
// It reads the image itself: no tool, nothing of the image as an argument.
func (x Tools) ListDir(ctx context.Context, path string, t Type, dir string) ([]Entry, error) {
	r, f, err := openReader(path, t)
	if err != nil {
		return nil, failed("read", t, err)
	}
	defer f.Close()
	entries, err := listDir(ctx, r, dir)
	return entries, failed("read", t, err)
}

// ReadFile writes the bytes of a regular file of an unmounted filesystem to w,
// holes as zeroes. file is as ListDir's dir; ErrNoFile when there is no such
// regular file. An error of w is returned as it is, after what w took.
func (x Tools) ReadFile(ctx context.Context, path string, t Type, file string, w io.Writer) error {
	r, f, err := openReader(path, t)
	if err != nil {
		return failed("read", t, err)
	}
	defer f.Close()
	return failed("read", t, readFile(ctx, f, r, file, w))
}

func readFile(ctx context.Context, image io.ReaderAt, r imageReader, file string, w io.Writer) error {
	i, err := walk(ctx, r, file)
	if err == nil && !i.mode.IsRegular() {
		err = fmt.Errorf("%w: %q is not a regular file", ErrNoFile, file)
	}
	if err != nil {
		return err
	}
	return copyFile(ctx, image, r, i, w)
}

func listDir(ctx context.Context, r imageReader, dir string) ([]Entry, error) {
	i, err := walk(ctx, r, dir)
	if err != nil {
		return nil, err
	}
	if !i.mode.IsDir() {
		return nil, fmt.Errorf("%w: %q is not a directory", ErrNoFile, dir)
	}
	entries := []Entry{}
	err = r.names(i, func(name string, number uint64) error {
		if name == "." || name == ".." {
			return nil
		}
		if len(entries) == maxDirEntries {
			return fmt.Errorf("directory %q has more than %d entries: %w", dir, maxDirEntries, errors.ErrUnsupported)
		}
		e, err := entry(r, name, number)
		if err == nil {
			err = ctx.Err()
		}
		entries = append(entries, e)
		return err
	})
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return entries, err
}

func entry(r imageReader, name string, number uint64) (Entry, error) {
	i, err := r.inode(number)
	if err != nil {
		return Entry{}, err
	}
	e := Entry{Name: name, Mode: i.mode, UID: i.uid, GID: i.gid, Size: i.size, ModTime: i.modTime}
	if i.mode&fs.ModeSymlink != 0 {
		if i.size > maxLinkBytes {
			return e, damaged("symbolic link of %d bytes", i.size)
		}
		e.Target, err = r.target(i)
	}
	return e, err
}

// errFound ends a search.
var errFound = errors.New("found")

// walk finds the inode at a path, comparing names here: they are only data.
func walk(ctx context.Context, r imageReader, path string) (*inode, error) {
	parts := strings.Split(path, "/")
	if len(parts) > maxPathParts {
		return nil, fmt.Errorf("%w: path of %d parts", ErrNoFile, len(parts))
	}
	i, err := r.inode(r.root())
	if err != nil {
		return nil, err
	}
	above := []*inode{}
	for _, part := range parts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		switch part {
		case "", ".":
			continue
		case "..":
			if len(above) > 0 {
				i, above = above[len(above)-1], above[:len(above)-1]
			}
			continue
		}
		child, err := lookup(r, i, part)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", path, err)
		}
		above = append(above, i)
		i = child
	}
	return i, nil
}

func lookup(r imageReader, dir *inode, name string) (*inode, error) {
	if !dir.mode.IsDir() {
		return nil, ErrNoFile
	}
	var number uint64
	err := r.names(dir, func(n string, at uint64) error {
		if n != name {
			return nil
		}
		number = at
		return errFound
	})
	if err == nil {
		return nil, ErrNoFile
	}
	if !errors.Is(err, errFound) {
		return nil, err
	}
	return r.inode(number)
}

// copyFile writes a file's bytes in order.
func copyFile(ctx context.Context, f io.ReaderAt, r imageReader, i *inode, w io.Writer) error {
	c := &copier{ctx: ctx, w: w, buf: make([]byte, min(copyPiece, max(i.size, 1)))}
	for e, err := range r.extents(i) {
		if err != nil {
			return err
		}
		if e.logical >= i.size {
			break
		}
		if e.unwritten {
			continue
		}
		if err := c.zeroes(e.logical); err != nil {
			return err
		}
		if e.inline != nil {
			err = c.write(e.inline[:min(int64(len(e.inline)), i.size-e.logical)])
			if err != nil {
				return err
			}
			continue
		}
		if err := c.data(f, e.physical, min(e.length, i.size-e.logical)); err != nil {
			return err
		}
	}
	return c.zeroes(i.size)
}

type copier struct {
	ctx context.Context
	w   io.Writer
	buf []byte
	at  int64 // bytes written
}

func (c *copier) data(f io.ReaderAt, off, n int64) error {
	for n > 0 {
		piece := c.buf[:min(n, int64(len(c.buf)))]
		if _, err := f.ReadAt(piece, off); err != nil {
			if errors.Is(err, io.EOF) {
				return damaged("file data beyond the end of the image")
			}
			return err
		}
		if err := c.write(piece); err != nil {
			return err
		}
		off, n = off+int64(len(piece)), n-int64(len(piece))
	}
	return nil
}

func (c *copier) zeroes(to int64) error {
	if c.at < to {
		clear(c.buf)
	}
	for c.at < to {
		if err := c.write(c.buf[:min(to-c.at, int64(len(c.buf)))]); err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) write(p []byte) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	n, err := c.w.Write(p)
	c.at += int64(n)
	return err
}

// dirPieces calls fn for each block of a directory, in order.
func dirPieces(f io.ReaderAt, r imageReader, i *inode, block, end int64, fn func(b []byte) error) error {
	total := int64(0)
	for e, err := range r.extents(i) {
		if err != nil {
			return err
		}
		if e.unwritten || e.logical >= end {
			continue
		}
		if total += e.length; total > maxDirBytes {
			return fmt.Errorf("directory of more than %d MiB: %w", maxDirBytes/MiB, errors.ErrUnsupported)
		}
		for off := int64(0); off < e.length; off += block {
			b, err := readAt(f, e.physical+off, int(block))
			if err != nil {
				return err
			}
			if err := fn(b); err != nil {
				return err
			}
		}
	}
	return nil
}

// unixMode translates the mode bits that all types share.
func unixMode(m uint16) (fs.FileMode, error) {
	mode := fs.FileMode(m & 0o777)
	for bit, flag := range map[uint16]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if m&bit != 0 {
			mode |= flag
		}
	}
	kind, ok := map[uint16]fs.FileMode{
		0o01: fs.ModeNamedPipe, 0o02: fs.ModeDevice | fs.ModeCharDevice, 0o04: fs.ModeDir, 0o06: fs.ModeDevice,
		0o10: 0, 0o12: fs.ModeSymlink, 0o14: fs.ModeSocket,
	}[m>>12]
	if !ok {
		return 0, damaged("inode with mode %#o", m)
	}
	return mode | kind, nil
}

// nameAllowed refuses names that no kernel makes, so that whoever uses names as
// paths is not led astray.
func nameAllowed(b []byte) error {
	if len(b) == 0 || bytes.IndexByte(b, '/') >= 0 || bytes.IndexByte(b, 0) >= 0 {
		return damaged("directory entry named %q", b)
	}
	return nil
}

// readAll reads a small file, such as a symbolic link's target.
func readAll(f io.ReaderAt, r imageReader, i *inode) (string, error) {
	var b strings.Builder
	err := copyFile(context.Background(), f, r, i, &b)
	return b.String(), err
}
