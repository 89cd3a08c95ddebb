package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// Type is the target type that this attacher serves.
const Type = "host"

// Attacher is an attach.Attacher.
type Attacher struct {
	prefixes []string
	// placing holds a lock for each path at which an Attach looks and mounts: two
	// of them must not cover each other. Other paths do not wait, because a
	// filesystem that does not answer may stop one for ever.
	placing sync.Map // path -> *sync.Mutex
}

var _ attach.Attacher = (*Attacher)(nil)

// New allows targets below prefixes: absolute, clean directories other than "/".
// None means that no target is allowed. blockdev.ErrInvalid names the rule.
func New(prefixes []string) (*Attacher, error) {
	for _, p := range prefixes {
		if err := attach.CheckPath(p); err != nil {
			return nil, blockdev.Op("host.New", "", err)
		}
	}
	return &Attacher{prefixes: prefixes}, nil
}

// Needs is a mount on the stage, of which Attach makes another one.
func (a *Attacher) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.Block}, Mount: true}
}

// Resolve checks the path and makes its directory (0755) when there is none.
// mountPath must be empty or the same path.
func (a *Attacher) Resolve(ctx context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	if err := ctx.Err(); err != nil {
		return t, err
	}
	if mountPath != "" && mountPath != t.Path {
		return t, blockdev.Op("host.Resolve", "", invalid("mountPath does not apply to a host target: use target.path"))
	}
	if stray := t.Stray("path"); stray != "" {
		return t, blockdev.Op("host.Resolve", "", invalid("target.%s does not apply to a host target", stray))
	}
	at, err := a.open(t.Path, true)
	if err != nil {
		return t, blockdev.Op("host.Resolve", "", err)
	}
	at.close()
	return attach.Target{Type: Type, Path: t.Path}, nil
}

// Attach mounts the volume at the target's path. It is there already is
// success; blockdev.ErrBusy when something else is.
func (a *Attacher) Attach(ctx context.Context, r attach.Request) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return blockdev.Op("host.Attach", r.Volume, a.attach(r))
}

func (a *Attacher) attach(r attach.Request) error {
	v, err := attach.VolumeOf(r)
	if err != nil {
		return err
	}
	defer a.place(r.Target.Path)()
	at, err := a.open(r.Target.Path, true)
	if err != nil {
		return err
	}
	defer at.close()
	there, err := at.mount()
	if err != nil {
		return err
	}
	if there != nil {
		return attach.SameVolume(v, there, r)
	}
	clone, err := attach.Clone(r)
	if err != nil {
		return err
	}
	defer clone.Close()
	return sys.MoveMount(clone, at.dir)
}

// place waits for the turn of a path. Locks are kept: there is one for each path
// that was ever used, and they are small.
func (a *Attacher) place(target string) (done func()) {
	key := target
	if prefix, rest, err := a.split(target); err == nil {
		if real, err := filepath.EvalSymlinks(prefix); err == nil { // two prefixes may be one directory
			key = real + "/" + rest
		}
	}
	lock, _ := a.placing.LoadOrStore(key, new(sync.Mutex))
	m := lock.(*sync.Mutex) //nolint:forcetypeassert // nothing else is put there
	m.Lock()
	return m.Unlock
}

// Detach unmounts the volume from the target's path. It is not there is
// success, and so is that something else is there. blockdev.ErrBusy, naming
// processes, while files or directories of it are in use; then nothing changed.
func (a *Attacher) Detach(ctx context.Context, r attach.Request) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return blockdev.Op("host.Detach", r.Volume, a.detach(ctx, r))
}

func (a *Attacher) detach(ctx context.Context, r attach.Request) error {
	v, err := attach.VolumeOf(r)
	if err != nil {
		return err
	}
	at, err := a.open(r.Target.Path, false)
	if leadsElsewhere(err) {
		return a.moved(v, r, err)
	}
	if err != nil {
		return err
	}
	defer at.close()
	there, err := at.mount()
	switch {
	case err != nil:
		return err
	case there == nil:
		return a.moved(v, r, nil)
	case !v.Known():
		return attach.NotKnown(there)
	case !v.Is(*there):
		return a.covered(v, r, there)
	}
	if r.Lazy {
		at.dir.Close()
		return sys.UnmountLazyAt(at.parent, at.name)
	}
	place, _ := sys.PlaceOf(at.dir) // only to name who uses it
	at.dir.Close()                  // it would keep the mount busy
	err = attach.Patiently(ctx, func() error { return sys.UnmountAt(at.parent, at.name) })
	switch {
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%w: %s is in use%s: %w", blockdev.ErrBusy, r.Target.Path, attach.Holders(place.Device), err)
	case errors.Is(err, syscall.EINVAL): // unmounted meanwhile
		return nil
	}
	return err
}

// Fence is always refused: who uses a directory of this host is no sandbox of
// ours, and is not killed.
func (a *Attacher) Fence(_ context.Context, r attach.Request) error {
	return blockdev.Op("host.Fence", r.Volume, fmt.Errorf("%w: processes of the host are not killed", attach.ErrCannotFence))
}

// Probe asks whether the volume is mounted at the target's path: attached or
// missing, never gone.
func (a *Attacher) Probe(ctx context.Context, r attach.Request) (attach.State, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	state, err := a.probe(r)
	return state, blockdev.Op("host.Probe", r.Volume, err)
}

func (a *Attacher) probe(r attach.Request) (attach.State, error) {
	v, err := attach.VolumeOf(r)
	if err != nil {
		return "", err
	}
	at, err := a.open(r.Target.Path, false)
	if leadsElsewhere(err) {
		return stateOf(a.moved(v, r, err))
	}
	if err != nil {
		return "", err
	}
	defer at.close()
	there, err := at.mount()
	switch {
	case err != nil:
		return "", err
	case there == nil:
		return stateOf(a.moved(v, r, nil))
	case !v.Known():
		return "", attach.NotKnown(there)
	case v.Is(*there):
		return attach.StateAttached, nil
	}
	return stateOf(a.covered(v, r, there))
}

func stateOf(moved error) (attach.State, error) {
	switch {
	case errors.Is(moved, blockdev.ErrBusy):
		return attach.StateAttached, nil
	case moved != nil:
		return "", moved
	}
	return attach.StateMissing, nil
}

// leadsElsewhere reports whether a walk ended because names are not, or not any
// more, what they were in Resolve.
func leadsElsewhere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENOTDIR)
}

// covered is moved for a place where something else is mounted: the volume may
// lie below it.
func (a *Attacher) covered(v attach.Volume, r attach.Request, there *attach.Mount) error {
	all, err := attach.Mounts()
	if err != nil {
		return err
	}
	if v.Covered(all, there) {
		return fmt.Errorf("%w: something is mounted over it at %s", blockdev.ErrBusy, r.Target.Path)
	}
	return a.moved(v, r, nil)
}

// moved is nil when a volume that is not at the target's path is not somewhere
// else on this host either: whoever renames a directory above a mount moves the
// mount. A volume has one writable attachment, so another writable mount is this
// one. Read-only ones may belong to other readers: then only a path that cannot
// be walked any more is reason for doubt, and the stage notices what is left.
func (a *Attacher) moved(v attach.Volume, r attach.Request, walked error) error {
	all, err := attach.Mounts()
	if err != nil {
		return err
	}
	doubt := walked != nil && !errors.Is(walked, fs.ErrNotExist)
	for _, m := range v.Among(all) {
		if m.Path != r.Mounted && m.ReadOnly == r.ReadOnly && (!r.ReadOnly || doubt) {
			return fmt.Errorf("%w: the volume is not at %s but at %s, because a directory above it was renamed",
				blockdev.ErrBusy, r.Target.Path, m.Path)
		}
	}
	return nil
}

// place is an opened target.
type place struct {
	parent *os.File
	name   string   // of the directory in parent
	dir    *os.File // the directory, or the root of what is mounted on it
}

func (p *place) close() {
	p.parent.Close()
	p.dir.Close()
}

// mount tells what is mounted at the place, nil for nothing.
func (p *place) mount() (*attach.Mount, error) { return attach.MountOnHere(p.parent, p.dir) }

// open walks from the target's prefix down to its path. Everything above the
// path itself must be on the prefix's filesystem: a volume is never mounted
// inside another one, which nobody could detach then.
func (a *Attacher) open(target string, create bool) (*place, error) {
	prefix, rest, err := a.split(target)
	if err != nil {
		return nil, err
	}
	top, err := openPrefix(prefix)
	if err != nil {
		return nil, err
	}
	defer top.Close()
	parent, err := sys.OpenBeneath(top, path.Dir(rest), sys.Walk{Create: create, OneMount: true})
	if err != nil {
		return nil, explain(target, prefix, err)
	}
	dir, err := sys.OpenBeneath(parent, path.Base(rest), sys.Walk{Create: create})
	if err != nil {
		parent.Close()
		return nil, explain(target, prefix, err)
	}
	return &place{parent: parent, name: path.Base(rest), dir: dir}, nil
}

// openPrefix opens a directory that the operator named; symbolic links in its
// path are the operator's.
func openPrefix(prefix string) (*os.File, error) {
	real, err := filepath.EvalSymlinks(prefix)
	if err == nil {
		var f *os.File
		if f, err = sys.OpenPath(real); err == nil {
			return f, nil
		}
	}
	// Not fs.ErrNotExist: a prefix that is not there (yet) says nothing about what
	// was mounted below it.
	return nil, fmt.Errorf("allowed prefix %s: %s", prefix, err.Error())
}

// split finds the longest allowed prefix of a target, and the path below it.
func (a *Attacher) split(target string) (prefix, rest string, err error) {
	if err := attach.CheckPath(target); err != nil {
		return "", "", err
	}
	for _, p := range a.prefixes {
		below, ok := strings.CutPrefix(target, p+"/")
		if ok && len(p) > len(prefix) {
			prefix, rest = p, below
		}
	}
	if prefix == "" {
		return "", "", invalid("target.path must be below one of the directories that the operator allows (%s)", strings.Join(a.prefixes, ", "))
	}
	return prefix, rest, nil
}

// explain says which rule a path on this host breaks.
func explain(target, prefix string, err error) error {
	switch {
	case errors.Is(err, syscall.ELOOP):
		return invalid("%s leads through a symbolic link: %w", target, err)
	case errors.Is(err, syscall.ENOTDIR):
		return invalid("%s is, or leads through, something that is not a directory: %w", target, err)
	case errors.Is(err, syscall.EXDEV):
		return invalid("%s leads through a mount below %s: %w", target, prefix, err)
	case errors.Is(err, syscall.ENAMETOOLONG):
		return invalid("%s has a name that is too long: %w", target, err)
	case errors.Is(err, syscall.EROFS):
		return invalid("%s does not exist and the filesystem is read-only: %w", target, err)
	}
	return err
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", blockdev.ErrInvalid, fmt.Errorf(format, args...))
}
