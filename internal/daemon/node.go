package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"holdfast/api"
	"holdfast/api/audit"
	"holdfast/api/auth"
	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/cloudhypervisor"
	"holdfast/blockdev/attach/export"
	"holdfast/blockdev/attach/firecracker"
	"holdfast/blockdev/attach/host"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/runc"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/attach/vmstart"
	"holdfast/blockdev/cage"
	"holdfast/blockdev/extent"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/filesystem/sanitize"
	"holdfast/blockdev/limit"
	"holdfast/blockdev/pools"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/sparse"
	"holdfast/engine"
	"holdfast/internal/preflight"
	"holdfast/internal/sandbox"
	"holdfast/internal/sys"
	"holdfast/metadata"
	"holdfast/templates"
	"holdfast/templates/oci"
	"holdfast/templates/remote"
)

// node is everything that is open, in the order in which it was opened.
type node struct {
	c          Config
	at         layout
	log        *slog.Logger
	lock       *Lock
	checks     []preflight.Check
	secret     []byte
	pool       *sparse.Pool // the default one
	pools      *pools.Set
	stores     overlay.Prefixes // that may be fetched from
	others     []*otherPool
	poolDir    string
	workers    sparse.Workers // nil: this host has none
	runDir     string         // of sandboxes, in memory
	store      *metadata.Store
	side       *metadata.SideLog
	auth       *auth.Auth
	audit      *audit.Log
	space      *space
	ledger     *engine.Ledger
	library    *templates.Library
	registries *oci.Registries
	cages      *cage.Cages // nil: off
	caging     func() error
	tools      filesystem.Tools
	stage      *attach.Stage
	engine     *engine.Engine
	boxes      *sandbox.Runtime // nil: not enabled
	meters     *meters

	clean       bool     // the process before this one stopped in order
	orderly     bool     // this one does
	rebuilding  bool     // the store is moved aside before it is opened
	restoreFrom string   // a backup to begin the new store with; empty: none
	kept        []string // what was moved

	undo []func() error // closes what is open, last first
}

// claim takes the state directory for this process.
func claim(c Config, log *slog.Logger, command string) (*node, error) {
	n := &node{c: c, at: layout{c.StateDir}, log: log, meters: newMeters()}
	if err := makeDirs(c.StateDir); err != nil {
		return nil, err
	}
	lock, err := LockState(c.StateDir, command)
	if err != nil {
		return nil, err
	}
	n.lock = lock
	n.later("release the state directory", lock.Release)
	if n.clean, err = n.takeCleanMark(); err != nil {
		return nil, errors.Join(err, n.close())
	}
	n.later("clean mark", n.leaveCleanMark) // while the state directory is still ours
	return n, nil
}

// later notes how to close what was just opened.
func (n *node) later(what string, closing func() error) {
	n.undo = append(n.undo, func() error {
		if err := closing(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	})
}

// close closes all that is open. Devices, mounts and sandboxes stay.
func (n *node) close() error {
	var errs []error
	for i := len(n.undo) - 1; i >= 0; i-- {
		err := n.undo[i]()
		n.orderly = n.orderly && err == nil
		errs = append(errs, err)
	}
	n.undo = nil
	return errors.Join(errs...)
}

// open opens the stores and wires the packages, up to an engine that has not
// reconciled yet. On error the caller closes what is open.
func (n *node) open(ctx context.Context) error {
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"host", n.checkHost},
		{"secrets", n.openSecrets},
		{"pool", n.openPool},
		{"cages", n.openCages},
		{"side log", n.openSideLog}, // before a rebuild moves the records aside: one of the two must have the keys
		{"metadata", n.openStore},
		{"keys", n.openAuth},
		{"audit log", n.openAudit},
		{"cages", n.readyCages},
		{"templates", n.openLibrary},
		{"engine", n.openEngine},
		{"sandboxes", n.openSandboxes},
	} {
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("start: %s: %w", step.what, err)
		}
	}
	return nil
}

func (n *node) checkHost(ctx context.Context) error {
	n.checks = hostChecks(ctx, n.c)
	logChecks(n.log, n.checks)
	if failed := preflight.Failed(n.checks); len(failed) > 0 {
		return fmt.Errorf("%w: %s: %s; %s", ErrHost, failed[0].Name, failed[0].Consequence, failed[0].Fix)
	}
	return nil
}

func (n *node) openSecrets(context.Context) (err error) {
	n.secret, err = secret(n.at.secret())
	return err
}

func (n *node) openPool(ctx context.Context) error {
	place, err := sparse.Prepare(ctx, n.c.PoolDir, sparse.Mode(n.c.PoolMode), n.c.PoolSize)
	if err != nil {
		return err
	}
	n.poolDir = place.Dir
	n.log.Info("pool", "dir", place.Dir, "mode", place.Mode, "image", place.Image, "size", place.Size)
	id, err := n.hostID()
	if err != nil {
		return err
	}
	if n.workers, err = n.openWorkers(ctx, id); err != nil {
		return err
	}
	if place.Mode == sparse.Copy && n.workers == nil {
		n.log.Warn("the pool cannot share bytes: each volume copies what its template holds")
	}
	if n.stores, err = overlay.ParsePrefixes(n.c.RemoteTemplates); err != nil {
		return fmt.Errorf("remote_templates: %w", err)
	}
	n.runDir = filepath.Join(n.c.SandboxRunDir, id)
	if n.pool, err = sparse.Open(ctx, place.Dir, sparse.Options{Host: id, Log: n.log, Workers: n.workers, Prefixes: n.stores}); err != nil {
		return err
	}
	n.later("pool", func() error { n.pool.Shutdown(); return nil })
	return n.openPools(ctx, id)
}

// hostID names this host in what pools and volumes say of themselves.
func (n *node) hostID() (string, error) {
	b, err := os.ReadFile(n.at.host())
	if errors.Is(err, fs.ErrNotExist) {
		id := strings.ToLower(rand.Text())
		return id, writeFile(n.at.host(), []byte(id+"\n"))
	}
	if err != nil {
		return "", err
	}
	id := strings.TrimSuffix(string(b), "\n")
	if !hostName.MatchString(id) { // workers and sandboxes are looked for under it
		return "", fmt.Errorf("%s: damaged: %.40q is not a name that was made here; remove it after a boot, or once no worker and no sandbox runs, to have a new one made", n.at.host(), id)
	}
	return id, nil
}

var hostName = regexp.MustCompile(`^[a-z0-9]{20,64}$`)

func (n *node) openStore(ctx context.Context) error {
	place, err := sparse.PrepareMetadata(ctx, n.c.StateDir, n.poolDir)
	if err != nil {
		return err
	}
	n.log.Info("metadata", "dir", place.Dir, "mode", place.Mode)
	if n.rebuilding { // not before: after a boot the old store is not mounted until here
		if n.kept, err = n.moveStoreAside(time.Now()); err != nil {
			return err
		}
		if n.restoreFrom != "" {
			if err := n.restore(); err != nil {
				return err
			}
		}
	}
	n.store, err = metadata.Open(n.at.store(), metadata.Options{
		Log: n.log, OnFailure: failStop(n.log), SequenceFile: n.at.sequence(), ObserveCommit: n.meters.commit,
	})
	if errors.Is(err, metadata.ErrRolledBack) || errors.Is(err, metadata.ErrDamaged) {
		return fmt.Errorf("%w; make new records from the images: holdfastd rebuild --state-dir %s --yes", err, n.c.StateDir)
	}
	if err != nil {
		return err
	}
	n.later("metadata", n.store.Close)
	return nil
}

func (n *node) openSideLog(context.Context) (err error) {
	n.side, err = metadata.OpenSideLog(n.at.sideLog())
	if errors.Is(err, metadata.ErrDamaged) {
		return fmt.Errorf("%w; move it away and start the daemon: the records have what it tells", err)
	}
	if err != nil {
		return err
	}
	n.later("side log", n.side.Close)
	return nil
}

func (n *node) openAuth(ctx context.Context) (err error) {
	n.auth, err = auth.Open(ctx, auth.Options{Store: n.store, SideLog: n.side, Secret: n.secret, Log: n.log})
	return err
}

func (n *node) openAudit(context.Context) (err error) {
	if err := makeDirs(filepath.Dir(n.at.audit())); err != nil {
		return err
	}
	n.audit, err = audit.Open(n.at.audit(), audit.Options{OnFailure: func(err error) {
		n.log.Error("the audit log has a gap", "cause", err)
	}})
	if err != nil {
		return err
	}
	n.later("audit log", n.audit.Close)
	return nil
}

// openLibrary also makes the ledger, which the library reserves space of and
// which in turn counts the library's images.
func (n *node) openLibrary(ctx context.Context) error {
	capacity, err := n.pool.Capacity(ctx)
	if err != nil {
		return err
	}
	n.space = newSpace(n.pool, n.poolDir, n.log)
	spaces := n.openLedgers(ctx)
	n.ledger = engine.NewLedger(engine.LedgerOptions{
		Total: capacity.Total, Ratio: n.c.Overprovision, Reserve: reserve(n.c, capacity.Total),
		Other: n.space.other, Free: n.space.left,
	})
	n.registries, err = oci.NewRegistries(oci.RegistryOptions{
		Hosts: n.c.Registries, Others: n.c.RegistryHosts, Credentials: n.c.RegistryCredentials, Stall: n.c.TransferLimit,
	})
	if err != nil {
		return fmt.Errorf("registries, registry_hosts, registry_credentials: %w", err)
	}
	stores, err := remote.NewStores(n.c.RemoteTemplates)
	if err != nil {
		return fmt.Errorf("remote_templates: %w", err)
	}
	n.library, err = templates.Open(ctx, templates.Options{
		Store: n.store, SideLog: n.side, Pool: n.pools, Space: n.ledger, Spaces: spaces,
		Filesystems: n.tools, Staging: filepath.Join(n.pool.Staging(), "uploads"), Manifests: n.pool.Manifests(),
		Secret: n.secret, Log: n.log, OnFailure: failStop(n.log), MaxArchiveBytes: n.c.MaxArchive, MaxEntries: int64(n.c.MaxEntries), MaxUploads: n.c.MaxUploads,
		KeepRevisions: n.c.KeepVersions, KeepAge: n.c.KeepAge, ScrubInterval: n.c.ScrubInterval, ScrubRate: n.c.ScrubRate,
		Unclean: !n.clean, OnEvent: n.templateEvent,
		Registries: n.registries, Stores: stores, MaxImageBytes: n.c.MaxSize,
	})
	if err != nil {
		return err
	}
	n.later("templates", n.library.Close)
	for _, p := range n.others {
		if p.backend == nil {
			continue
		}
		if err := p.space.counts(ctx, n.library); err != nil { // measured again each hour
			n.log.Error("what a pool holds besides volumes could not be measured", "pool", p.name, "cause", err)
		}
	}
	return n.space.counts(ctx, n.library)
}

func (n *node) openEngine(ctx context.Context) (err error) {
	if n.stage, err = attach.NewStage(n.at.stage()); err != nil {
		return err
	}
	attachers, err := n.attachers()
	if err != nil {
		return err
	}
	limiter, err := limit.New()
	if err != nil {
		return err
	}
	n.engine, err = engine.New(ctx, engine.Options{
		Store: n.store, SideLog: n.side, Pool: n.pools, PoolName: homePool, PoolKind: kindSparse, Others: n.enginePools(), PoolPolicy: n.c.PoolPolicy,
		Library: n.library, Stage: n.stage, Filesystems: n.tools, Attachers: attachers, Limiter: limiter, Copy: extent.CopyPart,
		Sanitizer: sanitize.New(n.tools, filepath.Join(n.pool.Staging(), "sanitize")),
		Ledger:    n.ledger, Log: n.log, OnFailure: failStop(n.log), Observe: n.meters.action,
		Regions: n.c.Regions, DefaultRegion: n.c.DefaultRegion, MaxSizeMiB: n.c.MaxSize / filesystem.MiB, StepLimit: n.c.StepLimit,
		MaxFreeze: n.c.FreezeLimit,
	})
	if err != nil {
		return err
	}
	n.library.Await(n.engine.Awaited)
	n.later("engine", func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.c.DrainLimit)
		defer cancel()
		return n.engine.Close(ctx)
	})
	return nil
}

func (n *node) attachers() (map[string]attach.Attacher, error) {
	if n.c.Dev {
		if err := makeDirs(n.at.attach()); err != nil {
			return nil, err
		}
	}
	onHost, err := host.New(n.c.HostPrefixes)
	if err != nil {
		return nil, err
	}
	inRunc, err := runc.New(runc.Options{Root: n.c.RuncRoot, Roots: n.c.RuncRoots})
	if err != nil {
		return nil, err
	}
	inSandbox, err := runc.New(runc.Options{Root: sandbox.RuncRoot(n.runDir)})
	if err != nil {
		return nil, err
	}
	door, err := vmsocket.New(n.c.VMSockets, n.log)
	if err != nil {
		return nil, err
	}
	inFirecracker, err := firecracker.New(door, n.c.FirecrackerIO)
	if err != nil {
		return nil, err
	}
	inQEMU, inCloudHypervisor := qemu.New(qemu.Options{Door: door, AIO: qemu.AIO(n.c.QemuAIO)}), cloudhypervisor.New(door, cloudhypervisor.Options{})
	atStart, err := vmstart.New(vmstart.Options{
		Dir: n.at.vmStart(), Door: door, FirecrackerIO: n.c.FirecrackerIO, Log: n.log,
		Resizers: map[string]attach.Resizer{qemu.Type: inQEMU, firecracker.Type: inFirecracker, cloudhypervisor.Type: inCloudHypervisor},
	})
	if err != nil {
		return nil, err
	}
	network, err := n.c.exportNetwork()
	if err != nil {
		return nil, err
	}
	exported, err := export.New(export.Options{Door: door, Pool: n.pools, Network: network})
	if err != nil {
		return nil, err
	}
	// Also when they are not enabled: an earlier run may have left some.
	return map[string]attach.Attacher{
		vmstart.Type: atStart, export.Type: exported,
		host.Type: onHost, runc.Type: inRunc, api.SandboxTarget: sandbox.NewAttacher(inSandbox),
		qemu.Type: inQEMU, firecracker.Type: inFirecracker,
		cloudhypervisor.Type: inCloudHypervisor,
	}, nil
}

// openSandboxes opens the runtime of sandboxes where it is enabled.
func (n *node) openSandboxes(ctx context.Context) (err error) {
	if !n.c.SandboxEnabled {
		return nil
	}
	images := map[string]string{}
	for _, text := range n.c.SandboxImages {
		name, dir, _ := strings.Cut(text, "=")
		images[name] = dir
	}
	n.boxes, err = sandbox.Open(ctx, sandbox.Options{
		Engine: n.engine, Store: n.store, StateDir: n.at.sandboxes(), RunDir: n.runDir, Log: n.log, Images: images, Registries: n.registries,
		Max: n.c.SandboxMax, MaxMemoryMiB: n.c.SandboxMemory >> 20, Pids: int64(n.c.SandboxPids), LayerMiB: n.c.SandboxLayer >> 20,
		FirstID: n.c.SandboxUsers, Region: n.c.DefaultRegion, Regions: n.c.Regions,
	})
	if err != nil && n.c.Dev {
		n.log.Warn("no sandboxes: this host lacks what they need (docs/sandboxes.md)", "cause", err)
		n.boxes = nil
		return nil
	}
	if err != nil {
		return err
	}
	n.later("sandboxes", func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.c.DrainLimit)
		defer cancel()
		return n.boxes.Close(ctx)
	})
	return nil
}

// healthy tells why the node cannot do its work, nil when it can.
func (n *node) healthy(context.Context) error {
	if err := n.engine.Healthy(); err != nil {
		return err
	}
	_, err := sys.SpaceOf(n.poolDir)
	return err
}

// doctor looks again at everything that can change while the daemon runs.
func (n *node) doctor(ctx context.Context) []preflight.Check {
	checks := hostChecks(ctx, n.c)
	checks = append(checks, preflight.Place(n.c.StateDir, n.poolDir, n.at.metadata())...)
	return append(append(checks, n.checkPoolsNow(ctx)...), n.checkTemplates())
}

// checksBody is doctor for the API.
func (n *node) checksBody(ctx context.Context) []api.Check {
	checks := n.doctor(ctx)
	body := make([]api.Check, len(checks))
	for i, c := range checks {
		body[i] = api.Check{Name: c.Name, Status: string(c.Status), Found: c.Found, Consequence: c.Consequence, Fix: c.Fix}
	}
	return body
}

var (
	_ blockdev.Cloner = (*sparse.Pool)(nil)
	_ api.Engine      = (*engine.Engine)(nil)
	_ api.Library     = (*templates.Library)(nil)
)
