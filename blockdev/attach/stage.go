package attach

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
)

const (
	// releaseWait bounds how long Unmount waits for the kernel to let a
	// filesystem go: that is done by others' last close, usually at once. A
	// container that is being started holds a copy of every mount of the host until
	// it has changed its root: tens of milliseconds, and on a busy host, where
	// containers start all the time, many times that.
	releaseWait = 2 * time.Second
	releasePoll = 2 * time.Millisecond
	// abandonWait is releaseWait for a filesystem that was shut down: who keeps it
	// will go on doing so, and the caller knows a way that needs nobody's help.
	abandonWait = 300 * time.Millisecond
	// passingWait bounds how long a passing user may keep a mount busy.
	passingWait = 400 * time.Millisecond
)

// Stage is a directory of this host in which volumes are mounted, one directory
// per ID, where no tenant can reach them. It keeps nothing in memory: what is
// mounted is asked of the kernel, so it is the same after a restart.
//
// The directory is a mount of its own, in a peer group of its own. Mount
// namespaces that existed before it never see its mounts. Those made later (a
// service with a private /tmp) begin with a copy of each, whatever the
// propagation; being peers or slaves of the group they lose the copy again when
// the stage unmounts. With private propagation such a copy would hold the volume
// for as long as the service runs.
//
// Methods are safe for concurrent use; calls for one ID are serialised by the
// caller.
type Stage struct{ dir string }

// NewStage makes dir (or finds it, after a restart) the stage: mode 0700, its
// own mount. The path must be absolute.
func NewStage(dir string) (*Stage, error) {
	s, err := newStage(dir)
	return s, blockdev.Op("attach.NewStage", "", err)
}

func newStage(dir string) (*Stage, error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("%w: stage directory %q is not absolute", blockdev.ErrInvalid, dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(dir) // as mountinfo will show it
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a directory
		return nil, err
	}
	if err := ownMount(dir); err != nil {
		return nil, err
	}
	return &Stage{dir: dir}, nil
}

// ownMount binds dir onto itself unless it is a mount, and gives it a peer
// group of its own unless it has one: leaving the group that an earlier run made
// would cut off the copies that other namespaces got since.
func ownMount(dir string) error {
	m, err := mountAt(dir)
	if err != nil {
		return err
	}
	if m == nil {
		if err := bindOntoItself(dir); err != nil {
			return err
		}
		if m, err = mountAt(dir); err != nil {
			return err
		}
		if m == nil {
			return fmt.Errorf("%s did not become a mount", dir)
		}
	}
	all, err := Mounts()
	if err != nil {
		return err
	}
	parent := ByID(all, m.Parent)
	if m.Group != "" && m.Master == "" && (parent == nil || parent.Group != m.Group) {
		return nil
	}
	if err := sys.SetPropagation(dir, sys.Private); err != nil {
		return err
	}
	return sys.SetPropagation(dir, sys.Shared)
}

func bindOntoItself(dir string) error {
	clone, err := sys.CloneMount(dir)
	if err != nil {
		return err
	}
	defer clone.Close()
	if err := sys.SetAttr(clone, sys.MountAttr{NoSuid: true, NoDev: true}, sys.Private); err != nil {
		return err
	}
	at, err := sys.OpenPath(dir)
	if err != nil {
		return err
	}
	defer at.Close()
	return sys.MoveMount(clone, at)
}

// Dir is where the stage is.
func (s *Stage) Dir() string { return s.dir }

// Mount mounts the endpoint's filesystem (nosuid, nodev; read-only when the
// endpoint is) and tells where. Mounted already from this device is success,
// from another one or in another mode blockdev.ErrBusy. ErrNeedsRecovery (also
// blockdev.ErrBusy) when a read-only device holds a dirty journal;
// blockdev.ErrCorrupt when there is no such filesystem on it.
func (s *Stage) Mount(ctx context.Context, id blockdev.ID, e blockdev.Endpoint, t filesystem.Type) (string, error) {
	dir, err := s.mount(ctx, id, e, t)
	return dir, blockdev.Op("attach.Mount", id, err)
}

func (s *Stage) mount(ctx context.Context, id blockdev.ID, e blockdev.Endpoint, t filesystem.Type) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	switch {
	case !id.Valid():
		return "", fmt.Errorf("%w: id %q", blockdev.ErrInvalid, id)
	case !t.Valid() || t == filesystem.None:
		return "", fmt.Errorf("%w: filesystem %q cannot be mounted", blockdev.ErrInvalid, t)
	case e.Kind != blockdev.Block:
		return "", fmt.Errorf("%w: a %q endpoint cannot be mounted", blockdev.ErrInvalid, e.Kind)
	}
	dir := s.path(id)
	m, err := mountAt(dir)
	if err != nil {
		return "", err
	}
	if m != nil {
		return dir, sameMount(m, e)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	err = sys.Mount(
		sys.Filesystem{Device: e.Path, Type: string(t), ReadOnly: e.ReadOnly, Options: options(t)},
		dir, sys.MountAttr{NoSuid: true, NoDev: true, ReadOnly: e.ReadOnly})
	if err != nil {
		_ = os.Remove(dir) // an empty directory more or less: the mount's error is the news
		return "", classifyMount(err)
	}
	return dir, nil
}

func options(t filesystem.Type) []string {
	o := filesystem.MountOptions(t)
	if t == filesystem.XFS {
		o = append(o, "nouuid") // the kernel refuses a second filesystem with one UUID
	}
	return o
}

// sameMount checks that what is mounted is the endpoint, in the endpoint's mode.
func sameMount(m *Mount, e blockdev.Endpoint) error {
	device, err := sys.PlaceBehind(e.Path)
	if err != nil {
		return err
	}
	if !(Volume{Device: device.RDevice, Source: e.Path}).Is(*m) {
		return fmt.Errorf("%w: %s is mounted there, not %s", blockdev.ErrBusy, m.Source, e.Path)
	}
	if m.ReadOnlyFS != e.ReadOnly {
		return fmt.Errorf("%w: it is mounted read-only=%t, not %t", blockdev.ErrBusy, m.ReadOnlyFS, e.ReadOnly)
	}
	return nil
}

// Mounted tells where the volume is mounted now, "" when it is not.
func (s *Stage) Mounted(ctx context.Context, id blockdev.ID) (string, error) {
	if !id.Valid() {
		return "", blockdev.Op("attach.Mounted", id, blockdev.ErrInvalid)
	}
	m, err := mountAt(s.path(id))
	if err != nil || m == nil {
		return "", blockdev.Op("attach.Mounted", id, err)
	}
	return s.path(id), nil
}

// List tells the IDs of all volumes that are mounted here.
func (s *Stage) List(ctx context.Context) ([]blockdev.ID, error) {
	all, err := s.Volumes(ctx)
	return slices.Sorted(maps.Keys(all)), err
}

// Volumes tells all volumes that are mounted here, and where, with one look at
// the table of mounts.
func (s *Stage) Volumes(ctx context.Context) (map[blockdev.ID]string, error) {
	table, err := Mounts()
	if err != nil {
		return nil, blockdev.Op("attach.Volumes", "", err)
	}
	all := map[blockdev.ID]string{}
	for _, m := range table {
		name, below := strings.CutPrefix(m.Path, s.dir+"/")
		if id := blockdev.ID(name); below && id.Valid() {
			all[id] = m.Path
		}
	}
	return all, nil
}

// Unmount flushes and unmounts the volume; not mounted is success. It returns
// nil only when the kernel has let the filesystem go: no mount in any namespace
// and no open file holds it. Otherwise blockdev.ErrBusy, saying who holds it
// where that can be found out, and the volume is mounted as before.
//
// A failed flush is blockdev.ErrFailed, told once: the volume is unmounted all
// the same, for a second flush would only hide what the first one lost.
func (s *Stage) Unmount(ctx context.Context, id blockdev.ID) error {
	return blockdev.Op("attach.Unmount", id, s.unmount(ctx, id))
}

func (s *Stage) unmount(ctx context.Context, id blockdev.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !id.Valid() {
		return fmt.Errorf("%w: id %q", blockdev.ErrInvalid, id)
	}
	dir := s.path(id)
	m, err := mountAt(dir)
	if err != nil {
		return err
	}
	if m == nil {
		return ignoreNotExist(os.Remove(dir))
	}
	place, _ := sys.PlaceAt(dir) // only to name who uses it
	var lost error
	if err := flush(dir); err != nil {
		lost = fmt.Errorf("%w: %w", blockdev.ErrFailed, err)
	}
	return errors.Join(lost, s.letGo(ctx, dir, m, place))
}

// letGo unmounts and waits until nothing else holds the filesystem.
func (s *Stage) letGo(ctx context.Context, dir string, m *Mount, place sys.Place) error {
	if err := Patiently(ctx, func() error { return sys.Unmount(dir) }); err != nil {
		if errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("%w: the volume is in use on this host: %w%s", blockdev.ErrBusy, err, Holders(place.Device))
		}
		return err
	}
	if err := released(ctx, m.Source, releaseWait); err != nil {
		return s.putBack(dir, m, place, err)
	}
	return ignoreNotExist(os.Remove(dir))
}

// Patiently unmounts, and does not take a passing user for one that stays: a
// process that is being started holds a copy of every open file of the one that
// starts it (of this one's too, when it runs a tool) until it executes its
// program. EBUSY after that is for whoever uses the mount.
func Patiently(ctx context.Context, unmount func() error) error {
	deadline := time.Now().Add(passingWait)
	for {
		err := unmount()
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(releasePoll):
		}
	}
}

func flush(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return sys.SyncFilesystem(d)
}

// errHeld: the filesystem lives on after its unmount.
var errHeld = fmt.Errorf("%w: the volume's filesystem is still held", blockdev.ErrBusy)

// released waits until nothing holds the device: the kernel claims it
// exclusively for as long as the filesystem lives, wherever it is mounted.
func released(ctx context.Context, device string, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for {
		held, err := sys.DeviceHeld(device)
		if err != nil || !held {
			return err
		}
		if time.Now().After(deadline) {
			return errHeld
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", errHeld, context.Cause(ctx))
		case <-time.After(releasePoll):
		}
	}
}

// putBack mounts the living filesystem again, so that the next Unmount, also
// one after a restart, finds it and asks again whether it has been let go.
func (s *Stage) putBack(dir string, m *Mount, place sys.Place, held error) error {
	held = fmt.Errorf("%w%s%s", held, namespaceHolders(Volume{Device: m.Device}), Holders(place.Device))
	again := sys.Mount(
		sys.Filesystem{Device: m.Source, Type: m.Type, ReadOnly: m.ReadOnlyFS, Options: options(filesystem.Type(m.Type))},
		dir, sys.MountAttr{NoSuid: true, NoDev: true, ReadOnly: m.ReadOnly})
	return errors.Join(held, again)
}

// Teardown takes the stage's own mount away. blockdev.ErrBusy while a volume is
// mounted. The daemon never does this: the next one finds the stage as it is.
func (s *Stage) Teardown(ctx context.Context) error {
	ids, err := s.List(ctx)
	if err == nil && len(ids) > 0 {
		err = fmt.Errorf("%w: %d volumes are mounted", blockdev.ErrBusy, len(ids))
	}
	if err == nil {
		err = sys.Unmount(s.dir)
	}
	return blockdev.Op("attach.Teardown", "", err)
}

func (s *Stage) path(id blockdev.ID) string { return filepath.Join(s.dir, string(id)) }
