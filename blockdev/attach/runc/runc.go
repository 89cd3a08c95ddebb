package runc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// Type is the target type that this attacher serves.
const Type = "runc"

// DefaultRoot is where runc keeps the state of root's containers.
const DefaultRoot = "/run/runc"

// Options configure an Attacher.
type Options struct {
	Command string   // runc's name or path; empty: "runc"
	Root    string   // of targets that name none; empty: DefaultRoot
	Roots   []string // that targets may name besides Root
}

// Attacher is an attach.Attacher.
type Attacher struct {
	o    Options
	boot string
}

var _ attach.Attacher = (*Attacher)(nil)

// New checks the configuration. That runc is not installed shows in Resolve
// only: the others do not need it.
func New(o Options) (*Attacher, error) {
	if o.Command == "" {
		o.Command = "runc"
	}
	if o.Root == "" {
		o.Root = DefaultRoot
	}
	for _, root := range append([]string{o.Root}, o.Roots...) {
		if !path.IsAbs(root) || path.Clean(root) != root {
			return nil, blockdev.Op("runc.New", "", invalid("state directory %q must be absolute and clean", root))
		}
	}
	boot, err := sys.BootID()
	if err != nil {
		return nil, blockdev.Op("runc.New", "", err)
	}
	return &Attacher{o: o, boot: boot}, nil
}

// Needs is a mount on the stage, of which Attach makes another one.
func (a *Attacher) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.Block}, Mount: true}
}

// Resolve checks the target and finds the container's first process. It runs
// runc where the container's record leaves a doubt; nothing else here does. blockdev.ErrGone when there is no such
// container or it has stopped, blockdev.ErrBusy while it is paused.
func (a *Attacher) Resolve(ctx context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	resolved, err := a.resolve(ctx, t, mountPath)
	return resolved, blockdev.Op("runc.Resolve", "", err)
}

func (a *Attacher) resolve(ctx context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	if t.Path != "" {
		return t, invalid("target.path does not apply to a runc target: use mountPath")
	}
	if stray := t.Stray("container", "root"); stray != "" {
		return t, invalid("target.%s does not apply to a runc target", stray)
	}
	if err := validContainer(t.Container); err != nil {
		return t, err
	}
	if err := validMountPath(mountPath); err != nil {
		return t, err
	}
	root := t.Root
	if root == "" {
		root = a.o.Root
	} else if root != a.o.Root && !slices.Contains(a.o.Roots, root) {
		return t, invalid("target.root is not one of the state directories that the operator allows")
	}
	p, err := a.find(ctx, root, t.Container)
	if err != nil {
		return t, err
	}
	defer p.close()
	ns, err := p.mountNamespace()
	if err != nil {
		return t, err
	}
	ns.Close()
	return attach.Target{
		Type: Type, Container: t.Container, Root: root,
		Pid: p.pid, StartTime: p.startTime, Boot: a.boot,
	}, nil
}

// Attach mounts the volume at the mount path inside the container; missing
// directories are made (0755). It is there already is success; blockdev.ErrBusy
// when something else is, blockdev.ErrInvalid when there can be no such
// directory.
func (a *Attacher) Attach(ctx context.Context, r attach.Request) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return blockdev.Op("runc.Attach", r.Volume, a.attach(r))
}

func (a *Attacher) attach(r attach.Request) error {
	if err := validMountPath(r.MountPath); err != nil {
		return err
	}
	v, err := attach.VolumeOf(r)
	if err != nil {
		return err
	}
	p, err := a.open(r.Target)
	if err != nil {
		return err
	}
	defer p.close()
	clone, err := attach.Clone(r)
	if err != nil {
		return err
	}
	defer clone.Close()
	if err := p.mapOwners(clone); err != nil {
		return err
	}
	root, err := sys.RootOf(p.pid)
	if err != nil {
		return errors.Join(err, p.alive())
	}
	defer root.Close()
	err = p.inside(func(in sys.Inside) error {
		if err := rootIs(in, root); err != nil {
			return err
		}
		return put(in, clone, v, r)
	})
	if err != nil {
		return err
	}
	return p.alive()
}

// Detach unmounts the volume from wherever it is mounted in the container's
// namespace. It is not there is success, and so is that the container is gone.
// blockdev.ErrBusy, naming processes, while files or directories of it are in
// use; then it is still at the mount path.
func (a *Attacher) Detach(ctx context.Context, r attach.Request) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return blockdev.Op("runc.Detach", r.Volume, a.detach(ctx, r))
}

func (a *Attacher) detach(ctx context.Context, r attach.Request) error {
	p, err := a.open(r.Target)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	v, err := attach.VolumeOf(r)
	if err != nil {
		return err
	}
	err = p.inside(func(in sys.Inside) error { return takeAway(ctx, in, v, r) })
	switch {
	case err == nil:
		return nil
	case isGone(p.alive()):
		return nil
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%w%s", err, holders(r.Mounted))
	}
	return err
}

// holders names who uses the volume mounted at dir. It looks at the host's
// /proc, so it is not for use inside.
func holders(dir string) string {
	place, err := sys.PlaceAt(dir)
	if err != nil || !place.MountRoot {
		return ""
	}
	return attach.Holders(place.Device)
}

// Probe asks whether the container lives and has the volume mounted anywhere in
// its namespace.
func (a *Attacher) Probe(ctx context.Context, r attach.Request) (attach.State, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	state, err := a.probe(r)
	return state, blockdev.Op("runc.Probe", r.Volume, err)
}

func (a *Attacher) probe(r attach.Request) (attach.State, error) {
	p, err := a.open(r.Target)
	if isGone(err) {
		return attach.StateGone, nil
	}
	if err != nil {
		return "", err
	}
	defer p.close()
	v, err := attach.VolumeOf(r)
	if err != nil {
		return "", err
	}
	var found []attach.Mount
	err = p.inside(func(in sys.Inside) (err error) {
		found, err = lookFor(in, v, r.MountPath)
		return err
	})
	switch gone := p.alive(); {
	case isGone(gone):
		return attach.StateGone, nil
	case err != nil:
		return "", err
	case gone != nil:
		return "", gone
	case len(found) > 0:
		return attach.StateAttached, nil
	}
	return attach.StateMissing, nil
}

// mounts reads the namespace's table of mounts.
func mounts(in sys.Inside) ([]attach.Mount, error) {
	table, err := in.Mountinfo()
	if err != nil {
		return nil, err
	}
	defer table.Close()
	return attach.ReadMounts(table)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", blockdev.ErrInvalid, fmt.Errorf(format, args...))
}

// processGone says which process is not there any more.
func processGone(pid int, why string) error {
	return fmt.Errorf("%w: process %d %s (%w)", blockdev.ErrGone, pid, why, os.ErrProcessDone)
}
