package templates

import (
	"context"
	"errors"
	"fmt"
	"os"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
)

// Capture asks for a revision made of a filesystem that somebody else keeps.
type Capture struct {
	Template   string
	Version    string // empty: its number
	Filesystem filesystem.Type
	Actor      string
	// Clone makes a draft dst that holds the filesystem as it was at one moment.
	// Its journal may have to be replayed.
	Clone func(ctx context.Context, dst blockdev.ID) error
}

// Captured is the revision, and what of the filesystem is not in it.
type Captured struct {
	Revision Revision
	Skipped  tree.Skipped
}

// captureText bounds the names of a captured tree in memory, in bytes.
const captureText = 1 << 30

// Capture clones a filesystem, reads the clone where nobody else sees it, builds
// its files into an image of ours and makes the revision READY, durably, before
// it returns; the template is made if it is not there. The same files give the
// same image, wherever they were.
//
// ErrInvalid for what is asked for; ErrArchive for a tree that cannot become a
// template; ErrBusy; Clone's errors as they are. After an error nothing is left of
// it but a gap in the numbers.
func (l *Library) Capture(ctx context.Context, workspace string, c Capture) (Captured, error) {
	if err := l.checkCapture(workspace, c); err != nil {
		return Captured{}, err
	}
	select {
	case l.uploads <- struct{}{}:
		defer func() { <-l.uploads }()
	default:
		return Captured{}, ErrBusy
	}
	draft := newID(blockdev.PrefixSource, l.now())
	err := c.Clone(ctx, draft)
	defer func() {
		err := l.o.Pool.Remove(context.WithoutCancel(ctx), draft)
		if err != nil {
			err = l.o.Pool.Remove(context.WithoutCancel(ctx), draft)
		}
		if err != nil {
			l.o.Log.Warn("the clone of a captured volume is left: the next start removes it", "image", draft, "err", err)
		}
	}()
	if err != nil {
		return Captured{}, err
	}
	if _, _, err := l.Put(ctx, workspace, c.Template, Change{Actor: c.Actor}, true); err != nil {
		return Captured{}, err
	}
	id, _, err := l.begin(ctx, workspace, c.Template, c.Version, c.Actor)
	if err != nil {
		return Captured{}, err
	}
	out, err := l.captureAs(ctx, id, draft, c)
	if err != nil {
		err = errors.Join(err, l.forget(context.WithoutCancel(ctx), keyOf(workspace, c.Template), id))
	}
	return out, err
}

// checkCapture refuses what can be known before anything is frozen.
func (l *Library) checkCapture(workspace string, c Capture) error {
	if err := checkName(c.Template); err != nil {
		return err
	}
	r, number := l.lookup(keyOf(workspace, c.Template)), 1
	if r != nil {
		number = r.Template.NextNumber
	}
	if c.Version == "" {
		return nil
	}
	if err := checkVersion(c.Version, number); err != nil {
		return err
	}
	if r == nil {
		return nil
	}
	if v := r.find(c.Version); v != nil && v.Status == Ready {
		return invalid("version: %q has a version %q already", c.Template, c.Version)
	}
	return nil
}

func (l *Library) captureAs(ctx context.Context, id, draft blockdev.ID, c Capture) (out Captured, err error) {
	key, err := l.claim(id)
	if err != nil {
		return out, err
	}
	defer l.unclaim(id)
	staged, err := l.stage(id, 0)
	if err != nil {
		return out, l.poolError(err)
	}
	defer staged.remove()
	var t tree.Tree
	err = l.withClone(ctx, draft, c.Filesystem, func(root *os.File) (err error) {
		limits := tree.Limits{Bytes: l.o.MaxArchiveBytes, Entries: l.o.MaxEntries, Text: captureText}
		t, out.Skipped, err = tree.ReadDirectory(ctx, root, limits, staged)
		return err
	})
	if errors.Is(err, tree.ErrUnfit) {
		err = fmt.Errorf("%w: %w", ErrArchive, err)
	}
	if err != nil {
		return out, l.poolError(err)
	}
	out.Revision, err = l.become(ctx, key, id, receivedTree(t, staged.file))
	return out, err
}

// withClone mounts a clone read-only on a device that is not, so that the kernel
// can replay its journal.
func (l *Library) withClone(ctx context.Context, id blockdev.ID, t filesystem.Type, fn func(root *os.File) error) error {
	return l.withEndpoint(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}}, func(device string) error {
		fs := sys.Filesystem{Device: device, Type: string(t), ReadOnly: true, Options: mountOptions[t]}
		mount, err := sys.NewMount(fs, sys.MountAttr{ReadOnly: true, NoSuid: true, NoDev: true})
		if err != nil {
			return err
		}
		root, err := sys.OpenMount(mount)
		if err != nil {
			return errors.Join(err, mount.Close())
		}
		return errors.Join(fn(root), root.Close(), mount.Close())
	})
}

// AddFile is the store's, within the space that is set aside.
func (s *staged) AddFile(ctx context.Context, f *os.File, size int64) (*tree.Content, error) {
	status, err := sys.StatusOf(f)
	if err != nil {
		return nil, err
	}
	if err := s.room(s.Size() + s.kept + min(status.Allocated, roundUp(size, tree.Block))); err != nil {
		return nil, err
	}
	c, err := s.Store.AddFile(ctx, f, size)
	return c, stagingError(err)
}

// Copy makes a draft with the data of a published image that nobody has open:
// what Clone of the pool does where files can share bytes.
func (l *Library) Copy(ctx context.Context, dst, src blockdev.ID, size int64) error {
	return l.poolError(l.copyData(ctx, dst, src, size))
}
