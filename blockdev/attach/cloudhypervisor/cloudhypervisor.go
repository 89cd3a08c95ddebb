package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmguest"
	"holdfast/blockdev/attach/vmsocket"
)

// Type is the target type that this attacher serves.
const Type = "cloud-hypervisor"

const (
	// base is where the API's paths begin: "servers" of the published document.
	base = "/api/v1/"
	// oldest is the first version that is told an image's type and probes nothing.
	oldest = 51
	raw    = "Raw" // ImageType
	// pollTime is between two looks at what a guest lets go.
	pollTime = 5 * time.Millisecond
)

// Options configure an Attacher.
type Options struct {
	Wait time.Duration // for a guest to let a disk go; 0: 5 s
}

// Attacher is an attach.Attacher, attach.Resizer, attach.Limiter, attach.Sentry and,
// by the vsock device of the VM, attach.Guest.
type Attacher struct {
	*vmguest.Agents
	door *vmsocket.Door
	wait time.Duration
}

var (
	_ attach.Attacher = (*Attacher)(nil)
	_ attach.Resizer  = (*Attacher)(nil)
	_ attach.Sentry   = (*Attacher)(nil)
	_ attach.Named    = (*Attacher)(nil)
	_ attach.Limiter  = (*Attacher)(nil)
	_ attach.Meter    = (*Attacher)(nil)
	_ attach.Guest    = (*Attacher)(nil)
	_ attach.Chooser  = (*Attacher)(nil)
)

// New takes the door to the sockets.
func New(door *vmsocket.Door, o Options) *Attacher {
	if o.Wait <= 0 {
		o.Wait = 5 * time.Second
	}
	serial := func(r attach.Request) (string, error) { return Serial(r.Volume), nil }
	return &Attacher{&vmguest.Agents{Door: door, Serial: serial, Vsock: true}, door, o.Wait}
}

// Needs is the image itself: Cloud Hypervisor does its own I/O.
func (a *Attacher) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block, blockdev.VhostUser}, Raw: true}
}

// KindsFor implements attach.Chooser, see vmsocket.KindsFor.
func (a *Attacher) KindsFor(t attach.Target) []blockdev.Kind { return vmsocket.KindsFor(t) }

// Serial implements attach.Named.
func (a *Attacher) Serial(id blockdev.ID) string { return Serial(id) }

// Serial is the serial number that a volume's disk has in the guest: the last 20
// characters of the volume's id, as many as virtio-blk has room for
// (VIRTIO_BLK_ID_BYTES). There it is /dev/disk/by-id/virtio-SERIAL.
func Serial(id blockdev.ID) string { return string(id[max(len(id)-20, 0):]) }

func diskID(id blockdev.ID) string { return "holdfast-" + string(id) }

// disk is the document's DiskConfig, without what we do not use: an image that the VMM
// opens, or a socket.
type disk struct {
	ID       string `json:"id"`
	Path     string `json:"path,omitempty"`
	ReadOnly bool   `json:"readonly"`
	Direct   bool   `json:"direct"`
	Serial   string `json:"serial,omitempty"`
	Image    string `json:"image_type,omitempty"`
	Backing  bool   `json:"backing_files"`

	Rates *vmsocket.Rates `json:"rate_limiter_config,omitempty"`

	Served bool   `json:"vhost_user,omitempty"`
	Socket string `json:"vhost_socket,omitempty"`
}

// at is where a disk's bytes come from: no two disks may have the same.
func (d disk) at() string { return d.Path + d.Socket }

// diskOf is a request's. Serial and limits of one that a worker serves are the worker's.
func diskOf(r attach.Request) disk {
	if r.Endpoint.Kind == blockdev.VhostUser {
		return disk{ID: diskID(r.Volume), ReadOnly: r.ReadOnly, Served: true, Socket: r.Endpoint.Path}
	}
	return disk{ID: diskID(r.Volume), Path: r.Endpoint.Path, ReadOnly: r.ReadOnly, Direct: true, Serial: Serial(r.Volume), Image: raw}
}

// info is a part of the document's VmInfo.
type info struct {
	Config struct {
		Disks  []disk
		Memory struct {
			memory
			Zones []memory
		}
	}
	State   string
	Devices map[string]any `json:"device_tree"`
}

type memory struct{ Shared, Hugepages bool }

func (m memory) inFile() bool { return m.Shared || m.Hugepages }

// sharesMemory reports whether a worker can be given the guest's memory: all of it, of
// which zones may tell one by one.
func (i info) sharesMemory() bool {
	m := i.Config.Memory
	return m.inFile() || len(m.Zones) > 0 && !slices.ContainsFunc(m.Zones, func(z memory) bool { return !z.inFile() })
}

// disk finds the volume's in the configuration, nil for none.
func (i info) disk(id blockdev.ID) *disk {
	at := slices.IndexFunc(i.Config.Disks, func(d disk) bool { return d.ID == diskID(id) })
	if at < 0 {
		return nil
	}
	return &i.Config.Disks[at]
}

func (a *Attacher) do(ctx context.Context, t attach.Target, method, call string, in, out any) error {
	return a.door.Do(ctx, t, method, base+call, in, out)
}

// Resolve finds the VMM behind the target's socket. blockdev.ErrInvalid when it is
// not Cloud Hypervisor, or too old; blockdev.ErrBusy while it has no VM.
func (a *Attacher) Resolve(ctx context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	resolved, err := a.door.Resolve(ctx, Type, t, mountPath)
	if err == nil {
		resolved.Shared, err = a.check(ctx, resolved)
	}
	if err == nil {
		err = vmsocket.Private(resolved, "--memory size=SIZE,shared=on")
	}
	return resolved, blockdev.Op("cloudhypervisor.Resolve", "", err)
}

// check reports whether the VMM behind a target's socket shares its guest's memory.
func (a *Attacher) check(ctx context.Context, t attach.Target) (shared bool, err error) {
	var ping struct{ Version string }
	err = a.do(ctx, t, http.MethodGet, "vmm.ping", nil, &ping)
	if err == nil && ping.Version == "" {
		err = vmsocket.ErrGarbled
	}
	if err != nil {
		return false, vmsocket.NotA("Cloud Hypervisor", err)
	}
	first, _, _ := strings.Cut(strings.TrimPrefix(ping.Version, "v"), ".")
	major, err := strconv.Atoi(first)
	if err != nil || major < oldest {
		return false, fmt.Errorf("%w: this Cloud Hypervisor is %.20q: versions before %d guess the format of an image from what a guest has written into it", blockdev.ErrInvalid, ping.Version, oldest)
	}
	i, err := a.info(ctx, t)
	if isStatus(err, http.StatusNotFound) {
		return false, fmt.Errorf("%w: the VMM has no virtual machine yet: create it first", blockdev.ErrBusy)
	}
	return i.sharesMemory(), err
}

func (a *Attacher) info(ctx context.Context, t attach.Target) (i info, err error) {
	return i, a.do(ctx, t, http.MethodGet, "vm.info", nil, &i)
}

// Attach adds the disk. It is there already is success; blockdev.ErrBusy when it is
// there in another mode, is leaving, or is refused.
func (a *Attacher) Attach(ctx context.Context, r attach.Request) error {
	return blockdev.Op("cloudhypervisor.Attach", r.Volume, a.attach(ctx, r))
}

func (a *Attacher) attach(ctx context.Context, r attach.Request) error {
	i, err := a.info(ctx, r.Target)
	if err != nil {
		return refusal(err)
	}
	want := diskOf(r)
	if !want.Served {
		if want.Rates, err = vmsocket.Given(r.Limits, r.ReadOnly); err != nil {
			return err
		}
	}
	if d := i.disk(r.Volume); d != nil && d.Served && d.at() != want.at() { // it was taken away by force, and the guest has not let it go since
		if err := a.detach(ctx, r); err != nil {
			return err
		}
		if i, err = a.info(ctx, r.Target); err != nil {
			return refusal(err)
		}
	} else if d != nil {
		if d.at() != want.at() || d.ReadOnly != want.ReadOnly || d.Image != want.Image {
			return fmt.Errorf("%w: the virtual machine has the volume's disk in another mode", blockdev.ErrBusy)
		}
		return has(*d, r)
	}
	if _, leaving := i.Devices[diskID(r.Volume)]; leaving {
		return fmt.Errorf("%w: the guest has not let the disk go that was removed before", blockdev.ErrBusy)
	}
	if slices.ContainsFunc(i.Config.Disks, func(d disk) bool { return d.at() == want.at() }) {
		return fmt.Errorf("%w: the virtual machine has the volume's image as another disk", blockdev.ErrBusy)
	}
	if err := a.door.SeesImage(r); err != nil {
		return err
	}
	return refusal(a.do(ctx, r.Target, http.MethodPut, "vm.add-disk", want, nil))
}

// Resized tells the VMM, which tells the guest, the size that the image has. A disk
// of a VM that is not booted is read when it is: there is nothing to tell. The VMM sets
// the size of an image itself, which it cannot of one that it may only read: a reader
// then sees the growth at its next attach, and that is success. So does one of a volume
// that a worker serves: the VMM does not ask a worker for its size again.
func (a *Attacher) Resized(ctx context.Context, r attach.Request) error {
	return blockdev.Op("cloudhypervisor.Resized", r.Volume, a.resized(ctx, r))
}

func (a *Attacher) resized(ctx context.Context, r attach.Request) error {
	if r.Endpoint.Kind == blockdev.VhostUser {
		return nil
	}
	i, err := a.info(ctx, r.Target)
	if err != nil {
		return refusal(err)
	}
	if i.State == "Created" || i.State == "Shutdown" {
		return nil
	}
	size := struct {
		ID   string `json:"id"`
		Size int64  `json:"desired_size"`
	}{diskID(r.Volume), r.Endpoint.Size}
	err = a.do(ctx, r.Target, http.MethodPut, "vm.resize-disk", size, nil)
	if r.ReadOnly && isStatus(err, http.StatusInternalServerError) {
		return nil
	}
	return refusal(err)
}

// Detach removes the disk and waits until the guest has let it go: on nil the VMM has
// the image open no more. blockdev.ErrBusy when the guest does not answer in
// Options.Wait; it was asked then, and may let go later.
func (a *Attacher) Detach(ctx context.Context, r attach.Request) error {
	err := a.detach(ctx, r)
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	return blockdev.Op("cloudhypervisor.Detach", r.Volume, err)
}

func (a *Attacher) detach(ctx context.Context, r attach.Request) error {
	left, err := a.left(ctx, r)
	if err != nil || left {
		return err
	}
	id := struct {
		ID string `json:"id"`
	}{diskID(r.Volume)}
	err = a.do(ctx, r.Target, http.MethodPut, "vm.remove-device", id, nil)
	if err != nil && !isStatus(err, http.StatusNotFound) { // asked before is no mistake
		return refusal(err)
	}
	waiting, cancel := context.WithTimeout(ctx, a.wait)
	defer cancel()
	for {
		if left, err := a.left(ctx, r); err != nil || left {
			return err
		}
		select {
		case <-waiting.Done():
			if err := ctx.Err(); err != nil {
				return err
			}
			return fmt.Errorf("%w: the guest was asked to let the disk go and has not: it is busy, paused, or does not listen", blockdev.ErrBusy)
		case <-time.After(pollTime):
		}
	}
}

// left reports whether nothing of the volume is in the VMM: not in its
// configuration, not among its devices, not among its open files.
func (a *Attacher) left(ctx context.Context, r attach.Request) (bool, error) {
	i, err := a.info(ctx, r.Target)
	if err != nil && !isStatus(err, http.StatusNotFound) { // 404: there is no VM
		return false, err
	}
	_, device := i.Devices[diskID(r.Volume)]
	if device || i.disk(r.Volume) != nil {
		return false, nil
	}
	holds, err := a.door.HoldsImage(r)
	return !holds && err == nil, err
}

// Fence kills the VMM.
func (a *Attacher) Fence(ctx context.Context, r attach.Request) error {
	return blockdev.Op("cloudhypervisor.Fence", r.Volume, a.door.Kill(ctx, r.Target))
}

// AwaitEnd implements attach.Sentry by the process's descriptor.
func (a *Attacher) AwaitEnd(ctx context.Context, t attach.Target) error {
	return blockdev.Op("cloudhypervisor.AwaitEnd", "", a.door.AwaitEnd(ctx, t))
}

// Probe asks the VMM for its disks, and the kernel for what the VMM has open.
func (a *Attacher) Probe(ctx context.Context, r attach.Request) (attach.State, error) {
	left, err := a.left(ctx, r)
	switch {
	case errors.Is(err, blockdev.ErrGone):
		return attach.StateGone, nil
	case err != nil:
		return "", blockdev.Op("cloudhypervisor.Probe", r.Volume, err)
	case left:
		return attach.StateMissing, nil
	}
	return attach.StateAttached, nil
}

func isStatus(err error, status int) bool {
	var refused *vmsocket.Refused
	return errors.As(err, &refused) && refused.Status == status
}

// refusal makes a refusal a conflict: the request was as the document has it.
func refusal(err error) error {
	if isStatus(err, http.StatusNotFound) {
		return fmt.Errorf("%w: the VMM has no virtual machine, or not this disk: %w", blockdev.ErrBusy, err)
	}
	var refused *vmsocket.Refused
	if errors.As(err, &refused) {
		return fmt.Errorf("%w: %w: the operator's log has its text", blockdev.ErrBusy, err)
	}
	return err
}
