package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
)

// Options are what an Engine is made of. Every field without a note is required.
type Options struct {
	Store       *metadata.Store
	SideLog     *metadata.SideLog // quotas, so that a rebuild finds them
	Pool        blockdev.Backend
	PoolName    string
	PoolKind    string      // for PoolStatus: "sparse"
	Others      []OtherPool // that volumes may be in besides; Pool is a Placer then
	PoolPolicy  string      // where a create without a pool goes; see choosePool
	Library     Library
	Stage       Stage
	Filesystems Filesystems
	Attachers   map[string]attach.Attacher // by target type
	Limiter     Limiter                    // nil: no attachment can have limits
	Sanitizer   Sanitizer                  // nil: no volume can be made of another one's files
	Copy        Copy                       // between pools; nil: no volume can be moved
	Ledger      *Ledger
	Log         *slog.Logger
	// OnFailure is called once when a flush or commit failed: the owner must end
	// the process, because nothing more may be acknowledged (fail-stop).
	OnFailure func(error)
	// Observe, if set, is told how long each action of a volume's life took
	// (the actions of step.go, and within "allocate" also "hydrate" and "publish")
	// and how it ended. It must be quick.
	Observe func(action string, d time.Duration, err error)

	Regions       []string         // allowed; empty: any text
	DefaultRegion string           // for requests without one
	MaxSizeMiB    int64            // largest volume; 0: 64 TiB
	Now           func() time.Time // nil: time.Now
	ProbeInterval time.Duration    // between looks at sandboxes and pending work; 0: 2 s
	MaxFreeze     time.Duration    // that a request may ask for; 0: a minute
	FlattenWait   time.Duration    // for a layered image to become flat, until the caller is told how much is left; 0: half the StepLimit
	StepLimit     time.Duration    // of a step of an attachment, until it is said to hang; 0: 20 s
}

// The tables. Keys: a volume's id; workspace "/" digest of the key; a workspace.
var (
	volumesTable     = metadata.Table[Volume]{Name: "volumes"}
	idempotencyTable = metadata.Table[remembered]{Name: "idempotency"}
	quotasTable      = metadata.Table[Quota]{Name: "quotas"}
)

// Engine is the life of the volumes of one node. It is safe for concurrent use.
type Engine struct {
	o         Options
	catalog   *catalog
	buried    *graveyard
	locks     *locks
	keys      *idempotency
	feed      *feed
	snapshots *snapshots
	freezes   *freezes
	io        ioMeter

	ctx    context.Context // of steps: a caller's context bounds only its waiting
	cancel context.CancelFunc
	steps  sync.WaitGroup
	kick   chan struct{}

	mu        sync.Mutex
	quotas    map[string]Quota
	endpoints map[blockdev.ID]blockdev.Endpoint // openings that attachments use
	attention map[blockdev.ID]time.Time         // volumes that Run looks at, and when it is time
	sentries  map[attach.Target]*sentry         // who waits for the end of a sandbox
	keepers   map[blockdev.ID]*keeper           // who waits for the end of a worker
	briefly   time.Duration
	apart     time.Duration
	counts    map[string]uint64           // see Counters
	complaint map[blockdev.ID]string      // what Run last logged of a volume
	pending   map[blockdev.ID]string      // why growth waits
	retries   map[blockdev.ID]retry       // volumes that did not settle: when to try again
	unflat    map[blockdev.ID]bool        // layered images that somebody waits for
	filled    map[blockdev.ID]int64       // device sizes that filesystems were grown to
	told      map[blockdev.ID]int64       // device sizes that sandboxes know of
	copies    map[blockdev.ID]*sanitizing // by the volume that is made
	intents   map[blockdev.ID]chan error  // creates whose wish is being made durable
	trims     trims
	failed    error
	stopping  bool
}

// New reads all records, recomputes the ledger and is ready to Reconcile.
func New(ctx context.Context, o Options) (*Engine, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxSizeMiB <= 0 {
		o.MaxSizeMiB = hardMaxSizeMiB
	}
	if o.StepLimit <= 0 {
		o.StepLimit = defaultStep
	}
	if o.FlattenWait <= 0 {
		o.FlattenWait = o.StepLimit / 2
	}
	if o.ProbeInterval <= 0 {
		o.ProbeInterval = 2 * time.Second
	}
	if o.MaxFreeze <= 0 {
		o.MaxFreeze = DefaultMaxFreeze
	}
	e := &Engine{
		o: o, catalog: newCatalog(), buried: newGraveyard(), locks: newLocks(), keys: newIdempotency(), feed: newFeed(uint64(max(o.Now().UnixMicro(), 0))), snapshots: newSnapshots(),
		kick: make(chan struct{}, 1), quotas: map[string]Quota{},
		endpoints: map[blockdev.ID]blockdev.Endpoint{}, attention: map[blockdev.ID]time.Time{}, sentries: map[attach.Target]*sentry{}, keepers: map[blockdev.ID]*keeper{}, briefly: briefly, apart: apartTime, counts: map[string]uint64{}, complaint: map[blockdev.ID]string{}, pending: map[blockdev.ID]string{}, retries: map[blockdev.ID]retry{}, filled: map[blockdev.ID]int64{}, unflat: map[blockdev.ID]bool{}, told: map[blockdev.ID]int64{}, intents: map[blockdev.ID]chan error{}, copies: map[blockdev.ID]*sanitizing{},
		freezes: &freezes{held: map[blockdev.ID]*frozen{}}, io: ioMeter{last: map[blockdev.ID]blockdev.Counters{}},
		trims: trims{written: map[blockdev.ID]int64{}, passed: map[blockdev.ID]time.Time{}},
	}
	for _, p := range o.Others {
		p.Ledger.shareQuotas(o.Ledger)
	}
	e.ctx, e.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if w, ok := o.Pool.(blockdev.FlatWatcher); ok {
		w.OnFlat(e.becameFlat)
	}
	if err := e.load(); err != nil {
		e.cancel()
		return nil, fmt.Errorf("engine: read records: %w", err)
	}
	return e, nil
}

func (e *Engine) load() error {
	var events []Happening
	defer func() { e.feed.seed(events) }()
	return e.o.Store.View(func(tx *metadata.Tx) error {
		err := volumesTable.Scan(tx, "", func(_ string, v Volume) error {
			e.ledger(v.Pool).record(v.Workspace, v.ID, v.bytes())
			e.placeFound(v)
			e.expectMove(v)
			if v.Phase == Deleting {
				e.buried.add(v)
				return nil
			}
			for _, event := range v.Events {
				events = append(events, Happening{Workspace: v.Workspace, Volume: v.Name, Event: event})
			}
			if !e.catalog.add(v) {
				return fmt.Errorf("two records of volume %q in workspace %q", v.Name, v.Workspace)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if err := e.loadSnapshots(tx); err != nil {
			return err
		}
		if err := quotasTable.Scan(tx, "", func(workspace string, q Quota) error {
			e.quotas[workspace] = q
			return nil
		}); err != nil {
			return err
		}
		return idempotencyTable.Scan(tx, "", func(key string, r remembered) error {
			e.keys.load(key, r)
			return nil
		})
	})
}

// Close refuses new work, waits until the steps under way are done or ctx ends,
// and then cancels them; for those that do not end it waits a moment more, and no
// longer. Devices, mounts and sandboxes stay as they are; what is frozen is
// thawed, because nobody would do it afterwards.
func (e *Engine) Close(ctx context.Context) error {
	e.mu.Lock()
	e.stopping = true
	e.mu.Unlock()
	e.thawAll(ctx) // first: a step may wait for one
	defer e.thawAll(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() { e.steps.Wait(); close(done) }()
	select {
	case <-done:
		e.cancel()
		return nil
	case <-ctx.Done():
	}
	e.cancel()
	select {
	case <-done:
		return ctx.Err()
	case <-time.After(closeGrace): // a call into the kernel that does not come back holds nobody up
		return fmt.Errorf("steps under way do not end: %w", ctx.Err())
	}
}

// do runs a step under the engine's own context and waits for it as long as the
// caller does: a caller that goes away interrupts nothing half-way.
func do[T any](ctx context.Context, e *Engine, step func(context.Context) (T, error)) (T, error) {
	var zero T
	e.mu.Lock()
	if e.stopping || e.failed != nil {
		err := e.failed
		e.mu.Unlock()
		return zero, &Problem{Kind: ErrUnavailable, Message: "the server is stopping: try again", Err: err}
	}
	e.steps.Add(1)
	e.mu.Unlock()

	type answer struct {
		v   T
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		defer e.steps.Done()
		v, err := step(e.ctx)
		answers <- answer{v, e.inspect(err)}
	}()
	select {
	case a := <-answers:
		return a.v, a.err
	case <-ctx.Done():
		return zero, ctx.Err()
	}
}

// inspect stops the engine when an error says that a flush or a commit failed.
func (e *Engine) inspect(err error) error {
	if !lostWrite(err) {
		return err
	}
	e.mu.Lock()
	first := e.failed == nil
	if first {
		e.failed = err
	}
	e.mu.Unlock()
	if first {
		e.o.Log.Error("a flush failed: no more work is acknowledged", "err", err)
		if e.o.OnFailure != nil {
			e.o.OnFailure(err)
		}
	}
	return &Problem{Kind: ErrUnavailable, Message: "the server lost a write and is stopping", Err: err}
}

// lostWrite reports whether err says that something may not have become durable.
func lostWrite(err error) bool {
	return errors.Is(err, blockdev.ErrFailed) || errors.Is(err, metadata.ErrFailed)
}

// Healthy tells why the engine takes no work, nil when it does.
func (e *Engine) Healthy() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failed != nil {
		return e.failed
	}
	if e.stopping {
		return ErrUnavailable
	}
	return nil
}

// timed performs a part of a volume's life and tells Observe.
func (e *Engine) timed(action string, part func() error) error {
	if e.o.Observe == nil {
		return part()
	}
	start := time.Now()
	err := part()
	e.o.Observe(action, time.Since(start), err)
	return err
}

func (e *Engine) now() time.Time { return e.o.Now().UTC().Round(0) }

// watch asks Run to look at a volume as soon as it can; unwatch says that nothing
// is left to do.
func (e *Engine) watch(id blockdev.ID) { e.watchFrom(id, time.Time{}) }

// watchFrom is watch from a time on.
func (e *Engine) watchFrom(id blockdev.ID, at time.Time) {
	e.mu.Lock()
	e.attention[id] = at
	e.mu.Unlock()
}

func (e *Engine) unwatch(id blockdev.ID) {
	e.mu.Lock()
	delete(e.attention, id)
	delete(e.complaint, id)
	e.mu.Unlock()
}

// wake makes Run look at once.
func (e *Engine) wake() {
	select {
	case e.kick <- struct{}{}:
	default:
	}
}

// Volume finds an active volume by name.
func (e *Engine) Volume(workspace, name string) (Volume, error) {
	if v, ok := e.catalog.named(workspace, name); ok {
		return v, nil
	}
	return Volume{}, problem(ErrNotFound, "", "volume %.60q not found", name)
}

// VolumeByExternalID finds the active volume with an external id: the newest, if
// several have it.
func (e *Engine) VolumeByExternalID(workspace, externalID string) (Volume, error) {
	if v, ok := e.catalog.external(workspace, externalID); ok {
		return v, nil
	}
	return Volume{}, problem(ErrNotFound, "", "no volume with external id %.70q", externalID)
}

// List gives one page of a workspace's volumes.
func (e *Engine) List(workspace string, q Query) (Page, error) {
	return e.catalog.page(workspace, q), nil
}

// Attachments counts the attachments of all volumes, by target type.
func (e *Engine) Attachments() map[string]int {
	counts := map[string]int{}
	for kind := range e.o.Attachers {
		counts[kind] = 0
	}
	e.catalog.each(func(v Volume) {
		for _, a := range v.Attachments {
			counts[a.Target.Type]++
		}
	})
	return counts
}

// CountByStatus counts all volumes by status.
func (e *Engine) CountByStatus() map[Status]int {
	counts := map[Status]int{}
	e.catalog.each(func(v Volume) { counts[v.Status()]++ })
	return counts
}

// ListDir lists a directory of a detached volume without mounting it.
func (e *Engine) ListDir(ctx context.Context, workspace, name, dir string) ([]filesystem.Entry, error) {
	return do(ctx, e, func(ctx context.Context) ([]filesystem.Entry, error) {
		var entries []filesystem.Entry
		err := e.detached(ctx, workspace, name, func(path string, v Volume) (err error) {
			entries, err = e.o.Filesystems.ListDir(ctx, path, v.Filesystem, dir)
			return err
		}, func(b blockdev.Bytes, v Volume) (err error) {
			entries, err = e.o.Filesystems.ListDirIn(ctx, b, v.Filesystem, dir)
			return err
		})
		return entries, err
	})
}

// ReadFile writes a file of a detached volume to w without mounting the volume.
// It runs under the caller's context, because w is the caller's.
func (e *Engine) ReadFile(ctx context.Context, workspace, name, file string, w io.Writer) error {
	return e.detached(ctx, workspace, name, func(path string, v Volume) error {
		return e.o.Filesystems.ReadFile(ctx, path, v.Filesystem, file, w)
	}, func(b blockdev.Bytes, v Volume) error {
		return e.o.Filesystems.ReadFileIn(ctx, b, v.Filesystem, file, w)
	})
}

// detached reads the image of a volume that nobody uses, as asBytes.
func (e *Engine) detached(ctx context.Context, workspace, name string, byPath func(path string, v Volume) error, byBytes func(b blockdev.Bytes, v Volume) error) (err error) {
	v, release, err := e.lockNamed(ctx, workspace, name)
	if err != nil {
		return err
	}
	defer release()
	if err := v.mayBeRead("read its files there, or detach it"); err != nil {
		return err
	}
	read := func() error {
		return e.asBytes(ctx, v.ID, true, func(path string) error { return byPath(path, v) }, func(b blockdev.Bytes) error { return byBytes(b, v) })
	}
	err = read()
	if !errors.Is(err, filesystem.ErrDirty) || v.Tainted {
		return err
	}
	// Its last use was cut short, by a power cut as a rule: mounting it recovers it.
	_, err = e.activate(ctx, v, false)
	if err := errors.Join(err, e.deactivate(ctx, v)); err != nil {
		return err
	}
	return read()
}

// mayBeRead refuses what reads the files of a volume that is not there for that.
// advice is what to do about one that is attached.
func (v Volume) mayBeRead(advice string) error {
	switch {
	case v.Phase != Ready || v.Failure != "":
		return notReady(v)
	case v.moving():
		return movedProblem(v)
	case len(v.Attachments) > 0:
		return problem(ErrAttached, "", "volume %q is attached to %s: %s", v.Name, v.AttachedTo(), advice)
	case v.Filesystem == filesystem.None:
		return problem(ErrUnsupported, "", "volume %q has no filesystem", v.Name)
	}
	return nil
}

func notReady(v Volume) error {
	if v.Failure != "" {
		return problem(ErrConflict, "", "volume %q has failed: %s", v.Name, v.Failure)
	}
	return problem(ErrConflict, "", "volume %q is %s", v.Name, v.Phase)
}

// lockNamed finds a volume by name and takes its lock; what it returns is the
// record as it is under the lock.
func (e *Engine) lockNamed(ctx context.Context, workspace, name string) (Volume, func(), error) {
	v, err := e.Volume(workspace, name)
	if err != nil {
		return Volume{}, nil, err
	}
	release, err := e.locks.acquire(ctx, v.ID)
	if err != nil {
		return Volume{}, nil, hangingProblem(v, err)
	}
	now, ok := e.catalog.get(v.ID)
	if !ok {
		release()
		return Volume{}, nil, problem(ErrNotFound, "", "volume %.60q not found", name)
	}
	return now, release, nil
}
