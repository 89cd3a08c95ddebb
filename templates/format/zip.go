package format

import (
	"archive/tar"
	"archive/zip"
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"holdfast/templates/archive"
)

// openZip receives a zip whole, checks its structure and unpacks it as it is read.
func openZip(ctx context.Context, in io.Reader, src *source, o Options) (*Stream, error) {
	f, err := unnamed(o.Staging)
	if err != nil {
		return nil, err
	}
	size, err := receiveAll(f, in, src)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	z, err := newZip(ctx, f, size, o.Limits)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.CloseWithError(z.writeTo(ctx, w)) // always nil
	}()
	return &Stream{Reader: r, Format: Zip, close: func() error {
		_ = r.Close() // ends the writer
		<-done
		return f.Close()
	}}, nil
}

// unnamed makes a file that goes with its descriptor, whatever happens.
func unnamed(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "upload-*")
	if err != nil {
		return nil, fmt.Errorf("staging: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("staging: %w", err), f.Close())
	}
	return f, nil
}

// receiveAll copies the source into f.
func receiveAll(f *os.File, in io.Reader, src *source) (int64, error) {
	w := bufio.NewWriterSize(f, 1<<20)
	n, err := io.Copy(w, in)
	err = errors.Join(err, w.Flush())
	switch {
	case src.err != nil:
		return n, src.err
	case err != nil:
		return n, fmt.Errorf("staging: %w", err)
	}
	return n, nil
}

// zipped is a zip whose structure was checked.
type zipped struct {
	*zip.Reader
	file    *os.File
	size    int64
	limits  Limits
	entries []span // of the directory, in its order
	dataEnd int64  // where the directory begins
	names   map[string]struct{}
}

// newZip reads the directory and refuses a zip that different readers would see
// different things in.
func newZip(ctx context.Context, f *os.File, size int64, l Limits) (*zipped, error) {
	z := &zipped{file: f, size: size, limits: l, names: map[string]struct{}{}}
	if err := z.directory(); err != nil {
		return nil, err
	}
	var err error
	if z.Reader, err = zip.NewReader(f, size); err != nil {
		return nil, zipError(err)
	}
	if len(z.File) != len(z.entries) {
		return nil, archive.Refuse("the zip's directory has %d entries, or %d", len(z.entries), len(z.File))
	}
	var out, in int64
	for i, e := range z.File {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := z.check(i, e); err != nil {
			return nil, err
		}
		if e.UncompressedSize64 > uint64(l.Bytes) || out > l.Bytes-int64(e.UncompressedSize64) { //nolint:gosec // bounded just before
			return nil, archive.RefuseEntry(e.Name, "with it, the zip unpacks to more than %d bytes", l.Bytes)
		}
		out += int64(e.UncompressedSize64) //nolint:gosec // bounded above
		in += int64(e.CompressedSize64)    //nolint:gosec // check held it against the file
		if out > l.allowed(in) {
			return nil, archive.RefuseEntry(e.Name, "up to it, %w", l.overflow(Zip, out))
		}
	}
	return z, z.overlaps()
}

// check looks at one entry as the directory and its local header tell it.
func (z *zipped) check(i int, e *zip.File) error {
	const encrypted = 1<<0 | 1<<6 | 1<<13
	switch {
	case e.Flags&encrypted != 0:
		return archive.RefuseEntry(e.Name, "it is encrypted")
	case e.Method != zip.Store && e.Method != zip.Deflate:
		return archive.RefuseEntry(e.Name, "compression method %d: only stored (0) and deflated (8) are taken", e.Method)
	case e.Method == zip.Store && e.CompressedSize64 != e.UncompressedSize64:
		return archive.RefuseEntry(e.Name, "stored, with two different sizes")
	case strings.IndexByte(e.Name, 0) >= 0:
		return archive.RefuseEntry(e.Name, "a NUL byte in a name")
	case e.CreatorVersion>>8 != creatorUnix && e.CreatorVersion>>8 != creatorMac && strings.IndexByte(e.Name, '\\') >= 0:
		return archive.RefuseEntry(e.Name, `a "\" in a name: the names of a zip have "/" between their parts`)
	}
	clean := path.Clean(e.Name)
	if _, twice := z.names[clean]; twice {
		return archive.RefuseEntry(e.Name, "it is in the zip twice")
	}
	z.names[clean] = struct{}{}
	return z.local(&z.entries[i], e)
}

// local reads an entry's local header, which other readers go by, and finds
// where its bytes end.
func (z *zipped) local(s *span, e *zip.File) error {
	const fixed = 30
	var b [fixed]byte
	if _, err := z.file.ReadAt(b[:], s.from); err != nil || binary.LittleEndian.Uint32(b[:]) != signLocal {
		return archive.RefuseEntry(e.Name, "the zip has no local header of it at byte %d", s.from)
	}
	le := binary.LittleEndian
	name := make([]byte, le.Uint16(b[26:]))
	if _, err := z.file.ReadAt(name, s.from+fixed); err != nil || string(name) != e.Name {
		return archive.RefuseEntry(e.Name, "the directory and the local header have different names (%s)", archive.Quote(string(name)))
	}
	if le.Uint16(b[6:]) != e.Flags || le.Uint16(b[8:]) != e.Method {
		return archive.RefuseEntry(e.Name, "the directory and the local header differ in flags or method")
	}
	const later = 1 << 3 // sizes and checksum follow the data
	for _, field := range []struct{ local, directory uint64 }{
		{uint64(le.Uint32(b[14:])), uint64(e.CRC32)},
		{uint64(le.Uint32(b[18:])), e.CompressedSize64},
		{uint64(le.Uint32(b[22:])), e.UncompressedSize64},
	} {
		same := field.local == field.directory || field.local == 1<<32-1 // which says: in the Zip64 field
		if !same && (e.Flags&later == 0 || field.local != 0) {
			return archive.RefuseEntry(e.Name, "the directory and the local header differ in size or checksum")
		}
	}
	begin := s.from + fixed + int64(len(name)) + int64(le.Uint16(b[28:]))
	if e.CompressedSize64 > uint64(z.size) || begin > z.size-int64(e.CompressedSize64) { //nolint:gosec // a file's size
		return archive.RefuseEntry(e.Name, "the zip ends inside of it")
	}
	s.to = begin + int64(e.CompressedSize64) //nolint:gosec // within the file
	return nil
}

const (
	creatorUnix = 3
	creatorMac  = 19
)

// writeTo writes the entries as a tar, in the directory's order.
func (z *zipped) writeTo(ctx context.Context, w io.Writer) error {
	out := tar.NewWriter(w)
	for _, e := range z.File {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := header(e)
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeSymlink {
			if h.Linkname, err = linkText(e); err != nil {
				return err
			}
		}
		if err := out.WriteHeader(h); err != nil {
			if errors.Is(err, io.ErrClosedPipe) {
				return err
			}
			return archive.RefuseEntry(e.Name, "%w", err)
		}
		if h.Typeflag == tar.TypeReg {
			if err := copyEntry(ctx, out, e); err != nil {
				return err
			}
		}
	}
	return out.Close()
}

// header makes of a zip's entry what tar would say of it. What it makes of
// devices, absolute names and the like, package archive refuses.
func header(e *zip.File) (*tar.Header, error) {
	h := &tar.Header{Format: tar.FormatPAX, Name: e.Name, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: e.Modified}
	if h.ModTime.IsZero() {
		h.ModTime = time.Unix(0, 0)
	}
	directory := strings.HasSuffix(e.Name, "/")
	if directory {
		h.Typeflag, h.Mode = tar.TypeDir, 0o755
	}
	h.Uid, h.Gid = owner(e.Extra)
	creator := e.CreatorVersion >> 8
	if mode := e.ExternalAttrs >> 16; mode != 0 && (creator == creatorUnix || creator == creatorMac) {
		h.Mode = int64(mode & 0o7777)
		kinds := map[uint32]byte{
			0: h.Typeflag, 0o100000: tar.TypeReg, 0o040000: tar.TypeDir, 0o120000: tar.TypeSymlink,
			0o020000: tar.TypeChar, 0o060000: tar.TypeBlock, 0o010000: tar.TypeFifo,
		}
		kind, known := kinds[mode&0o170000]
		if !known {
			return nil, archive.RefuseEntry(e.Name, "its mode %o is of no known type", mode)
		}
		if directory && kind != tar.TypeDir {
			return nil, archive.RefuseEntry(e.Name, "it is a directory by its name and not by its mode")
		}
		h.Typeflag = kind
	}
	if h.Typeflag == tar.TypeReg {
		h.Size = int64(e.UncompressedSize64) //nolint:gosec // held against the limits
	} else if h.Typeflag == tar.TypeDir && e.UncompressedSize64 != 0 {
		return nil, archive.RefuseEntry(e.Name, "a directory with %d bytes of contents", e.UncompressedSize64)
	}
	return h, nil
}

// linkText reads a symbolic link, whose contents are its text.
func linkText(e *zip.File) (string, error) {
	const most = 4096
	if e.UncompressedSize64 > most {
		return "", archive.RefuseEntry(e.Name, "a symbolic link's target is longer than %d bytes", most)
	}
	r, err := e.Open()
	if err != nil {
		return "", archive.RefuseEntry(e.Name, "%w", zipError(err))
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, most+1))
	if err != nil {
		return "", archive.RefuseEntry(e.Name, "%w", zipError(err))
	}
	return string(text), nil
}

func copyEntry(ctx context.Context, w io.Writer, e *zip.File) error {
	r, err := e.Open()
	if err != nil {
		return archive.RefuseEntry(e.Name, "%w", zipError(err))
	}
	defer r.Close()
	buf := make([]byte, 128<<10)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.Read(buf)
		if _, werr := w.Write(buf[:n]); werr != nil {
			if errors.Is(werr, tar.ErrWriteTooLong) {
				return archive.RefuseEntry(e.Name, "it is longer than the zip says")
			}
			return werr
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return archive.RefuseEntry(e.Name, "%w", zipError(err))
		}
	}
}

// zipError says in our words what the library found.
func zipError(err error) error {
	switch {
	case errors.Is(err, zip.ErrFormat):
		return archive.Refuse("not a valid zip")
	case errors.Is(err, zip.ErrChecksum):
		return archive.Refuse("its checksum is wrong")
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return archive.Refuse("the zip is cut off")
	}
	return archive.Refuse("the zip is damaged: %w", err)
}
