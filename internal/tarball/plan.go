package tarball

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"holdfast/internal/sys"
)

var (
	// ErrChanged means that a file is not what it was when the length was
	// computed: what was written is not an archive of the directory.
	ErrChanged = errors.New("changed while it was read")
	// ErrKind means that a file is of a kind that a template cannot hold.
	ErrKind = errors.New("is a device")
)

const (
	block  = 512
	footer = 2 * block
)

// entry is one header, and what its file was when it was planned.
type entry struct {
	header *tar.Header
	info   fs.FileInfo
}

// Plan is a directory as it was when it was walked.
type Plan struct {
	root    string
	entries []entry
	length  int64

	Files   int      // regular files
	Bytes   int64    // their content
	Skipped []string // sockets: they are no data
}

// New walks a directory. The directory itself gets no entry. A symbolic link
// as the root is followed.
func New(ctx context.Context, root string) (*Plan, error) {
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, err
	}
	p := &Plan{root: root, length: footer}
	first := map[inode]string{}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || path == root {
			if path == root && err == nil && !d.IsDir() {
				return fmt.Errorf("%s is not a directory", root)
			}
			return err
		}
		return p.add(path, d, first)
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

type inode struct{ dev, ino uint64 }

func (p *Plan) add(path string, d fs.DirEntry, first map[inode]string) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket != 0 {
		p.Skipped = append(p.Skipped, path)
		return nil
	}
	if info.Mode()&fs.ModeDevice != 0 {
		return fmt.Errorf("%s: %w: a template holds files, directories and links", path, ErrKind)
	}
	h, err := p.header(path, info, first)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	n, err := headerLength(h)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	p.length += n + (h.Size+block-1)/block*block
	if h.Typeflag == tar.TypeReg {
		p.Files++
		p.Bytes += h.Size
	}
	p.entries = append(p.entries, entry{header: h, info: info})
	return nil
}

func (p *Plan) header(path string, info fs.FileInfo, first map[inode]string) (*tar.Header, error) {
	var link string
	var err error
	if info.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(path); err != nil {
			return nil, err
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return nil, err
	}
	name, err := filepath.Rel(p.root, path)
	if err != nil {
		return nil, err
	}
	h.Name = name
	if info.IsDir() {
		h.Name += "/"
	}
	// Names of users differ between hosts, and read and change times between two
	// readings of one tree: an archive of the same tree is the same bytes.
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	h.Format = tar.FormatPAX
	if st, ok := info.Sys().(*syscall.Stat_t); ok && !info.IsDir() && st.Nlink > 1 { // symbolic links have further names too
		key := inode{st.Dev, st.Ino}
		if target, seen := first[key]; seen {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, target, 0
			return h, nil
		}
		first[key] = h.Name
	}
	if info.Mode().IsRegular() || info.IsDir() {
		h.PAXRecords, err = attributes(path)
	}
	return h, err
}

// kept says which attributes travel: the owner's own, capabilities and ACLs.
// What a host puts on files for itself (labels, overlay's marks) stays behind.
func kept(name string) bool {
	return strings.HasPrefix(name, "user.") || slices.Contains([]string{
		"security.capability", "system.posix_acl_access", "system.posix_acl_default"}, name)
}

func attributes(path string) (map[string]string, error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	attrs, err := sys.Xattrs(f)
	if err != nil {
		return nil, err
	}
	records := map[string]string{}
	for name, v := range attrs {
		if kept(name) {
			records[attrRecord+name] = string(v)
		}
	}
	return records, nil
}

// missing tells that what was walked is not there any more.
func missing(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ELOOP) }

// open never follows a link and never waits for the other end of a pipe.
func open(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
}

// headerLength lets a writer write the header, and counts.
func headerLength(h *tar.Header) (int64, error) {
	var n count
	err := tar.NewWriter(&n).WriteHeader(h)
	return int64(n), err
}

type count int64

func (c *count) Write(p []byte) (int, error) {
	*c += count(len(p))
	return len(p), nil
}

// Length is the archive's length, in bytes.
func (p *Plan) Length() int64 { return p.length }

// Entries is the number of entries.
func (p *Plan) Entries() int { return len(p.entries) }

// WriteTo writes the archive: exactly Length bytes, or an error. ErrChanged
// names a file that is not what it was.
func (p *Plan) WriteTo(w io.Writer) (int64, error) {
	n := &counted{w: w}
	tw := tar.NewWriter(n)
	for _, e := range p.entries {
		if err := p.write(tw, e); err != nil {
			return n.n, err
		}
	}
	if err := tw.Close(); err != nil {
		return n.n, err
	}
	if n.n != p.length {
		return n.n, fmt.Errorf("%s: archive has %d bytes, %d were announced", p.root, n.n, p.length)
	}
	return n.n, nil
}

type counted struct {
	w io.Writer
	n int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func (p *Plan) write(tw *tar.Writer, e entry) error {
	if e.header.Typeflag != tar.TypeReg {
		return tw.WriteHeader(e.header)
	}
	f, err := p.openEntry(e)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := tw.WriteHeader(e.header); err != nil {
		return err
	}
	if _, err := io.CopyN(tw, f, e.header.Size); err != nil {
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("%s: %w", p.path(e), ErrChanged)
		}
		return err
	}
	return unchanged(f, e.info)
}

func unchanged(f *os.File, was fs.FileInfo) error {
	now, err := f.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(now, was) || now.Size() != was.Size() || !now.ModTime().Equal(was.ModTime()) || now.Mode() != was.Mode() {
		return fmt.Errorf("%s: %w", f.Name(), ErrChanged)
	}
	return nil
}

// Reader gives the archive as a stream. Close ends it at any place.
func (p *Plan) Reader() io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		_, err := p.WriteTo(w)
		_ = w.CloseWithError(err) // always nil
	}()
	return r
}
