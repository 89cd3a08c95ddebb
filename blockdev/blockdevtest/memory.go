package blockdevtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
)

// ErrCrash, returned by a Failpoint, stands for the death of the process at that
// point: every later call fails with it until Restart.
var ErrCrash = errors.New("simulated crash")

// MemoryTotal is the capacity of a new Memory, in bytes.
const MemoryTotal = 64 << 30

// Memory is a backend, with all that a backend can do besides, whose images live in
// memory and survive Restart as files would survive the death of a process. It is
// safe for concurrent use. Blocks are allocated when written and shared by clones.
//
// Failpoint, when set, is called before and after every side effect with the
// point's name: "before create", "after create", and so on for the names in
// Points. An error from a "before" point means that the side effect does not
// happen, one from an "after" point that it did; both times the call reports
// the error, and if it is ErrCrash the backend is dead until Restart. The hook
// runs without any lock of Memory held. Set it before the backend is used.
type Memory struct {
	Failpoint func(point string) error
	// Layered makes it a pool without reflink: what Clone makes is layered, and a
	// Snapshot makes its image so; one that is open as File or Block has none. Set it
	// before the backend is used.
	Layered bool
	// Began, unless nil, is told of each worker that begins to serve an image, with the
	// limits of its first request. Set it before use.
	Began func(id blockdev.ID, limits blockdev.Limits)
	// Devices makes it one of a host that has block devices over workers: layered images
	// open as Block, too, for who wants them Served. Set it before the backend is used.
	Devices bool

	mu          sync.Mutex
	total       int64
	used        int64 // unique blocks, bytes
	crashed     bool
	restarts    int
	opened      int // openings made, ever
	images      map[blockdev.ID]*memoryImage
	quarantined []blockdev.Quarantine
	onFlat      func(blockdev.ID)
	noWorkers   bool // no worker can be started
	parts       bool // no device can be connected to one that follows
}

// Points are the names of Memory's side effects, in the order in which a
// volume's life meets them.
var Points = []string{
	"create", "clone", "open", "grow.image", "grow.device", "close.flush", "close.detach",
	"sever", "publish", "describe", "snapshot", "flatten", "trim", "remove", "quarantine",
}

type memoryImage struct {
	data        memoryData
	draft       bool
	description []byte
	damaged     bool
	opening     *memoryOpening
	layers      int   // 0: flat
	absent      int64 // bytes of other images' that Flatten has to copy
	remote      bool  // these come from far away
	accessed    int   // handles of Access
}

// sealed reports whether this takes only what layered snapshots take.
func (i *memoryImage) sealed(id blockdev.ID) bool {
	return i.layers > 0 && strings.HasPrefix(string(id), blockdev.PrefixSnapshot+"-")
}

type memoryOpening struct {
	endpoint  blockdev.Endpoint
	limits    blockdev.Limits // of a worker
	dead      bool            // the worker is
	apart     bool            // the worker has no device
	ended     chan struct{}   // closed with the worker's end; nil: nobody waits
	held      int             // consumers that keep the device in use
	inherited bool            // made before the last restart
	counters  blockdev.Counters
}

// end tells who waits for the worker's end.
func (o *memoryOpening) end() {
	if o != nil && o.ended != nil {
		close(o.ended)
		o.ended = nil
	}
}

// idle reports whether only a dead process made this and nothing uses it.
func (o *memoryOpening) idle() bool { return o == nil || (o.inherited && o.held == 0) }

var (
	_ blockdev.Backend = (*Memory)(nil)
	_ blockdev.Cloner  = (*Memory)(nil)
	_ blockdev.Trimmer = (*Memory)(nil)

	_ blockdev.Meter      = (*Memory)(nil)
	_ blockdev.Accountant = (*Memory)(nil)
	_ blockdev.Severer    = (*Memory)(nil)

	_ blockdev.Snapshotter = (*Memory)(nil)
	_ blockdev.Flattener   = (*Memory)(nil)
	_ blockdev.Accessor    = (*Memory)(nil)
	_ serve.Observer       = (*Memory)(nil)
	_ serve.Throttler      = (*Memory)(nil)
	_ serve.Sentry         = (*Memory)(nil)
	_ serve.Reviver        = (*Memory)(nil)
	_ blockdev.LayerServer = (*Memory)(nil)
)

// NewMemory makes an empty backend.
func NewMemory() *Memory {
	return &Memory{total: MemoryTotal, images: map[blockdev.ID]*memoryImage{}}
}

// begin checks what every call checks.
func (m *Memory) begin(ctx context.Context, ids ...blockdev.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.crashed {
		return ErrCrash
	}
	for _, id := range ids {
		if !id.Valid() {
			return fmt.Errorf("image id %q: %w", string(id), blockdev.ErrInvalid)
		}
	}
	return nil
}

// effect performs one side effect under the lock, between its two failpoints.
func (m *Memory) effect(point string, apply func() error) error {
	if err := m.fail("before " + point); err != nil {
		return err
	}
	m.mu.Lock()
	err := apply()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	return m.fail("after " + point)
}

func (m *Memory) fail(point string) error {
	m.mu.Lock()
	crashed, hook := m.crashed, m.Failpoint
	m.mu.Unlock()
	if crashed {
		return ErrCrash // another call crashed while this one was under way
	}
	if hook == nil {
		return nil
	}
	err := hook(point)
	if errors.Is(err, ErrCrash) {
		m.mu.Lock()
		m.crashed = true
		m.mu.Unlock()
	}
	return err
}

// find gives the image; the lock must be held.
func (m *Memory) find(id blockdev.ID) (*memoryImage, error) {
	if image := m.images[id]; image != nil {
		return image, nil
	}
	return nil, blockdev.ErrNotFound
}

// Create implements blockdev.Backend.
func (m *Memory) Create(ctx context.Context, id blockdev.ID, size int64) error {
	return blockdev.Op("memory.Create", id, m.create(ctx, id, size))
}

func (m *Memory) create(ctx context.Context, id blockdev.ID, size int64) error {
	if err := m.begin(ctx, id); err != nil {
		return err
	}
	if err := checkSize(size); err != nil {
		return err
	}
	return m.effect("create", func() error {
		if err := m.clearDraft(id); err != nil {
			return err
		}
		m.images[id] = &memoryImage{draft: true, data: memoryData{size: size}}
		return nil
	})
}

func checkSize(size int64) error {
	if size <= 0 || size%512 != 0 {
		return fmt.Errorf("size %d is not a positive multiple of 512: %w", size, blockdev.ErrInvalid)
	}
	return nil
}

// clearDraft makes way for a draft; the lock must be held.
func (m *Memory) clearDraft(id blockdev.ID) error {
	old := m.images[id]
	switch {
	case old == nil:
		return nil
	case !old.draft:
		return blockdev.ErrExists
	case !old.opening.idle() || old.accessed > 0:
		return blockdev.ErrBusy
	}
	m.used -= old.data.release()
	delete(m.images, id)
	return nil
}

// Clone implements blockdev.Cloner.
func (m *Memory) Clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	return blockdev.Op("memory.Clone", dst, m.clone(ctx, dst, src, size))
}

func (m *Memory) clone(ctx context.Context, dst, src blockdev.ID, size int64) error {
	if err := errors.Join(m.begin(ctx, dst, src), checkSize(size)); err != nil {
		return err
	}
	return m.effect("clone", func() error {
		from, err := m.find(src)
		if err != nil || from.draft {
			return fmt.Errorf("source %s: %w", src, blockdev.ErrNotFound)
		}
		if size < from.data.size {
			return fmt.Errorf("size %d is smaller than %s: %w", size, src, blockdev.ErrInvalid)
		}
		if err := m.clearDraft(dst); err != nil {
			return err
		}
		m.images[dst] = m.copyOf(from, size)
		return nil
	})
}

// Publish implements blockdev.Backend.
func (m *Memory) Publish(ctx context.Context, id blockdev.ID, description []byte) error {
	return blockdev.Op("memory.Publish", id, m.publish(ctx, id, description))
}

func (m *Memory) publish(ctx context.Context, id blockdev.ID, description []byte) error {
	if err := m.begin(ctx, id); err != nil {
		return err
	}
	return m.effect("publish", func() error {
		image, err := m.find(id)
		if err != nil {
			return err
		}
		image.draft, image.damaged, image.description = false, false, bytes.Clone(description)
		return nil
	})
}

// Describe implements blockdev.Backend.
func (m *Memory) Describe(ctx context.Context, id blockdev.ID, description []byte) error {
	return blockdev.Op("memory.Describe", id, m.describe(ctx, id, description))
}

func (m *Memory) describe(ctx context.Context, id blockdev.ID, description []byte) error {
	if err := m.begin(ctx, id); err != nil {
		return err
	}
	return m.effect("describe", func() error {
		image, err := m.find(id)
		if err != nil {
			return err
		}
		if image.draft {
			return fmt.Errorf("a draft has no description: %w", blockdev.ErrNotFound)
		}
		image.damaged, image.description = false, bytes.Clone(description)
		return nil
	})
}

// Grow implements blockdev.Backend.
func (m *Memory) Grow(ctx context.Context, id blockdev.ID, size int64) error {
	return blockdev.Op("memory.Grow", id, m.grow(ctx, id, size))
}

func (m *Memory) grow(ctx context.Context, id blockdev.ID, size int64) error {
	if err := errors.Join(m.begin(ctx, id), checkSize(size)); err != nil {
		return err
	}
	var image *memoryImage
	err := m.effect("grow.image", func() (err error) {
		if image, err = m.find(id); err != nil {
			return err
		}
		if image.sealed(id) {
			return errors.ErrUnsupported
		}
		image.data.size = max(image.data.size, size)
		return nil
	})
	if err != nil {
		return err
	}
	m.mu.Lock()
	open := image.opening != nil
	m.mu.Unlock()
	if !open {
		return nil
	}
	return m.effect("grow.device", func() error {
		if image.opening != nil {
			image.opening.endpoint.Size = image.data.size
		}
		return nil
	})
}

// Open implements blockdev.Backend.
func (m *Memory) Open(ctx context.Context, id blockdev.ID, w blockdev.Want) (blockdev.Endpoint, error) {
	e, err := m.open(ctx, id, w)
	return e, blockdev.Op("memory.Open", id, err)
}

func (m *Memory) open(ctx context.Context, id blockdev.ID, w blockdev.Want) (e blockdev.Endpoint, err error) {
	if err := m.begin(ctx, id); err != nil {
		return e, err
	}
	if len(w.Kinds) == 0 {
		return e, fmt.Errorf("no kind of endpoint wanted: %w", blockdev.ErrInvalid)
	}
	err = m.effect("open", func() error {
		image, err := m.find(id)
		if err == nil {
			e, err = m.opening(id, image, w)
		}
		return err
	})
	return e, err
}

// opening gives the opening of an image, a new one if there is none; the lock must be
// held.
func (m *Memory) opening(id blockdev.ID, image *memoryImage, w blockdev.Want) (e blockdev.Endpoint, err error) {
	if o := image.opening; o != nil {
		if o.endpoint.ReadOnly != w.ReadOnly || !slices.Contains(w.Kinds, o.endpoint.Kind) {
			return e, fmt.Errorf("open otherwise: %w", blockdev.ErrBusy)
		}
		if o.dead && m.noWorkers {
			return e, errNoWorker
		}
		if o.dead { // its worker is started again
			m.serve(id, o, w.Limits)
		}
		o.endpoint.Size = image.data.size // a crash may have left the device behind
		return o.endpoint, nil
	}
	kind, served, err := image.choose(id, w, m.Devices)
	if err != nil {
		return e, err
	}
	m.opened++
	e = blockdev.Endpoint{Kind: kind, Path: memoryPath + string(id), Size: image.data.size,
		ReadOnly: w.ReadOnly, Served: served, Lease: fmt.Sprintf("%s-%d", kind, m.opened)}
	image.opening = &memoryOpening{endpoint: e, counters: blockdev.Counters{Since: time.Now().UTC()}}
	if image.opening.kind() != "" {
		m.serve(id, image.opening, w.Limits)
	}
	return e, nil
}

// Close implements blockdev.Backend.
func (m *Memory) Close(ctx context.Context, id blockdev.ID, lease string) error {
	return blockdev.Op("memory.Close", id, m.close(ctx, id, lease))
}

func (m *Memory) close(ctx context.Context, id blockdev.ID, lease string) error {
	if err := m.begin(ctx, id); err != nil {
		return err
	}
	m.mu.Lock()
	image := m.images[id]
	open := image != nil && image.opening != nil && image.opening.endpoint.Lease == lease
	m.mu.Unlock()
	if !open {
		return nil
	}
	if err := m.effect("close.flush", func() error { return nil }); err != nil {
		return err
	}
	return m.effect("close.detach", func() error {
		if image.opening != nil && image.opening.held > 0 {
			return blockdev.ErrBusy
		}
		image.opening.end()
		image.opening = nil
		return nil
	})
}

// CanSever implements blockdev.Severer.
func (m *Memory) CanSever(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("memory.CanSever", id, m.begin(ctx, id))
}

// Sever implements blockdev.Severer: who held the device goes on holding nothing.
func (m *Memory) Sever(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("memory.Sever", id, m.sever(ctx, id))
}

func (m *Memory) sever(ctx context.Context, id blockdev.ID) error {
	if err := m.begin(ctx, id); err != nil {
		return err
	}
	m.mu.Lock()
	image, err := m.find(id)
	open := err == nil && image.opening != nil
	m.mu.Unlock()
	if err != nil || !open {
		return err
	}
	return m.effect("sever", func() error { image.opening.end(); image.opening = nil; return nil })
}

// Remove implements blockdev.Backend. Space is given back at once.
func (m *Memory) Remove(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("memory.Remove", id, m.remove(ctx, id))
}

func (m *Memory) remove(ctx context.Context, id blockdev.ID) error {
	if err := m.begin(ctx, id); err != nil {
		return err
	}
	return m.effect("remove", func() error {
		image := m.images[id]
		if image == nil {
			return nil
		}
		if image.accessed > 0 || image.opening != nil && !(image.draft && image.opening.idle()) {
			return blockdev.ErrBusy
		}
		m.used -= image.data.release()
		delete(m.images, id)
		return nil
	})
}

// Stat implements blockdev.Backend.
func (m *Memory) Stat(ctx context.Context, id blockdev.ID) (blockdev.Info, error) {
	info, err := m.stat(ctx, id)
	return info, blockdev.Op("memory.Stat", id, err)
}

func (m *Memory) stat(ctx context.Context, id blockdev.ID) (blockdev.Info, error) {
	if err := m.begin(ctx, id); err != nil {
		return blockdev.Info{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	image, err := m.find(id)
	if err != nil {
		return blockdev.Info{}, err
	}
	if image.damaged {
		return blockdev.Info{}, fmt.Errorf("description: %w", blockdev.ErrCorrupt)
	}
	return image.info(id), nil
}

func (i *memoryImage) info(id blockdev.ID) blockdev.Info {
	allocated, shared := i.data.space()
	return blockdev.Info{ID: id, Draft: i.draft, Size: i.data.size, Allocated: allocated, Shared: shared,
		Description: bytes.Clone(i.description), Open: i.opening != nil, Layers: i.layers, Absent: i.absent, Remote: i.remote}
}

// List implements blockdev.Backend.
func (m *Memory) List(ctx context.Context) ([]blockdev.Info, error) {
	infos, err := m.list(ctx)
	return infos, blockdev.Op("memory.List", "", err)
}

func (m *Memory) list(ctx context.Context) (infos []blockdev.Info, err error) {
	if err := m.begin(ctx); err != nil {
		return nil, err
	}
	var damaged []blockdev.ID
	m.mu.Lock()
	for id, image := range m.images {
		if image.damaged {
			damaged = append(damaged, id)
		} else {
			infos = append(infos, image.info(id))
		}
	}
	m.mu.Unlock()
	for _, id := range damaged {
		if err := m.effect("quarantine", func() error { return m.quarantine(id) }); err != nil {
			return nil, err
		}
	}
	sort.Slice(infos, func(i, j int) bool { return infos[i].ID < infos[j].ID })
	return infos, nil
}

// quarantine puts an image aside; the lock must be held.
func (m *Memory) quarantine(id blockdev.ID) error {
	if image := m.images[id]; image != nil {
		allocated, _ := image.data.space()
		m.quarantined = append(m.quarantined, blockdev.Quarantine{Name: string(id), Reason: "description is damaged", Bytes: allocated})
		delete(m.images, id)
	}
	return nil
}

// Quarantined implements blockdev.Backend.
func (m *Memory) Quarantined(ctx context.Context) ([]blockdev.Quarantine, error) {
	if err := m.begin(ctx); err != nil {
		return nil, blockdev.Op("memory.Quarantined", "", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]blockdev.Quarantine(nil), m.quarantined...), nil
}

// Capacity implements blockdev.Backend.
func (m *Memory) Capacity(ctx context.Context) (blockdev.Capacity, error) {
	if err := m.begin(ctx); err != nil {
		return blockdev.Capacity{}, blockdev.Op("memory.Capacity", "", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return blockdev.Capacity{Total: m.total, Free: m.total - m.used, Allocated: m.used}, nil
}

// Trim implements blockdev.Trimmer.
func (m *Memory) Trim(ctx context.Context, id blockdev.ID) (freed int64, err error) {
	if err = m.begin(ctx, id); err == nil {
		err = m.effect("trim", func() error {
			image, err := m.find(id)
			if err != nil {
				return err
			}
			if image.opening != nil || image.accessed > 0 {
				return blockdev.ErrBusy
			}
			if image.layers > 0 {
				return blockdev.ErrLayered
			}
			var unique int64
			freed, unique = image.data.trim()
			m.used -= unique
			return nil
		})
	}
	return freed, blockdev.Op("memory.Trim", id, err)
}
