package archive

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"holdfast/internal/sys"
)

// impliedMode is the mode of directories that no entry names.
const impliedMode = 0o755

// Extract writes the entries of an archive that Check accepted below root, an
// empty directory: by descriptor, one name at a time, so that nothing in the
// archive can reach outside of it. Nothing is flushed. An error means that what
// is below root is of no use.
func Extract(ctx context.Context, r io.Reader, root *os.File) (err error) {
	top, err := sys.TreeRoot(root)
	if err != nil {
		return err
	}
	x := extractor{ctx: ctx, root: top, buffer: make([]byte, bufferSize), mode: impliedMode}
	defer func() { err = errors.Join(err, x.close()) }()
	in := newReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := in.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := x.write(e, in); err != nil {
			return &entryError{path: e.path, err: err}
		}
	}
	return x.directories()
}

// entryError names the entry that could not be written. It is not the archive's
// fault: a full filesystem, for example.
type entryError struct {
	path string
	err  error
}

func (e *entryError) Error() string { return "extract " + quote(e.path) + ": " + e.err.Error() }
func (e *entryError) Unwrap() error { return e.err }

// extractor writes entries. The directories from the root to the last entry's
// are kept open, since archives are mostly made by walking a tree.
type extractor struct {
	ctx    context.Context //nolint:containedctx // of the one Extract
	root   sys.Dir
	path   []level
	buffer []byte
	later  []entry // directories, whose times and modes are set when all is in them
	newest time.Time
	mode   uint32 // of the root
}

type level struct {
	path string
	dir  sys.Dir
}

func (x *extractor) close() error {
	err := x.root.Close()
	for _, l := range x.path {
		err = errors.Join(err, l.dir.Close())
	}
	return err
}

func (x *extractor) write(e entry, in *reader) error {
	if e.time.After(x.newest) {
		x.newest = e.time
	}
	if e.path == "." {
		x.later = append(x.later, e)
		return nil
	}
	parent, name := split(e.path)
	dir, err := x.open(parent, e.time)
	if err != nil {
		return err
	}
	switch e.kind {
	case directory:
		if err := dir.Make(name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		x.later = append(x.later, e)
		return nil
	case regular:
		return x.file(dir, name, e, in)
	case symlink:
		return x.symlink(dir, name, e)
	default:
		return x.link(dir, name, e)
	}
}

// open gives the directory at a path below the root. Those that no entry has
// made yet are made, with the time of the entry that implies them.
func (x *extractor) open(path string, implied time.Time) (sys.Dir, error) {
	for n := len(x.path); n > 0 && !within(path, x.path[n-1].path); n-- {
		if err := x.path[n-1].dir.Close(); err != nil {
			return sys.Dir{}, err
		}
		x.path = x.path[:n-1]
	}
	dir, done := x.root, ""
	if n := len(x.path); n > 0 {
		dir, done = x.path[n-1].dir, x.path[n-1].path
	}
	for done != path {
		rest := strings.TrimPrefix(path[len(done):], "/")
		name, _, _ := strings.Cut(rest, "/")
		done = path[:len(path)-len(rest)+len(name)]
		next, err := dir.Open(name)
		if errors.Is(err, os.ErrNotExist) {
			if err := dir.Make(name); err != nil {
				return sys.Dir{}, err
			}
			x.later = append(x.later, entry{kind: directory, path: done, mode: impliedMode, time: implied})
			next, err = dir.Open(name)
		}
		if err != nil {
			return sys.Dir{}, err
		}
		dir = next
		x.path = append(x.path, level{path: done, dir: dir})
	}
	return dir, nil
}

// within reports whether path is dir or below it.
func within(path, dir string) bool {
	return strings.HasPrefix(path, dir) && (len(path) == len(dir) || path[len(dir)] == '/')
}

func (x *extractor) file(dir sys.Dir, name string, e entry, in *reader) (err error) {
	f, err := replacing(dir, name, func() (sys.TreeFile, error) { return dir.Create(name) })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := x.contents(f, e, in); err != nil {
		return err
	}
	return setAll(f, e)
}

// contents writes a file and leaves out what is zero.
func (x *extractor) contents(f sys.TreeFile, e entry, in *reader) error {
	var offset, end int64 // end: what has been written up to
	for offset < e.size {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(in, x.buffer[:min(int64(len(x.buffer)), e.size-offset)])
		if err != nil {
			return in.damaged(err)
		}
		for run := range dataRuns(x.buffer[:n]) {
			if _, err := f.WriteAt(x.buffer[run.from:run.to], offset+int64(run.from)); err != nil {
				return err
			}
			end = offset + int64(run.to)
		}
		offset += int64(n)
	}
	if end != e.size {
		return f.Truncate(e.size)
	}
	return nil
}

type span struct{ from, to int }

// dataRuns gives the ranges of whole chunks of b that are not zero throughout.
func dataRuns(b []byte) func(yield func(span) bool) {
	return func(yield func(span) bool) {
		from := -1
		for i := 0; i < len(b); i += chunk {
			switch zero := isZero(b[i:min(i+chunk, len(b))]); {
			case zero && from >= 0:
				if !yield(span{from, i}) {
					return
				}
				from = -1
			case !zero && from < 0:
				from = i
			}
		}
		if from >= 0 {
			yield(span{from, len(b)})
		}
	}
}

func (x *extractor) symlink(dir sys.Dir, name string, e entry) error {
	_, err := replacing(dir, name, func() (struct{}, error) { return struct{}{}, dir.Symlink(e.link, name) })
	if err != nil {
		return err
	}
	if err := dir.Chown(name, sys.Owner{UID: e.uid, GID: e.gid}); err != nil {
		return err
	}
	for _, a := range e.attrs {
		if err := dir.SetXattr(name, a.name, []byte(a.value)); err != nil {
			return err
		}
	}
	return dir.SetTimes(name, e.time)
}

// link makes another name. The inode has its attributes from its first entry.
func (x *extractor) link(dir sys.Dir, name string, e entry) (err error) {
	parent, target := split(e.link)
	from := x.root
	if parent != "" {
		if from, err = x.root.OpenBelow(parent); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, from.Close()) }()
	}
	_, err = replacing(dir, name, func() (struct{}, error) { return struct{}{}, dir.Link(from, target, name) })
	return err
}

// replacing does what makes a name, and takes an earlier one away if need be.
func replacing[T any](dir sys.Dir, name string, make func() (T, error)) (T, error) {
	made, err := make()
	if !errors.Is(err, os.ErrExist) {
		return made, err
	}
	if err := dir.Unlink(name); err != nil {
		return made, err
	}
	return make()
}

// directories sets what is left: attributes of directories, the root last.
func (x *extractor) directories() error {
	root := entry{kind: directory, path: ".", mode: x.mode, time: x.newest}
	if root.time.IsZero() {
		root.time = time.Unix(0, 0)
	}
	for _, e := range x.later {
		if e.path == "." {
			root = e
			continue
		}
		if err := x.setDirectory(e); err != nil {
			return &entryError{path: e.path, err: err}
		}
	}
	return setAll(x.root.Self(), root)
}

func (x *extractor) setDirectory(e entry) (err error) {
	d, err := x.root.OpenBelow(e.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return setAll(d.Self(), e)
}

// setAll sets owner, attributes, mode and times, in this order: a change of owner
// takes capabilities and setuid bits away, ACLs change the mode.
func setAll(f sys.TreeFile, e entry) error {
	if err := f.Chown(sys.Owner{UID: e.uid, GID: e.gid}); err != nil {
		return err
	}
	for _, a := range e.attrs {
		if err := f.SetXattr(a.name, []byte(a.value)); err != nil {
			return err
		}
	}
	if err := f.Chmod(e.mode); err != nil {
		return err
	}
	return f.SetTimes(e.time)
}
