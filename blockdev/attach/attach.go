package attach

import (
	"context"
	"slices"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
)

// Target says where a volume goes. It is stored with the attachment as it is.
type Target struct {
	Type      string `json:"type"`                // names the Attacher: "host", "runc", "qemu", "firecracker", "cloud-hypervisor", "vm", "export"
	Path      string `json:"path,omitempty"`      // host: absolute directory under an allowed prefix; vm: of the image, for this attachment alone
	VMM       string `json:"vmm,omitempty"`       // vm: what will run it
	Container string `json:"container,omitempty"` // runc: container id
	Root      string `json:"root,omitempty"`      // runc: its state directory; empty: the configured default
	Socket    string `json:"socket,omitempty"`    // of a VMM: its monitor or API socket, absolute, under an allowed prefix; export: where a link to the socket is made
	Agent     string `json:"agent,omitempty"`     // socket that leads to our agent in the guest; "": there is none
	QemuAgent string `json:"qemuAgent,omitempty"` // qemu: socket that leads to QEMU's own guest agent
	// Transport is how a virtual machine gets the volume: "" by the first kind that it
	// can use and the volume has, "vhost-user" by a worker's socket only. export: "" for
	// a socket of this host, "tls" for a port of it.
	Transport string `json:"transport,omitempty"`
	Protocol  string `json:"protocol,omitempty"`  // export: "nbd" or "vhost-user"
	Owner     int    `json:"owner,omitempty"`     // export: user of this host who may connect besides root; 0: nobody
	Clients   string `json:"clients,omitempty"`   // export by tls: names that certificates of clients may have, a space apart; "": any
	Port      int    `json:"port,omitempty"`      // export by tls: where it is reached, chosen when it is resolved, never taken from a caller
	Export    string `json:"export,omitempty"`    // export by tls: the name of the export, which nobody can guess; the same
	Shared    bool   `json:"shared,omitempty"`    // a VMM's guest memory can be shared with a worker, found at attach time, never taken from a caller
	Pid       int    `json:"pid,omitempty"`       // of the sandbox (init process, VMM), found at attach time, never taken from a caller
	StartTime uint64 `json:"startTime,omitempty"` // of that process (field 22 of /proc/pid/stat), against pid reuse
	Boot      string `json:"boot,omitempty"`      // boot id at attach time: a pid of another boot is gone
}

// Stray names a field of a caller's target, as the API does, that is none of those that
// its type knows; "" for none. What nobody looks at is refused, and not passed over: its
// caller believes that it holds.
func (t Target) Stray(known ...string) string {
	for _, f := range []struct {
		name  string
		given bool
	}{
		{"path", t.Path != ""}, {"vmm", t.VMM != ""}, {"container", t.Container != ""}, {"root", t.Root != ""}, {"socket", t.Socket != ""},
		{"agent", t.Agent != ""}, {"qemuAgent", t.QemuAgent != ""}, {"transport", t.Transport != ""}, {"protocol", t.Protocol != ""}, {"owner", t.Owner != 0},
		{"clients", t.Clients != ""}, {"port", t.Port != 0}, {"export", t.Export != ""},
	} {
		if f.given && !slices.Contains(known, f.name) {
			return f.name
		}
	}
	return ""
}

// Needs is what an Attacher must be given.
type Needs struct {
	Kinds []blockdev.Kind // of endpoint, best first
	Mount bool            // the endpoint must be mounted on the Stage first
	// Raw: the sandbox gets the device itself and can write any block of it. A
	// volume that is attached so to a writer is tainted first, durably.
	Raw bool
}

// Chooser is an Attacher that can use other kinds of endpoint in one sandbox than in
// another.
type Chooser interface {
	// KindsFor are those that a resolved target can use, best first; none is what Needs
	// says. It may ask the sandbox, and must be quick.
	KindsFor(t Target) []blockdev.Kind
}

// Resizer is an Attacher whose sandboxes do not see by themselves that a device
// has grown.
type Resizer interface {
	// Resized tells the sandbox the size of the request's endpoint, and returns when
	// it has been told. Told already is success.
	Resized(ctx context.Context, r Request) error
}

// Meter is an Attacher whose sandboxes count what they do with a volume.
type Meter interface {
	// Counters tells what went through the volume since it is in the sandbox. Since is
	// not set. blockdev.ErrNotFound when it is not there; only the request's Volume and
	// Target are looked at. What the sandbox cannot tell is 0.
	Counters(ctx context.Context, r Request) (blockdev.Counters, error)
}

// Named is an Attacher whose sandboxes know a device by a serial number.
type Named interface {
	// Serial is that of a volume's device in any sandbox.
	Serial(id blockdev.ID) string
}

// Request is one attachment to make or take away.
type Request struct {
	Volume    blockdev.ID
	Endpoint  blockdev.Endpoint
	Mounted   string // the Stage's directory for this volume, when Needs.Mount
	Target    Target
	MountPath string // absolute path inside the sandbox; of a virtual machine only with an agent
	ReadOnly  bool
	Others    []Target // of the volume's other attachments
	// Filesystem is what the volume was made with; in a guest it may be another by now.
	Filesystem filesystem.Type
	// Lazy makes Detach take the volume away while files of it are open, too: of a
	// filesystem that was shut down, or that nobody can write.
	Lazy bool
	// Limits hold from the moment at which the sandbox has the volume. For a Limiter.
	Limits blockdev.Limits
}

// Limiter is an Attacher whose sandboxes bound by themselves what they do with a
// volume. Its Attach makes the request's limits hold before anything can be read or
// written, and they hold until the sandbox has let the volume go.
type Limiter interface {
	// Explain tells how limits hold in a target's sandbox. errors.ErrUnsupported, with
	// the reason, for those that cannot.
	Explain(t Target, readOnly bool, l blockdev.Limits) (blockdev.Enforcement, error)
	// MayChange is nil when limits of a volume in that sandbox can be changed while it
	// is there, else errors.ErrUnsupported with the reason.
	MayChange(t Target) error
	// Limit makes exactly the request's limits hold for a volume that is in the
	// sandbox; the zero Limits lift all. One that is not there has none: success.
	// errors.ErrUnsupported, with the reason, when they can only be had by another
	// Attach. Errors else as Attach.
	Limit(ctx context.Context, r Request) error
}

// State is what a Probe finds.
type State string

const (
	StateAttached State = "attached" // the sandbox lives and holds the volume
	StateMissing  State = "missing"  // the sandbox lives and does not hold the volume
	StateGone     State = "gone"     // the sandbox is provably dead
)

// Sentry is an Attacher that can tell of a sandbox's end when it happens.
type Sentry interface {
	// AwaitEnd returns nil when the sandbox of a resolved target has provably
	// ended, and an error when ctx has or it cannot tell.
	AwaitEnd(ctx context.Context, t Target) error
}

// Attacher puts volumes into one type of sandbox. Methods are idempotent and
// safe for concurrent use.
type Attacher interface {
	Needs() Needs
	// Resolve checks a caller's target and completes it (pid, start time, boot id).
	// blockdev.ErrInvalid, with the rule, for a target that can never work;
	// blockdev.ErrGone for a sandbox that is not there.
	Resolve(ctx context.Context, t Target, mountPath string) (Target, error)
	// Attach makes the volume visible. blockdev.ErrGone when the sandbox died;
	// blockdev.ErrBusy when something else is at that place, or the volume in
	// another mode.
	Attach(ctx context.Context, r Request) error
	// Detach takes it away and returns nil only when it is no longer visible in
	// the sandbox. blockdev.ErrBusy while it is in use there (open files); then
	// nothing has changed. A sandbox that is gone is success.
	Detach(ctx context.Context, r Request) error
	// Fence ends the sandbox, so that it provably cannot write any more: on nil all
	// its processes have ended. ErrCannotFence, with the reason, where that is not
	// to be done or does not succeed. What was written stays in the filesystem.
	Fence(ctx context.Context, r Request) error
	// Probe asks whether the sandbox lives and holds the volume. An error means
	// unknown: still attached.
	Probe(ctx context.Context, r Request) (State, error)
}
