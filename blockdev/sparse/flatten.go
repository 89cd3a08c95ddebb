package sparse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
)

const (
	// flatFresh is a second name for a file with all bytes on its way to be the image.
	flatFresh = imageFile + ".flat"
	// awayTime is how long the background asks a store that fails before it goes on with
	// other images, and awayPause when it comes back.
	awayTime, awayPause = 5 * time.Second, time.Minute
	// keepEvery is how much is copied between two flushes: what a crash costs.
	keepEvery = 64 << 20 // bytes
)

var _ blockdev.Flattener = (*Pool)(nil)

// Flatten implements blockdev.Flattener. errors.ErrUnsupported for a snapshot: it
// stays as it is. blockdev.ErrBusy also when the image is wanted meanwhile.
func (p *Pool) Flatten(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("sparse.Flatten", id, p.flatten(ctx, id))
}

func (p *Pool) flatten(ctx context.Context, id blockdev.ID) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	work, done, err := p.turns.takeYielding(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	dir, draft, err := p.locate(id)
	if err != nil {
		return err
	}
	return yielded(work, p.flattenIn(work, id, dir, draft, nil))
}

// flattenIn brings all bytes of an image into its top layer, which then is the
// image. pace, if not nil, is called before each read of what lies below. The caller
// has the turn.
func (p *Pool) flattenIn(ctx context.Context, id blockdev.ID, dir string, draft bool, pace func(n int) error) error {
	c, err := readChain(id, dir)
	if err != nil || c == nil {
		return err
	}
	switch {
	case sealedForEver(id, draft):
		return fmt.Errorf("a snapshot stays as it is: %w", errors.ErrUnsupported)
	case p.isAccessed(id):
		return fmt.Errorf("this process works on it: %w", blockdev.ErrBusy)
	case p.known(id) != nil:
		return fmt.Errorf("it is open: %w", blockdev.ErrBusy)
	}
	err = p.sweep(dir, c)
	if err == nil {
		err = p.recoverClosed(id, dir, draft, c)
	}
	if err != nil {
		return err
	}
	whole, err := p.bringTogether(ctx, id, dir, c, pace)
	if err != nil {
		return err
	}
	return p.becomeFlat(id, dir, whole)
}

// sealedForEver reports whether a layered image is one that nobody writes to.
func sealedForEver(id blockdev.ID, draft bool) bool {
	return !draft && strings.HasPrefix(string(id), blockdev.PrefixSnapshot+"-")
}

// bringTogether makes one file hold all bytes of an image, and names it. What was
// copied is kept also when it ends early.
func (p *Pool) bringTogether(ctx context.Context, id blockdev.ID, dir string, c *chain, pace func(n int) error) (whole string, err error) {
	for {
		down, err := goesDown(dir, c)
		switch {
		case err != nil:
			return "", err
		case down && len(c.Layers) == 1:
			return c.Base, p.mergeIntoBase(ctx, id, dir, c, pace)
		case down:
			err = p.mergeDown(ctx, id, dir, c, pace)
		case len(c.Layers) == 1:
			return c.Layers[0] + dataSuffix, p.bringUp(ctx, id, dir, c, pace)
		default:
			err = p.bringUp(ctx, id, dir, c, pace)
		}
		if err != nil {
			return "", err
		}
	}
}

// bringUp copies into the top what it lacks of the next layer, or else of the base.
func (p *Pool) bringUp(ctx context.Context, id blockdev.ID, dir string, c *chain, pace func(n int) error) (err error) {
	reader := &pacedFiles{pace: pace, copied: make(chan struct{}, 1)}
	v, err := p.assemble(ctx, dir, c, false, reader)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if v.far != nil && pace != nil {
		go v.far.giveUp(awayTime)
	}
	keeping, stop := context.WithCancel(ctx)
	var keeper sync.WaitGroup
	keeper.Go(func() { reader.keep(keeping, v.Overlay) })
	err = p.copyUp(ctx, id, dir, c, v.Overlay)
	stop()
	keeper.Wait()
	if err != nil && ctx.Err() != nil && v.far != nil {
		err = v.far.explained(err)
	}
	if err != nil && !errors.Is(err, blockdev.ErrFailed) {
		err = errors.Join(err, v.Sync())
	}
	return noSpace(err)
}

func (p *Pool) copyUp(ctx context.Context, id blockdev.ID, dir string, c *chain, v *overlay.Overlay) error {
	if len(c.Layers) > 1 {
		if err := p.at("flatten.absorb"); err != nil {
			return err
		}
		return v.Absorb(ctx, 0, func() error { return p.dropLayer(id, dir, c, 1) })
	}
	if err := p.at("flatten.hydrate"); err != nil {
		return err
	}
	return overlay.NewHydrator(v, nil, nil).Run(ctx)
}

// dropLayer takes a layer out of the chain whose blocks the one above has.
func (p *Pool) dropLayer(id blockdev.ID, dir string, c *chain, i int) error {
	gone := chain{Layers: []string{c.Layers[i]}}
	shorter := *c
	shorter.Layers = append(append([]string(nil), c.Layers[:i]...), c.Layers[i+1:]...)
	if err := p.writeChain(id, dir, &shorter); err != nil {
		return err
	}
	*c = shorter
	for _, name := range gone.files() {
		_ = os.Remove(dir + "/" + name) // it is recorded; sweep takes it away, too
	}
	return nil
}

// becomeFlat makes an image plain of which one file has all bytes, durably. As long as
// the chain is there it decides; without it the image's file does.
func (p *Pool) becomeFlat(id blockdev.ID, dir, whole string) error {
	if err := p.at("flat.link"); err != nil {
		return err
	}
	fresh := dir + "/" + flatFresh
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := link(dir+"/"+whole, fresh); err != nil {
		return err
	}
	if err := os.Rename(fresh, dir+"/"+imageFile); err != nil {
		return noSpace(err)
	}
	if err := p.at("flat.flush"); err != nil {
		return err
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	if err := p.at("flat.unchain"); err != nil {
		return err
	}
	if err := p.unchain(dir); err != nil {
		return err
	}
	if tell := p.onFlat.Load(); tell != nil {
		(*tell)(id)
	}
	if err := p.at("flat.sweep"); err != nil {
		return err
	}
	return p.sweep(dir, nil)
}

func (p *Pool) unchain(dir string) error {
	p.changing.Lock()
	defer p.changing.Unlock()
	if err := os.Remove(dir + "/" + chainFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return noSpace(err)
	}
	return syncDir(dir)
}

// pacedFiles count what is read below a top layer.
type pacedFiles struct {
	pace   func(n int) error
	mu     sync.Mutex
	since  int64
	copied chan struct{}
}

type pacedFile struct {
	overlay.File
	p *pacedFiles
}

// file has a file read at the pace.
func (p *pacedFiles) file(f overlay.File) overlay.File { return pacedFile{f, p} }

func (f pacedFile) ReadAt(b []byte, off int64) (int, error) { return f.p.read(f.File, b, off) }

func (p *pacedFiles) read(from io.ReaderAt, b []byte, off int64) (int, error) {
	if p.pace != nil {
		if err := p.pace(len(b)); err != nil {
			return 0, err
		}
	}
	n, err := from.ReadAt(b, off)
	p.count(n)
	return n, err
}

// ShareInto implements overlay.Sharer.
func (f pacedFile) ShareInto(dst overlay.File, off, n int64) error {
	return f.p.share(f.File, dst, off, n)
}

// share has a file share bytes of what lies below, which takes little of the rate: none
// are moved.
func (p *pacedFiles) share(below any, dst overlay.File, off, n int64) error {
	from, ok := below.(overlay.Sharer)
	if !ok {
		return errors.ErrUnsupported
	}
	if p.pace != nil {
		if err := p.pace(overlay.ShareCost); err != nil {
			return err
		}
	}
	p.count(overlay.ShareCost)
	return from.ShareInto(dst, off, n)
}

// Extent implements overlay.Extenter.
func (f pacedFile) Extent(off, limit int64) (length int64, hole bool, err error) {
	if e, ok := f.File.(overlay.Extenter); ok {
		return e.Extent(off, limit)
	}
	return limit, false, nil
}

// Written tells a layer whose map is loose what was written.
func (f pacedFile) Written(off, end int64, fn func(from, to int64)) error {
	if w, ok := f.File.(overlay.Witness); ok {
		return w.Written(off, end, fn)
	}
	return errors.ErrUnsupported
}

// Witnesses: nothing is written through it.
func (f pacedFile) Witnesses() bool { return false }

func (p *pacedFiles) count(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since += int64(n); p.since < keepEvery {
		return
	}
	p.since = 0
	select {
	case p.copied <- struct{}{}:
	default:
	}
}

// keep flushes what was copied, now and then, so that a crash costs little. That a
// flush failed the copying notices.
func (p *pacedFiles) keep(ctx context.Context, v *overlay.Overlay) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.copied:
			_ = v.Sync()
		}
	}
}

// defaultRate is how fast the background copies, in bytes per second.
const defaultRate = 64 << 20

// flattenAll makes closed layered volumes flat, one at a time, as long as nobody
// wants them. Those of a base that is away wait for the next time.
func (p *Pool) flattenAll(ctx context.Context) error {
	entries, err := os.ReadDir(p.path(imagesDir))
	if err != nil {
		return err
	}
	var errs []error
	away := map[string]bool{} // by addresses
	for _, entry := range entries {
		id := blockdev.ID(entry.Name())
		if !id.Valid() || immutable(id) {
			continue
		}
		c, err := readChain(id, p.image(id))
		if err == nil && (c == nil || away[p.urlOf(c)]) {
			continue
		}
		err = p.flattenIdle(ctx, id)
		if ctx.Err() != nil {
			return nil
		}
		if c != nil && errors.Is(err, blockdev.ErrUnreachable) {
			away[p.urlOf(c)] = true
		}
		if err != nil && !errors.Is(err, blockdev.ErrBusy) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, blockdev.ErrNotFound) {
			errs = append(errs, fmt.Errorf("%s: %w", id, err))
		}
	}
	if len(away) > 0 {
		time.AfterFunc(awayPause, p.wakeBackground)
	}
	return errors.Join(errs...)
}

func (p *Pool) flattenIdle(ctx context.Context, id blockdev.ID) error {
	work, done, ok := p.turns.takeFree(ctx, id)
	if !ok {
		p.lookAgain()
		return nil
	}
	defer done()
	var err error
	if p.known(id).served() {
		err = p.mergeServed(work, id, p.image(id))
	} else {
		err = p.flattenIn(work, id, p.image(id), false, p.pace(work))
	}
	if err = yielded(work, err); errors.Is(err, errYield) {
		p.lookAgain()
	}
	return err
}

// lookAgain has the background look again at what gave way.
func (p *Pool) lookAgain() { time.AfterFunc(time.Second, p.wakeBackground) }

// pace bounds the background to the pool's rate.
func (p *Pool) pace(ctx context.Context) func(n int) error {
	next := time.Now()
	return func(n int) error {
		if wait := time.Until(next); wait > 0 {
			timer := time.NewTimer(wait)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		} else {
			next = time.Now()
		}
		next = next.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
		return ctx.Err()
	}
}
