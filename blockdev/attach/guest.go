package attach

import (
	"context"
	"errors"
	"time"

	"holdfast/blockdev/filesystem"
)

var (
	// ErrGuestSilent: the agent in the guest does not answer, or not as one does.
	// Whether it has done what was asked, or will, is not known.
	ErrGuestSilent = errors.New("the agent in the guest does not answer")
	// ErrInUse: the guest uses the volume; nothing has changed.
	ErrInUse = errors.New("the volume is in use in the guest")
	// ErrNotInside: the volume is not mounted in the guest.
	ErrNotInside = errors.New("the volume is not mounted in the guest")
	// ErrGuestRefused: the agent could not do it, for a reason of the guest.
	ErrGuestRefused = errors.New("it failed in the guest")
)

// Guest is an Attacher whose sandboxes may have an agent of ours inside, which
// works on a volume's filesystem where this host must not. What it says is the
// sandbox's word: bounded in size and time, and believed of that volume only. Every
// method but HasAgent asks it, is idempotent, and may give one of the errors above
// (all are blockdev.ErrBusy as well), or blockdev.ErrGone when the sandbox has ended. ctx bounds the whole.
type Guest interface {
	// HasAgent reports whether a target names an agent.
	HasAgent(t Target) bool
	// MountInside mounts the request's volume at its MountPath. Mounted there already
	// is success.
	MountInside(ctx context.Context, r Request) error
	// UnmountInside unmounts it wherever it is; when Lazy, also while it is in use,
	// after a flush. Not mounted is success.
	UnmountInside(ctx context.Context, r Request) error
	// GrowInside grows the mounted filesystem to the endpoint's size.
	GrowInside(ctx context.Context, r Request) error
	// SyncInside makes durable what was written, and what was removed free.
	SyncInside(ctx context.Context, r Request) error
	// TrimInside is filesystem.Tools.TrimMounted.
	TrimInside(ctx context.Context, r Request, from, length int64) (filesystem.Trimmed, error)
	// FreezeInside holds all writes until ThawInside, or for a time at most: the agent
	// watches over that.
	FreezeInside(ctx context.Context, r Request, timeout time.Duration) error
	ThawInside(ctx context.Context, r Request) error
	// StatInside tells how full the mounted filesystem is, and whether it is frozen.
	StatInside(ctx context.Context, r Request) (filesystem.Usage, bool, error)
}
