package templates

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/tree"
	"holdfast/templates/archive"
)

// openRevision is a READY revision whose tree and image are at hand.
type openRevision struct {
	Revision
	tree    tree.Tree
	image   *os.File
	release func()
}

// openContents opens a revision's tree and image until release is called; neither
// goes before. After an unclean stop the image is verified first.
func (l *Library) openContents(ctx context.Context, id blockdev.ID) (*openRevision, error) {
	v, err := l.pinGood(ctx, id)
	if err != nil {
		return nil, err
	}
	t, err := l.manifest(ctx, v)
	if err != nil {
		l.unpin(id)
		return nil, err
	}
	image, giveBack, err := l.lend(ctx, id)
	if err != nil {
		l.unpin(id)
		return nil, l.poolError(err)
	}
	return &openRevision{Revision: v, tree: t, image: image, release: func() { giveBack(); l.unpin(id) }}, nil
}

// Chunk reads a chunk out of the image and holds it against its digest. What the
// image has in its place otherwise is never given out: blockdev.ErrCorrupt.
func (o *openRevision) Chunk(_ context.Context, n *tree.Node, k int, b []byte) error {
	if err := readChunk(o.image, n, k, b); err != nil {
		return err
	}
	if tree.DigestOf(b) != n.Digests[k] {
		return fmt.Errorf("%w: chunk %d of %.120q in version %s:%s", blockdev.ErrCorrupt, k, n.Path, o.Template, o.Name)
	}
	return nil
}

// readChunk fills b with chunk k of a file whose runs lie in an image.
func readChunk(image io.ReaderAt, n *tree.Node, k int, b []byte) error {
	clear(b)
	begin := int64(k) * tree.Chunk
	end := begin + int64(len(b))
	for _, r := range n.Runs[runAt(n, begin):] {
		if r.Offset >= end {
			break
		}
		from, to := max(r.Offset, begin), min(r.Offset+r.Length, end)
		if _, err := image.ReadAt(b[from-begin:to-begin], r.At+from-r.Offset); err != nil {
			return err
		}
	}
	return nil
}

// runAt is the first run of a file that ends behind an offset.
func runAt(n *tree.Node, offset int64) int {
	low, high := 0, len(n.Runs)
	for low < high {
		if m := (low + high) / 2; n.Runs[m].Offset+n.Runs[m].Length <= offset {
			low = m + 1
		} else {
			high = m
		}
	}
	return low
}

// suspectOn has a revision verified when reading it gave what cannot be.
func (l *Library) suspectOn(err error, id blockdev.ID) {
	if !errors.Is(err, blockdev.ErrCorrupt) && damageOf(err) == "" {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.suspect != nil {
		l.suspect[id] = true
	}
}

// revisionOf finds a READY revision by version, "" and "latest" being the newest.
func (l *Library) revisionOf(ctx context.Context, workspace, name, version string) (Revision, error) {
	if !nameForm.MatchString(name) || version != "" && !versionForm.MatchString(version) {
		return Revision{}, fmt.Errorf("%w: version %.70q of %.70q", ErrNotFound, version, name)
	}
	ref := name
	if version != "" {
		ref += ":" + version
	}
	_, v, err := l.Resolve(ctx, workspace, ref)
	return v, err
}

// Archive writes the contents of a READY revision as a plain tar, which is the
// same bytes each time and makes the same image when it is pushed again. begin is
// told the revision and the archive's length in bytes, and gives where it goes; an
// error after that means that what was written is not all of it. ErrNotFound,
// ErrDamaged.
func (l *Library) Archive(ctx context.Context, workspace, name, version string, begin func(v Revision, length int64) io.Writer) error {
	v, err := l.revisionOf(ctx, workspace, name, version)
	if err != nil {
		return err
	}
	o, err := l.openContents(ctx, v.ID)
	if err != nil {
		return err
	}
	defer o.release()
	err = archive.Write(ctx, begin(o.Revision, archive.Length(o.tree)), o.tree, o)
	l.suspectOn(err, v.ID)
	return err
}

// diffWait is how long a comparison waits for its turn.
const diffWait = 10 * time.Second

// Difference is a name that is not the same in two revisions.
type Difference struct {
	Path    string
	Action  string   // "added", "removed" or "changed"
	Aspects []string // of a changed one: see tree.Aspect
	Before  *Inode   // nil: added
	After   *Inode   // nil: removed
}

// Inode is what a name is in a revision.
type Inode struct {
	Kind    string // "file", "directory" or "symlink"
	Mode    uint32
	UID     uint32
	GID     uint32
	Size    int64 // bytes, of a file
	ModTime time.Time
	Target  string // of a symbolic link
}

func differenceOf(c tree.Change) Difference {
	d := Difference{Path: c.Path, Action: string(c.Action), Before: inodeOf(c.Before), After: inodeOf(c.After)}
	for _, a := range c.Aspects {
		d.Aspects = append(d.Aspects, string(a))
	}
	return d
}

func inodeOf(n *tree.Node) *Inode {
	if n == nil {
		return nil
	}
	kind := map[tree.Kind]string{tree.Directory: "directory", tree.Regular: "file", tree.Symlink: "symlink"}[n.Kind]
	return &Inode{Kind: kind, Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Size, ModTime: n.ModTime, Target: n.Target}
}

// Diff tells each name that is not the same in two READY revisions of a template,
// in the order of a tree. begin is told which they are, before anything else.
// ErrNotFound, ErrDamaged, ErrBusy when too many compare; each's errors are returned as they are.
func (l *Library) Diff(ctx context.Context, workspace, name, from, to string, begin func(from, to Revision), each func(Difference) error) error {
	var revisions [2]Revision
	var trees [2]tree.Tree
	for i, version := range []string{from, to} {
		v, err := l.revisionOf(ctx, workspace, name, version)
		if err != nil {
			return err
		}
		if v, err = l.pin(v.ID); err != nil {
			return err
		}
		defer l.unpin(v.ID)
		revisions[i] = v
	}
	if revisions[0].ID != revisions[1].ID {
		select {
		case l.diffs <- struct{}{}: // each holds two trees in memory
			defer func() { <-l.diffs }()
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(diffWait):
			return fmt.Errorf("%w: comparisons are under way", ErrBusy)
		}
		for i, v := range revisions {
			t, err := l.manifest(ctx, v)
			if err != nil {
				return err
			}
			trees[i] = t
		}
	}
	begin(revisions[0], revisions[1])
	return tree.Diff(trees[0], trees[1], func(c tree.Change) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return each(differenceOf(c))
	})
}
