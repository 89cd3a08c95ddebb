package sparse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/loop"
	"holdfast/blockdev/serve/opened"
	"holdfast/internal/sys"
)

// opening is what this process knows of an open image. Of a block device the
// kernel knows it as well, and is asked each time.
type opening struct {
	kind      blockdev.Kind // of the endpoint
	readOnly  bool
	lease     string
	device    loop.Device // of a Block that no worker serves
	lock      *os.File    // beside the image, held while it is open; at a worker that has it
	atWorker  opened.Note // of one at a worker
	inherited bool        // an earlier process made it
	untold    bool        // its worker was silent when it was told where its base is; the pool's lock is held
}

// Open implements blockdev.Backend. A Block is a loop device with direct I/O that
// enforces ReadOnly itself and is found again after a restart of the process; of a
// layered image, for who wants it Served, one of the kernel's NBD client over a worker, of
// which the same is true. A File
// is the image's path: its opening ends with the process, and a consumer that asked
// for ReadOnly must open it so. A VhostUser or NBD is a worker's socket; the opening
// outlives this process and also a worker that dies: Open again starts another one.
func (p *Pool) Open(ctx context.Context, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
	e, err := p.openImage(ctx, id, w)
	return e, blockdev.Op("sparse.Open", id, err)
}

func (p *Pool) openImage(ctx context.Context, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
	if err := check(ctx, id); err != nil {
		return blockdev.Endpoint{}, err
	}
	if len(w.Kinds) == 0 {
		return blockdev.Endpoint{}, fmt.Errorf("no kind of endpoint wanted: %w", blockdev.ErrInvalid)
	}
	done, err := p.turns.take(ctx, id)
	if err != nil {
		return blockdev.Endpoint{}, err
	}
	defer done()
	dir, draft, err := p.locate(id)
	if err != nil {
		return blockdev.Endpoint{}, err
	}
	if p.isAccessed(id) {
		return blockdev.Endpoint{}, fmt.Errorf("this process works on it: %w", blockdev.ErrBusy)
	}
	if o := p.known(id); o.served() {
		return p.openServed(ctx, id, dir, o, w)
	}
	c, err := readChain(id, dir)
	if err != nil {
		return blockdev.Endpoint{}, err
	}
	if err := p.sweep(dir, c); err != nil {
		return blockdev.Endpoint{}, err
	}
	if c != nil {
		if sealedForEver(id, draft) || !p.layers || !slices.ContainsFunc(w.Kinds, isSocket) && !onDevice(w) {
			return blockdev.Endpoint{}, layeredKinds(w.Kinds)
		}
		return p.openServed(ctx, id, dir, nil, w)
	}
	if err := writable(id, dir, draft, w.ReadOnly); err != nil {
		return blockdev.Endpoint{}, err
	}
	f, err := os.OpenFile(dir+"/"+imageFile, accessMode(w.ReadOnly), 0)
	if err != nil {
		return blockdev.Endpoint{}, notFound(err)
	}
	defer f.Close()

	o := p.known(id)
	if o == nil && slices.ContainsFunc(w.Kinds, func(k blockdev.Kind) bool { return k != blockdev.File }) {
		o, err = p.unknownDevice(id, dir, f)
	}
	if err == nil && o == nil && p.atWorker(w.Kinds) {
		return p.openServed(ctx, id, dir, nil, w)
	}
	if err == nil && o == nil {
		o, err = p.newOpening(id, dir, f, w)
	}
	if err != nil {
		return blockdev.Endpoint{}, err
	}
	if o.readOnly != w.ReadOnly || !slices.Contains(w.Kinds, o.kind) {
		return blockdev.Endpoint{}, fmt.Errorf("open as %s: %w", o.lease, blockdev.ErrBusy)
	}
	return o.endpoint(dir, f)
}

// atWorker reports whether a worker gives the first of these kinds that the pool has.
func (p *Pool) atWorker(kinds []blockdev.Kind) bool {
	for _, k := range kinds {
		if k == blockdev.File || k == blockdev.Block {
			return false
		}
		if p.workers != nil && isSocket(k) {
			return true
		}
	}
	return false
}

// layeredKinds is why a layered image does not open as one of these.
func layeredKinds(kinds []blockdev.Kind) error {
	for _, k := range kinds {
		if k == blockdev.File || k == blockdev.Block || isSocket(k) {
			return blockdev.ErrLayered
		}
	}
	return fmt.Errorf("endpoint kinds %v: %w", kinds, errors.ErrUnsupported)
}

// writable refuses writers of a flat image that is another's base, or a snapshot.
func writable(id blockdev.ID, dir string, draft, readOnly bool) error {
	if readOnly {
		return nil
	}
	if sealedForEver(id, draft) {
		return fmt.Errorf("%w: a snapshot is never written", blockdev.ErrInvalid)
	}
	status, err := sys.StatusAt(dir + "/" + imageFile)
	if err != nil {
		return notFound(err)
	}
	if status.Links > 1 {
		return fmt.Errorf("%w: other images read from it", blockdev.ErrInvalid)
	}
	return nil
}

func accessMode(readOnly bool) int {
	if readOnly {
		return os.O_RDONLY
	}
	return os.O_RDWR
}

// endpoint describes the opening. A device that a crash left smaller than its
// image is grown.
func (o *opening) endpoint(dir string, f *os.File) (blockdev.Endpoint, error) {
	status, err := sys.StatusOf(f)
	if err != nil {
		return blockdev.Endpoint{}, err
	}
	e := blockdev.Endpoint{Kind: o.kind, Path: dir + "/" + imageFile, Size: status.Size, ReadOnly: o.readOnly, Lease: o.lease}
	if o.looped() {
		e.Path, e.Size = o.device.Path, o.device.Size
		if o.device.Size < status.Size {
			e.Size, err = o.device.Grow()
		}
	}
	return e, err
}

// unknownDevice looks for a device of the image that this process has not made
// and did not find when it opened the pool, and adopts it; nil for none. As a
// rule the image is provably open nowhere else, which is told at once. Otherwise
// every loop device of the host is asked.
func (p *Pool) unknownDevice(id blockdev.ID, dir string, f *os.File) (*opening, error) {
	if only, err := sys.OnlyOpening(f); err != nil || only {
		return nil, err
	}
	devices, err := loop.Find(f)
	if err != nil || len(devices) == 0 {
		return nil, err
	}
	if len(devices) > 1 || devices[0].Partial {
		return nil, fmt.Errorf("%w: it has %d loop devices, the first is %s", blockdev.ErrBusy, len(devices), devices[0].Path)
	}
	return p.adopt(id, dir, devices[0])
}

// known gives the opening that this process knows of, nil for none. One whose
// device is gone is forgotten.
func (p *Pool) known(id blockdev.ID) *opening {
	p.mu.Lock()
	o := p.openings[id]
	p.mu.Unlock()
	if !o.looped() {
		return o
	}
	now, err := loop.Inspect(o.device.Path)
	switch {
	case err == nil && now.File == o.device.File && now.Sequence == o.device.Sequence:
		fresh := *o
		fresh.device = now
		return &fresh
	case err == nil || errors.Is(err, blockdev.ErrNotFound):
		p.forget(id, o.lease)
		return nil
	}
	return o
}

// adopt takes over a device that an earlier process, or a Detach cut short, left.
func (p *Pool) adopt(id blockdev.ID, dir string, device loop.Device) (*opening, error) {
	if device.Autoclear {
		if err := device.Keep(); err != nil {
			return nil, err
		}
	}
	lock, err := takeLock(dir + "/" + lockFile)
	if err != nil {
		return nil, err
	}
	return p.remember(id, &opening{kind: blockdev.Block, readOnly: device.ReadOnly, device: device, lock: lock, inherited: true})
}

func (p *Pool) newOpening(id blockdev.ID, dir string, f *os.File, w blockdev.Want) (*opening, error) {
	supported := slices.IndexFunc(w.Kinds, func(k blockdev.Kind) bool { return k == blockdev.File || k == blockdev.Block })
	if supported < 0 {
		return nil, fmt.Errorf("endpoint kinds %v: %w", w.Kinds, errors.ErrUnsupported)
	}
	lock, err := takeLock(dir + "/" + lockFile)
	if err != nil {
		return nil, err
	}
	o := &opening{kind: w.Kinds[supported], readOnly: w.ReadOnly, lock: lock}
	if o.looped() {
		if err = p.at("open.attach"); err == nil {
			o.device, err = loop.Attach(f, w.ReadOnly)
		}
		if err != nil {
			dropLock(lock)
			return nil, err
		}
		noteBegin(lock, o.device)
	}
	return p.remember(id, o)
}

// remember names an opening and keeps it. A device's name holds for this use of
// it alone: a stale Close cannot meet a later one.
func (p *Pool) remember(id blockdev.ID, o *opening) (*opening, error) {
	mode := "rw"
	if o.readOnly {
		mode = "ro"
	}
	o.lease = fmt.Sprintf("%s-%s", o.kind, mode)
	if o.looped() {
		boot, err := sys.BootID()
		if err != nil {
			dropLock(o.lock)
			return nil, err
		}
		o.lease = fmt.Sprintf("%s-%s-%d", o.lease, boot, o.device.Sequence)
	}
	if o.served() {
		o.lease = o.atWorker.Lease()
	}
	p.mu.Lock()
	p.openings[id] = o
	p.mu.Unlock()
	return o, nil
}

func (p *Pool) forget(id blockdev.ID, lease string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if o := p.openings[id]; o != nil && o.lease == lease {
		if o.lock != nil {
			dropLock(o.lock)
		}
		delete(p.openings, id)
	}
}

// Close implements blockdev.Backend.
func (p *Pool) Close(ctx context.Context, id blockdev.ID, lease string) error {
	return blockdev.Op("sparse.Close", id, p.close(ctx, id, lease))
}

func (p *Pool) close(ctx context.Context, id blockdev.ID, lease string) error {
	if err := check(ctx, id); err != nil {
		return err
	}
	done, err := p.turns.take(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	o := p.known(id)
	if o == nil || o.lease != lease {
		return nil
	}
	return p.release(ctx, id, o)
}

// release flushes and ends an opening.
func (p *Pool) release(ctx context.Context, id blockdev.ID, o *opening) error {
	if err := p.at("close.flush"); err != nil {
		return err
	}
	if o.served() {
		return p.closeServed(ctx, id, o)
	}
	err := p.flushOpening(ctx, id, o)
	if err == nil {
		p.forget(id, o.lease)
	}
	return err
}

func (p *Pool) flushOpening(ctx context.Context, id blockdev.ID, o *opening) error {
	if o.looped() {
		return o.device.Detach(ctx) // flushes, down to the image
	}
	dir, draft, err := p.locate(id)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if o.readOnly || draft {
		return nil // nothing was written, or Publish flushes it: a draft is never durable
	}
	f, err := os.Open(dir + "/" + imageFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return syncFile(f)
}

// closedForRemoval makes sure that nobody uses an image. A draft's device that
// only a dead process had made does not count, and goes.
func (p *Pool) closedForRemoval(ctx context.Context, id blockdev.ID, dir string, draft bool) error {
	if p.isAccessed(id) {
		return fmt.Errorf("this process works on it: %w", blockdev.ErrBusy)
	}
	o := p.known(id)
	if o == nil && !draft {
		found, err := p.foreignDevice(id, dir)
		if err != nil {
			return err
		}
		o = found
	}
	if o == nil {
		return nil
	}
	if draft && o.inherited {
		return p.release(ctx, id, o)
	}
	return fmt.Errorf("open as %s: %w", o.lease, blockdev.ErrBusy)
}

// foreignDevice is unknownDevice for an image that nobody has opened yet.
func (p *Pool) foreignDevice(id blockdev.ID, dir string) (*opening, error) {
	f, err := os.Open(dir + "/" + imageFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return p.unknownDevice(id, dir, f)
}

// findOpenings learns from the kernel, and from the notes beside them, which images an
// earlier process left open.
func (p *Pool) findOpenings(ctx context.Context) error {
	devices, err := loop.List()
	if err != nil {
		return err
	}
	byFile := map[sys.FileID][]loop.Device{}
	for _, device := range devices {
		byFile[device.File] = append(byFile[device.File], device)
	}
	for _, parent := range []string{imagesDir, draftsDir} {
		entries, err := os.ReadDir(p.path(parent))
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := p.findOpening(ctx, blockdev.ID(entry.Name()), p.path(parent, entry.Name()), byFile); err != nil {
				return err
			}
		}
	}
	p.eachServed(func(id blockdev.ID) { p.meetWorker(ctx, id) })
	return ctx.Err()
}

func (p *Pool) findOpening(ctx context.Context, id blockdev.ID, dir string, byFile map[sys.FileID][]loop.Device) error {
	if !id.Valid() {
		return nil
	}
	if found, err := p.findServed(id, dir); err != nil || found {
		return err
	}
	if err := p.sweepAtStart(id, dir); err != nil {
		return err
	}
	status, err := sys.StatusAt(dir + "/" + imageFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// What a Sever that was cut short left: a body that has no name yet.
	if err := os.Remove(dir + "/" + severedFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	devices := byFile[status.FileID]
	if len(devices) != 1 || devices[0].Partial {
		return nil // none, or not as we make them: Open and Remove will refuse
	}
	_, err = p.adopt(id, dir, devices[0])
	return err
}

// findServed takes over an opening at a worker, which may have died.
func (p *Pool) findServed(id blockdev.ID, dir string) (found bool, err error) {
	if p.workers == nil {
		return false, nil
	}
	o, err := readServed(dir)
	if err != nil || o == nil {
		return false, err
	}
	_, err = p.remember(id, o)
	return err == nil, err
}

// meetWorker ends what an earlier process has begun with a worker that it has left, and
// tells it what it has not. With one that does not answer in time that is done when the
// image is opened, or the worker is observed, next, as an attachment's is at each look.
func (p *Pool) meetWorker(ctx context.Context, id blockdev.ID) {
	bounded, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	dir, _, err := p.locate(id)
	if err == nil {
		_, err = p.worker(bounded, id)
	}
	if errors.Is(err, blockdev.ErrNotFound) {
		return
	}
	if err != nil {
		p.told(id, bounded.Err() == nil)
		p.log.Error("find the worker of an image again", "id", id, "error", err)
		return
	}
	p.tellFound(bounded, id, dir)
}

// sweepAtStart is sweep for a directory of which nothing is known yet; one that is
// damaged is left as it is.
func (p *Pool) sweepAtStart(id blockdev.ID, dir string) error {
	c, err := readChain(id, dir)
	if errors.Is(err, blockdev.ErrCorrupt) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err == nil {
		err = p.sweep(dir, c)
	}
	if errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	return err
}
