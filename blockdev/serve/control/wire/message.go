package wire

import (
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
)

const (
	// Version is what both ends speak. A worker outlives daemons: what is added must
	// not change what older workers are told.
	Version = 1
	// MaxMessage bounds a message, in bytes.
	MaxMessage = 128 << 10
	// MaxFiles bounds the descriptors of a message; the kernel's bound is 253.
	MaxFiles = 240
	// MaxLayers bounds a stack.
	MaxLayers = 100
	// MaxTrace bounds a trace: 4 GiB of chunks.
	MaxTrace = 4096
)

// ErrProtocol means that the other end said what makes no sense.
var ErrProtocol = errors.New("protocol violation")

// Op is what is asked for.
type Op string

const (
	Open     Op = "open"
	Status   Op = "status"
	Throttle Op = "throttle"
	Grow     Op = "grow"
	Seal     Op = "seal"
	Absorb   Op = "absorb"
	Settle   Op = "settle"
	Recorded Op = "recorded"
	Trace    Op = "trace"
	Expose   Op = "expose"
	Withdraw Op = "withdraw"
	Address  Op = "address"
	Stop     Op = "stop"
)

// Request is what a daemon says.
type Request struct {
	Version int              `json:"version"`
	Op      Op               `json:"op"`
	Volume  *Volume          `json:"volume,omitempty"` // Open
	Limits  *blockdev.Limits `json:"limits,omitempty"` // Throttle
	Size    int64            `json:"size,omitempty"`   // Grow, bytes
	Layer   int              `json:"layer,omitempty"`  // Absorb
	Down    bool             `json:"down,omitempty"`   // Absorb: into the lower one, whose files come with it
	Most    int64            `json:"most,omitempty"`   // Absorb: bytes to copy, 0 for all
	Name    string           `json:"name,omitempty"`   // Seal: of the new layer; Withdraw: of the export
	Force   bool             `json:"force,omitempty"`  // Withdraw: clients that use it as well; an older worker is busy then
	Remote  *Remote          `json:"remote,omitempty"` // Address
	Expose  *Exposure        `json:"expose,omitempty"` // Expose
	Error   *Error           `json:"error,omitempty"`  // Recorded: why it is not
}

// Remote is where a base that is far away is.
type Remote struct {
	URL      string   `json:"url"`
	Prefixes []string `json:"prefixes,omitempty"` // of addresses that its store may redirect to
}

// check tells whether there can be such an address: ErrProtocol.
func (r *Remote) check() error {
	if r == nil || r.URL == "" || len(r.URL) > 4096 || len(r.Prefixes) > 64 {
		return fmt.Errorf("%w: the address of a base", ErrProtocol)
	}
	return nil
}

// Volume is what a worker is to serve. Its descriptors are, in this order: the
// control socket and the data socket, both bound and not listening; a directory
// with nothing in it to be the worker's root; the flat image or for each layer, the
// top first, data and map; the base; the digests; the lock.
type Volume struct {
	ID          blockdev.ID     `json:"id"`
	Kind        blockdev.Kind   `json:"kind"`
	ReadOnly    bool            `json:"readOnly,omitempty"`
	Size        int64           `json:"size"` // bytes
	Flat        bool            `json:"flat,omitempty"`
	Layers      int             `json:"layers,omitempty"`
	Base        bool            `json:"base,omitempty"`
	BaseSize    int64           `json:"baseSize,omitempty"` // bytes
	Remote      bool            `json:"remote,omitempty"`
	URL         string          `json:"url,omitempty"`
	Prefixes    []string        `json:"prefixes,omitempty"` // as Remote has them
	Lock        bool            `json:"lock,omitempty"`
	Refuse      bool            `json:"refuse,omitempty"` // there is no image: every request fails
	Queues      int             `json:"queues,omitempty"`
	Limits      blockdev.Limits `json:"limits"`
	Trace       []int64         `json:"trace,omitempty"`
	HydrateRate int64           `json:"hydrateRate,omitempty"` // bytes a second
	Hydrate     bool            `json:"hydrate,omitempty"`
	User        int             `json:"user"`  // to become, and
	Group       int             `json:"group"` // its group
	// DieWithParent has it end with the process that started it.
	DieWithParent bool `json:"dieWithParent,omitempty"`
}

// Exposure is a serve.Exposure; its socket, if it has one, is the descriptor of the
// message.
type Exposure struct {
	Name        string   `json:"name"`
	Socket      bool     `json:"socket,omitempty"`
	Certificate []byte   `json:"certificate"`
	Key         []byte   `json:"key"`
	Authorities []byte   `json:"authorities"`
	Clients     []string `json:"clients,omitempty"`
}

// check tells whether an exposure makes sense: ErrProtocol.
func (e *Exposure) check() error {
	if e == nil || len(e.Name) == 0 || len(e.Name) > 255 || len(e.Certificate)+len(e.Key)+len(e.Authorities) > serve.MaxPEM || len(e.Clients) > 64 {
		return fmt.Errorf("%w: what is to be exposed", ErrProtocol)
	}
	return nil
}

// SocketFiles are the descriptors before those of the volume.
const SocketFiles = 3

// Files is how many descriptors come with the volume.
func (v *Volume) Files() int {
	n := SocketFiles + 2*v.Layers
	for _, one := range []bool{v.Flat, v.Base, v.Remote, v.Lock} {
		if one {
			n++
		}
	}
	return n
}

// Check tells whether a volume makes sense: ErrProtocol.
func (v *Volume) Check() error {
	switch {
	case !v.ID.Valid():
		return fmt.Errorf("%w: volume %.40q", ErrProtocol, string(v.ID))
	case v.Kind != blockdev.VhostUser && v.Kind != blockdev.NBD:
		return fmt.Errorf("%w: kind %.40q", ErrProtocol, string(v.Kind))
	case !possible(v.Limits):
		return fmt.Errorf("%w: limits %+v", ErrProtocol, v.Limits)
	case v.Size <= 0 || v.BaseSize < 0 || v.HydrateRate < 0 || v.Queues < 0:
		return fmt.Errorf("%w: size %d, base %d, rate %d, queues %d", ErrProtocol, v.Size, v.BaseSize, v.HydrateRate, v.Queues)
	case v.Refuse && (v.Kind != blockdev.VhostUser || v.Flat || v.Layers != 0 || v.Base || v.Remote || v.Lock):
		return fmt.Errorf("%w: an image for who refuses all requests, or by %s", ErrProtocol, v.Kind)
	case !v.Refuse && v.Flat != (v.Layers == 0) || v.Layers < 0 || v.Layers > MaxLayers:
		return fmt.Errorf("%w: %d layers, flat %t", ErrProtocol, v.Layers, v.Flat)
	case v.Flat && (v.Base || v.Remote) || v.Base && v.Remote || v.Base != (v.BaseSize > 0):
		return fmt.Errorf("%w: more than one base, or one of no size", ErrProtocol)
	case v.Remote != (v.URL != "") || len(v.URL) > 4096 || len(v.Prefixes) > 64 || len(v.Trace) > MaxTrace:
		return fmt.Errorf("%w: address of %d bytes, trace of %d chunks", ErrProtocol, len(v.URL), len(v.Trace))
	}
	return nil
}

// possible reports whether limits are some.
func possible(l blockdev.Limits) bool {
	return min(l.ReadIOPS, l.WriteIOPS, l.ReadBytes, l.WriteBytes) >= 0
}

// Files is how many descriptors come with a request.
func (r *Request) Files() int {
	switch {
	case r.Op == Open && r.Volume != nil:
		return r.Volume.Files()
	case r.Op == Seal, r.Op == Absorb && r.Down:
		return 2
	case r.Op == Expose && r.Expose != nil && r.Expose.Socket:
		return 1
	}
	return 0
}

// check tells whether a request makes sense with so many descriptors.
func (r *Request) check(files int) error {
	if r.Version != Version {
		return fmt.Errorf("%w: version %d, this program speaks %d", ErrProtocol, r.Version, Version)
	}
	var err error
	switch r.Op {
	case Open:
		if r.Volume == nil {
			return fmt.Errorf("%w: no volume to open", ErrProtocol)
		}
		err = r.Volume.Check()
	case Throttle:
		if r.Limits == nil || !possible(*r.Limits) {
			err = fmt.Errorf("%w: limits", ErrProtocol)
		}
	case Grow, Absorb:
		if r.Size < 0 || r.Layer < 0 || r.Most < 0 || r.Down && r.Layer == 0 {
			err = fmt.Errorf("%w: size %d, layer %d, most %d, down %t", ErrProtocol, r.Size, r.Layer, r.Most, r.Down)
		}
	case Expose:
		err = r.Expose.check()
	case Address:
		err = r.Remote.check()
	case Seal, Withdraw:
		if len(r.Name) == 0 || len(r.Name) > 255 {
			err = fmt.Errorf("%w: a name of %d bytes", ErrProtocol, len(r.Name))
		}
	case Status, Settle, Recorded, Trace, Stop:
	default:
		err = fmt.Errorf("%w: %.40q is not known", ErrProtocol, string(r.Op))
	}
	if err == nil && files != r.Files() {
		err = fmt.Errorf("%w: %s with %d descriptors, not %d", ErrProtocol, r.Op, files, r.Files())
	}
	return err
}

// Reply is what a worker says.
type Reply struct {
	Version int            `json:"version"`
	Record  *Pending       `json:"record,omitempty"` // make it durable and answer by Recorded; the last reply follows
	Error   *Error         `json:"error,omitempty"`
	Service *serve.Service `json:"service,omitempty"` // Open, Status
	Volume  *Serving       `json:"volume,omitempty"`  // Open, Status
	Trace   []int64        `json:"trace,omitempty"`
	Held    int64          `json:"held,omitempty"`   // Seal: how long requests waited, nanoseconds
	More    bool           `json:"more,omitempty"`   // Absorb: most were copied before all was
	Copied  *int64         `json:"copied,omitempty"` // Absorb: bytes, as overlay.Merge counts them; nil: it does not tell
}

// Serving is what a worker serves.
type Serving struct {
	ID       blockdev.ID   `json:"id"`
	Kind     blockdev.Kind `json:"kind"`
	ReadOnly bool          `json:"readOnly,omitempty"`
	Size     int64         `json:"size"` // bytes
	Pending  *Pending      `json:"pending,omitempty"`
}

// Pending is a change of the stack that waits for its record.
type Pending struct {
	Op   Op     `json:"op"`             // Seal or Absorb
	Name string `json:"name,omitempty"` // Seal: of the layer that is the top
	// Layer of Absorb: the one that is to go.
	Layer int `json:"layer,omitempty"`
}

func (r *Reply) check(files int) error {
	if r.Version != Version || files != 0 {
		return fmt.Errorf("%w: a reply of version %d with %d descriptors", ErrProtocol, r.Version, files)
	}
	return nil
}

// Error is one on its way between processes: its sentinel by name, and its text.
type Error struct {
	Kind string `json:"kind,omitempty"`
	Text string `json:"text"`
}

// kinds are the sentinels that keep their identity.
var kinds = map[string]error{
	"not-found":   blockdev.ErrNotFound,
	"busy":        blockdev.ErrBusy,
	"no-space":    blockdev.ErrNoSpace,
	"corrupt":     blockdev.ErrCorrupt,
	"invalid":     blockdev.ErrInvalid,
	"exists":      blockdev.ErrExists,
	"failed":      blockdev.ErrFailed,
	"protocol":    ErrProtocol,
	"unsupported": errors.ErrUnsupported,
}

// NewError puts an error into words; nil stays nil.
func NewError(err error) *Error {
	if err == nil {
		return nil
	}
	e := &Error{Text: err.Error()}
	if len(e.Text) > 4096 {
		e.Text = e.Text[:4096]
	}
	for kind, sentinel := range kinds {
		if errors.Is(err, sentinel) && (e.Kind == "" || kind == "failed") { // a failed flush outweighs its cause
			e.Kind = kind
		}
	}
	return e
}

// remote is an error of the other end.
type remote struct {
	text string
	is   error
}

func (e *remote) Error() string { return e.text }
func (e *remote) Unwrap() error { return e.is }

// Err gives the error back; nil stays nil.
func (e *Error) Err() error {
	if e == nil {
		return nil
	}
	return &remote{e.Text, kinds[e.Kind]}
}
