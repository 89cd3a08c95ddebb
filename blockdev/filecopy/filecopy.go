package filecopy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"

	"holdfast/blockdev"
	"holdfast/blockdev/extent"
	"holdfast/internal/sys"
)

// ErrKind is in the chain when the tree holds a device, pipe or socket.
var ErrKind = errors.New("neither a directory, a regular file nor a symbolic link")

// maxDepth bounds how deep a tree is copied: two descriptors are open for each
// directory on the way.
const maxDepth = 1024

// shadows are attributes by which XFS and ext4 show again what they also show
// under its own name, and a label of this host's policy.
var shadows = []string{"trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT", "security.selinux"}

// Tree copies all that is below the open directory from, and the directory's own
// attributes, to the open directory to: directories, files with their holes,
// symbolic and hard links, owners, modes, extended attributes with ACLs and
// capabilities, and modification times. Nobody else changes either meanwhile. A
// directory that is in to already is used; any other name there is an error.
// blockdev.ErrNoSpace when it does not fit. Nothing is flushed.
func Tree(ctx context.Context, from, to *os.File) error {
	return blockdev.Op("filecopy.Tree", "", tree(ctx, from, to))
}

func tree(ctx context.Context, from, to *os.File) (err error) {
	src, err := sys.TreeRoot(from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	dst, err := sys.TreeRoot(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	st, err := src.Status(".")
	if err != nil {
		return err
	}
	c := &copier{ctx: ctx, device: st.Device, root: dst, first: map[uint64]string{}}
	err = c.directory(src, dst, ".", st)
	if sys.IsNoSpace(err) && !errors.Is(err, blockdev.ErrNoSpace) {
		err = fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	return err
}

type copier struct {
	ctx    context.Context //nolint:containedctx // of the one Tree
	device uint64          // of the source
	root   sys.Dir         // of the destination
	first  map[uint64]string
	depth  int
}

// directory copies what is in src, then its attributes: a default ACL would give
// itself to what is made below, and each new name changes the time.
func (c *copier) directory(src, dst sys.Dir, at string, st sys.NodeStatus) error {
	if c.depth++; c.depth > maxDepth {
		return fmt.Errorf("%.120q is deeper than %d directories", at, maxDepth)
	}
	defer func() { c.depth-- }()
	names, err := src.Names()
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.entry(src, dst, name, path.Join(at, name)); err != nil {
			return err
		}
	}
	return attributes(src, ".", dst.Self(), st)
}

func (c *copier) entry(src, dst sys.Dir, name, at string) error {
	st, err := src.Status(name)
	if err != nil {
		return err
	}
	if st.Device != c.device {
		return fmt.Errorf("%.120q is on another file system", at)
	}
	switch st.Kind {
	case sys.NodeDirectory:
		return c.below(src, dst, name, at, st)
	case sys.NodeRegular, sys.NodeSymlink:
		if st.Links > 1 {
			if there, ok := c.first[st.Inode]; ok {
				return c.link(dst, name, there)
			}
			c.first[st.Inode] = at
		}
		if st.Kind == sys.NodeSymlink {
			return symlink(src, dst, name, st)
		}
		return c.file(src, dst, name, st)
	}
	return fmt.Errorf("%.120q: %w", at, ErrKind)
}

func (c *copier) below(src, dst sys.Dir, name, at string, st sys.NodeStatus) (err error) {
	from, err := src.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	if err := dst.Make(name); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	to, err := dst.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	return c.directory(from, to, at, st)
}

// link makes a further name of an inode that has been copied.
func (c *copier) link(dst sys.Dir, name, there string) (err error) {
	dir, err := c.root.OpenBelow(path.Dir(there))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return dst.Link(dir, path.Base(there), name)
}

func symlink(src, dst sys.Dir, name string, st sys.NodeStatus) error {
	text, err := src.Target(name)
	if err != nil {
		return err
	}
	if err := dst.Symlink(text, name); err != nil {
		return err
	}
	if err := dst.Chown(name, st.Owner); err != nil {
		return err
	}
	attrs, err := src.Xattrs(name)
	if err != nil {
		return err
	}
	for key, value := range attrs {
		if slices.Contains(shadows, key) {
			continue
		}
		if err := dst.SetXattr(name, key, value); err != nil {
			return err
		}
	}
	return dst.SetTimes(name, st.ModTime)
}

func (c *copier) file(src, dst sys.Dir, name string, st sys.NodeStatus) (err error) {
	to, err := dst.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	if st.Size > 0 {
		if err := c.contents(src, name, to); err != nil {
			return err
		}
	}
	return attributes(src, name, to, st)
}

func (c *copier) contents(src sys.Dir, name string, to sys.TreeFile) (err error) {
	from, err := src.OpenFile(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	into, err := to.File()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, into.Close()) }()
	_, err = extent.Copy(c.ctx, into, from)
	return err
}

// attributes gives a file or directory what the source's has. The order matters:
// a change of owner takes setuid bits and capabilities away.
func attributes(src sys.Dir, name string, to sys.TreeFile, st sys.NodeStatus) error {
	if err := to.Chown(st.Owner); err != nil {
		return err
	}
	if err := to.Chmod(st.Mode); err != nil {
		return err
	}
	attrs, err := src.Xattrs(name)
	if err != nil {
		return err
	}
	for key, value := range attrs {
		if slices.Contains(shadows, key) {
			continue
		}
		if err := to.SetXattr(key, value); err != nil {
			return err
		}
	}
	return to.SetTimes(st.ModTime)
}
