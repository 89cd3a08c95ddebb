package vmstart

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/cloudhypervisor"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/internal/sys"
)

// Type is the target type that this attacher serves.
const Type = "vm"

// Options configure an Attacher.
type Options struct {
	Dir  string         // of the links, absolute; made when it is needed
	Door *vmsocket.Door // to the processes, and the sockets that the operator allows
	// FirecrackerIO is the I/O engine of drives, see package firecracker.
	FirecrackerIO string
	// Resizers tell running machines that have a socket of a growth, by VMM.
	Resizers map[string]attach.Resizer
	Log      *slog.Logger
}

// Attacher is an attach.Attacher, attach.Finder, attach.Launcher, attach.Resizer and
// attach.Sentry.
type Attacher struct{ o Options }

var (
	_ attach.Attacher = (*Attacher)(nil)
	_ attach.Finder   = (*Attacher)(nil)
	_ attach.Picky    = (*Attacher)(nil)
	_ attach.Chooser  = (*Attacher)(nil)
	_ attach.Witness  = (*Attacher)(nil)
	_ attach.Launcher = (*Attacher)(nil)
	_ attach.Resizer  = (*Attacher)(nil)
	_ attach.Sentry   = (*Attacher)(nil)
	_ attach.Named    = (*Attacher)(nil)
	_ attach.Limiter  = (*Attacher)(nil)
)

// New gives an Attacher. blockdev.ErrInvalid for options that cannot work.
func New(o Options) (*Attacher, error) {
	if !filepath.IsAbs(o.Dir) {
		return nil, blockdev.Op("vmstart.New", "", fmt.Errorf("%w: directory %q is not absolute", blockdev.ErrInvalid, o.Dir))
	}
	return &Attacher{o}, nil
}

// Needs is the image itself.
func (a *Attacher) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.File, blockdev.Block}, Raw: true}
}

// NeedsOf implements attach.Picky: Kata takes block devices only.
func (a *Attacher) NeedsOf(t attach.Target) attach.Needs {
	needs := a.Needs()
	if t.VMM == Kata {
		needs.Kinds = []blockdev.Kind{blockdev.Block}
	}
	return needs
}

// KindsFor implements attach.Chooser: a worker where the target wants one, for nobody
// knows yet whether the machine will share its memory. None else: see NeedsOf.
func (a *Attacher) KindsFor(t attach.Target) []blockdev.Kind {
	if t.Transport == "" {
		return nil
	}
	return vmsocket.KindsFor(t)
}

// Serial implements attach.Named, as all that plug volumes into machines.
func (a *Attacher) Serial(id blockdev.ID) string { return qemu.Serial(id) }

// Resolve checks a target and gives it its path.
func (a *Attacher) Resolve(_ context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	err := a.check(t, mountPath)
	t.Path = filepath.Join(a.o.Dir, strings.ToLower(rand.Text()))
	t.Shared = false
	return t, blockdev.Op("vmstart.Resolve", "", err)
}

func (a *Attacher) check(t attach.Target, mountPath string) error {
	rule := ""
	switch {
	case vmms[t.VMM] == nil:
		rule = "target.vmm must be one of: " + strings.Join(slices.Sorted(maps.Keys(vmms)), ", ")
	case t.Transport != "" && (t.Transport != string(blockdev.VhostUser) || t.VMM != qemu.Type && t.VMM != cloudhypervisor.Type):
		rule = fmt.Sprintf("target.transport is %q or nothing, for machines of QEMU and Cloud Hypervisor", blockdev.VhostUser)
	case t.Stray("vmm", "socket", "transport") != "":
		rule = "a vm target has a vmm, and perhaps a socket, only"
	case mountPath != "":
		rule = "mountPath does not apply to a vm target: the guest mounts the device"
	case t.Socket != "" && a.o.Resizers[t.VMM] == nil:
		rule = "target.socket is of no use here: a machine of " + t.VMM + " is not asked for anything"
	case t.Socket != "":
		return a.o.Door.Allows(t.Socket)
	default:
		return nil
	}
	return fmt.Errorf("%w: %s", blockdev.ErrInvalid, rule)
}

// Attach makes the attachment's path lead to the image. blockdev.ErrBusy when
// somebody has the image open who is not known to the volume.
func (a *Attacher) Attach(ctx context.Context, r attach.Request) error {
	return blockdev.Op("vmstart.Attach", r.Volume, a.attach(ctx, r))
}

func (a *Attacher) attach(ctx context.Context, r attach.Request) error {
	if r.Target.Pid == 0 && !r.ReadOnly && !a.linked(r) {
		if err := a.free(ctx, r); err != nil {
			return err
		}
	}
	return a.link(r)
}

// linked reports whether the attachment's path leads to the image.
func (a *Attacher) linked(r attach.Request) bool {
	to, err := os.Readlink(r.Target.Path)
	return err == nil && to == r.Endpoint.Path
}

func (a *Attacher) link(r attach.Request) error {
	if a.linked(r) {
		return nil
	}
	if filepath.Dir(r.Target.Path) != a.o.Dir {
		return fmt.Errorf("%w: path %q of the target is not ours", blockdev.ErrInvalid, r.Target.Path)
	}
	if err := os.MkdirAll(a.o.Dir, 0o711); err != nil {
		return err
	}
	fresh := r.Target.Path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(r.Endpoint.Path, fresh); err != nil {
		return err
	}
	return os.Rename(fresh, r.Target.Path)
}

// unlink takes the path away, durably: one that comes back with a power cut would
// lead to what somebody else has by then.
func (a *Attacher) unlink(r attach.Request) error {
	for _, name := range []string{r.Target.Path, r.Target.Path + ".new"} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	dir, err := os.Open(a.o.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// Detach takes the path away, and returns nil when after that nobody has the image
// open. blockdev.ErrBusy, naming the process, while one has.
func (a *Attacher) Detach(ctx context.Context, r attach.Request) error {
	err := a.unlink(r)
	if err == nil {
		err = a.free(ctx, r)
	}
	return blockdev.Op("vmstart.Detach", r.Volume, err)
}

// free is nil when nobody but the volume's other attachments has the image open.
func (a *Attacher) free(ctx context.Context, r attach.Request) error {
	if r.Endpoint.Path == "" && r.Endpoint.Kind == blockdev.VhostUser { // its worker has ended
		return nil
	}
	if r.Endpoint.Kind == blockdev.File && len(r.Others) == 0 {
		only, err := onlyOurs(r.Endpoint.Path)
		if err != nil || only {
			return err
		}
	}
	found, err := a.holders(ctx, r)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("%w: %s: end the virtual machine first", errInUse, processes(found))
	}
	if r.Endpoint.Kind == blockdev.File && len(r.Others) == 0 {
		return again(r.Endpoint.Path)
	}
	return nil
}

// errInUse is a blockdev.ErrBusy.
var errInUse = fmt.Errorf("%w by a virtual machine", blockdev.ErrBusy)

// again asks once more for the proof, after no holder was found: one may just have
// gone.
func again(image string) error {
	only, err := onlyOurs(image)
	if err == nil && !only {
		err = fmt.Errorf("%w: something has the image open, and no process that can be told has: a kernel's own opening, or another namespace's", blockdev.ErrBusy)
	}
	return err
}

// onlyOurs reports whether the kernel proves that nobody has a file open.
func onlyOurs(image string) (bool, error) {
	f, err := os.Open(image)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return sys.OnlyOpening(f)
}

// holders are the processes that have the image open and are not another
// attachment's.
func (a *Attacher) holders(ctx context.Context, r attach.Request) ([]attach.Target, error) {
	found, err := a.o.Door.Holders(ctx, r.Endpoint.Path)
	return slices.DeleteFunc(found, func(t attach.Target) bool {
		return slices.ContainsFunc(r.Others, func(o attach.Target) bool {
			return o.Pid == t.Pid && o.StartTime == t.StartTime && o.Boot == t.Boot
		})
	}), err
}

func processes(found []attach.Target) string {
	text := make([]string, len(found))
	for i, t := range found {
		text[i] = fmt.Sprint(t.Pid)
	}
	if len(text) == 1 {
		return "process " + text[0] + " has it open"
	}
	return "processes " + strings.Join(text, ", ") + " have it open"
}

// Users implements attach.Witness. A file that provably nobody has open is told at once.
func (a *Attacher) Users(ctx context.Context, path string) ([]attach.Target, error) {
	place, err := sys.PlaceBehind(path)
	if err == nil && !place.IsBlock() {
		var only bool
		if only, err = onlyOurs(path); err == nil && only {
			return nil, nil
		}
	}
	var found []attach.Target
	if err == nil {
		found, err = a.o.Door.Holders(ctx, path)
	}
	return found, blockdev.Op("vmstart.Users", "", err)
}

// Find implements attach.Finder. A machine whose process has ended is looked for
// again: a program may hand its image to another one.
func (a *Attacher) Find(ctx context.Context, r attach.Request) (attach.Target, error) {
	t, err := a.find(ctx, r)
	return t, blockdev.Op("vmstart.Find", r.Volume, err)
}

func (a *Attacher) find(ctx context.Context, r attach.Request) (attach.Target, error) {
	t := r.Target
	if t.Pid != 0 {
		alive, err := a.alive(t)
		if err != nil || alive {
			return t, err
		}
	}
	found, err := a.holders(ctx, r)
	if err == nil && len(found) > 0 {
		t.Pid, t.StartTime, t.Boot = found[0].Pid, found[0].StartTime, found[0].Boot
	}
	return t, err
}

func (a *Attacher) alive(t attach.Target) (bool, error) {
	p, err := a.o.Door.Open(t)
	if errors.Is(err, blockdev.ErrGone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	p.Close()
	return true, nil
}

// Probe implements attach.Attacher. What was not started yet, or has closed the
// image and lives, is attached: it may open it again.
func (a *Attacher) Probe(_ context.Context, r attach.Request) (attach.State, error) {
	if r.Target.Pid != 0 {
		alive, err := a.alive(r.Target)
		if err != nil {
			return "", blockdev.Op("vmstart.Probe", r.Volume, err)
		}
		if !alive {
			return attach.StateGone, nil
		}
	}
	if !a.linked(r) {
		return attach.StateMissing, nil
	}
	return attach.StateAttached, nil
}

// AwaitEnd implements attach.Sentry.
func (a *Attacher) AwaitEnd(ctx context.Context, t attach.Target) error {
	return blockdev.Op("vmstart.AwaitEnd", "", a.o.Door.AwaitEnd(ctx, t))
}

// Fence takes the path away and kills the process that was found to have the image
// open: the one that was recorded, or else the only one. attach.ErrCannotFence when
// there are several and none was recorded, or one more is left.
func (a *Attacher) Fence(ctx context.Context, r attach.Request) error {
	return blockdev.Op("vmstart.Fence", r.Volume, a.fence(ctx, r))
}

func (a *Attacher) fence(ctx context.Context, r attach.Request) error {
	if err := a.unlink(r); err != nil {
		return err
	}
	t := r.Target
	if t.Pid == 0 && r.Endpoint.Path != "" {
		found, err := a.holders(ctx, r)
		switch {
		case err != nil:
			return err
		case len(found) > 1:
			return fmt.Errorf("%w: %s, and none of them is known to be the virtual machine", attach.ErrCannotFence, processes(found))
		case len(found) == 1:
			t = found[0]
		}
	}
	if t.Pid != 0 {
		if err := a.o.Door.Kill(ctx, t); err != nil {
			return err
		}
	}
	if r.Endpoint.Path == "" {
		return nil
	}
	rest, err := a.holders(ctx, r)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%w: the virtual machine has ended, and %s besides", attach.ErrCannotFence, processes(rest))
	}
	return err
}

// Resized tells a running machine of a growth, where a socket of it is known.
// Others see it when they are started again, or told by whoever runs them.
func (a *Attacher) Resized(ctx context.Context, r attach.Request) error {
	resizer := a.o.Resizers[r.Target.VMM]
	if resizer == nil || r.Target.Socket == "" || r.Target.Pid == 0 {
		return nil
	}
	return blockdev.Op("vmstart.Resized", r.Volume, resizer.Resized(ctx, r))
}
