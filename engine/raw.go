package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
)

// isRaw reports whether a target's sandboxes get the device itself.
func (e *Engine) isRaw(t attach.Target) bool {
	return e.needsOf(t).Raw
}

// rawOnly reports whether a volume is in use, and only by sandboxes that get the
// device itself: this host then looks at no byte of it.
func (e *Engine) rawOnly(v Volume) bool {
	return len(v.Attachments) > 0 && !slices.ContainsFunc(v.Attachments, func(a Attachment) bool { return !e.isRaw(a.Target) })
}

// countedInside is what the sandboxes count that have the device itself, together; nil
// where one does not.
func (e *Engine) countedInside(ctx context.Context, v Volume) *blockdev.Counters {
	var sum *blockdev.Counters
	for _, a := range v.Attachments {
		if isSocket(a.Kind) { // the pool's worker counts
			return nil
		}
		meter, ok := e.o.Attachers[a.Target.Type].(attach.Meter)
		if !ok || a.Phase != Attached {
			return nil
		}
		c, err := meter.Counters(ctx, attach.Request{Volume: v.ID, Target: a.Target})
		if err != nil {
			e.o.Log.Debug("a sandbox does not tell what it has counted", "volume", v.ID, "attachment", a.ID, "err", err)
			return nil
		}
		if sum == nil {
			sum = &blockdev.Counters{Since: a.CreatedAt}
		}
		*sum = sum.Add(c)
	}
	return sum
}

// kindsFor are the kinds of endpoint for an attachment, best first. A reader takes
// a device where it can: an image has one opening, and readers that need a mount
// share it; a device also enforces what a file leaves to the sandbox.
func (e *Engine) kindsFor(t attach.Target, readOnly bool) []blockdev.Kind {
	kinds := slices.Clone(e.needsOf(t).Kinds)
	if chooser, ok := e.o.Attachers[t.Type].(attach.Chooser); ok {
		if chosen := chooser.KindsFor(t); len(chosen) > 0 {
			kinds = slices.Clone(chosen)
		}
	}
	if at := slices.Index(kinds, blockdev.Block); readOnly && at > 0 {
		kinds = slices.Insert(slices.Delete(kinds, at, at+1), 0, blockdev.Block)
	}
	return kinds
}

// kindsOf are the kinds of endpoint that an attachment can go on with: a sandbox that
// has a worker's socket has nothing else, though the volume may be flat by now.
func (e *Engine) kindsOf(a Attachment) []blockdev.Kind {
	if isSocket(a.Kind) {
		return []blockdev.Kind{a.Kind}
	}
	kinds := e.kindsFor(a.Target, a.ReadOnly)
	if a.Kind != "" {
		kinds = slices.DeleteFunc(kinds, isSocket)
	}
	return kinds
}

// isSocket reports whether a worker serves what is open so.
func isSocket(k blockdev.Kind) bool { return k == blockdev.VhostUser || k == blockdev.NBD }

// expose notes, in the write that precedes the exposure of the device, what a
// sandbox that gets it can do: one that writes taints the volume for ever.
func (e *Engine) expose(v *Volume, t attach.Target, readOnly bool) {
	if !e.isRaw(t) {
		return
	}
	// What has grown since a guest had it is grown by the agent, where there is one;
	// without one it is not known, and the new guest's.
	if !v.Tainted || v.GuestMiB == 0 || e.agentOf(t) == nil {
		v.GuestMiB = v.SizeMiB
	}
	v.Tainted = v.Tainted || !readOnly
}

// mayMount refuses what would mount a volume on this host, where it must not be.
func (v Volume) mayMount() error {
	switch {
	case v.Filesystem == filesystem.None:
		return problem(ErrUnsupported, "", "volume %q has no filesystem to mount: targets host, runc and sandbox need ext4, xfs or btrfs", v.Name)
	case v.Tainted:
		return problem(ErrUnsupported, "", "volume %q was writable as raw blocks, in a virtual machine or by a client of an export: this host never mounts it again. "+
			"Attach it to a virtual machine, or copy its files there to a new volume", v.Name)
	}
	return nil
}

// guestGrows says what of a volume's growth is left to a guest, "" for nothing
// that is known: nobody but the guest looks into its filesystem.
func (v Volume) guestGrows() string {
	if !v.Tainted || v.Filesystem == filesystem.None || v.SizeMiB <= v.GuestMiB {
		return ""
	}
	return fmt.Sprintf("the device has grown from %d MB since a virtual machine got it: its filesystem is grown in the guest, and this host does not look at it", v.GuestMiB)
}

// untold reports whether a sandbox of the volume has yet to be told of a device's
// size, in bytes. What was told is not remembered over a restart: told twice is no
// harm.
func (e *Engine) untold(v Volume, device int64) bool {
	e.mu.Lock()
	told := e.told[v.ID]
	e.mu.Unlock()
	return told != device && slices.ContainsFunc(v.Attachments, e.mustTell)
}

func (e *Engine) mustTell(a Attachment) bool {
	_, tells := e.o.Attachers[a.Target.Type].(attach.Resizer)
	return tells && a.Phase == Attached
}

func (e *Engine) setTold(id blockdev.ID, device int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.told[id] = device
}

// inform tells the sandboxes that do not see it by themselves how large the device is.
func (e *Engine) inform(ctx context.Context, v Volume, device int64) error {
	for _, a := range v.Attachments {
		if !e.mustTell(a) {
			continue
		}
		resizer := e.o.Attachers[a.Target.Type].(attach.Resizer) //nolint:forcetypeassert // mustTell has seen it
		err := e.step(ctx, v.ID, stepResize, func(ctx context.Context) error {
			request, err := e.request(ctx, v, a)
			if err != nil {
				return err
			}
			return resizer.Resized(ctx, request)
		})
		if errors.Is(err, blockdev.ErrGone) { // the next look at it finds that
			continue
		}
		if err != nil {
			return fmt.Errorf("attachment %s: %w", a.ID, err)
		}
	}
	e.setTold(v.ID, device)
	return nil
}

// endpointOf is the opening that an attachment uses. That of a raw one is asked
// for: a file's ends with the process, and a device may have grown. A worker that is
// started for it has the limits before its clients, who come again by themselves.
func (e *Engine) endpointOf(ctx context.Context, v Volume, a Attachment) (blockdev.Endpoint, error) {
	if e.isRaw(a.Target) {
		return e.open(ctx, v.ID, blockdev.Want{Kinds: e.kindsOf(a), ReadOnly: a.ReadOnly, Limits: a.Limits})
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.endpoints[v.ID], nil
}
