package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/go-runc"

	"holdfast/api"
	"holdfast/engine"
	"holdfast/internal/run"
	"holdfast/internal/sys"
	"holdfast/metadata"
	"holdfast/templates/oci"
)

// Engine is what the runtime needs of the volumes. engine.Engine is one.
type Engine interface {
	CreateVolume(ctx context.Context, r engine.CreateVolume) (engine.Volume, error)
	Volume(workspace, name string) (engine.Volume, error)
	DeleteVolume(ctx context.Context, workspace, name, actor string) (engine.Volume, error)
	Attach(ctx context.Context, workspace, name string, r engine.AttachVolume) (engine.Attachment, error)
	Detach(ctx context.Context, workspace, name, id, actor string) (engine.Attachment, error)
}

// Options are what a Runtime is made of. Every field without a note is required.
type Options struct {
	Engine   Engine
	Store    *metadata.Store
	StateDir string // for images; nobody else's
	RunDir   string // in memory (tmpfs), named by this host alone; nobody else's
	Log      *slog.Logger

	Images       map[string]string // the name that clients send, with or without its tag: a source
	Registries   *oci.Registries   // that sources may name; nil: none
	Max          int               // sandboxes on this machine
	MaxMemoryMiB int64             // of one; who asks for more gets this
	Pids         int64             // processes and threads of one
	LayerMiB     int64             // of one's own changes to its root filesystem, which count as memory
	FirstID      int               // of the host's users, from which each sandbox has 65536; 0: no user namespaces
	Region       string            // of those that name none and have no volume
	Regions      []string          // allowed; empty: any text

	Now           func() time.Time // nil: time.Now
	ProbeInterval time.Duration    // between looks at the sandboxes; 0: 1 s
}

// Runtime runs sandboxes. It is safe for concurrent use.
type Runtime struct {
	o          Options
	images     *images
	containers *containers

	ctx    context.Context // of steps: a caller's context bounds only its waiting
	cancel context.CancelFunc
	steps  sync.WaitGroup
	kick   chan struct{}

	mu       sync.Mutex
	boxes    map[string]*box // by workspace "/" name
	stopping bool
}

var _ api.Sandboxes = (*Runtime)(nil)

// box is a sandbox of this process. The holder of turn changes it.
type box struct {
	turn chan struct{}
	mu   sync.Mutex
	rec  record

	processes processes
}

func newBox(rec record) *box {
	return &box{turn: make(chan struct{}, 1), rec: rec}
}

func (b *box) record() record {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rec.clone()
}

// lock takes the box's turn; release gives it back.
func (b *box) lock(ctx context.Context) error {
	select {
	case b.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *box) release() { <-b.turn }

// Open reads the records and makes the minimal image. Reconcile comes next.
func Open(ctx context.Context, o Options) (*Runtime, error) {
	r, err := open(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("sandboxes: %w", err)
	}
	return r, nil
}

func open(ctx context.Context, o Options) (*Runtime, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.ProbeInterval <= 0 {
		o.ProbeInterval = time.Second
	}
	boot, err := sys.BootID()
	if err != nil {
		return nil, err
	}
	images, err := openImages(ctx, filepath.Join(o.StateDir, "images"), o)
	if err != nil {
		return nil, err
	}
	// Whoever is root in a sandbox must be able to come down to its root filesystem.
	for _, dir := range []string{o.RunDir, filepath.Join(o.RunDir, "boxes")} {
		if err := errors.Join(os.MkdirAll(dir, 0o711), os.Chmod(dir, 0o711)); err != nil { //nolint:gosec // passage only
			return nil, err
		}
	}
	if err := images.placeTool(filepath.Join(o.RunDir, "busybox")); err != nil {
		return nil, err
	}
	r := &Runtime{
		o: o, images: images, kick: make(chan struct{}, 1), boxes: map[string]*box{},
		containers: newContainers(o.RunDir, boot),
	}
	if _, err := run.Look("runc"); err != nil {
		return nil, err
	}
	if o.FirstID > 0 {
		if err := mapsOwners(images.minimal, o.FirstID); err != nil {
			o.Log.Warn("no user namespaces for sandboxes: root in them has the number of the host's root, held by capabilities and system call filters alone", "cause", err)
			r.o.FirstID = 0
		}
	}
	r.ctx, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return r, r.load()
}

// mapsOwners tries what user namespaces need: one, and a mount that is seen as in it.
func mapsOwners(dir string, firstID int) error {
	ns, err := run.UserNamespace(firstID, idRange)
	if err != nil {
		return err
	}
	defer ns.Close()
	mount, err := sys.CloneMount(dir)
	if err != nil {
		return err
	}
	defer mount.Close()
	return sys.MapOwners(mount, ns)
}

// RuncRoot is where runc keeps the state of the sandboxes of a RunDir.
func RuncRoot(runDir string) string { return filepath.Join(runDir, "runc") }

func newContainers(runDir, boot string) *containers {
	return &containers{runc: &runc.Runc{Root: RuncRoot(runDir)}, dir: filepath.Join(runDir, "boxes"), boot: boot}
}

func (r *Runtime) load() error {
	return r.o.Store.View(func(tx *metadata.Tx) error {
		return sandboxesTable.Scan(tx, "", func(_ string, rec record) error {
			r.boxes[key(rec.Workspace, rec.Name)] = newBox(rec)
			return nil
		})
	})
}

func key(workspace, name string) string { return workspace + "/" + name }

// Close refuses new work and waits until the steps under way are done, or ctx
// ends. Sandboxes go on.
func (r *Runtime) Close(ctx context.Context) error {
	r.mu.Lock()
	r.stopping = true
	r.mu.Unlock()
	done := make(chan struct{})
	go func() { r.steps.Wait(); close(done) }()
	select {
	case <-done:
		r.cancel()
		return nil
	case <-ctx.Done():
		r.cancel()
		<-done
		return ctx.Err()
	}
}

// do runs a step under the runtime's own context and waits for it as long as the
// caller does.
func do[T any](ctx context.Context, r *Runtime, step func(context.Context) (T, error)) (T, error) {
	type answer struct {
		v   T
		err error
	}
	answers := make(chan answer, 1)
	if !r.begin() {
		var zero T
		return zero, stopping()
	}
	go func() {
		defer r.steps.Done()
		v, err := step(r.ctx)
		answers <- answer{v, err}
	}()
	select {
	case a := <-answers:
		return a.v, a.err
	case <-ctx.Done():
		var zero T
		return zero, ctx.Err()
	}
}

// begin counts a step that is to be waited for; false while stopping.
func (r *Runtime) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping {
		return false
	}
	r.steps.Add(1)
	return true
}

func stopping() error {
	return &engine.Problem{Kind: engine.ErrUnavailable, Message: "the server is stopping: try again"}
}

func (r *Runtime) now() time.Time { return r.o.Now().UTC().Round(0) }

// save makes a record durable, then lets others see it.
func (r *Runtime) save(ctx context.Context, b *box, rec record) error {
	err := r.o.Store.Update(ctx, func(tx *metadata.Tx) error { return sandboxesTable.Put(tx, rec.ID, rec) })
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rec = rec
	return nil
}

// saveFreeing is save for a step that frees something: it works when the
// metadata's own disk is full.
func (r *Runtime) saveFreeing(ctx context.Context, b *box, rec record) error {
	err := r.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error { return sandboxesTable.Put(tx, rec.ID, rec) })
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rec = rec
	return nil
}

// erase ends the record; the name is free.
func (r *Runtime) erase(ctx context.Context, rec record) error {
	err := r.o.Store.UpdateFreeing(ctx, func(tx *metadata.Tx) error { return sandboxesTable.Delete(tx, rec.ID) })
	if err != nil && !errors.Is(err, metadata.ErrNotFound) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.boxes, key(rec.Workspace, rec.Name))
	return nil
}

// find finds a sandbox by name.
func (r *Runtime) find(workspace, name string) (*box, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b := r.boxes[key(workspace, name)]; b != nil {
		return b, nil
	}
	return nil, problem(engine.ErrNotFound, "", "sandbox %.60q not found", name)
}

// Sandbox finds a sandbox by name.
func (r *Runtime) Sandbox(workspace, name string) (api.Sandbox, error) {
	b, err := r.find(workspace, name)
	if err != nil {
		return api.Sandbox{}, err
	}
	return b.record().show(), nil
}

// SandboxByExternalID finds the newest one that is not being deleted.
func (r *Runtime) SandboxByExternalID(workspace, externalID string) (api.Sandbox, error) {
	for _, rec := range r.of(workspace) {
		if rec.ExternalID == externalID && externalID != "" && rec.Phase != deleting {
			return rec.show(), nil
		}
	}
	return api.Sandbox{}, problem(engine.ErrNotFound, "", "no sandbox with external id %.70q", externalID)
}

// List gives a workspace's sandboxes, the newest first.
func (r *Runtime) List(workspace string) []api.Sandbox {
	all := []api.Sandbox{}
	for _, rec := range r.of(workspace) {
		all = append(all, rec.show())
	}
	return all
}

func (r *Runtime) of(workspace string) []record {
	var all []record
	for _, b := range r.all() {
		if rec := b.record(); rec.Workspace == workspace {
			all = append(all, rec)
		}
	}
	slices.SortFunc(all, func(a, b record) int {
		if c := b.CreatedAt.Compare(a.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(b.Name, a.Name)
	})
	return all
}

func (r *Runtime) all() []*box {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*box, 0, len(r.boxes))
	for _, b := range r.boxes {
		all = append(all, b)
	}
	return all
}

func problem(kind error, field, format string, args ...any) error {
	return &engine.Problem{Kind: kind, Field: field, Message: fmt.Sprintf(format, args...)}
}
