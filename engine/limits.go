package engine

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/serve"
)

// Limiter bounds what targets do with devices that are mounted on this host.
// limit.Limiter is one. Attachers whose sandboxes get the device itself may be an
// attach.Limiter.
type Limiter interface {
	// Explain tells how limits hold for a target, errors.ErrUnsupported, with the
	// reason, where they cannot.
	Explain(t attach.Target, readOnly bool) (blockdev.Enforcement, error)
	// Apply makes exactly these limits hold; the zero Limits lift all.
	// blockdev.ErrGone when the sandbox is not there; lifting is success then.
	Apply(ctx context.Context, device string, t attach.Target, readOnly bool, l blockdev.Limits) error
}

// Bounds of what can be asked for. Below the least a single request of the
// filesystem would take seconds.
const (
	leastIOPS   = 10
	leastBytes  = 64 << 10
	mostIOPS    = 1<<32 - 1
	mostBytes   = 1 << 50
	noLimitText = "0 is no limit"
)

func checkLimits(l blockdev.Limits) error {
	for _, f := range []struct {
		name               string
		value, least, most int64
	}{
		{"readIops", l.ReadIOPS, leastIOPS, mostIOPS}, {"writeIops", l.WriteIOPS, leastIOPS, mostIOPS},
		{"readBytesPerSecond", l.ReadBytes, leastBytes, mostBytes}, {"writeBytesPerSecond", l.WriteBytes, leastBytes, mostBytes},
	} {
		if f.value != 0 && (f.value < f.least || f.value > f.most) {
			return problem(ErrInvalid, "limits."+f.name, "must be %d to %d; %s", f.least, f.most, noLimitText)
		}
	}
	return nil
}

// sameLimits refuses a repeated request that asks for other limits.
func (r AttachVolume) sameLimits(a Attachment) error {
	if r.Limits.None() || r.Limits == a.Limits { // without a wish they may have been changed since
		return nil
	}
	return problem(ErrConflict, "limits", "attachment %s has other limits: change them by its own request", a.ID)
}

// mayLimit checks limits that an attachment of v shall have.
func (e *Engine) mayLimit(v Volume, id string, kind blockdev.Kind, t attach.Target, readOnly bool, l blockdev.Limits) error {
	if err := checkLimits(l); err != nil {
		return err
	}
	for _, other := range v.Attachments { // readers share a device; these share a cgroup as well
		same := isSocket(kind) || other.Target.Pid == t.Pid && other.Target.StartTime == t.StartTime
		if other.ID != id && same && other.Limits != l {
			return problem(ErrConflict, "limits", "attachment %s has the same volume in the same place with other limits: they would share one budget", other.ID)
		}
	}
	if l.None() {
		return nil
	}
	if _, err := e.explainLimits(kind, t, readOnly, l); err != nil {
		return noLimits(err)
	}
	return nil
}

// ownLimiter is that of a target whose sandboxes bound themselves, nil for one that
// the host bounds, or nobody.
func (e *Engine) ownLimiter(t attach.Target) attach.Limiter {
	own, _ := e.o.Attachers[t.Type].(attach.Limiter)
	return own
}

// explainLimits tells how limits hold, errors.ErrUnsupported where they cannot.
func (e *Engine) explainLimits(kind blockdev.Kind, t attach.Target, readOnly bool, l blockdev.Limits) (blockdev.Enforcement, error) {
	own := e.ownLimiter(t)
	switch {
	case isSocket(kind):
		if _, ok := e.o.Pool.(serve.Throttler); !ok {
			return blockdev.Enforcement{}, fmt.Errorf("what this volume's worker does is not limited: %w", errors.ErrUnsupported)
		}
		return blockdev.Enforcement{Mechanism: "worker"}, nil
	case own != nil:
		return own.Explain(t, readOnly, l)
	case e.isRaw(t):
		return blockdev.Enforcement{}, fmt.Errorf("what this virtual machine does is not limited: %w", errors.ErrUnsupported)
	case e.o.Limiter == nil:
		return blockdev.Enforcement{}, fmt.Errorf("this server does not limit rates: %w", errors.ErrUnsupported)
	}
	return e.o.Limiter.Explain(t, readOnly)
}

// mayChange refuses other limits for an attachment that keeps those it came with.
func (e *Engine) mayChange(a Attachment, l blockdev.Limits) error {
	own := e.ownLimiter(a.Target)
	if own == nil || a.Limits == l || isSocket(a.Kind) {
		return nil
	}
	if err := own.MayChange(a.Target); err != nil {
		return noLimits(err)
	}
	return nil
}

func noLimits(err error) error {
	return &Problem{Kind: ErrUnsupported, Field: "limits", Message: fmt.Sprintf("cannot be enforced here: %v", err), Err: err}
}

// Enforcement tells how an attachment's limits hold; the zero value for one
// without limits.
func (e *Engine) Enforcement(a Attachment) blockdev.Enforcement {
	if a.Limits.None() {
		return blockdev.Enforcement{}
	}
	found, err := e.explainLimits(a.Kind, a.Target, a.ReadOnly, a.Limits)
	if err != nil {
		return blockdev.Enforcement{Mechanism: "none", Gaps: []string{err.Error()}}
	}
	return found
}

// SetLimits changes an attachment's limits while it is in use. The wish is
// durable before it holds: a start makes it true again.
func (e *Engine) SetLimits(ctx context.Context, workspace, name, id string, l blockdev.Limits, actor string) (Attachment, error) {
	return do(ctx, e, func(ctx context.Context) (Attachment, error) {
		v, release, err := e.lockNamed(ctx, workspace, name)
		if err != nil {
			return Attachment{}, err
		}
		defer release()
		before := v
		v = v.clone()
		a := v.attachment(id)
		switch {
		case a == nil:
			return Attachment{}, problem(ErrNotFound, "", "volume %q has no attachment %.40q", v.Name, id)
		case a.Phase != Attached:
			return Attachment{}, problem(ErrConflict, "", "attachment %s is %s: try again", a.ID, a.Phase)
		}
		if err := e.mayLimit(v, id, a.Kind, a.Target, a.ReadOnly, l); err != nil {
			return Attachment{}, err
		}
		if err := e.mayChange(*a, l); err != nil {
			return Attachment{}, err
		}
		old := *a
		a.Limits = l
		v.UpdatedAt, v.UpdatedBy = e.now(), actor
		if err := e.save(ctx, &v); err != nil {
			return Attachment{}, userError(err)
		}
		if err := e.limit(ctx, v, *v.attachment(id), l); err != nil {
			before.Sequence = v.Sequence
			back := before.clone()
			return Attachment{}, errors.Join(attachError(v, err), e.limit(ctx, v, old, old.Limits), e.save(ctx, &back))
		}
		return *v.attachment(id), nil
	})
}

// limit makes limits hold for an attachment whose device is open; no limits
// lift what there was. A device that is closed has none.
func (e *Engine) limit(ctx context.Context, v Volume, a Attachment, l blockdev.Limits) error {
	switch own := e.ownLimiter(a.Target); {
	case isSocket(a.Kind):
		return e.throttle(ctx, v, l)
	case own != nil:
		return e.limitInside(ctx, own, v, a, l)
	case e.o.Limiter == nil, e.isRaw(a.Target):
		return nil
	}
	device, err := e.deviceOf(ctx, v, a.ReadOnly)
	if err != nil || device == "" {
		return err
	}
	err = e.o.Limiter.Apply(ctx, device, a.Target, a.ReadOnly, l)
	if errors.Is(err, errors.ErrUnsupported) {
		return noLimits(err)
	}
	return err
}

// limitInside makes limits hold for a volume that is in a sandbox that bounds itself.
func (e *Engine) limitInside(ctx context.Context, own attach.Limiter, v Volume, a Attachment, l blockdev.Limits) error {
	request, err := e.request(ctx, v, a)
	if err != nil {
		return err
	}
	request.Limits = l
	err = own.Limit(ctx, request)
	if errors.Is(err, errors.ErrUnsupported) {
		return noLimits(err)
	}
	return err
}

// limitsServed are those of a volume that a worker serves: of several readers all have the
// same.
func (v Volume) limitsServed() blockdev.Limits {
	for _, a := range v.Attachments {
		if isSocket(a.Kind) {
			return a.Limits
		}
	}
	return blockdev.Limits{}
}

// throttle makes limits hold for a volume that a worker serves. Where none does nobody
// can use it, and the next that does begins with them.
func (e *Engine) throttle(ctx context.Context, v Volume, l blockdev.Limits) error {
	throttler, ok := e.o.Pool.(serve.Throttler)
	if !ok {
		return noLimits(errors.ErrUnsupported)
	}
	err := throttler.Throttle(ctx, v.ID, l)
	if errors.Is(err, blockdev.ErrNotFound) {
		return nil
	}
	return err
}

// deviceOf tells where the volume's open device is, "" when there is none.
func (e *Engine) deviceOf(ctx context.Context, v Volume, readOnly bool) (string, error) {
	e.mu.Lock()
	endpoint, known := e.endpoints[v.ID]
	e.mu.Unlock()
	if known {
		return endpoint.Path, nil
	}
	info, err := e.o.Pool.Stat(ctx, v.ID)
	if errors.Is(err, blockdev.ErrNotFound) || err == nil && !info.Open {
		return "", nil
	}
	if err == nil {
		endpoint, err = e.open(ctx, v.ID, mountWant(readOnly))
	}
	return endpoint.Path, err
}

// lift takes an attachment's limits away before it is detached: what is dirty is
// flushed at full speed, and whoever gets the device next has none. Those of a sandbox
// that bounds itself stay until the volume has left it: a guest that does not let go
// must not be rid of them.
func (e *Engine) lift(ctx context.Context, v Volume, a Attachment) error {
	if a.Limits.None() || isSocket(a.Kind) || e.ownLimiter(a.Target) != nil {
		return nil
	}
	return e.limit(ctx, v, a, blockdev.Limits{})
}

// limitAgain makes the limits of living attachments true at a start: the daemon
// may have died before they were, and a boot takes them away.
func (e *Engine) limitAgain(ctx context.Context, v Volume) error {
	var failures error
	for _, a := range v.Attachments {
		if a.Limits.None() || a.Phase != Attached {
			continue
		}
		if err := e.limit(ctx, v, a, a.Limits); err != nil {
			failures = errors.Join(failures, fmt.Errorf("limits of attachment %s: %w", a.ID, err))
		}
	}
	return failures
}
