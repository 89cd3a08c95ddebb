package sparse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// layered is an image that this process has put together.
type layered struct {
	*overlay.Overlay
	files []*os.File
	far   *farBase // nil: its base is none, or here
}

// Close ends it; nothing is flushed.
func (l *layered) Close() (err error) {
	if l.far != nil {
		err = l.far.Close()
	}
	for _, f := range l.files {
		err = errors.Join(err, f.Close())
	}
	return err
}

// assemble opens the layers of an image in dir. through, if not nil, stands between
// it and what lies below its top. What of a base is far away can be read until ctx ends.
// The caller has the image's turn.
func (p *Pool) assemble(ctx context.Context, dir string, c *chain, readOnly bool, through *pacedFiles) (_ *layered, err error) {
	l := &layered{}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	open := func(name string, flag int) overlay.File {
		f, openErr := os.OpenFile(dir+"/"+name, flag, 0)
		if openErr != nil {
			err = errors.Join(err, unexplained(name, openErr))
			return nil
		}
		l.files = append(l.files, f)
		return overlay.OSFile{File: f}
	}
	if !readOnly {
		if err := ownTop(dir, c); err != nil {
			return nil, err
		}
	}
	var stack []overlay.Files
	for i, name := range c.Layers {
		flag := accessMode(readOnly || i > 0)
		f := overlay.Files{Data: open(name+dataSuffix, flag), Map: open(name+mapSuffix, flag)}
		if err != nil {
			return nil, err
		}
		if _, err := wholeLayer(f); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if i > 0 && through != nil {
			f.Data = through.file(f.Data)
		}
		stack = append(stack, f)
	}
	base, err := p.openBase(ctx, l, dir, c, through)
	if err != nil {
		return nil, err
	}
	l.Overlay, err = overlay.Open(stack, base)
	return l, err
}

// ownTop makes sure that what is about to be written is nobody else's.
func ownTop(dir string, c *chain) error {
	status, err := sys.StatusAt(dir + "/" + c.Layers[0] + dataSuffix)
	if err != nil {
		return unexplained(c.Layers[0], err)
	}
	if status.Links != 1 {
		return fmt.Errorf("%w: its top layer has %d names", blockdev.ErrCorrupt, status.Links)
	}
	return nil
}

// openBase gives a chain's base, nil where it has none.
func (p *Pool) openBase(ctx context.Context, l *layered, dir string, c *chain, through *pacedFiles) (overlay.Source, error) {
	switch {
	case c.Base == "":
		return nil, nil
	case c.far():
		far, err := p.openFar(ctx, dir, c)
		if err != nil {
			return nil, err
		}
		if l.far = far; through != nil {
			return throughSource{far, through}, nil
		}
		return far, nil
	}
	f, err := os.Open(dir + "/" + c.Base)
	if err != nil {
		return nil, unexplained("base", err)
	}
	l.files = append(l.files, f)
	if err := wholeBase(f, c); err != nil {
		return nil, err
	}
	image := overlay.NewImage(f, c.BaseSize)
	if through != nil {
		return throughSource{image, through}, nil
	}
	return image, nil
}

// wholeBase makes sure that a base has all its bytes.
func wholeBase(f *os.File, c *chain) error {
	status, err := sys.StatusOf(f)
	if err == nil && status.Size < c.BaseSize {
		err = fmt.Errorf("%w: the base has %d bytes of %d", blockdev.ErrCorrupt, status.Size, c.BaseSize)
	}
	return err
}

// wholeLayer makes sure that a layer's data has all the bytes that its map speaks of,
// and tells how many.
func wholeLayer(f overlay.Files) (size int64, err error) {
	if size, err = overlay.SizeOf(f.Map); err != nil {
		return 0, err
	}
	data, ok := f.Data.(overlay.OSFile)
	if !ok {
		return size, nil
	}
	status, err := sys.StatusOf(data.File)
	if err == nil && status.Size < size {
		err = fmt.Errorf("%w: it has %d bytes of %d", blockdev.ErrCorrupt, status.Size, size)
	}
	return size, err
}

// throughSource is a base whose reads are paced.
type throughSource struct {
	overlay.Source
	p *pacedFiles
}

func (s throughSource) ReadAt(p []byte, off int64) (int, error) { return s.p.read(s.Source, p, off) }

// ShareInto implements overlay.Sharer.
func (s throughSource) ShareInto(dst overlay.File, off, n int64) error {
	return s.p.share(s.Source, dst, off, n)
}

var _ blockdev.FlatWatcher = (*Pool)(nil)

// IsLayered implements blockdev.FlatWatcher.
func (p *Pool) IsLayered(ctx context.Context, id blockdev.ID) (layered, open bool, err error) {
	dir := ""
	if err = check(ctx, id); err == nil {
		dir, _, err = p.locate(id)
	}
	if err == nil {
		layered, err = exists(dir + "/" + chainFile)
	}
	if err != nil {
		return false, false, blockdev.Op("sparse.IsLayered", id, err)
	}
	return layered, p.known(id) != nil, nil
}

// OnFlat implements blockdev.FlatWatcher.
func (p *Pool) OnFlat(fn func(id blockdev.ID)) { p.onFlat.Store(&fn) }

// inspectLayers adds up what a layered image consists of.
func (p *Pool) inspectLayers(info *blockdev.Info, dir string, c *chain, told heldByWorkers) error {
	var held, below int64 // by the top; of what the top does not hold, at most
	for i, name := range c.Layers {
		f, closeFiles, err := openLayer(dir, name, os.O_RDONLY)
		if err != nil {
			return unexplained(name, err)
		}
		size, err := wholeLayer(f)
		if err == nil && i == 0 {
			info.Size = size
			held, err = p.heldByTop(info.ID, f, told)
			if err == nil && c.far() {
				below, err = p.absentFar(dir, c, f)
			}
		}
		if err = errors.Join(err, closeFiles()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, name := range c.files() {
		f, err := os.Open(dir + "/" + name)
		if err != nil {
			return unexplained(name, err)
		}
		status, shared, err := spaceOf(f)
		if err == nil && name == c.Base && !c.far() {
			err = wholeBase(f, c)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		info.Allocated += status.Allocated
		info.Shared += shared
		if name != c.Layers[0]+dataSuffix && !strings.HasSuffix(name, mapSuffix) && !(c.far() && name == c.Base) {
			below += status.Allocated
		}
	}
	info.Layers, info.Remote = len(c.Layers), c.far()
	info.Absent = min(info.Size-held, below)
	return nil
}

// heldByWorkers is how many bytes the top layers of images hold, as their workers say.
type heldByWorkers map[blockdev.ID]int64

// askHeld asks all workers of layered images, beside each other: List has one that stands
// still be waited for once, not for each.
func (p *Pool) askHeld(ctx context.Context) heldByWorkers {
	var mu sync.Mutex
	all := heldByWorkers{}
	p.eachServed(func(id blockdev.ID) {
		if layered, _, err := p.IsLayered(ctx, id); err != nil || !layered {
			return
		}
		if held, ok := p.askHeldOf(ctx, id); ok {
			mu.Lock()
			defer mu.Unlock()
			all[id] = held
		}
	})
	return all
}

func (p *Pool) askHeldOf(ctx context.Context, id blockdev.ID) (held int64, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	s, err := p.Observe(ctx, id)
	if err != nil || s.Layers == nil {
		return 0, false
	}
	return s.Layers.Held, true
}

// heldByTop tells how many bytes of the volume a top layer holds. A worker that writes
// to its map is asked, or has been.
func (p *Pool) heldByTop(id blockdev.ID, f overlay.Files, told heldByWorkers) (int64, error) {
	held, ok := told[id]
	if told == nil && p.known(id).served() {
		held, ok = p.askHeldOf(context.Background(), id)
	}
	if ok {
		return held, nil
	}
	_, held, err := overlay.Survey(f.Map)
	return held, err
}

// askTime bounds how long a worker may take to tell how it does.
const askTime = 5 * time.Second

// spaceOf tells how much of a file's space others have a part in: all of it where
// it has another name.
func spaceOf(f *os.File) (status sys.FileStatus, shared int64, err error) {
	if status, err = sys.StatusOf(f); err != nil {
		return status, 0, err
	}
	if status.Links > 1 {
		return status, status.Allocated, nil
	}
	mapped, err := sys.MapFile(f, statExtents)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return status, 0, err
	}
	return status, min(mapped.Shared, status.Allocated), nil
}

// exclusiveOf counts the bytes of a file that are nobody else's; it looks at every
// extent.
func exclusiveOf(path string, most int) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, notFound(err)
	}
	defer f.Close()
	status, err := sys.StatusOf(f)
	if err != nil || status.Links > 1 {
		return 0, err
	}
	m, err := sys.MapFile(f, most)
	if errors.Is(err, errors.ErrUnsupported) {
		return status.Allocated, nil
	}
	return m.Allocated - m.Shared, err
}
