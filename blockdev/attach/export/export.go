package export

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/serve"
)

// Type is the target type that this attacher serves.
const Type = "export"

// Attacher is an attach.Attacher, attach.Chooser, attach.Resizer and attach.Launcher.
type Attacher struct {
	door    *vmsocket.Door
	pool    Pool
	network *network // nil: there is none
}

// Pool is what knows the workers of volumes, and has them listen to the network.
type Pool interface {
	serve.Observer
	serve.Exposer
}

var (
	_ attach.Attacher = (*Attacher)(nil)
	_ attach.Chooser  = (*Attacher)(nil)
	_ attach.Launcher = (*Attacher)(nil)
)

// Options of an Attacher.
type Options struct {
	Door    *vmsocket.Door // to the directories where links may be made
	Pool    Pool
	Network Network // where exports over TLS are reached; the zero Network: nowhere
}

// New makes an Attacher. blockdev.ErrInvalid for a Network that cannot be used.
func New(o Options) (*Attacher, error) {
	a := &Attacher{door: o.Door, pool: o.Pool}
	if o.Network == (Network{}) {
		return a, nil
	}
	if err := o.Network.check(); err != nil {
		return nil, blockdev.Op("export.New", "", err)
	}
	a.network = &network{Network: o.Network, given: map[int]time.Time{}}
	return a, nil
}

// Needs is a worker's socket. Whoever connects can write any block.
func (a *Attacher) Needs() attach.Needs {
	return attach.Needs{Kinds: []blockdev.Kind{blockdev.NBD, blockdev.VhostUser}, Raw: true}
}

// KindsFor implements attach.Chooser: the protocol.
func (a *Attacher) KindsFor(t attach.Target) []blockdev.Kind {
	return []blockdev.Kind{blockdev.Kind(t.Protocol)}
}

// Resolve checks a target. blockdev.ErrBusy when there is something else where its link
// is to be.
func (a *Attacher) Resolve(_ context.Context, t attach.Target, mountPath string) (attach.Target, error) {
	err := check(t, mountPath)
	if err == nil && t.Socket != "" {
		_, err = a.linked(t.Socket)
	}
	if err == nil && t.Transport == TLS {
		t.Port, t.Export, err = a.network.reserve()
	}
	t.Pid, t.StartTime, t.Boot, t.Shared = 0, 0, "", false // of a sandbox, and there is none
	return t, blockdev.Op("export.Resolve", "", err)
}

func check(t attach.Target, mountPath string) error {
	rule := ""
	switch {
	case t.Protocol != string(blockdev.NBD) && t.Protocol != string(blockdev.VhostUser):
		rule = fmt.Sprintf("target.protocol must be one of: %s, %s", blockdev.NBD, blockdev.VhostUser)
	case t.Owner < 0 || t.Owner >= math.MaxUint32: // (uid_t)-1 is nobody
		rule = "target.owner must be the number of a user of this server's host"
	case t.Stray("protocol", "socket", "owner", "transport", "clients") != "":
		rule = "an export target has a protocol, and perhaps a socket and an owner, or a transport and clients, only"
	case t.Transport == TLS && (t.Protocol != string(blockdev.NBD) || t.Socket != "" || t.Owner != 0):
		rule = "target.transport tls is of protocol nbd, without a socket and an owner"
	case t.Transport == TLS && !clientsForm.MatchString(t.Clients):
		rule = fmt.Sprintf("target.clients must be at most %d names of 1 to 64 letters, digits and _.@-", mostClients)
	case t.Transport != TLS && (t.Transport != "" || t.Clients != ""):
		rule = "target.transport of an export is tls or absent; target.clients are of transport tls only"
	case mountPath != "":
		rule = "mountPath does not apply to an export: whoever connects gets the device"
	default:
		return nil
	}
	return fmt.Errorf("%w: %s", blockdev.ErrInvalid, rule)
}

// Attach lets the target's owner in and makes its link. blockdev.ErrBusy when another
// export of the volume has another owner, or the link's name is taken.
func (a *Attacher) Attach(ctx context.Context, r attach.Request) error {
	return blockdev.Op("export.Attach", r.Volume, a.open(ctx, r))
}

func (a *Attacher) open(ctx context.Context, r attach.Request) error {
	if string(r.Endpoint.Kind) != r.Target.Protocol {
		return fmt.Errorf("%w: the volume is served by %s", blockdev.ErrBusy, r.Endpoint.Kind)
	}
	if r.Target.Transport == TLS {
		return a.expose(ctx, r)
	}
	owner, err := ownerOf(r.Endpoint.Path)
	if err != nil {
		return err
	}
	if owner != r.Target.Owner && hasSocket(r.Others) {
		return fmt.Errorf("%w: another export of the volume has another owner", blockdev.ErrBusy)
	}
	if owner != r.Target.Owner {
		if err := os.Lchown(r.Endpoint.Path, r.Target.Owner, -1); err != nil {
			return err
		}
	}
	if r.Target.Socket == "" {
		return nil
	}
	return a.link(r)
}

const (
	// leaveTime is how long a client may take to be gone that has hung up already: its
	// worker sees it a moment after that.
	leaveTime = 2 * time.Second
	leavePoll = 5 * time.Millisecond
)

// Detach takes the link away. blockdev.ErrBusy (attach.ErrInUse) while a client is
// connected, two seconds later still: then nothing has changed. Lazily, connections
// over TLS by this attachment are ended.
func (a *Attacher) Detach(ctx context.Context, r attach.Request) error {
	return blockdev.Op("export.Detach", r.Volume, a.close(ctx, r))
}

func (a *Attacher) close(ctx context.Context, r attach.Request) error {
	waiting, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	for {
		err := a.tryClose(ctx, r)
		if !errors.Is(err, attach.ErrInUse) {
			return err
		}
		select {
		case <-waiting.Done():
			return err
		case <-time.After(leavePoll):
		}
	}
}

func (a *Attacher) tryClose(ctx context.Context, r attach.Request) error {
	if r.Target.Transport == TLS {
		return a.withdraw(ctx, r)
	}
	if err := a.unused(ctx, r); err != nil {
		return err
	}
	if r.Target.Socket != "" {
		if err := a.unlink(r); err != nil {
			return err
		}
	}
	err := a.unused(ctx, r) // who came by the link in between
	if errors.Is(err, attach.ErrInUse) && r.Target.Socket != "" {
		err = errors.Join(err, a.link(r))
	}
	return err
}

// unused is nil when nobody is connected whose connection ends with this attachment.
func (a *Attacher) unused(ctx context.Context, r attach.Request) error {
	if hasSocket(r.Others) {
		return nil
	}
	s, err := a.pool.Observe(ctx, r.Volume)
	if errors.Is(err, blockdev.ErrNotFound) { // nobody can be
		return nil
	}
	if err != nil {
		return err
	}
	here := s.Clients
	for _, x := range s.Exposed {
		here -= x.Clients
	}
	if here > 0 {
		return inUse{here}
	}
	return nil
}

// hasSocket reports whether one of the targets is a socket of this host.
func hasSocket(targets []attach.Target) bool {
	return slices.ContainsFunc(targets, func(t attach.Target) bool { return t.Transport != TLS })
}

// inUse is an attach.ErrInUse in its own words.
type inUse struct{ clients int }

func (e inUse) Error() string {
	if e.clients == 1 {
		return "a client is connected to the export: it has to hang up first"
	}
	return fmt.Sprintf("%d clients are connected to the export: they have to hang up first", e.clients)
}

// Is lets it be told as attach.ErrInUse, and as the blockdev.ErrBusy that this is.
func (e inUse) Is(target error) bool { return target == attach.ErrInUse || target == blockdev.ErrBusy }

// Probe looks whether the volume can be connected to by the target's owner and name. An
// export has no sandbox that could be gone: it outlives the host's boot.
func (a *Attacher) Probe(ctx context.Context, r attach.Request) (attach.State, error) {
	state, err := a.probe(ctx, r)
	return state, blockdev.Op("export.Probe", r.Volume, err)
}

func (a *Attacher) probe(ctx context.Context, r attach.Request) (attach.State, error) {
	if r.Target.Transport == TLS {
		a.network.keep(r.Target)
	}
	s, err := a.pool.Observe(ctx, r.Volume)
	if errors.Is(err, blockdev.ErrNotFound) {
		return attach.StateMissing, nil
	}
	if err != nil {
		return "", err
	}
	if r.Target.Transport == TLS {
		return a.exposed(s, r.Target), nil
	}
	owner, err := ownerOf(r.Endpoint.Path)
	if err != nil {
		return "", err
	}
	if owner != r.Target.Owner && !hasSocket(r.Others) {
		return attach.StateMissing, nil
	}
	if r.Target.Socket != "" {
		to, err := a.linked(r.Target.Socket)
		if err != nil || to != r.Endpoint.Path {
			return attach.StateMissing, err
		}
	}
	return attach.StateAttached, nil
}

// Fence kills the worker, and returns nil when its process has ended: what it had
// acknowledged as flushed is in the image. None is success.
func (a *Attacher) Fence(ctx context.Context, r attach.Request) error {
	return blockdev.Op("export.Fence", r.Volume, a.fence(ctx, r))
}

func (a *Attacher) fence(ctx context.Context, r attach.Request) error {
	before, err := a.pool.Observe(ctx, r.Volume)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	worker, err := a.door.Pin(before.Pid)
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	// The process that was pinned is the worker if the worker is still of that number.
	now, err := a.pool.Observe(ctx, r.Volume)
	switch {
	case errors.Is(err, blockdev.ErrNotFound):
		return nil
	case err != nil:
		return err
	case now.Pid != before.Pid || !now.Since.Equal(before.Since):
		return fmt.Errorf("%w: the volume's worker was replaced meanwhile", attach.ErrCannotFence)
	}
	return a.door.Kill(ctx, worker)
}

// escaped makes a value of a form one of a URI, which keeps slashes and knows no plus.
var escaped = strings.NewReplacer("%2F", "/", "+", "%20")

// Launch implements attach.Launcher: where to connect to.
func (a *Attacher) Launch(_ context.Context, r attach.Request, _ filesystem.Type) (attach.Launch, error) {
	if r.Target.Transport == TLS {
		return attach.Launch{URI: a.network.uri(r.Target)}, nil
	}
	l := attach.Launch{Path: r.Target.Socket}
	if l.Path == "" {
		l.Path = r.Endpoint.Path
	}
	if l.Path == "" {
		return l, blockdev.Op("export.Launch", r.Volume, fmt.Errorf("%w: the volume's worker is being looked for", blockdev.ErrBusy))
	}
	if r.Target.Protocol == string(blockdev.NBD) {
		l.URI = "nbd+unix:///?socket=" + escaped.Replace(url.QueryEscape(l.Path))
	}
	return l, nil
}
