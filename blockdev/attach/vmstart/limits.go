package vmstart

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// limiter is that of a target's VMM, nil for one that bounds nothing.
func (a *Attacher) limiter(t attach.Target) attach.Limiter {
	l, _ := a.o.Resizers[t.VMM].(attach.Limiter)
	return l
}

// Explain implements attach.Limiter: limits are in what Launch gives, and hold as they
// do for volumes that are plugged in.
func (a *Attacher) Explain(t attach.Target, readOnly bool, l blockdev.Limits) (blockdev.Enforcement, error) {
	limiter := a.limiter(t)
	if limiter == nil {
		return blockdev.Enforcement{}, fmt.Errorf("%w: a machine of %s gets no limits", errors.ErrUnsupported, t.VMM)
	}
	e, err := limiter.Explain(t, readOnly, l)
	if err == nil {
		e.Gaps = append(e.Gaps, "a machine that is started otherwise than with the arguments given")
	}
	return e, err
}

// MayChange implements attach.Limiter: those of a running machine whose socket is known.
func (a *Attacher) MayChange(t attach.Target) error {
	limiter := a.limiter(t)
	if limiter == nil || t.Socket == "" || t.Pid == 0 {
		return fmt.Errorf("%w: limits are in the arguments that were given, and change while the machine runs and its socket is known only", errors.ErrUnsupported)
	}
	return limiter.MayChange(t)
}

// Limit implements attach.Limiter. A machine that cannot be asked has what is in its
// arguments.
func (a *Attacher) Limit(ctx context.Context, r attach.Request) error {
	limiter := a.limiter(r.Target)
	if limiter == nil || r.Target.Socket == "" || r.Target.Pid == 0 {
		return nil
	}
	return blockdev.Op("vmstart.Limit", r.Volume, limiter.Limit(ctx, r))
}
