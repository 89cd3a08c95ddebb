package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"holdfast/blockdev/tree"
)

// Stores of the runs of a tree that ReadTree gives.
const (
	StoreLoose = 0 // what does not lie in whole blocks of its own
	StoreImage = 1 // the image itself
)

// ErrLimit: a tree is larger than its reader was told to take.
var ErrLimit = errors.New("more files than can be copied at once")

// ErrUnfit is in the chain when an image is good and its files cannot be copied into
// another one: the text says which and why.
var ErrUnfit = errors.New("the files cannot be copied")

// Copied is what was copied from one filesystem into a fresh one.
type Copied struct {
	Entries int64 // inodes
	Left    Left
}

// Left counts what a filesystem holds and a tree that was read from it does not.
type Left struct {
	tree.Skipped
	Attributes int64 // files whose extended attributes, or some of them, were not kept
}

// ReadTree reads all files of an unmounted filesystem that a guest may have written,
// by code of ours: nothing is mounted, and nothing of the image is an argument. Data in
// whole blocks stays where it is, in store StoreImage; the rest is written to loose,
// an empty file, which is StoreLoose. Holes stay holes, and hard links are kept.
//
// Owners, modes, times and symbolic links are kept of all types; extended attributes
// and ACLs of ext4, but for values in inodes of their own. Devices, pipes and sockets
// are left out.
//
// ErrForeign and ErrDamaged, with the reason, for an image that does not fit together
// (a directory with two names, data outside of the device); ErrDirty for one that was
// not unmounted cleanly; tree.ErrUnfit and ErrLimit for what cannot be kept.
func (x Tools) ReadTree(ctx context.Context, path string, t Type, limits tree.Limits, loose *os.File) (tree.Tree, Left, error) {
	if err := x.whole(ctx, path, t); err != nil {
		return tree.Tree{}, Left{}, failed("read", t, err)
	}
	r, f, err := openReader(path, t)
	if err != nil {
		return tree.Tree{}, Left{}, failed("read", t, err)
	}
	defer f.Close()
	size, err := deviceSize(path)
	if err != nil {
		return tree.Tree{}, Left{}, failed("read", t, err)
	}
	w := treeReader{
		ctx: ctx, r: r, limits: limits, b: tree.NewBuilder(), seen: map[uint64]bool{}, first: map[uint64]string{},
		gather: gatherer{image: f, size: size, loose: loose, left: limits.Bytes},
	}
	if err := w.read(); err != nil {
		return tree.Tree{}, Left{}, failed("read", t, err)
	}
	return w.b.Tree(), w.left, nil
}

// treeReader is one ReadTree.
type treeReader struct {
	ctx    context.Context //nolint:containedctx // of the one ReadTree
	r      imageReader
	limits tree.Limits
	b      *tree.Builder
	seen   map[uint64]bool   // directories, which have one name
	first  map[uint64]string // names of files and links
	gather gatherer
	left   Left
}

func (w *treeReader) read() error {
	root, err := w.r.inode(w.r.root())
	if err != nil {
		return err
	}
	if !root.mode.IsDir() {
		return damaged("the root is no directory")
	}
	if err := w.directory(".", root); err != nil {
		return err
	}
	return w.gather.flush()
}

func (w *treeReader) directory(path string, dir *inode) error {
	if w.seen[dir.number] {
		return damaged("a directory has two names, the second is %.120q", path)
	}
	w.seen[dir.number] = true
	entries, err := w.entries(path, dir)
	if err != nil {
		return err
	}
	if path == "lost+found" && len(entries) == 0 { // every ext4 has one
		return nil
	}
	attributes, err := w.attributes(path, dir)
	if err != nil {
		return err
	}
	if err := w.b.Directory(path, attributes); err != nil {
		return err
	}
	for _, e := range entries {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := w.entry(below(path, e.name), e.number); err != nil {
			return err
		}
	}
	return nil
}

func below(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

type dirEntry struct {
	name   string
	number uint64
}

// entries are a directory's, sorted, so that contents lie in the order of the tree.
func (w *treeReader) entries(path string, dir *inode) ([]dirEntry, error) {
	var all []dirEntry
	err := w.r.names(dir, func(name string, number uint64) error {
		switch {
		case name == "." || name == "..":
			return nil
		case len(name) > 255:
			return damaged("a name of %d bytes in %.120q", len(name), path)
		case int64(len(all)+w.b.Names()) >= w.limits.Entries:
			return fmt.Errorf("%w: more than %d entries", ErrLimit, w.limits.Entries)
		}
		all = append(all, dirEntry{name, number})
		return w.ctx.Err()
	})
	slices.SortFunc(all, func(a, b dirEntry) int { return strings.Compare(a.name, b.name) })
	for i := 1; i < len(all) && err == nil; i++ {
		if all[i].name == all[i-1].name {
			err = damaged("two entries %.120q in %.120q", all[i].name, path)
		}
	}
	return all, err
}

func (w *treeReader) entry(path string, number uint64) error {
	switch {
	case len(path) > tree.MaxPath:
		return fmt.Errorf("%w: a path longer than %d bytes", tree.ErrUnfit, tree.MaxPath)
	case strings.Count(path, "/") >= tree.MaxDepth:
		return fmt.Errorf("%w: %.120q is deeper than %d directories", tree.ErrUnfit, path, tree.MaxDepth)
	case w.b.Text() > w.limits.Text:
		return fmt.Errorf("%w: names and attributes of more than %d bytes", ErrLimit, w.limits.Text)
	}
	if first, ok := w.first[number]; ok {
		return w.b.Link(path, first)
	}
	i, err := w.r.inode(number)
	if err != nil {
		return err
	}
	if i.mode.IsDir() {
		return w.directory(path, i)
	}
	if i.mode.Type()&^fs.ModeSymlink != 0 {
		if i.mode&fs.ModeDevice != 0 {
			w.left.Devices++
		} else {
			w.left.Pipes++
		}
		return nil
	}
	attributes, err := w.attributes(path, i)
	if err != nil {
		return err
	}
	w.first[number] = path
	if i.mode&fs.ModeSymlink != 0 {
		return w.symlink(path, i, attributes)
	}
	if i.size > tree.MaxFileBytes {
		return fmt.Errorf("%w: %.120q has %d bytes, the most is %d", tree.ErrUnfit, path, i.size, int64(tree.MaxFileBytes))
	}
	content, err := w.gather.file(w.ctx, w.r, i)
	if err != nil {
		return fmt.Errorf("%.120q: %w", path, err)
	}
	return w.b.File(path, attributes, content)
}

func (w *treeReader) symlink(path string, i *inode, a tree.Attributes) error {
	if i.size <= 0 || i.size >= maxLinkBytes {
		return damaged("symbolic link of %d bytes", i.size)
	}
	target, err := w.r.target(i)
	if err != nil {
		return err
	}
	if target == "" || strings.IndexByte(target, 0) >= 0 {
		return damaged("symbolic link to %.120q", target)
	}
	return w.b.Symlink(path, a, target)
}

// attributed is a reader that knows extended attributes.
type attributed interface {
	// xattrs gives those of an inode by their full names, and whether that is all.
	xattrs(i *inode) (all []tree.Xattr, complete bool, err error)
}

func (w *treeReader) attributes(path string, i *inode) (tree.Attributes, error) {
	if i.uid < 0 || i.gid < 0 || i.uid >= 1<<32-1 || i.gid >= 1<<32-1 { // the highest number means none
		return tree.Attributes{}, damaged("owner %d, group %d of %.120q", i.uid, i.gid, path)
	}
	a := tree.Attributes{Mode: unixPermissions(i.mode), UID: uint32(i.uid), GID: uint32(i.gid), ModTime: i.modTime}
	if a.ModTime.Before(tree.FirstTime) {
		a.ModTime = tree.FirstTime
	}
	if a.ModTime.After(tree.LastTime) {
		a.ModTime = tree.LastTime
	}
	r, ok := w.r.(attributed)
	if !ok {
		return a, nil
	}
	all, complete, err := r.xattrs(i)
	if !complete {
		w.left.Attributes++
	}
	a.Xattrs = all
	return a, err
}

// unixPermissions are a mode's bits below its type.
func unixPermissions(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for bit, flag := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if m&flag != 0 {
			mode |= bit
		}
	}
	return mode
}
