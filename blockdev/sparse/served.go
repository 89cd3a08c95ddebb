package sparse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/opened"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

// Workers start the processes that serve images, and find them again.
type Workers = opened.Workers

type calls = opened.Calls // embedded, under a name that is not exported

// isSocket reports whether a worker gives this kind.
func isSocket(k blockdev.Kind) bool { return opened.IsSocket(k) }

// served reports whether a worker serves the image.
func (o *opening) served() bool { return o != nil && o.atWorker.Token != "" }

// looped reports whether it is a loop device of the image.
func (o *opening) looped() bool { return o != nil && o.kind == blockdev.Block && !o.served() }

func openingOf(n opened.Note) *opening {
	return &opening{kind: n.Opened(), readOnly: n.ReadOnly, atWorker: n}
}

// readServed reads the note of an opening at a worker; nil where there is none of
// this boot.
func readServed(dir string) (*opening, error) {
	n, err := opened.Read(dir + "/" + lockFile)
	if n == nil {
		return nil, err
	}
	o := openingOf(*n)
	o.inherited = true
	return o, nil
}

func clearServed(dir string) error { return opened.Clear(dir + "/" + lockFile) }

// openServed opens an image at a worker, a new one if there is no opening.
func (p *Pool) openServed(ctx context.Context, id blockdev.ID, dir string, o *opening, w blockdev.Want) (blockdev.Endpoint, error) {
	fresh := o == nil
	if fresh {
		n, err := opened.New(w)
		if err != nil {
			return blockdev.Endpoint{}, err
		}
		o = openingOf(n)
	}
	if err := o.atWorker.Fits(w); err != nil {
		return blockdev.Endpoint{}, err
	}
	changes := p.addresses.count()
	worker, err := p.running(ctx, id, dir, o, w.Limits, !fresh)
	if err != nil {
		if fresh {
			err = errors.Join(err, clearServed(dir))
		}
		return blockdev.Endpoint{}, err
	}
	if fresh {
		if o, err = p.remember(id, o); err != nil {
			return blockdev.Endpoint{}, err
		}
	}
	if changes != p.addresses.count() || p.untold(id) { // between its start and its being remembered, or while it stood still
		p.tellFound(ctx, id, dir)
	}
	e, err := p.servedEndpoint(ctx, id, dir, o, worker)
	if err != nil && fresh && o.atWorker.Device {
		err = errors.Join(err, p.stopServed(context.WithoutCancel(ctx), id, o, worker))
	}
	return e, err
}

// servedEndpoint is what an opening gives whose worker runs.
func (p *Pool) servedEndpoint(ctx context.Context, id blockdev.ID, dir string, o *opening, w *control.Worker) (blockdev.Endpoint, error) {
	e := blockdev.Endpoint{Kind: o.kind, Path: w.Socket(), ReadOnly: o.readOnly, Served: true, Lease: o.lease}
	var err error
	if e.Size, err = p.sizeOf(id, dir); err == nil && w.Size() < e.Size { // of a Grow that was cut short
		err = w.Grow(ctx, e.Size)
	}
	if err == nil && o.atWorker.Device {
		e.Path, err = p.deviceOver(ctx, id, o, w, e.Size)
	}
	return e, err
}

func (p *Pool) sizeOf(id blockdev.ID, dir string) (int64, error) {
	c, err := readChain(id, dir)
	if err != nil {
		return 0, err
	}
	if c == nil {
		status, err := sys.StatusAt(dir + "/" + imageFile)
		return status.Size, err
	}
	f, closeFiles, err := openLayer(dir, c.Layers[0], os.O_RDONLY)
	if err != nil {
		return 0, unexplained(c.Layers[0], err)
	}
	size, err := overlay.SizeOf(f.Map)
	return size, errors.Join(err, closeFiles())
}

// running gives the worker of an image, which is started with limits if it does not run;
// again says that the opening has had one.
func (p *Pool) running(ctx context.Context, id blockdev.ID, dir string, o *opening, limits blockdev.Limits, again bool) (*control.Worker, error) {
	w, err := p.worker(ctx, id)
	if !errors.Is(err, blockdev.ErrNotFound) {
		return w, err
	}
	c, err := readChain(id, dir)
	if err == nil {
		err = p.sweep(dir, c)
	}
	if err != nil {
		return nil, err
	}
	lock, err := takeLock(dir + "/" + lockFile)
	if err != nil {
		return nil, err
	}
	if err = noSpace(o.atWorker.Write(lock)); err == nil {
		err = p.at("open.worker")
	}
	if err == nil && !o.readOnly {
		p.forgetDescent(id)
		err = recoverLayers(dir, c, again, true)
	}
	if err == nil {
		w, err = p.start(ctx, id, dir, c, o, limits, lock)
	}
	if err != nil {
		dropLock(lock)
		return nil, err
	}
	return w, lock.Close() // the worker has it, and keeps the lock
}

// worker finds the one that serves an image, and ends what a call that was cut short
// has begun with it. blockdev.ErrNotFound when none runs.
func (p *Pool) worker(ctx context.Context, id blockdev.ID) (*control.Worker, error) {
	w, err := p.workers.Find(ctx, id)
	if err != nil {
		return nil, err
	}
	return w, w.Settle(ctx, func(c control.Change) error { return p.recordChange(ctx, w, id, c) })
}

// recordChange makes durable what a worker's stack has become, which it may be
// already.
func (p *Pool) recordChange(ctx context.Context, w *control.Worker, id blockdev.ID, change control.Change) error {
	dir, _, err := p.locate(id)
	if err != nil {
		return err
	}
	c, err := readChain(id, dir)
	if err != nil {
		return err
	}
	if change.Sealed == "" {
		return p.recordMerged(ctx, w, id, dir, c, change.Layer)
	}
	top := strings.TrimSuffix(change.Sealed, dataSuffix)
	if c != nil && c.Layers[0] == top {
		return syncDir(dir)
	}
	s := subject{id: id, dir: dir, chain: c}
	flat := c == nil
	if flat {
		status, err := sys.StatusAt(dir + "/" + imageFile)
		if err != nil {
			return err
		}
		c = &chain{Base: newPart("base"), BaseSize: status.Size}
	}
	if err := p.recordSeal(s, c.with(top)); err != nil || !flat {
		return err
	}
	_ = p.dropFlatName(dir) // it is recorded
	return nil
}

// recordMerged makes durable that a layer is not in a stack any more.
func (p *Pool) recordMerged(ctx context.Context, w *control.Worker, id blockdev.ID, dir string, c *chain, gone int) error {
	s, err := w.Status(ctx)
	if err != nil {
		return err
	}
	if c == nil || s.Layers == nil || gone >= len(c.Layers) && len(c.Layers) != s.Layers.Sealed {
		return fmt.Errorf("%w: its worker has taken out a layer that it never had", blockdev.ErrCorrupt)
	}
	if len(c.Layers) == s.Layers.Sealed { // it counts the one that goes
		return syncDir(dir)
	}
	return p.recordDrop(id, dir, c, gone)
}

// start opens all files and has a worker serve them.
func (p *Pool) start(ctx context.Context, id blockdev.ID, dir string, c *chain, o *opening, limits blockdev.Limits, lock *os.File) (_ *control.Worker, err error) {
	spec := control.Spec{ID: id, Kind: o.atWorker.Kind, ReadOnly: o.readOnly, Limits: limits, Lock: lock, Hydrate: !o.readOnly, Trace: p.trace(c), Opening: o.atWorker.Socket()}
	if spec.Size, err = p.sizeOf(id, dir); err != nil {
		return nil, err
	}
	var files []*os.File
	defer func() { closeAll(files) }()
	open := func(name string, flag int) *os.File {
		f, openErr := openPart(dir+"/"+name, flag)
		if openErr != nil {
			err = errors.Join(err, unexplained(name, openErr))
			return nil
		}
		files = append(files, f)
		return f
	}
	if c == nil {
		spec.Flat = open(imageFile, accessMode(o.readOnly)|syscall.O_DIRECT)
	} else {
		for i, name := range c.Layers {
			flag := accessMode(o.readOnly || i > 0)
			spec.Layers = append(spec.Layers, control.Layer{Data: open(name+dataSuffix, flag|syscall.O_DIRECT), Map: open(name+mapSuffix, flag)})
		}
		switch {
		case c.far():
			spec.Remote = &control.Remote{URL: p.urlOf(c), Prefixes: p.prefixes.Texts(), Chunks: open(c.Base, os.O_RDONLY)}
		case c.Base != "":
			spec.Base, spec.BaseSize = open(c.Base, os.O_RDONLY), c.BaseSize
		}
		if !o.readOnly {
			err = errors.Join(err, ownTop(dir, c))
		}
	}
	if err == nil && spec.Remote != nil {
		_, err = verifyChunks(spec.Remote.Chunks, c)
	}
	if err != nil {
		return nil, err
	}
	return p.workers.Serve(ctx, spec)
}

// recoverLayers readies the layers that a worker may have written to for whoever opens
// them next: the top, and the one below it, from which it had not gone on to a top that
// was recorded already. killed says that it ended under the hands of its clients, atWorker
// that a worker is next.
func recoverLayers(dir string, c *chain, killed, atWorker bool) error {
	if c == nil {
		return nil
	}
	for i, name := range c.Layers[:min(2, len(c.Layers))] {
		if !ownLayer(dir, name) {
			return nil // whoever has it too was told that it is durable
		}
		data, err := openPart(dir+"/"+name+dataSuffix, os.O_RDWR|syscall.O_DIRECT)
		if err != nil {
			return unexplained(name, err)
		}
		index, err := os.OpenFile(dir+"/"+name+mapSuffix, os.O_RDWR, 0)
		if err != nil {
			return errors.Join(unexplained(name, err), data.Close())
		}
		if f := (overlay.OSFile{File: data}); !atWorker || killed || i > 0 || !f.Witnesses() { // of a top that is one the worker finds all
			err = overlay.Recover(overlay.Files{Data: f, Map: overlay.OSFile{File: index}}, killed)
		}
		if err = errors.Join(noSpace(err), data.Close(), index.Close()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// recoverClosed is recoverLayers for who works on an image without a worker: what is read
// by him is what the next worker reads, be it written before a crash or not. The caller
// has the turn.
func (p *Pool) recoverClosed(id blockdev.ID, dir string, draft bool, c *chain) error {
	if immutable(id) && !draft {
		return nil
	}
	return recoverLayers(dir, c, p.known(id).served(), false)
}

// openPart opens a file, without direct I/O where its filesystem has none.
func openPart(path string, flag int) (*os.File, error) {
	f, err := os.OpenFile(path, flag, 0)
	if errors.Is(err, syscall.EINVAL) && flag&syscall.O_DIRECT != 0 {
		f, err = os.OpenFile(path, flag&^syscall.O_DIRECT, 0)
	}
	return f, err
}

// ownLayer reports whether a layer is this image's alone.
func ownLayer(dir, name string) bool {
	data, errData := sys.StatusAt(dir + "/" + name + dataSuffix)
	index, errMap := sys.StatusAt(dir + "/" + name + mapSuffix)
	return errors.Join(errData, errMap) == nil && data.Links == 1 && index.Links == 1
}

// closeServed stops the worker: it flushes and ends. What has become whole is made
// flat. blockdev.ErrBusy while it has clients.
func (p *Pool) closeServed(ctx context.Context, id blockdev.ID, o *opening) error {
	lost := p.detachDevice(ctx, id, o)
	if lost != nil && !errors.Is(lost, blockdev.ErrFailed) {
		return lost
	}
	return errors.Join(lost, p.closeWorker(ctx, id, o))
}

func (p *Pool) closeWorker(ctx context.Context, id blockdev.ID, o *opening) error {
	w, err := p.worker(ctx, id)
	if err == nil && !o.atWorker.Device { // that was its only client, and is gone
		err = opened.Unused(ctx, w)
	}
	if errors.Is(err, blockdev.ErrNotFound) {
		return p.endServed(id, o, true, nil)
	}
	if err != nil {
		return err
	}
	p.keepTrace(ctx, id, w)
	return p.stopServed(ctx, id, o, w)
}

// stopServed tells the worker of an opening to end, and ends the opening.
func (p *Pool) stopServed(ctx context.Context, id blockdev.ID, o *opening, w *control.Worker) error {
	err := w.Stop(ctx)
	if err != nil && !errors.Is(err, blockdev.ErrFailed) {
		return err
	}
	return p.endServed(id, o, false, err)
}

// endServed ends an opening whose worker has ended: in its own time, with a flush that has
// failed or not (nil), or killed.
func (p *Pool) endServed(id blockdev.ID, o *opening, killed bool, failed error) error {
	if err := p.abandonDevice(id, o); err != nil { // as long as the note says that there is one
		return errors.Join(failed, err)
	}
	dir, draft, err := p.locate(id)
	if err == nil && killed && !o.readOnly {
		err = p.recoverKilled(id, dir)
	}
	if err == nil {
		if err = clearServed(dir); err == nil {
			p.forget(id, o.lease)
			err = p.at("close.settle")
		}
		if err == nil && failed == nil && !o.readOnly {
			err = p.settle(id, dir, draft)
		}
	} else if errors.Is(err, blockdev.ErrNotFound) {
		p.forget(id, o.lease)
		err = nil
	}
	return errors.Join(failed, err)
}

// recoverKilled keeps what a worker has acknowledged that was killed and that no other one
// follows. An image that is damaged is left as it is.
func (p *Pool) recoverKilled(id blockdev.ID, dir string) error {
	c, err := readChain(id, dir)
	if err == nil {
		err = recoverLayers(dir, c, true, false)
	}
	if errors.Is(err, blockdev.ErrCorrupt) {
		p.log.Error("ready an image whose worker has ended", "id", id, "error", err)
		return nil
	}
	return err
}

// settle makes a closed layered image flat that has become whole, which costs a few
// flushes. Others are left to the background.
func (p *Pool) settle(id blockdev.ID, dir string, draft bool) error {
	c, err := readChain(id, dir)
	if err != nil || c == nil || sealedForEver(id, draft) {
		return err
	}
	p.wakeBackground()
	if len(c.Layers) > 1 {
		return nil
	}
	f, closeFiles, err := openLayer(dir, c.Layers[0], os.O_RDONLY)
	if err != nil {
		return unexplained(c.Layers[0], err)
	}
	size, held, err := overlay.Survey(f.Map)
	if err = errors.Join(err, closeFiles()); err != nil || held < size {
		return err
	}
	return errors.Join(ownTop(dir, c), p.becomeFlat(id, dir, c.Layers[0]+dataSuffix))
}

// severServed ends the only way to the image: the worker.
func (p *Pool) severServed(ctx context.Context, id blockdev.ID, dir string, o *opening) error {
	if err := p.at("sever.worker"); err != nil {
		return err
	}
	size, err := p.sizeOf(id, dir)
	if err != nil {
		return err
	}
	return opened.Severing{
		Workers: p.workers, Log: p.log, ID: id, Note: o.atWorker, Size: size,
		Worker: func(ctx context.Context) (*control.Worker, error) { return p.worker(ctx, id) },
		Stop: func(ctx context.Context, w *control.Worker) error {
			if err := p.at("sever.stop"); err != nil {
				return err
			}
			return w.Stop(ctx)
		},
		Close: func(_ context.Context, killed bool, failed error) error {
			if err := p.at("sever.close"); err != nil {
				return err
			}
			return p.endServed(id, o, killed, failed)
		},
	}.Sever(ctx)
}

// sealServed has the worker put a layer on top.
func (p *Pool) sealServed(ctx context.Context, s subject, top string, record func() error) (held time.Duration, err error) {
	w, err := p.worker(ctx, s.id)
	if errors.Is(err, blockdev.ErrNotFound) { // it has died, so nobody writes
		if err := recoverLayers(s.dir, s.chain, true, true); err != nil {
			return 0, err
		}
		return 0, record()
	}
	if err != nil {
		return 0, err
	}
	data, err := openPart(s.dir+"/"+top+dataSuffix, os.O_RDWR|syscall.O_DIRECT)
	if err != nil {
		return 0, err
	}
	defer data.Close()
	index, err := os.OpenFile(s.dir+"/"+top+mapSuffix, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer index.Close()
	held, err = w.Seal(ctx, control.Layer{Data: data, Map: index}, record)
	if errors.Is(err, blockdev.ErrNotFound) { // not that there is no such image
		err = fmt.Errorf("its worker ended meanwhile: %s", err.Error())
	}
	return held, err
}

// growServed tells a worker, if one runs: of a layered image it makes the top larger.
// done is false where nobody did. Who has a device over it sees the size on return.
func (p *Pool) growServed(ctx context.Context, id blockdev.ID, dir string, o *opening, size int64) (done bool, err error) {
	if o.atWorker.Device {
		return true, p.growDevice(ctx, id, dir, o, size)
	}
	w, err := p.worker(ctx, id)
	if errors.Is(err, blockdev.ErrNotFound) {
		return false, nil
	}
	if err == nil && w.Size() < size {
		err = w.Grow(ctx, size)
	}
	return true, err
}

// askedAtOnce bounds the workers that are asked beside each other.
const askedAtOnce = 32

// eachServed does something for each image that is open at a worker, several at once: one
// worker that does not answer is not waited for by the others' turn.
func (p *Pool) eachServed(do func(id blockdev.ID)) {
	p.mu.Lock()
	var ids []blockdev.ID
	for id, o := range p.openings {
		if o.served() {
			ids = append(ids, id)
		}
	}
	p.mu.Unlock()
	var all sync.WaitGroup
	places := make(chan struct{}, askedAtOnce)
	for _, id := range ids {
		places <- struct{}{}
		all.Go(func() {
			defer func() { <-places }()
			do(id)
		})
	}
	all.Wait()
}

// observed gives the worker of an image that is open at one.
func (p *Pool) observed(ctx context.Context, id blockdev.ID) (*control.Worker, error) {
	if err := check(ctx, id); err != nil {
		return nil, err
	}
	if o := p.known(id); !o.served() {
		return nil, fmt.Errorf("no worker serves it: %w", blockdev.ErrNotFound)
	}
	w, err := p.workers.Find(ctx, id)
	if err == nil && p.untold(id) {
		if dir, _, err := p.locate(id); err == nil {
			p.tellFound(ctx, id, dir)
		}
	}
	return w, err
}
