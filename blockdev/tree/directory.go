package tree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"holdfast/internal/sys"
)

// Limits bound what a tree may be. Sizes are in bytes.
type Limits struct {
	Bytes   int64 // of all files together, holes included
	Entries int64 // names, those of implied directories too
	Text    int64 // of paths, targets and attributes together: what a Tree needs in memory besides 300 for each entry (twice that while it is built) and 32 for each run, which Bytes bounds
}

// What ext4 with inodes of 256 bytes and blocks of 4 KiB can hold; a tree is what
// an image can be made of.
const (
	MaxPath      = 4096 // bytes of a path, or of a link's target and one more
	MaxDepth     = 128  // components of a path
	MaxXattrs    = 3800 // bytes of the names and values of an inode, and XattrExtra for each
	XattrExtra   = 16 + 3
	MaxFileBytes = 16 << 40
)

// FirstTime and LastTime bound what an ext4 inode can say.
var (
	FirstTime = time.Unix(-1<<31, 0)
	LastTime  = time.Unix(-1<<31+1<<34-1, 999999999)
)

// ErrUnfit is in the chain when a directory holds what a Tree cannot: the text
// names the path and the rule.
var ErrUnfit = errors.New("cannot be kept")

// Contents takes the contents of the files of a directory. A *Store is one that
// copies them.
type Contents interface {
	AddFile(ctx context.Context, f *os.File, size int64) (*Content, error)
}

// Skipped counts what a directory holds and a Tree does not keep.
type Skipped struct {
	Devices, Pipes int64 // pipes and sockets
}

// leftOut are attributes: the first is a host's policy, not the tree's; the others are how file systems
// show again what they also show under its own name.
var leftOut = []string{"security.selinux", "trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"}

// ReadDirectory reads the tree below root, an open directory of a file system that
// nobody changes meanwhile (a read-only mount, a frozen or fresh clone), and gives
// the contents of its files to c. Nothing is followed or opened that is not a
// directory or a regular file of the same file system. Devices, pipes and sockets
// are left out and counted, as is ext4's empty lost+found. Times outside of what
// ext4 can hold are moved to its bounds. ErrUnfit, with the path, for what cannot
// be kept otherwise or is beyond the limits.
func ReadDirectory(ctx context.Context, root *os.File, limits Limits, c Contents) (Tree, Skipped, error) {
	top, err := sys.TreeRoot(root)
	if err != nil {
		return Tree{}, Skipped{}, err
	}
	w := walker{ctx: ctx, limits: limits, contents: c, b: NewBuilder(), linked: map[uint64]string{}}
	err = errors.Join(w.root(top), top.Close())
	if err != nil {
		return Tree{}, Skipped{}, err
	}
	if s, ok := c.(interface{ Flush() (int64, error) }); ok { // contents are complete only then
		if _, err := s.Flush(); err != nil {
			return Tree{}, Skipped{}, err
		}
	}
	return w.b.Tree(), w.skipped, nil
}

type walker struct {
	ctx      context.Context //nolint:containedctx // of the one ReadDirectory
	limits   Limits
	contents Contents
	b        *Builder
	device   uint64
	linked   map[uint64]string // inodes with several names, by number
	skipped  Skipped
	bytes    int64
}

func (w *walker) root(top sys.Dir) error {
	st, err := top.Status(".")
	if err != nil {
		return err
	}
	w.device = st.Device
	return w.directory(top, ".", st)
}

// directory adds an open directory and all below it.
func (w *walker) directory(d sys.Dir, path string, st sys.NodeStatus) error {
	attrs, err := w.attributes(d, ".", path, st)
	if err != nil {
		return err
	}
	if err := w.b.Directory(path, attrs); err != nil {
		return err
	}
	names, err := d.Names()
	if err != nil {
		return err
	}
	slices.Sort(names) // so that contents lie in the order of the tree
	for _, name := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := w.entry(d, path, name); err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) entry(d sys.Dir, parent, name string) error {
	path := name
	if parent != "." {
		path = parent + "/" + name
	}
	st, err := d.Status(name)
	if err != nil {
		return err
	}
	if err := w.fits(path, st); err != nil {
		return err
	}
	switch st.Kind {
	case sys.NodeDirectory:
		return w.below(d, path, name, st)
	case sys.NodeRegular, sys.NodeSymlink:
		if first, ok := w.linked[st.Inode]; ok && st.Links > 1 {
			return w.b.Link(path, first)
		}
		if st.Links > 1 {
			w.linked[st.Inode] = path
		}
		return w.leaf(d, path, name, st)
	}
	if st.IsDevice {
		w.skipped.Devices++
	} else {
		w.skipped.Pipes++
	}
	return nil
}

func unfit(path, format string, args ...any) error {
	if len(path) > 120 {
		path = path[:120] + "..."
	}
	return fmt.Errorf("%q: %w: %w", path, ErrUnfit, fmt.Errorf(format, args...))
}

// fits checks an entry against the limits.
func (w *walker) fits(path string, st sys.NodeStatus) error {
	switch {
	case st.Device != w.device:
		return unfit(path, "it is on another file system")
	case len(path) > MaxPath:
		return unfit(path, "a path longer than %d bytes", MaxPath)
	case strings.Count(path, "/") >= MaxDepth:
		return unfit(path, "deeper than %d directories", MaxDepth)
	case int64(w.b.Names()) >= w.limits.Entries:
		return unfit(path, "more than %d entries", w.limits.Entries)
	case st.Kind == sys.NodeRegular && st.Size > MaxFileBytes:
		return unfit(path, "a file of %d bytes: the most is %d", st.Size, int64(MaxFileBytes))
	case w.b.Text() > w.limits.Text:
		return unfit(path, "names and attributes together are longer than %d bytes", w.limits.Text)
	}
	return nil
}

func (w *walker) below(d sys.Dir, path, name string, st sys.NodeStatus) (err error) {
	sub, err := d.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sub.Close()) }()
	if path == "lost+found" && st.Owner == (sys.Owner{}) && st.Mode == 0o700 {
		if names, err := sub.Names(); err != nil || len(names) == 0 {
			return err
		}
	}
	return w.directory(sub, path, st)
}

func (w *walker) leaf(d sys.Dir, path, name string, st sys.NodeStatus) error {
	attrs, err := w.attributes(d, name, path, st)
	if err != nil {
		return err
	}
	if st.Kind == sys.NodeSymlink {
		target, err := d.Target(name)
		if err == nil && (len(target) == 0 || len(target) >= MaxPath) {
			err = unfit(path, "a symbolic link's target of %d bytes", len(target))
		}
		if err != nil {
			return err
		}
		return w.b.Symlink(path, attrs, target)
	}
	if st.Size > w.limits.Bytes-w.bytes {
		return unfit(path, "the files together are larger than %d bytes", w.limits.Bytes)
	}
	w.bytes += st.Size
	f, err := d.OpenFile(name)
	if err != nil {
		return err
	}
	c, err := w.contents.AddFile(w.ctx, f, st.Size)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("read %.120q: %w", path, err)
	}
	return w.b.File(path, attrs, c)
}

// attributes reads those of a name in d; path is for messages.
func (w *walker) attributes(d sys.Dir, name, path string, st sys.NodeStatus) (Attributes, error) {
	a := Attributes{Mode: st.Mode, UID: uint32(st.Owner.UID), GID: uint32(st.Owner.GID), ModTime: st.ModTime} //nolint:gosec // they are 32 bits in the kernel
	if a.ModTime.Before(FirstTime) {
		a.ModTime = FirstTime
	}
	if a.ModTime.After(LastTime) {
		a.ModTime = LastTime
	}
	all, err := d.Xattrs(name)
	if err != nil {
		return a, err
	}
	total := 0
	for key, value := range all {
		if slices.Contains(leftOut, key) {
			continue
		}
		total += len(key) + len(value) + XattrExtra
		a.Xattrs = append(a.Xattrs, Xattr{Name: key, Value: value})
	}
	if total > MaxXattrs {
		return a, unfit(path, "extended attributes of %d bytes together: the most is %d", total, MaxXattrs)
	}
	return a, nil
}
