package tarball

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"

	"holdfast/internal/sys"
)

// ErrUnsafe means that an archive wants what is never done: a name outside of the
// directory, a device, a name twice, a way through a link.
var ErrUnsafe = errors.New("the archive is not safe to unpack")

// Extracted tells what was unpacked.
type Extracted struct {
	Entries int
	Bytes   int64 // of files, holes included
	Owners  bool  // false: owners were not kept, because the caller may not give files away
}

// Extract unpacks a tar below dir, an empty directory or one that is not there
// yet. Wherever the archive is from, nothing outside of dir is reached: each name is
// looked up in a directory that is open already, no link is followed, and nothing
// that is there is overwritten. Modes, times, extended attributes, hard links and
// holes are kept; owners where the caller is root. ErrUnsafe names an entry that
// is refused; what was unpacked before it stays.
func Extract(ctx context.Context, r io.Reader, dir string) (done Extracted, err error) {
	root, err := emptyDirectory(dir)
	if err != nil {
		return done, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	top, err := sys.TreeRoot(root)
	if err != nil {
		return done, err
	}
	defer func() { err = errors.Join(err, top.Close()) }()
	x := &extraction{ctx: ctx, root: top, buf: make([]byte, 1<<20)}
	x.done.Owners = os.Geteuid() == 0
	in := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return x.done, err
		}
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return x.done, fmt.Errorf("read the archive: %w", err)
		}
		if err := x.entry(h, in); err != nil {
			return x.done, fmt.Errorf("unpack %.120q: %w", h.Name, err)
		}
		x.done.Entries++
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return x.done, fmt.Errorf("read the archive: %w", err)
	}
	return x.done, x.directories()
}

func emptyDirectory(dir string) (*os.File, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	root, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	switch names, err := root.Readdirnames(1); {
	case len(names) > 0:
		return nil, errors.Join(fmt.Errorf("%s is not empty: nothing is overwritten", dir), root.Close())
	case err != nil && !errors.Is(err, io.EOF):
		return nil, errors.Join(err, root.Close())
	}
	return root, nil
}

type extraction struct {
	ctx   context.Context //nolint:containedctx // of the one Extract
	root  sys.Dir
	buf   []byte
	done  Extracted
	later []*tar.Header // directories, whose attributes are set when all is in them
}

func (x *extraction) entry(h *tar.Header, in io.Reader) error {
	parts, err := splitName(h.Name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		x.later = append(x.later, h)
		if len(parts) == 0 {
			return nil
		}
	}
	if len(parts) == 0 {
		return fmt.Errorf("%w: it has no name", ErrUnsafe)
	}
	dir, err := x.parent(parts)
	if err != nil {
		return err
	}
	err = x.make(dir, parts[len(parts)-1], h, in)
	return errors.Join(err, dir.Close())
}

// splitName takes a name apart; none for the root.
func splitName(name string) ([]string, error) {
	if strings.HasPrefix(name, "/") || strings.IndexByte(name, 0) >= 0 {
		return nil, fmt.Errorf("%w: the name is absolute or holds a NUL", ErrUnsafe)
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "", ".":
		case "..":
			return nil, fmt.Errorf(`%w: a ".." in the name`, ErrUnsafe)
		default:
			parts = append(parts, part)
		}
	}
	return parts, nil
}

// parent opens the directory of a name, which an earlier entry made.
func (x *extraction) parent(parts []string) (sys.Dir, error) {
	path := "."
	if len(parts) > 1 {
		path = strings.Join(parts[:len(parts)-1], "/")
	}
	dir, err := x.root.OpenBelow(path)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.EXDEV) {
		return dir, fmt.Errorf("%w: it leads through what is no directory of the archive: %w", ErrUnsafe, err)
	}
	return dir, err
}

func (x *extraction) make(dir sys.Dir, name string, h *tar.Header, in io.Reader) error {
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		err = dir.Make(name)
	case tar.TypeReg:
		err = x.file(dir, name, h, in)
	case tar.TypeSymlink:
		err = x.symlink(dir, name, h)
	case tar.TypeLink:
		err = x.link(dir, name, h)
	default:
		return fmt.Errorf("%w: an entry of type %q", ErrUnsafe, h.Typeflag)
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: the name is there already", ErrUnsafe)
	}
	return err
}

func (x *extraction) file(dir sys.Dir, name string, h *tar.Header, in io.Reader) (err error) {
	f, err := dir.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var at, end int64
	for at < h.Size {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(in, x.buf[:min(int64(len(x.buf)), h.Size-at)])
		if err != nil {
			return fmt.Errorf("read the archive: %w", err)
		}
		for part := range slices.Chunk(x.buf[:n], len(zeroes)) {
			if !bytes.Equal(part, zeroes[:len(part)]) {
				if _, err := f.WriteAt(part, at); err != nil {
					return err
				}
				end = at + int64(len(part))
			}
			at += int64(len(part))
		}
	}
	if end != h.Size {
		if err := f.Truncate(h.Size); err != nil {
			return err
		}
	}
	x.done.Bytes += h.Size
	return x.attributes(f, h)
}

// zeroes are what becomes a hole.
var zeroes [64 << 10]byte

func (x *extraction) symlink(dir sys.Dir, name string, h *tar.Header) error {
	if err := dir.Symlink(h.Linkname, name); err != nil {
		return err
	}
	if x.done.Owners {
		if err := dir.Chown(name, sys.Owner{UID: h.Uid, GID: h.Gid}); err != nil {
			return err
		}
		for attr, value := range attrsOf(h) {
			if err := dir.SetXattr(name, attr, value); err != nil {
				return err
			}
		}
	}
	return dir.SetTimes(name, h.ModTime)
}

func (x *extraction) link(dir sys.Dir, name string, h *tar.Header) error {
	target, err := splitName(h.Linkname)
	if err != nil || len(target) == 0 {
		return fmt.Errorf("%w: a hard link to %.120q", ErrUnsafe, h.Linkname)
	}
	from, err := x.parent(target)
	if err != nil {
		return err
	}
	return errors.Join(dir.Link(from, target[len(target)-1], name), from.Close())
}

func attrsOf(h *tar.Header) map[string][]byte {
	all := map[string][]byte{}
	for key, value := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(key, attrRecord); ok {
			all[attr] = []byte(value)
		}
	}
	return all
}

// attributes sets owner, extended attributes, mode and times, in this order: a
// change of owner takes capabilities and setuid bits away, ACLs change the mode.
// Who is not root keeps what is his to keep: his own files, without setuid bits,
// which meant another owner, and without attributes that only root may set.
func (x *extraction) attributes(f sys.TreeFile, h *tar.Header) error {
	mode := uint32(h.Mode & 0o7777)
	if x.done.Owners {
		if err := f.Chown(sys.Owner{UID: h.Uid, GID: h.Gid}); err != nil {
			return err
		}
	} else {
		mode &= 0o777
	}
	for attr, value := range attrsOf(h) {
		if !x.done.Owners && !strings.HasPrefix(attr, "user.") && !strings.HasPrefix(attr, "system.posix_acl_") {
			continue
		}
		if err := f.SetXattr(attr, value); err != nil {
			return err
		}
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	return f.SetTimes(h.ModTime)
}

// directories sets the attributes of directories, the deepest first: a mode may
// keep its owner out.
func (x *extraction) directories() error {
	for i := len(x.later) - 1; i >= 0; i-- {
		h := x.later[i]
		if err := x.directory(h); err != nil {
			return fmt.Errorf("unpack %.120q: %w", h.Name, err)
		}
	}
	return nil
}

func (x *extraction) directory(h *tar.Header) (err error) {
	parts, err := splitName(h.Name)
	if err != nil {
		return err
	}
	d, err := x.parent(append(parts, ""))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return x.attributes(d.Self(), h)
}
