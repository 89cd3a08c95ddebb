package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
	"holdfast/templates"
)

// world is everything around an engine, in memory, with one counter of side
// effects: it can fail or crash at any of them.
type world struct {
	t       testing.TB
	pool    *blockdevtest.Memory
	second  *blockdevtest.Memory // of the pool "second"; nil: there is one pool
	store   *metadata.Store
	sideLog *metadata.SideLog
	kernel  *kernel
	clock   time.Time
	engine  *Engine

	trimPiece    int64                   // bytes that a trim does at once
	journal      bool                    // what the toy filesystem recovers with
	betweenTrims func()                  // called before each of them; nil: nothing
	captured     func(draft blockdev.ID) // called with each clone that is captured; nil: nothing

	mu      sync.Mutex
	points  []string // side effects so far, by name
	cut     int      // fail at this one (1-based); 0: never
	crash   bool     // the failure is a crash: nothing works until restart
	crashed bool
}

func newWorld(t testing.TB) *world { return newWorldIn(t, false) }

// newLayeredWorld is one whose pool shares no bytes between files.
func newLayeredWorld(t testing.TB) *world { return newWorldIn(t, true) }

func newWorldIn(t testing.TB, layered bool) *world {
	w := &world{t: t, pool: blockdevtest.NewMemory(), trimPiece: 1 << 40, clock: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
	w.pool.Failpoint, w.pool.Layered = w.point, layered
	w.kernel = &kernel{w: w, mounts: map[blockdev.ID]mount{}, visible: map[string]blockdev.ID{}, dead: map[string]bool{}, busy: map[string]bool{}, dirty: map[string]bool{}, frozen: map[string]bool{}, limits: map[string]blockdev.Limits{}, shut: map[blockdev.ID]bool{}, open: map[string]opened{}, leases: map[blockdev.ID]string{}, told: map[string]int64{}, running: map[string]int{}}
	dir := t.TempDir()
	var err error
	w.store, err = metadata.Open(filepath.Join(dir, "db"), metadata.Options{Log: slog.New(slog.DiscardHandler), Failpoint: w.point})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.store.Close() })
	w.sideLog, err = metadata.OpenSideLog(filepath.Join(dir, "side.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.sideLog.Close() })
	w.boot()
	return w
}

// boot makes a new engine over what is there, as a start of the daemon does.
func (w *world) boot() {
	w.t.Helper()
	w.openLibrary()
	o := Options{
		Store: w.store, SideLog: w.sideLog, Pool: w.pool, PoolName: "memory", PoolKind: "memory",
		Library: shelves{w}, Stage: w.kernel, Filesystems: toyFS{w},
		Attachers:     map[string]attach.Attacher{"host": attacher{w, true}, "runc": attacher{w, false}, "vm": machine{attacher{w, false}}, "start": starter{machine{attacher{w, false}}}, "socket": socketMachine{machine{attacher{w, false}}}},
		Limiter:       limiter{w},
		Sanitizer:     toySanitizer{w},
		Ledger:        NewLedger(LedgerOptions{Total: 64 << 30, Ratio: 1}),
		Log:           slog.New(slog.DiscardHandler),
		DefaultRegion: "here",
		Now:           w.now,
	}
	w.addSecond(&o)
	e, err := New(context.Background(), o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.engine = e
	if err := e.Reconcile(context.Background()); err != nil {
		w.t.Fatalf("reconcile: %v", err)
	}
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock = w.clock.Add(time.Millisecond)
	return w.clock
}

// restart is the death of the process, or with power also of the kernel.
func (w *world) restart(power bool) {
	w.t.Helper()
	w.mu.Lock()
	w.cut, w.crashed = 0, false
	w.mu.Unlock()
	w.engine.cancel()
	if power {
		w.kernel.powerCut()
	}
	w.pool.Restart(blockdevtest.Restarted{LoseDrafts: power, LoseOpenings: power})
	if w.second != nil {
		w.second.Restart(blockdevtest.Restarted{LoseDrafts: power, LoseOpenings: power})
	}
	w.boot()
}

var errInjected = errors.New("injected failure")

// point counts a side effect and fails when its turn has come.
func (w *world) point(name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.crashed {
		return blockdevtest.ErrCrash
	}
	w.points = append(w.points, name)
	if w.cut == 0 || len(w.points) != w.cut {
		return nil
	}
	if w.crash {
		w.crashed = true
		return blockdevtest.ErrCrash
	}
	return fmt.Errorf("%s: %w", name, errInjected)
}

// effect performs a side effect of the fake kernel between its two points.
func (w *world) effect(name string, act func()) error {
	if err := w.point("before " + name); err != nil {
		return err
	}
	act()
	return w.point("after " + name)
}

// A toy filesystem is a superblock: a magic, a size and a UUID at the image's
// start. It behaves as the engine relies on, and lives in the image's bytes, so
// that clones and crashes treat it like data.
const (
	toyMagic = "toyfs001"
	toySize  = 8
	toyUUID  = 16
	toyFrom  = 52 // the revision that filled it
	toyBytes = 100
)

// imager finds an image by an endpoint's path: a Memory, or a world of several.
type imager interface {
	Image(path string) (*blockdevtest.MemoryImage, error)
}

func writeToy(pool imager, path string, size int64, uuid, from string) error {
	image, err := pool.Image(path)
	if err != nil {
		return err
	}
	b := make([]byte, toyBytes)
	copy(b, toyMagic)
	binary.LittleEndian.PutUint64(b[toySize:], uint64(size))
	copy(b[toyUUID:], uuid)
	copy(b[toyFrom:], from)
	_, err = image.WriteAt(b, 0)
	return err
}

type toySuper struct {
	size       int64
	uuid, from string
}

func readToy(pool imager, path string) (toySuper, error) {
	image, err := pool.Image(path)
	if err != nil {
		return toySuper{}, err
	}
	b := make([]byte, toyBytes)
	if _, err := image.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return toySuper{}, err
	}
	return toyIn(b)
}

// toyIn is a toy filesystem's superblock in bytes.
func toyIn(b []byte) (toySuper, error) {
	if string(b[:8]) != toyMagic {
		return toySuper{}, filesystem.ErrDamaged
	}
	text := func(from, to int) string { return string(bytes.TrimRight(b[from:to], "\x00")) }
	return toySuper{int64(binary.LittleEndian.Uint64(b[toySize:])), text(toyUUID, toyFrom), text(toyFrom, toyBytes)}, nil
}

// toyFS is the engine's Filesystems: xfs grows only mounted, ext4 only unmounted.
type toyFS struct{ w *world }

func (f toyFS) Identify(_ context.Context, path string, _ filesystem.Type, uuid string) error {
	s, err := readToy(f.w, path)
	if err != nil {
		return err
	}
	return f.w.effect("identify", func() { err = writeToy(f.w, path, s.size, uuid, s.from) })
}

func (f toyFS) Size(_ context.Context, path string, _ filesystem.Type) (int64, error) {
	s, err := readToy(f.w, path)
	return s.size, err
}

// IdentifyIn and the others work on bytes that Access gave.
func (f toyFS) IdentifyIn(_ context.Context, image filesystem.Image, _ int64, _ filesystem.Type, uuid string) error {
	b := make([]byte, toyBytes)
	if _, err := image.ReadAt(b, 0); err != nil {
		return err
	}
	if _, err := toyIn(b); err != nil {
		return err
	}
	clear(b[toyUUID:toyFrom])
	copy(b[toyUUID:], uuid)
	var err error
	return errors.Join(f.w.effect("identify in", func() { _, err = image.WriteAt(b, 0) }), err)
}

func (f toyFS) SizeIn(_ context.Context, image io.ReaderAt, _ filesystem.Type) (int64, error) {
	b := make([]byte, toyBytes)
	if _, err := image.ReadAt(b, 0); err != nil {
		return 0, err
	}
	s, err := toyIn(b)
	return s.size, err
}

func (f toyFS) ListDirIn(ctx context.Context, image io.ReaderAt, t filesystem.Type, _ string) ([]filesystem.Entry, error) {
	if _, err := f.SizeIn(ctx, image, t); err != nil {
		return nil, err
	}
	return []filesystem.Entry{{Name: "file"}}, nil
}

func (f toyFS) ReadFileIn(ctx context.Context, image io.ReaderAt, t filesystem.Type, _ string, to io.Writer) error {
	if _, err := f.SizeIn(ctx, image, t); err != nil {
		return err
	}
	_, err := io.WriteString(to, "content")
	return err
}

func (f toyFS) SizeMounted(ctx context.Context, dir string, t filesystem.Type) (int64, error) {
	return f.Size(ctx, "mem:"+dir, t)
}

func (f toyFS) Grow(_ context.Context, path string, t filesystem.Type) error {
	if t != filesystem.Ext4 {
		return filesystem.ErrNeedsMount
	}
	return f.grow(path)
}

func (f toyFS) Preen(_ context.Context, path string) error {
	if _, err := readToy(f.w, path); err != nil {
		return err
	}
	if f.w.kernel.dirty[strings.TrimPrefix(path, "mem:")] {
		return filesystem.ErrNeedsRepair
	}
	return f.w.effect("preen", func() {})
}

func (f toyFS) GrowMounted(_ context.Context, dir string, t filesystem.Type) error {
	if t == filesystem.Ext4 {
		return filesystem.ErrCannotGrowMounted
	}
	if f.w.kernel.isFrozen(dir) {
		return errors.New("growing a frozen filesystem waits for ever")
	}
	return f.grow("mem:" + dir)
}

func (f toyFS) grow(path string) error {
	s, err := readToy(f.w, path)
	if err != nil {
		return err
	}
	image, err := f.w.Image(path)
	if err != nil {
		return err
	}
	return f.w.effect("grow filesystem", func() { err = writeToy(f.w, path, image.Size(), s.uuid, s.from) })
}

func (f toyFS) ListDir(_ context.Context, path string, _ filesystem.Type, _ string) ([]filesystem.Entry, error) {
	if f.w.kernel.dirty[strings.TrimPrefix(path, "mem:")] {
		return nil, filesystem.ErrDirty
	}
	return []filesystem.Entry{{Name: "file"}}, nil
}

func (f toyFS) ReadFile(_ context.Context, _ string, _ filesystem.Type, _ string, to io.Writer) error {
	_, err := io.WriteString(to, "content")
	return err
}

// shelves is a Library with one template, demo:1, of 10 MiB.
type shelves struct{ w *world }

var demoRevision = templates.Revision{ID: "rev-00000000000000000000000001", Name: "1", Number: 1, Status: templates.Ready, MinimumBytes: 10 << 20}

// farRevision has its bytes far away, as far as an engine can tell.
var farRevision = templates.Revision{ID: "rev-00000000000000000000000002", Name: "1", Number: 1, Status: templates.Ready, MinimumBytes: 20 << 20, ImageBytes: 20 << 20,
	Remote: &templates.Remote{Filesystem: filesystem.Ext4}}

func (l shelves) Resolve(_ context.Context, _, ref string) (templates.Template, templates.Revision, error) {
	r, err := templates.ParseReference(ref)
	if err != nil {
		return templates.Template{}, templates.Revision{}, err
	}
	if r.Name == "far" {
		return templates.Template{Name: "far"}, farRevision, nil
	}
	if r.Name != "demo" || r.Version != "" && r.Version != "1" && r.Version != templates.LatestVersion {
		return templates.Template{}, templates.Revision{}, templates.ErrNotFound
	}
	return templates.Template{Name: "demo", DefaultSizeMiB: 20}, demoRevision, nil
}

func (l shelves) Hydrate(ctx context.Context, dst blockdev.ID, s templates.SourceSpec) error {
	if s.Revision != "" && s.Size < demoRevision.MinimumBytes {
		return fmt.Errorf("%w: it needs 10 MB", templates.ErrTooSmall)
	}
	if s.Revision == farRevision.ID {
		if s.Size < farRevision.ImageBytes {
			return fmt.Errorf("%w: it needs 20 MB", templates.ErrTooSmall)
		}
		return l.cloneSource(ctx, dst, s, farRevision.ImageBytes)
	}
	if l.w.pool.Layered {
		return l.cloneSource(ctx, dst, s, s.Size)
	}
	return l.make(ctx, dst, s)
}

func (l shelves) make(ctx context.Context, dst blockdev.ID, s templates.SourceSpec) error {
	if err := l.w.pool.Create(ctx, dst, s.Size); err != nil {
		return err
	}
	return writeToy(l.w.pool, "mem:"+string(dst), s.Size, "", string(s.Revision))
}

// revisionNumber tells revisions, and none, apart.
func revisionNumber(id blockdev.ID) int64 {
	switch id {
	case demoRevision.ID:
		return 1
	case farRevision.ID:
		return 2
	}
	return 0
}

// cloneSource makes a layered draft over a source, of has bytes, that is made once.
func (l shelves) cloneSource(ctx context.Context, dst blockdev.ID, s templates.SourceSpec, has int64) error {
	src := blockdev.ID(fmt.Sprintf("%s-%026d", blockdev.PrefixSource, has/filesystem.MiB*10+revisionNumber(s.Revision)))
	info, err := l.w.pool.Stat(ctx, src)
	if err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		return err
	}
	if err != nil || info.Draft {
		made := s
		made.Size = has
		if err := l.make(ctx, src, made); err != nil {
			return err
		}
		if err := l.w.pool.Publish(ctx, src, []byte("source")); err != nil {
			return err
		}
	}
	return l.w.pool.Clone(ctx, dst, src, s.Size)
}

// kernel is what survives the process and not the power: mounts and sandboxes.
type kernel struct {
	w       *world
	mu      sync.Mutex
	mounts  map[blockdev.ID]mount
	visible map[string]blockdev.ID     // holder key -> volume
	dead    map[string]bool            // containers
	busy    map[string]bool            // holder keys with open files
	dirty   map[string]bool            // volumes whose journal a mount must recover
	frozen  map[string]bool            // mounts, by directory
	limits  map[string]blockdev.Limits // "device|container"
	shut    map[blockdev.ID]bool       // filesystems that were shut down
	open    map[string]opened          // files that holders keep open, by holder key: what keeps a device
	leases  map[blockdev.ID]string     // of the device that was mounted last
	told    map[string]int64           // bytes of the device as virtual machines know it, by holder key
	boots   int
	running map[string]int // machines that were started after their attachment, by name: their pids
	started int
}

type mount struct {
	endpoint blockdev.Endpoint
	kind     filesystem.Type
	letGo    func()
}

// opened is a holder's open file: it keeps one device.
type opened struct {
	lease string
	letGo func()
}

func (k *kernel) powerCut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, m := range k.mounts {
		m.letGo()
	}
	clear(k.mounts)
	clear(k.visible)
	clear(k.busy)
	clear(k.frozen)
	clear(k.limits)
	clear(k.running)
	clear(k.shut)
	for _, o := range k.open {
		o.letGo()
	}
	clear(k.open)
	k.boots++
}

func (k *kernel) Mount(_ context.Context, id blockdev.ID, e blockdev.Endpoint, t filesystem.Type) (string, error) {
	k.mu.Lock()
	m, mounted := k.mounts[id]
	k.mu.Unlock()
	if mounted && k.deviceless(id, m) {
		return "", fmt.Errorf("%w: another device is mounted there", blockdev.ErrBusy)
	}
	if mounted {
		return string(id), nil
	}
	letGo, err := k.w.pool.Hold(id)
	if err != nil {
		return "", err
	}
	err = k.w.effect("mount", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.mounts[id] = mount{e, t, letGo}
		k.leases[id] = e.Lease
		delete(k.dirty, string(id))
	})
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, mounted := k.mounts[id]; !mounted {
		letGo()
	}
	return string(id), err
}

func (k *kernel) Unmount(_ context.Context, id blockdev.ID) error {
	k.mu.Lock()
	m, mounted := k.mounts[id]
	for _, volume := range k.visible {
		if volume == id {
			k.mu.Unlock()
			return blockdev.ErrBusy
		}
	}
	frozen := k.frozen[string(id)]
	k.mu.Unlock()
	if !mounted {
		return nil
	}
	if frozen {
		k.w.t.Errorf("volume %s is unmounted while it is frozen: nobody can thaw it any more", id)
	}
	if k.shut[id] {
		return fmt.Errorf("%w: flush of a filesystem that was shut down", blockdev.ErrFailed)
	}
	var lost error
	if k.deviceless(id, m) {
		if lost = fmt.Errorf("%w: flush of a filesystem whose device is gone", blockdev.ErrFailed); k.keeps(m.endpoint.Lease) {
			return errors.Join(lost, blockdev.ErrBusy)
		}
	}
	return errors.Join(lost, k.w.effect("unmount", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		m.letGo()
		delete(k.mounts, id)
	}))
}

// deviceless reports whether what is mounted is on a device over a worker that was taken
// away.
func (k *kernel) deviceless(id blockdev.ID, m mount) bool {
	return m.endpoint.Served && !k.w.pool.LeadsTo(id, m.endpoint.Lease)
}

// keeps reports whether somebody has a file open that is on a device.
func (k *kernel) keeps(lease string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, o := range k.open {
		if o.lease == lease {
			return true
		}
	}
	return false
}

// hold lets who is at a place keep a file open: it is busy, and its device is held
// until the power goes or the sandbox does.
func (k *kernel) hold(p string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, visible := k.visible[p]; !visible || k.busy[p] {
		return
	}
	letGo, err := k.w.pool.Hold(k.visible[p])
	if err != nil {
		k.w.t.Fatal(err)
	}
	k.busy[p], k.open[p] = true, opened{k.leases[k.visible[p]], letGo}
}

// Shutdown is of every type but btrfs.
func (k *kernel) Shutdown(_ context.Context, id blockdev.ID, _ bool) error {
	k.mu.Lock()
	m, mounted := k.mounts[id]
	k.mu.Unlock()
	if !mounted {
		return nil
	}
	if m.kind == filesystem.Btrfs {
		return errors.ErrUnsupported
	}
	return k.w.effect("shutdown", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.shut[id] = true
	})
}

func (k *kernel) Abandon(_ context.Context, id blockdev.ID, _ string) error {
	k.mu.Lock()
	m, mounted := k.mounts[id]
	k.mu.Unlock()
	if mounted {
		err := k.w.effect("abandon", func() {
			k.mu.Lock()
			defer k.mu.Unlock()
			m.letGo()
			delete(k.mounts, id)
			delete(k.shut, id)
		})
		if err != nil {
			return err
		}
	}
	k.mu.Lock()
	lease := k.leases[id]
	k.mu.Unlock()
	if k.keeps(lease) {
		return blockdev.ErrBusy
	}
	return nil
}

func (k *kernel) Mounted(_ context.Context, id blockdev.ID) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.mounts[id]; ok {
		return string(id), nil
	}
	return "", nil
}

// attacher puts volumes into the kernel's "visible" map. A host target outlives
// power cuts; a container does not.
type attacher struct {
	w    *world
	host bool
}

func place(r attach.Request) string {
	return r.Target.Path + "|" + r.Target.Container + "|" + r.MountPath
}

func (a attacher) Needs() attach.Needs { return attach.Needs{Mount: true} }

func (a attacher) gone(t attach.Target) bool {
	k := a.w.kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	return !a.host && (k.dead[t.Container] || t.Pid != 100+k.boots && t.Pid != 0)
}

func (a attacher) Resolve(_ context.Context, t attach.Target, _ string) (attach.Target, error) {
	if a.gone(t) {
		return t, blockdev.ErrGone
	}
	if !a.host {
		t.Pid = 100 + a.w.kernel.boots
	}
	return t, nil
}

func (a attacher) Attach(_ context.Context, r attach.Request) error {
	k := a.w.kernel
	if a.gone(r.Target) {
		return blockdev.ErrGone
	}
	if r.Mounted == "" {
		return fmt.Errorf("volume %s is not mounted on the stage", r.Volume)
	}
	k.mu.Lock()
	other, taken := k.visible[place(r)]
	k.mu.Unlock()
	if taken {
		if other == r.Volume {
			return nil
		}
		return blockdev.ErrBusy
	}
	return a.w.effect("attach", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.visible[place(r)] = r.Volume
	})
}

func (a attacher) Detach(_ context.Context, r attach.Request) error {
	k := a.w.kernel
	k.mu.Lock()
	busy, there := k.busy[place(r)], k.visible[place(r)] == r.Volume
	k.mu.Unlock()
	if busy && !r.Lazy && !a.gone(r.Target) {
		return blockdev.ErrBusy
	}
	if !there {
		return nil
	}
	return a.w.effect("detach", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.visible, place(r))
		delete(k.busy, place(r)) // nothing can be busy where nothing is; what is open stays open
	})
}

// Fence ends a container; a directory of the host is refused.
func (a attacher) Fence(_ context.Context, r attach.Request) error {
	if a.host {
		return attach.ErrCannotFence
	}
	k := a.w.kernel
	return a.w.effect("kill", func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.dead[r.Target.Container] = true
		delete(k.busy, place(r))
		delete(k.visible, place(r))
		if o, holds := k.open[place(r)]; holds {
			o.letGo()
			delete(k.open, place(r))
		}
	})
}

func (a attacher) Probe(_ context.Context, r attach.Request) (attach.State, error) {
	if a.gone(r.Target) {
		return attach.StateGone, nil
	}
	k := a.w.kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.visible[place(r)] == r.Volume {
		return attach.StateAttached, nil
	}
	return attach.StateMissing, nil
}
