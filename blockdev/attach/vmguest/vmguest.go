package vmguest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/guest"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/filesystem"
)

const (
	// defaultPatience is how long an agent may be silent: it says something every
	// guest.WorkingEvery.
	defaultPatience = 5 * time.Second
	// deviceWait is how long a guest may take to see a device, or its new size.
	deviceWait = 10 * time.Second
	// lookTime is how long an agent may take to say whether a volume is mounted.
	lookTime = time.Second
	// most bounds a number that a guest says, so that sums of them stay numbers.
	most = math.MaxInt64 / 4
)

// Agents is an attach.Guest.
type Agents struct {
	Door *vmsocket.Door
	// Serial is that of the request's device in the guest.
	Serial func(attach.Request) (string, error)
	// Vsock: the socket is a hybrid vsock's, not a serial port's.
	Vsock bool
	// Patience is how long an agent may say nothing; 0: 5 s.
	Patience time.Duration
}

var _ attach.Guest = (*Agents)(nil)

// HasAgent implements attach.Guest.
func (a *Agents) HasAgent(t attach.Target) bool { return t.Agent != "" }

// Greet makes sure that an agent answers whose protocol is ours; a target without
// one is success. It is asked before a volume is touched.
func (a *Agents) Greet(ctx context.Context, t attach.Target) error {
	if !a.HasAgent(t) {
		return nil
	}
	answer, err := a.ask(ctx, t, guest.Request{Do: guest.Hello})
	if err == nil && answer.Version != guest.Version {
		err = tell(fmt.Errorf("the agent in the guest speaks version %d of the protocol, and this server version %d", answer.Version, guest.Version), attach.ErrGuestRefused)
	}
	return err
}

func (a *Agents) ask(ctx context.Context, t attach.Target, r guest.Request) (guest.Answer, error) {
	patience := a.Patience
	if patience <= 0 {
		patience = defaultPatience
	}
	conn, err := a.Door.DialBeside(ctx, t, "target.agent", t.Agent)
	if err != nil {
		return guest.Answer{}, silentUnlessGone(err)
	}
	defer conn.Close()
	if a.Vsock {
		if err := guest.Connect(ctx, conn, patience, guest.VsockPort); err != nil {
			return guest.Answer{}, a.explain(ctx, t, err)
		}
	}
	answer, err := guest.Ask(ctx, conn, patience, r)
	return answer, a.explain(ctx, t, err)
}

// told is an error of the guest in words for whoever asked, and what it is besides.
// All are blockdev.ErrBusy: another time it may do.
type told struct {
	error
	kinds []error
}

func tell(err error, kinds ...error) error { return &told{err, append(kinds, blockdev.ErrBusy)} }

func (t *told) Unwrap() []error { return append(t.kinds, t.error) }

// silentUnlessGone: a socket that cannot be reached tells nothing of the guest.
func silentUnlessGone(err error) error {
	if errors.Is(err, blockdev.ErrGone) {
		return err
	}
	return tell(err, attach.ErrGuestSilent)
}

// explain puts what went wrong into this package's callers' words. Any of it is
// explained by the machine's end.
func (a *Agents) explain(ctx context.Context, t attach.Target, err error) error {
	if err == nil {
		return nil
	}
	p, gone := a.Door.Open(t)
	if gone == nil {
		gone = p.Gone(ctx)
		p.Close()
	}
	if gone != nil {
		return gone
	}
	var refused *guest.Refused
	if !errors.As(err, &refused) {
		return tell(err, attach.ErrGuestSilent)
	}
	switch refused.Code {
	case guest.CodeBusy:
		return tell(err, attach.ErrInUse)
	case guest.CodeNotMounted:
		return tell(err, attach.ErrNotInside)
	case guest.CodeUnsupported:
		return tell(err, attach.ErrGuestRefused, errors.ErrUnsupported)
	}
	return tell(err, attach.ErrGuestRefused)
}

// about asks for something about the request's volume.
func (a *Agents) about(ctx context.Context, r attach.Request, ask guest.Request) (guest.Answer, error) {
	serial, err := a.Serial(r)
	if err != nil {
		return guest.Answer{}, err
	}
	ask.Serial = serial
	answer, err := a.ask(ctx, r.Target, ask)
	return answer, blockdev.Op("vmguest."+ask.Do, r.Volume, err)
}

// MountInside implements attach.Guest.
func (a *Agents) MountInside(ctx context.Context, r attach.Request) error {
	_, err := a.about(ctx, r, guest.Request{Do: guest.Mount, Path: r.MountPath, Filesystem: string(r.Filesystem), ReadOnly: r.ReadOnly, TimeoutMs: deviceWait.Milliseconds()})
	return err
}

// UnmountInside implements attach.Guest.
func (a *Agents) UnmountInside(ctx context.Context, r attach.Request) error {
	_, err := a.about(ctx, r, guest.Request{Do: guest.Unmount, Lazy: r.Lazy})
	return err
}

// Missing reports whether the request's volume, whose device is in the guest, should
// be mounted there by the agent and is not (the guest has booted since, say). An
// agent that does not answer leaves it unknown: false.
func (a *Agents) Missing(ctx context.Context, r attach.Request) bool {
	if !a.HasAgent(r.Target) || r.MountPath == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	_, err := a.about(ctx, r, guest.Request{Do: guest.Stat})
	return errors.Is(err, attach.ErrNotInside)
}

// GrowInside implements attach.Guest.
func (a *Agents) GrowInside(ctx context.Context, r attach.Request) error {
	_, err := a.about(ctx, r, guest.Request{Do: guest.Grow, Size: r.Endpoint.Size, TimeoutMs: deviceWait.Milliseconds()})
	return err
}

// SyncInside implements attach.Guest.
func (a *Agents) SyncInside(ctx context.Context, r attach.Request) error {
	_, err := a.about(ctx, r, guest.Request{Do: guest.Sync})
	return err
}

// TrimInside implements attach.Guest. An agent that does not get on is refused: its
// caller goes from piece to piece.
func (a *Agents) TrimInside(ctx context.Context, r attach.Request, from, length int64) (filesystem.Trimmed, error) {
	answer, err := a.about(ctx, r, guest.Request{Do: guest.Trim, From: from, Length: length})
	if err != nil {
		return filesystem.Trimmed{}, err
	}
	t := answer.Trim
	if t == nil || !numbers(t.Discarded, t.Next) || t.Discarded > r.Endpoint.Size || !t.Done && (t.Next <= from || t.Next > r.Endpoint.Size) {
		return filesystem.Trimmed{}, nonsense()
	}
	return filesystem.Trimmed{Discarded: t.Discarded, Next: t.Next, Done: t.Done}, nil
}

// FreezeInside implements attach.Guest.
func (a *Agents) FreezeInside(ctx context.Context, r attach.Request, timeout time.Duration) error {
	_, err := a.about(ctx, r, guest.Request{Do: guest.Freeze, TimeoutMs: timeout.Milliseconds()})
	return err
}

// ThawInside implements attach.Guest.
func (a *Agents) ThawInside(ctx context.Context, r attach.Request) error {
	_, err := a.about(ctx, r, guest.Request{Do: guest.Thaw})
	return err
}

// StatInside implements attach.Guest.
func (a *Agents) StatInside(ctx context.Context, r attach.Request) (filesystem.Usage, bool, error) {
	answer, err := a.about(ctx, r, guest.Request{Do: guest.Stat})
	if err != nil {
		return filesystem.Usage{}, false, err
	}
	u := answer.Usage
	if u == nil || !numbers(u.Total, u.Used, u.Free, u.Inodes, u.UsedInodes, u.FreeInodes) ||
		u.Total > r.Endpoint.Size || u.Used > u.Total || u.Free > u.Total || u.UsedInodes > u.Inodes || u.FreeInodes > u.Inodes {
		return filesystem.Usage{}, false, nonsense()
	}
	return filesystem.Usage{Total: u.Total, Used: u.Used, Free: u.Free, Inodes: u.Inodes, UsedInodes: u.UsedInodes, FreeInodes: u.FreeInodes}, answer.Frozen, nil
}

func nonsense() error {
	return tell(errors.New("the agent in the guest says numbers that cannot be"), attach.ErrGuestSilent)
}

func numbers(all ...int64) bool {
	for _, n := range all {
		if n < 0 || n > most {
			return false
		}
	}
	return true
}
