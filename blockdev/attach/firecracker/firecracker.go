package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmsocket"
)

// Type is the target type that this attacher serves.
const Type = "firecracker"

// The I/O engines of drives: Async is io_uring, of host kernels after 5.10.51.
const (
	Sync  = "Sync"
	Async = "Async"
)

const (
	notStarted = "Not started" // InstanceInfo.state
	writeback  = "Writeback"   // Drive.cache_type
)

// Attacher is an attach.Attacher, attach.Resizer, attach.Limiter and attach.Sentry.
type Attacher struct {
	door   *vmsocket.Door
	engine string
}

var (
	_ attach.Attacher = (*Attacher)(nil)
	_ attach.Resizer  = (*Attacher)(nil)
	_ attach.Sentry   = (*Attacher)(nil)
	_ attach.Limiter  = (*Attacher)(nil)
)

// New takes the door to the sockets and the I/O engine of drives, Sync or Async.
// blockdev.ErrInvalid for another engine.
func New(door *vmsocket.Door, engine string) (*Attacher, error) {
	if engine != Sync && engine != Async {
		return nil, blockdev.Op("firecracker.New", "", fmt.Errorf("%w: I/O engine %q is neither %s nor %s", blockdev.ErrInvalid, engine, Sync, Async))
	}
	return &Attacher{door, engine}, nil
}

// Needs is the image itself: Firecracker does its own I/O.
func (a *Attacher) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}, Raw: true}
}

// instance is a part of the document's InstanceInfo.
type instance struct {
	App   string `json:"app_name"`
	State string `json:"state"`

	Version string `json:"vmm_version"`
}

// drive is the document's Drive, without what we do not use.
type drive struct {
	ID       string `json:"drive_id"`
	Root     bool   `json:"is_root_device"`
	Cache    string `json:"cache_type"`
	ReadOnly bool   `json:"is_read_only"`
	Path     string `json:"path_on_host"`
	Engine   string `json:"io_engine"`

	Rates *vmsocket.Rates `json:"rate_limiter,omitempty"`
}

// partialDrive is the document's PartialDrive. What it does not name stays.
type partialDrive struct {
	ID    string          `json:"drive_id"`
	Path  string          `json:"path_on_host,omitempty"`
	Rates *vmsocket.Rates `json:"rate_limiter,omitempty"`
}

// driveID names a volume's drive: Firecracker allows letters, digits and underscores.
func driveID(id blockdev.ID) string { return strings.ReplaceAll(string(id), "-", "_") }

func (a *Attacher) drive(r attach.Request) drive {
	return drive{ID: driveID(r.Volume), Cache: writeback, ReadOnly: r.ReadOnly, Path: r.Endpoint.Path, Engine: a.engine}
}

// Resolve finds the VMM behind the target's socket. blockdev.ErrInvalid when it is
// not Firecracker, blockdev.ErrBusy when its microVM has been started.
func (a *Attacher) Resolve(ctx context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	if t.Agent != "" || mountPath != "" {
		return t, blockdev.Op("firecracker.Resolve", "", fmt.Errorf("%w: a Firecracker target has no agent and no mountPath: its volumes are attached before the guest runs, which mounts them itself", blockdev.ErrInvalid))
	}
	resolved, err := a.door.Resolve(ctx, Type, t, mountPath)
	if err == nil {
		var i instance
		if i, err = a.describe(ctx, resolved); err == nil {
			err = a.mayTakeDrives(resolved, i)
		}
	}
	return resolved, blockdev.Op("firecracker.Resolve", "", err)
}

func (a *Attacher) describe(ctx context.Context, t attach.Target) (i instance, err error) {
	err = a.door.Do(ctx, t, http.MethodGet, "/", nil, &i)
	if err == nil && i.App != "Firecracker" {
		err = vmsocket.ErrGarbled
	}
	return i, vmsocket.NotA("Firecracker", err)
}

// find gives the volume's drive, nil for none, and whether the image is there by
// another drive.
func (a *Attacher) find(ctx context.Context, r attach.Request) (found *drive, foreign bool, err error) {
	var config struct{ Drives []drive }
	if err := a.door.Do(ctx, r.Target, http.MethodGet, "/vm/config", nil, &config); err != nil {
		return nil, false, err
	}
	if at := slices.IndexFunc(config.Drives, func(d drive) bool { return d.ID == driveID(r.Volume) }); at >= 0 {
		found = &config.Drives[at]
	}
	foreign = slices.ContainsFunc(config.Drives, func(d drive) bool { return d.ID != driveID(r.Volume) && d.Path == r.Endpoint.Path })
	return found, foreign, nil
}

// Attach gives the microVM the drive, before it boots or by hot-plug. It has it
// already, booted or not, is success. blockdev.ErrBusy when it has booted without it, has it in another
// mode, or refuses.
func (a *Attacher) Attach(ctx context.Context, r attach.Request) error {
	return blockdev.Op("firecracker.Attach", r.Volume, a.attach(ctx, r))
}

func (a *Attacher) attach(ctx context.Context, r attach.Request) error {
	i, err := a.describe(ctx, r.Target)
	if err != nil {
		return err
	}
	found, foreign, err := a.find(ctx, r)
	want := a.drive(r)
	switch {
	case err != nil:
		return err
	case foreign:
		return fmt.Errorf("%w: the microVM has the volume's image as another drive", blockdev.ErrBusy)
	case found != nil && (found.Path != want.Path || found.ReadOnly != want.ReadOnly || found.Cache != want.Cache):
		return fmt.Errorf("%w: the microVM has a drive of the volume's name in another mode", blockdev.ErrBusy)
	case found != nil:
		return a.rate(ctx, r, i, *found)
	}
	if err := a.mayTakeDrives(r.Target, i); err != nil {
		return err
	}
	if err := a.door.SeesImage(r); err != nil {
		return err
	}
	return a.put(ctx, r)
}

func (a *Attacher) put(ctx context.Context, r attach.Request) error {
	d := a.drive(r)
	var err error
	if d.Rates, err = vmsocket.Given(r.Limits, r.ReadOnly); err != nil {
		return err
	}
	return refusal(a.door.Do(ctx, r.Target, http.MethodPut, "/drives/"+d.ID, d, nil))
}

func (a *Attacher) patch(ctx context.Context, r attach.Request, p partialDrive) error {
	p.ID = driveID(r.Volume)
	return refusal(a.door.Do(ctx, r.Target, http.MethodPatch, "/drives/"+p.ID, p, nil))
}

// Resized makes Firecracker read the image's size again. The guest is told by its
// device; that it has seen it is not.
func (a *Attacher) Resized(ctx context.Context, r attach.Request) error {
	return blockdev.Op("firecracker.Resized", r.Volume, a.resized(ctx, r))
}

func (a *Attacher) resized(ctx context.Context, r attach.Request) error {
	i, err := a.describe(ctx, r.Target)
	if err != nil {
		return err
	}
	if i.State == notStarted { // the drive is given again: PATCH is for booted ones
		return a.put(ctx, r)
	}
	return a.patch(ctx, r, partialDrive{Path: r.Endpoint.Path})
}

// refusal makes a refusal a conflict: the request was as the document has it.
func refusal(err error) error {
	var refused *vmsocket.Refused
	if errors.As(err, &refused) {
		return fmt.Errorf("%w: %w: the operator's log has its text", blockdev.ErrBusy, err)
	}
	return err
}

// Detach is success when the VMM has ended, or has not got the drive. A drive of a
// started microVM is taken back where Firecracker has hot-plug: the guest must have
// let it go before, nobody asks it. blockdev.ErrBusy otherwise.
func (a *Attacher) Detach(ctx context.Context, r attach.Request) error {
	state, err := a.probe(ctx, r)
	if err == nil && state == attach.StateAttached {
		err = a.takeBack(ctx, r)
	}
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	return blockdev.Op("firecracker.Detach", r.Volume, err)
}

// Fence kills the VMM.
func (a *Attacher) Fence(ctx context.Context, r attach.Request) error {
	return blockdev.Op("firecracker.Fence", r.Volume, a.door.Kill(ctx, r.Target))
}

// AwaitEnd implements attach.Sentry by the process's descriptor.
func (a *Attacher) AwaitEnd(ctx context.Context, t attach.Target) error {
	return blockdev.Op("firecracker.AwaitEnd", "", a.door.AwaitEnd(ctx, t))
}

// Probe asks the VMM for its drives, and the kernel for what the VMM has open.
func (a *Attacher) Probe(ctx context.Context, r attach.Request) (attach.State, error) {
	state, err := a.probe(ctx, r)
	return state, blockdev.Op("firecracker.Probe", r.Volume, err)
}

func (a *Attacher) probe(ctx context.Context, r attach.Request) (attach.State, error) {
	found, foreign, err := a.find(ctx, r)
	there := found != nil || foreign
	if err == nil && !there {
		there, err = a.door.HoldsImage(r)
	}
	switch {
	case errors.Is(err, blockdev.ErrGone):
		return attach.StateGone, nil
	case err != nil:
		return "", err
	case there:
		return attach.StateAttached, nil
	}
	return attach.StateMissing, nil
}
