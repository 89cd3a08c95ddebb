package templates

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/tree"
	"holdfast/templates/archive"
)

// openRevision is a READY revision whose tree and image are at hand.
type openRevision struct {
	Revision
	tree    tree.Source
	image   *os.File
	release func()
}

// openContents opens a revision's tree and image until release is called; neither
// goes before. After an unclean stop the image is verified first.
func (l *Library) openContents(ctx context.Context, id blockdev.ID) (o *openRevision, err error) {
	v, err := l.pinGood(ctx, id)
	if err != nil {
		return nil, err
	}
	if v.Remote != nil {
		l.unpin(id)
		return nil, v.remoteError()
	}
	o = &openRevision{Revision: v, release: func() { l.unpin(id) }}
	defer func() {
		if err != nil {
			o.release()
		}
	}()
	source, closeTree, err := l.openManifest(ctx, v)
	if err != nil {
		return nil, err
	}
	o.tree, o.release = source, func() { closeTree(); l.unpin(id) }
	image, giveBack, err := l.lend(ctx, id)
	if err != nil {
		return nil, l.poolError(err)
	}
	o.image, o.release = image, func() { giveBack(); closeTree(); l.unpin(id) }
	return o, nil
}

// openManifest is manifest for trees that are only gone through: they stay on disk.
// It was read once to its end when this returns, so it is whole.
func (l *Library) openManifest(ctx context.Context, v Revision) (tree.Source, func(), error) {
	f, source, err := l.scanManifest(v)
	if err == nil {
		return source, func() { _ = f.Close() }, nil // it was only read
	}
	t, err := l.manifest(ctx, v) // makes it again, and has it in memory now
	if err != nil {
		return nil, nil, err
	}
	return t.Source(), func() {}, nil
}

func (l *Library) scanManifest(v Revision) (*os.File, tree.Source, error) {
	f, err := os.Open(l.manifestPath(v))
	if err != nil {
		return nil, nil, err
	}
	source, err := manifestSource(f, v)
	if err == nil {
		for _, broken := range source() {
			err = broken
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, source, nil
}

// Chunk reads a chunk out of the image and holds it against its digest. What the
// image has in its place otherwise is never given out: blockdev.ErrCorrupt.
func (o *openRevision) Chunk(_ context.Context, n *tree.Node, k int, b []byte) error {
	if err := readRuns(o.image, runsWithin(n.Runs, int64(k)*tree.Chunk, int64(len(b))), b); err != nil {
		return err
	}
	if tree.DigestOf(b) != n.Digests[k] {
		return fmt.Errorf("%w: chunk %d of %.120q in version %s:%s", blockdev.ErrCorrupt, k, n.Path, o.Template, o.Name)
	}
	return nil
}

// runsWithin gives what of a file's runs lies in a range, with offsets in that.
func runsWithin(runs []tree.Run, begin, length int64) (within []tree.Run) {
	end := begin + length
	first := sort.Search(len(runs), func(i int) bool { return runs[i].Offset+runs[i].Length > begin })
	for _, r := range runs[first:] {
		if r.Offset >= end {
			break
		}
		from, to := max(r.Offset, begin), min(r.Offset+r.Length, end)
		within = append(within, tree.Run{Offset: from - begin, Length: to - from, At: r.At + from - r.Offset})
	}
	return within
}

// readRuns fills b from runs in an image; the rest is zeroed.
func readRuns(image io.ReaderAt, runs []tree.Run, b []byte) error {
	clear(b)
	for _, r := range runs {
		if _, err := image.ReadAt(b[r.Offset:r.Offset+r.Length], r.At); err != nil {
			return err
		}
	}
	return nil
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
	length, err := archive.Length(ctx, o.tree)
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(begin(o.Revision, length), archiveBuffer)
	if err = archive.Write(ctx, out, o.tree, o); err != nil {
		l.suspectOn(err, v.ID)
		return err
	}
	return out.Flush()
}

// archiveBuffer collects the small pieces that an archive is written in, in bytes.
const archiveBuffer = 256 << 10

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
// ErrNotFound, ErrDamaged; each's errors are returned as they are.
func (l *Library) Diff(ctx context.Context, workspace, name, from, to string, begin func(from, to Revision), each func(Difference) error) error {
	var revisions [2]Revision
	var trees [2]tree.Source
	for i, version := range []string{from, to} {
		v, err := l.revisionOf(ctx, workspace, name, version)
		if err != nil {
			return err
		}
		if v, err = l.pin(v.ID); err != nil {
			return err
		}
		defer l.unpin(v.ID)
		source, release, err := l.openManifest(ctx, v)
		if err != nil {
			return err
		}
		defer release()
		revisions[i], trees[i] = v, source
	}
	begin(revisions[0], revisions[1])
	return tree.Diff(trees[0], trees[1], func(c tree.Change) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return each(differenceOf(c))
	})
}
