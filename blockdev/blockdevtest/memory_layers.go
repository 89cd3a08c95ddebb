package blockdevtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
)

// copyOf makes a draft with an image's bytes; the lock must be held.
func (m *Memory) copyOf(from *memoryImage, size int64) *memoryImage {
	i := &memoryImage{draft: true, data: from.data.clone(size)}
	if m.Layered {
		i.layers, i.remote = from.layers+1, from.remote
		i.absent, _ = i.data.space()
	}
	return i
}

// Snapshot implements blockdev.Snapshotter.
func (m *Memory) Snapshot(ctx context.Context, snap, of blockdev.ID) (held time.Duration, err error) {
	return 0, blockdev.Op("memory.Snapshot", snap, m.snapshot(ctx, snap, of))
}

func (m *Memory) snapshot(ctx context.Context, snap, of blockdev.ID) error {
	if err := m.begin(ctx, snap, of); err != nil {
		return err
	}
	return m.effect("snapshot", func() error {
		image, err := m.find(of)
		switch {
		case err != nil || image.draft:
			return fmt.Errorf("source %s: %w", of, blockdev.ErrNotFound)
		case image.sealed(of):
			return errors.ErrUnsupported
		case m.Layered && image.opening != nil && image.opening.kind() == "":
			return fmt.Errorf("open as %s: %w", image.opening.endpoint.Lease, errors.ErrUnsupported)
		case image.accessed > 0:
			return blockdev.ErrBusy
		}
		if err := m.clearDraft(snap); err != nil {
			return err
		}
		m.images[snap] = m.copyOf(image, image.data.size)
		if m.Layered {
			image.layers++
			image.absent, _ = image.data.space()
		}
		return nil
	})
}

// Flatten implements blockdev.Flattener. A Failpoint may make it last.
func (m *Memory) Flatten(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("memory.Flatten", id, m.flatten(ctx, id))
}

func (m *Memory) flatten(ctx context.Context, id blockdev.ID) error {
	if err := m.begin(ctx, id); err != nil {
		return err
	}
	m.mu.Lock()
	image, err := m.find(id)
	flat := err == nil && image.layers == 0
	m.mu.Unlock()
	if err != nil || flat {
		return err
	}
	return m.effect("flatten", func() error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case image.sealed(id):
			return errors.ErrUnsupported
		case image.opening != nil || image.accessed > 0:
			return blockdev.ErrBusy
		}
		image.layers, image.absent, image.remote = 0, 0, false
		if m.onFlat != nil {
			m.onFlat(id)
		}
		return nil
	})
}

// IsLayered implements blockdev.FlatWatcher.
func (m *Memory) IsLayered(ctx context.Context, id blockdev.ID) (layered, open bool, err error) {
	info, err := m.Stat(ctx, id)
	return info.Layers > 0, info.Open, err
}

// OnFlat implements blockdev.FlatWatcher.
func (m *Memory) OnFlat(fn func(id blockdev.ID)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.onFlat = fn
}

// MakeRemote has a layered image, and those that are made of it, say that its bytes come
// from far away.
func (m *Memory) MakeRemote(id blockdev.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.images[id].remote = true
}

// memoryBytes is what Access gives.
type memoryBytes struct {
	*MemoryImage
	readOnly bool
}

// Access implements blockdev.Accessor.
func (m *Memory) Access(ctx context.Context, id blockdev.ID, readOnly bool) (blockdev.Bytes, error) {
	b, err := m.access(ctx, id, readOnly)
	if err != nil {
		return nil, blockdev.Op("memory.Access", id, err)
	}
	return b, nil
}

func (m *Memory) access(ctx context.Context, id blockdev.ID, readOnly bool) (*memoryBytes, error) {
	if err := m.begin(ctx, id); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	image, err := m.find(id)
	switch {
	case err != nil:
		return nil, err
	case image.opening != nil || image.accessed > 0:
		return nil, blockdev.ErrBusy
	case !readOnly && image.sealed(id) && !image.draft:
		return nil, fmt.Errorf("%w: a snapshot is never written", blockdev.ErrInvalid)
	}
	image.accessed++
	return &memoryBytes{MemoryImage: &MemoryImage{id: id, m: m, image: image}, readOnly: readOnly}, nil
}

// WriteAt implements io.WriterAt.
func (b *memoryBytes) WriteAt(p []byte, off int64) (int, error) {
	if b.readOnly {
		return 0, fmt.Errorf("opened read-only: %w", blockdev.ErrInvalid)
	}
	return b.MemoryImage.WriteAt(p, off)
}

// Sync implements blockdev.Bytes; memory is as durable as it gets.
func (b *memoryBytes) Sync() error { return nil }

// Close implements io.Closer.
func (b *memoryBytes) Close() error {
	b.m.mu.Lock()
	defer b.m.mu.Unlock()
	b.image.accessed = 0
	return nil
}

// choose picks the first kind that the image can give, and tells whether a worker does.
func (i *memoryImage) choose(id blockdev.ID, w blockdev.Want, devices bool) (kind blockdev.Kind, served bool, err error) {
	if i.accessed > 0 {
		return "", false, fmt.Errorf("this process works on it: %w", blockdev.ErrBusy)
	}
	known := false
	for _, k := range w.Kinds {
		switch k {
		case blockdev.File, blockdev.Block:
			if i.layers == 0 {
				return k, false, nil
			}
			known = true
		case blockdev.VhostUser, blockdev.NBD:
			if !i.sealed(id) {
				return k, true, nil
			}
			known = true
		}
	}
	switch {
	case known && devices && w.Served && slices.Contains(w.Kinds, blockdev.Block) && !i.sealed(id):
		return blockdev.Block, true, nil
	case known:
		return "", false, blockdev.ErrLayered
	}
	return "", false, fmt.Errorf("endpoint kinds %v: %w", w.Kinds, errors.ErrUnsupported)
}

// ServesLayers implements blockdev.LayerServer.
func (m *Memory) ServesLayers(_ context.Context, id blockdev.ID) error {
	if m.Layered && m.Devices {
		return nil
	}
	return blockdev.Op("memory.ServesLayers", id, errors.ErrUnsupported)
}

// Revive implements serve.Reviver.
func (m *Memory) Revive(ctx context.Context, id blockdev.ID, lease string) error {
	if err := m.begin(ctx, id); err != nil {
		return blockdev.Op("memory.Revive", id, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if image := m.images[id]; image != nil && image.opening != nil && image.opening.endpoint.Lease == lease && image.opening.onDevice() {
		if image.opening.dead && m.noWorkers {
			return blockdev.Op("memory.Revive", id, errNoWorker)
		}
		image.opening.dead, image.opening.apart = false, m.parts
		if m.parts {
			return blockdev.Op("memory.Revive", id, errParted)
		}
	}
	return nil
}

// onDevice reports whether it is a device over a worker.
func (o *memoryOpening) onDevice() bool {
	return o.endpoint.Served && o.endpoint.Kind == blockdev.Block
}

// kind is the kind of socket that a worker serves, "" for an opening without one.
func (o *memoryOpening) kind() blockdev.Kind {
	if o.onDevice() {
		return blockdev.NBD
	}
	if k := o.endpoint.Kind; k == blockdev.VhostUser || k == blockdev.NBD {
		return k
	}
	return ""
}

// serve starts an opening's worker; the lock must be held.
func (m *Memory) serve(id blockdev.ID, o *memoryOpening, limits blockdev.Limits) {
	o.dead, o.apart, o.limits = false, false, limits
	if m.Began != nil {
		m.Began(id, limits)
	}
}

// served gives the opening that a worker serves; the lock must be held.
func (m *Memory) served(id blockdev.ID) (*memoryImage, error) {
	image := m.images[id]
	if image == nil || image.opening == nil || image.opening.kind() == "" || image.opening.dead {
		return nil, fmt.Errorf("no worker: %w", blockdev.ErrNotFound)
	}
	return image, nil
}

// Observe implements serve.Observer.
func (m *Memory) Observe(ctx context.Context, id blockdev.ID) (serve.Service, error) {
	if err := m.begin(ctx, id); err != nil {
		return serve.Service{}, blockdev.Op("memory.Observe", id, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	image, err := m.served(id)
	if err != nil {
		return serve.Service{}, blockdev.Op("memory.Observe", id, err)
	}
	o := image.opening
	s := serve.Service{Since: o.counters.Since, Pid: 1, Kind: o.kind(), Clients: o.held, Limits: o.limits}
	if o.onDevice() { // whatever holds that
		s.Clients = 1
		if o.apart {
			s.Clients = 0
		}
	}
	if image.layers > 0 {
		allocated, _ := image.data.space()
		s.Layers = &serve.Hydration{Sealed: image.layers - 1, Held: allocated - min(allocated, image.absent), Size: image.data.size}
	}
	return s, nil
}

// Throttle implements serve.Throttler.
func (m *Memory) Throttle(ctx context.Context, id blockdev.ID, limits blockdev.Limits) error {
	if err := m.begin(ctx, id); err != nil {
		return blockdev.Op("memory.Throttle", id, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	image, err := m.served(id)
	if err == nil {
		image.opening.limits = limits
	}
	return blockdev.Op("memory.Throttle", id, err)
}

// AwaitEnd implements serve.Sentry. The end of the backend's process ends no worker.
func (m *Memory) AwaitEnd(ctx context.Context, id blockdev.ID) error {
	m.mu.Lock()
	image, err := m.served(id)
	if err != nil {
		m.mu.Unlock()
		return nil
	}
	if image.opening.ended == nil {
		image.opening.ended = make(chan struct{})
	}
	ended := image.opening.ended
	m.mu.Unlock()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Die has the worker of an image die. Its opening stays, and Open starts it again.
func (m *Memory) Die(id blockdev.ID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	image, err := m.served(id)
	if err == nil {
		image.opening.dead, image.opening.limits = true, blockdev.Limits{}
		image.opening.end()
	}
	return blockdev.Op("memory.Die", id, err)
}

var errNoWorker = errors.New("no worker can be started")

// StartsWorkers says whether a worker that has died can be followed by another one, as is
// so at first.
func (m *Memory) StartsWorkers(does bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.noWorkers = !does
}

var errParted = errors.New("the device is not connected to its worker")

// Part has the worker of an image lose its device, and live.
func (m *Memory) Part(id blockdev.ID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	image, err := m.served(id)
	if err == nil {
		image.opening.apart = true
	}
	return blockdev.Op("memory.Part", id, err)
}

// ConnectsDevices says whether a device can be connected to the next worker, as is so at
// first.
func (m *Memory) ConnectsDevices(does bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.parts = !does
}

// LeadsTo reports whether the device of an opening still leads to the image: no more after
// Sever.
func (m *Memory) LeadsTo(id blockdev.ID, lease string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	image := m.images[id]
	return image != nil && image.opening != nil && image.opening.endpoint.Lease == lease
}
