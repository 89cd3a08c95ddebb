package engine

import (
	"context"
	"errors"
	"io"
	"sync"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// Upkeep is what the engine needs of filesystems in use, besides growing them.
// filesystem.Tools is one.
type Upkeep interface {
	// Usage reads an unmounted filesystem's numbers from its superblock;
	// UsageMounted asks the one that is mounted at dir and never waits for a freeze.
	Usage(ctx context.Context, path string, t filesystem.Type) (filesystem.Usage, error)
	// UsageIn is Usage of an image that is no file of this host.
	UsageIn(ctx context.Context, image io.ReaderAt, t filesystem.Type) (filesystem.Usage, error)
	UsageMounted(ctx context.Context, dir string, t filesystem.Type) (filesystem.Usage, error)
	// SyncMounted makes durable what was written, and what was removed free.
	SyncMounted(ctx context.Context, dir string, t filesystem.Type) error
	// TrimMounted discards the free blocks in a range of bytes.
	// filesystem.ErrReadOnly, errors.ErrUnsupported.
	TrimMounted(ctx context.Context, dir string, t filesystem.Type, from, length int64) (filesystem.Trimmed, error)
	// Recovers reports whether a copy of the device at one moment can be used, of the
	// filesystem mounted at dir: others have to be frozen for it.
	Recovers(ctx context.Context, dir string, t filesystem.Type) (bool, error)
	// Freeze flushes and holds all writes until Thaw; filesystem.ErrFrozen when it
	// is frozen. Thaw of what is not frozen is success.
	Freeze(dir string) error
	Thaw(dir string) error
}

// ioMeter sums what goes through the devices of all volumes, also of those that
// are closed by now. The kernel counts per opening; the sum never falls.
type ioMeter struct {
	mu    sync.Mutex
	total blockdev.Counters
	last  map[blockdev.ID]blockdev.Counters // as last read, of open devices
}

// countIO takes what went through a volume's device since it was last asked into
// the sum. prime only notes where to begin: for devices that were open before
// this process was.
func (e *Engine) countIO(ctx context.Context, id blockdev.ID, prime bool) {
	meter, ok := e.o.Pool.(blockdev.Meter)
	if !ok {
		return
	}
	now, err := meter.Counters(ctx, id)
	e.io.mu.Lock()
	defer e.io.mu.Unlock()
	if err != nil { // not open, or nobody noted where it began
		return
	}
	if !prime {
		e.io.total = e.io.total.Add(now.Less(e.io.last[id]))
	}
	e.io.last[id] = now
}

func (e *Engine) forgetIO(id blockdev.ID) {
	e.io.mu.Lock()
	defer e.io.mu.Unlock()
	delete(e.io.last, id)
}

// InUse sums up the volumes that are mounted now, and all I/O since the start.
type InUse struct {
	Mounted int
	Frozen  int
	Usage   filesystem.Usage
	IO      blockdev.Counters
}

// InUse asks every mounted volume. What cannot be asked (it has shut down, or was
// detached meanwhile) is left out.
func (e *Engine) InUse(ctx context.Context) (InUse, error) {
	var u InUse
	mounted, err := e.o.Stage.Volumes(ctx)
	if err != nil {
		return u, err
	}
	for id, dir := range mounted {
		if err := ctx.Err(); err != nil {
			return u, err
		}
		v, ok := e.catalog.get(id)
		if !ok {
			continue
		}
		e.countIO(ctx, id, false)
		one, err := e.o.Filesystems.UsageMounted(ctx, dir, v.Filesystem)
		if err != nil {
			continue
		}
		u.Mounted++
		if v.frozenAt(e.o.Now()) {
			u.Frozen++
		}
		u.Usage.Total, u.Usage.Used, u.Usage.Free = u.Usage.Total+one.Total, u.Usage.Used+one.Used, u.Usage.Free+one.Free
		u.Usage.Inodes, u.Usage.UsedInodes, u.Usage.FreeInodes = u.Usage.Inodes+one.Inodes, u.Usage.UsedInodes+one.UsedInodes, u.Usage.FreeInodes+one.FreeInodes
	}
	e.io.mu.Lock()
	u.IO = e.io.total
	e.io.mu.Unlock()
	return u, nil
}

// MountState says what a volume's filesystem is doing.
type MountState string

const (
	Unmounted MountState = "unmounted"
	Mounted   MountState = "mounted"
	Frozen    MountState = "frozen"
)

// Stats is how full a volume is and what it is doing. Sizes are bytes.
type Stats struct {
	State      MountState
	Freeze     *Freeze           // while frozen
	Device     int64             // size
	Allocated  int64             // in the pool
	Shared     int64             // of Allocated
	Filesystem *filesystem.Usage // nil: Unknown says why
	Unknown    string
	IO         *blockdev.Counters // since the device was opened; nil while there is none, or nobody counted
}

// Stats asks the kernel about a mounted volume and reads the superblock of
// another. It mounts nothing.
func (e *Engine) Stats(ctx context.Context, workspace, name string) (Stats, error) {
	v, err := e.Volume(workspace, name)
	if err != nil {
		return Stats{}, err
	}
	s := Stats{State: Unmounted}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if errors.Is(err, blockdev.ErrNotFound) {
		s.Unknown = "the volume has no image"
		return s, nil
	}
	if err != nil {
		return s, err
	}
	s.Device, s.Allocated, s.Shared = info.Size, info.Allocated, info.Shared
	s.IO = e.counters(ctx, v)
	if v.Filesystem == filesystem.None {
		s.Unknown = "the volume has no filesystem"
		return s, nil
	}
	if e.rawOnly(v) {
		return e.statsInside(ctx, v, s)
	}
	dir, err := e.o.Stage.Mounted(ctx, v.ID)
	if err != nil {
		return s, err
	}
	if dir == "" {
		return e.statsUnmounted(ctx, v, s)
	}
	s.State = Mounted
	if v.frozenAt(e.o.Now()) {
		s.State, s.Freeze = Frozen, v.Frozen
	}
	usage, err := e.o.Filesystems.UsageMounted(ctx, dir, v.Filesystem)
	if err != nil {
		s.Unknown = "the filesystem does not answer"
		e.o.Log.Warn("no statistics of a mounted volume", "volume", v.ID, "workspace", v.Workspace, "err", err)
		return s, nil
	}
	s.Filesystem = &usage
	return s, nil
}

func (e *Engine) statsUnmounted(ctx context.Context, v Volume, s Stats) (Stats, error) {
	release, free := e.locks.try(v.ID)
	if !free || v.Phase != Ready {
		if free {
			release()
		}
		s.Unknown = "something is being done to the volume: ask again"
		return s, nil
	}
	defer release()
	var usage filesystem.Usage
	err := e.asBytes(ctx, v.ID, true, func(path string) (err error) {
		usage, err = e.o.Filesystems.Usage(ctx, path, v.Filesystem)
		return err
	}, func(b blockdev.Bytes) (err error) {
		usage, err = e.o.Filesystems.UsageIn(ctx, b, v.Filesystem)
		return err
	})
	switch {
	case errors.Is(err, blockdev.ErrBusy):
		s.Unknown = "the volume is in use, and not mounted on this host"
	case err != nil && ctx.Err() != nil:
		return s, err
	case err != nil:
		s.Unknown = "the filesystem's superblock cannot be read"
		e.o.Log.Warn("no statistics of a volume", "volume", v.ID, "workspace", v.Workspace, "err", err)
	default:
		s.Filesystem = &usage
	}
	return s, nil
}
