package engine

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/templates"
)

// maxSteps bounds settle: a volume that needs more has a bug, not a future.
const maxSteps = 16

// settle takes one step after the other until nothing is left to do. The caller
// holds the volume's lock; v is changed to what it became.
func (e *Engine) settle(ctx context.Context, v *Volume) error {
	for range maxSteps {
		f, err := e.ask(ctx, *v)
		if err != nil {
			return err
		}
		next := step(*v, f)
		if next == actNothing {
			e.setPending(v.ID, waiting(*v, f))
			e.forgetRetry(v.ID)
			return nil
		}
		var again bool
		err = e.timed(string(next), func() (err error) {
			again, err = e.take(ctx, v, f, next)
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", next, err)
		}
		if !again {
			return nil
		}
	}
	return fmt.Errorf("volume %s does not settle", v.ID)
}

// waiting says what growth waits for when nothing can be done for it now.
func waiting(v Volume, f facts) string {
	if f.strange != "" {
		return v.guestsOwn(f.strange)
	}
	if f.raw && !v.Tainted && v.Filesystem != filesystem.None && v.SizeMiB > v.GuestMiB {
		return "the filesystem grows when the volume is detached: it is attached read-only to a virtual machine"
	}
	return ""
}

// take performs one action. again is false when the volume is as far as it can
// get now: gone, failed, or pending.
func (e *Engine) take(ctx context.Context, v *Volume, f facts, next action) (again bool, err error) {
	switch next {
	case actAllocate:
		// Its image has the wanted size, and its filesystem the image's, unless it is a
		// fork, or its bytes are far away.
		err := e.allocate(ctx, v)
		return v.Snapshot != "" || v.Remote, err
	case actAdopt:
		return true, e.adoptImage(ctx, v)
	case actRemove:
		return false, e.remove(ctx, *v)
	case actMissing:
		v.Failure = "the image is missing from the pool"
		e.catalog.replace(*v)
		return false, nil
	case actDevice:
		return true, e.o.Pool.Grow(ctx, v.ID, v.bytes())
	case actTell:
		return true, e.inform(ctx, *v, f.device)
	case actInside:
		err := e.growInside(ctx, v)
		return err == nil && v.SizeMiB == v.GuestMiB, err
	case actOffline:
		return e.growOffline(ctx, v, f)
	case actMounted:
		return e.growMounted(ctx, v, f)
	case actNote:
		return true, e.noteGrown(ctx, v)
	}
	return false, fmt.Errorf("no such action")
}

// ask gathers the facts that step needs for the volume's phase.
func (e *Engine) ask(ctx context.Context, v Volume) (facts, error) {
	var f facts
	if v.Phase == Deleting {
		return f, nil
	}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if errors.Is(err, blockdev.ErrNotFound) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	f.published, f.device = !info.Draft, info.Size
	f.filled = e.filledTo(v.ID) == info.Size
	f.raw, f.untold = e.rawOnly(v), e.untold(v, info.Size)
	_, agent := e.inside(v, false)
	f.inside = agent != nil
	if v.Phase != Ready || v.Filesystem == filesystem.None || !f.published || f.raw || v.moving() {
		return f, nil
	}
	if v.Tainted {
		return e.askTainted(ctx, v, f)
	}
	dir, err := e.o.Stage.Mounted(ctx, v.ID)
	if err != nil {
		return f, err
	}
	if dir != "" {
		f.mounted = true
		f.filesystem, err = e.o.Filesystems.SizeMounted(ctx, dir, v.Filesystem)
		return f, err
	}
	f.filesystem, err = e.sizeUnmounted(ctx, v)
	return f, err
}

// sizeUnmounted reads the size of a filesystem that nobody uses, in bytes.
func (e *Engine) sizeUnmounted(ctx context.Context, v Volume) (size int64, err error) {
	err = e.asBytes(ctx, v.ID, true, func(path string) (err error) {
		size, err = e.o.Filesystems.Size(ctx, path, v.Filesystem)
		return err
	}, func(b blockdev.Bytes) (err error) {
		size, err = e.o.Filesystems.SizeIn(ctx, b, v.Filesystem)
		return err
	})
	return size, err
}

// asFile opens the image as a file, or where the pool has none as a device, for as
// long as use runs. blockdev.ErrBusy when it is open otherwise: what somebody else
// has opened is not ours to close.
func (e *Engine) asFile(ctx context.Context, id blockdev.ID, readOnly bool, use func(path string) error) (err error) {
	endpoint, err := e.openFile(ctx, id, readOnly, func(ctx context.Context, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
		return e.openFlat(ctx, e.o.Pool, id, w)
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.o.Pool.Close(ctx, id, endpoint.Lease)) }()
	return use(endpoint.Path)
}

// openFile opens the image as a file, or where the pool has none as a device that
// nobody else has.
func (e *Engine) openFile(ctx context.Context, id blockdev.ID, readOnly bool, open func(context.Context, blockdev.ID, blockdev.Want) (blockdev.Endpoint, error)) (blockdev.Endpoint, error) {
	endpoint, err := open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.File}, ReadOnly: readOnly})
	if !errors.Is(err, errors.ErrUnsupported) {
		return endpoint, err
	}
	info, err := e.o.Pool.Stat(ctx, id)
	if err != nil {
		return blockdev.Endpoint{}, err
	}
	if info.Open {
		return blockdev.Endpoint{}, fmt.Errorf("%w: its device is open", blockdev.ErrBusy)
	}
	return open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}, ReadOnly: readOnly})
}

// allocate makes the draft, gives its filesystem an identity of its own and
// publishes it with the description that says Ready. The record follows.
func (e *Engine) allocate(ctx context.Context, v *Volume) error {
	if v.Filesystem == filesystem.None && v.Snapshot == "" {
		if err := e.o.Pool.Create(ctx, v.ID, v.bytes()); err != nil {
			return err
		}
	} else if err := e.timed("hydrate", func() error { return e.hydrate(ctx, v) }); err != nil {
		return err
	}
	if err := e.inheritRemote(ctx, v); err != nil {
		return err
	}
	if err := e.intended(v.ID); err != nil {
		return err
	}
	ready := v.clone()
	ready.Phase = Ready
	ready.Sequence++
	if s := e.sanitizing(*v); s != nil {
		e.happened(&ready, "sanitize", "%s", s)
	}
	e.happened(&ready, "deployment", "Volume is ready")
	if ready.Remote {
		e.happened(&ready, "hydration", "Its blocks are fetched as they are wanted, and the rest in the background")
	}
	b, err := describe(ready)
	if err != nil {
		return err
	}
	if err := e.timed("publish", func() error { return e.o.Pool.Publish(ctx, v.ID, b) }); err != nil {
		return err
	}
	if err := e.commit(ctx, ready); err != nil {
		return err
	}
	*v = ready
	return nil
}

func (e *Engine) hydrate(ctx context.Context, v *Volume) error {
	switch {
	case v.SanitizedFrom != "":
		return e.copyFiles(ctx, *v)
	case v.Snapshot != "":
		return e.fork(ctx, v)
	}
	spec := templates.SourceSpec{Filesystem: v.Filesystem, Size: v.bytes(), Revision: v.Revision, Pool: v.Pool}
	if err := e.o.Library.Hydrate(ctx, v.ID, spec); err != nil {
		return err
	}
	return e.identify(ctx, v.ID, v.Filesystem, v.UUID)
}

// identify gives the clean filesystem of a draft a UUID, which Publish makes durable.
func (e *Engine) identify(ctx context.Context, id blockdev.ID, t filesystem.Type, uuid string) error {
	return e.asBytes(ctx, id, false, func(path string) error {
		return e.o.Filesystems.Identify(ctx, path, t, uuid)
	}, func(b blockdev.Bytes) error {
		return e.o.Filesystems.IdentifyIn(ctx, b, b.Size(), t, uuid)
	})
}

// adoptImage lets the record follow a published image: its description was made
// durable before a crash took the commit.
func (e *Engine) adoptImage(ctx context.Context, v *Volume) error {
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if err != nil {
		return err
	}
	found, err := parseDescription(info.Description)
	if err != nil {
		return fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	if err := e.commit(ctx, found); err != nil {
		return err
	}
	*v = found
	return nil
}

// remove takes a volume away: mounts and device (left by a crash at most), then
// the image, then the record.
func (e *Engine) remove(ctx context.Context, v Volume) error {
	if err := e.deactivate(ctx, v); err != nil {
		return err
	}
	if err := e.removeOther(ctx, v); err != nil {
		return err
	}
	if err := e.o.Pool.Remove(ctx, v.ID); err != nil {
		return err
	}
	return e.erase(ctx, v.ID)
}

// growOffline grows the filesystem of a volume that nobody uses. ext4 is marked
// first: a growth that is cut short needs the checker before the next use.
func (e *Engine) growOffline(ctx context.Context, v *Volume, f facts) (again bool, err error) {
	if v.Remote { // nobody waits for a store to have a filesystem grow
		if err := e.growsWhenFlat(ctx, *v); err != nil {
			return false, err
		}
	}
	if grows, err := e.growsServed(ctx, *v); grows || err != nil {
		if err == nil {
			again, err = e.growOnStage(ctx, v, f)
		}
		if !errors.Is(err, filesystem.ErrCannotGrowMounted) {
			return again, err
		}
	}
	if v.Tainted && !v.CheckFirst { // later what the checker finds may be of our own growth
		if ready, err := e.preen(ctx, *v); !ready {
			return false, err
		}
	}
	if !v.CheckFirst && v.Filesystem == filesystem.Ext4 {
		v.CheckFirst = true
		if err := e.save(ctx, v); err != nil {
			return false, err
		}
	}
	err = e.asFile(ctx, v.ID, false, func(path string) error {
		return e.o.Filesystems.Grow(ctx, path, v.Filesystem)
	})
	if errors.Is(err, filesystem.ErrNeedsMount) {
		return e.growOnStage(ctx, v, f)
	}
	if err != nil {
		return false, err
	}
	e.setFilled(v.ID, f.device)
	if v.Tainted {
		return true, e.noteGrown(ctx, v)
	}
	if v.CheckFirst {
		v.CheckFirst = false
		return true, e.save(ctx, v)
	}
	return true, nil
}

// growOnStage mounts a volume that nobody uses, to grow it.
func (e *Engine) growOnStage(ctx context.Context, v *Volume, f facts) (again bool, err error) {
	dir, err := e.activate(ctx, *v, false)
	if err != nil {
		return false, errors.Join(err, e.deactivate(ctx, *v))
	}
	err = e.o.Filesystems.GrowMounted(ctx, dir, v.Filesystem)
	if err == nil {
		e.setFilled(v.ID, f.device)
	}
	return err == nil, errors.Join(err, e.deactivate(ctx, *v))
}

func (e *Engine) growMounted(ctx context.Context, v *Volume, f facts) (again bool, err error) {
	if v.frozenAt(e.o.Now()) {
		e.setPending(v.ID, "the filesystem grows when it is thawed")
		return false, nil
	}
	dir, err := e.o.Stage.Mounted(ctx, v.ID)
	if err != nil {
		return false, err
	}
	switch err := e.o.Filesystems.GrowMounted(ctx, dir, v.Filesystem); {
	case errors.Is(err, filesystem.ErrCannotGrowMounted):
		e.setPending(v.ID, fmt.Sprintf("the filesystem grows when the volume is detached: %v", err))
		return false, nil
	case errors.Is(err, filesystem.ErrReadOnly):
		e.setPending(v.ID, "the filesystem grows when the volume is detached or attached writable: it is attached read-only")
		return false, nil
	case err != nil:
		return false, err
	}
	e.setFilled(v.ID, f.device)
	return true, nil
}

// filledTo is the device size, in bytes, that the filesystem was last grown to.
func (e *Engine) filledTo(id blockdev.ID) int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.filled[id]
}

func (e *Engine) setFilled(id blockdev.ID, device int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.filled[id] = device
}

func (e *Engine) setPending(id blockdev.ID, why string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if why == "" {
		delete(e.pending, id)
		return
	}
	e.pending[id] = why
}

// activate opens the volume as a block device and mounts it on the stage.
func (e *Engine) activate(ctx context.Context, v Volume, readOnly bool) (dir string, err error) {
	endpoint, err := e.open(ctx, v.ID, mountWant(readOnly))
	if err != nil {
		return "", err
	}
	return e.o.Stage.Mount(ctx, v.ID, endpoint, v.Filesystem)
}

// mountWant is what this host mounts: it keeps the worker of one that is served.
func mountWant(readOnly bool) blockdev.Want {
	return blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}, ReadOnly: readOnly, Served: true}
}

func (e *Engine) open(ctx context.Context, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
	endpoint, err := e.openFlat(ctx, e.o.Pool, id, w)
	if err != nil {
		return endpoint, err
	}
	e.mu.Lock()
	e.endpoints[id] = endpoint
	e.mu.Unlock()
	if overWorker(endpoint) {
		e.guardDevice(id)
	}
	return endpoint, nil
}

// deactivate flushes, unmounts and closes what activate made, also when another
// life of this process made it.
func (e *Engine) deactivate(ctx context.Context, v Volume) error {
	if err := e.letRun(ctx, v.ID); err != nil { // a frozen filesystem outlives its unmount
		return err
	}
	e.countIO(ctx, v.ID, false)
	if err := e.serveAgain(ctx, v); err != nil { // an unmount writes
		return err
	}
	if err := e.o.Stage.Unmount(ctx, v.ID); err != nil {
		return err
	}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if errors.Is(err, blockdev.ErrNotFound) || err == nil && !info.Open {
		e.forgetEndpoint(v.ID)
		return nil
	}
	if err != nil {
		return err
	}
	lease, err := e.leaseOf(ctx, v)
	if err != nil {
		return err
	}
	e.dismissKeeper(v.ID) // its worker is to end, and until then the pool sees to it
	if err := e.o.Pool.Close(ctx, v.ID, lease); err != nil {
		if overWorker(e.endpointNow(v.ID)) {
			e.guardDevice(v.ID)
		}
		return err
	}
	e.forgetIO(v.ID)
	e.forgetEndpoint(v.ID)
	return nil
}

// leaseOf finds the opening of an open image: remembered, or asked for again (an
// opening that is there is found, not made twice).
func (e *Engine) leaseOf(ctx context.Context, v Volume) (string, error) {
	e.mu.Lock()
	endpoint, known := e.endpoints[v.ID]
	e.mu.Unlock()
	if known {
		return endpoint.Lease, nil
	}
	var failures error
	for _, kind := range []blockdev.Kind{blockdev.Block, blockdev.File, blockdev.VhostUser, blockdev.NBD} {
		for _, readOnly := range []bool{false, true} {
			endpoint, err := e.o.Pool.Open(ctx, v.ID, blockdev.Want{Kinds: []blockdev.Kind{kind}, ReadOnly: readOnly, Served: true, Limits: v.limitsServed()})
			if err == nil {
				return endpoint.Lease, nil
			}
			failures = errors.Join(failures, err)
		}
	}
	return "", failures
}

func (e *Engine) forgetEndpoint(id blockdev.ID) {
	e.dismissKeeper(id)
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.endpoints, id)
}
