package firecracker

import (
	"context"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmsocket"
)

// Explain implements attach.Limiter. errors.ErrUnsupported for a writer that is bounded
// in one direction only.
func (a *Attacher) Explain(_ attach.Target, readOnly bool, l blockdev.Limits) (blockdev.Enforcement, error) {
	return vmsocket.ExplainRates("Firecracker rate_limiter", l, readOnly)
}

// MayChange implements attach.Limiter: they always may.
func (a *Attacher) MayChange(attach.Target) error { return nil }

// Limit implements attach.Limiter. Buckets begin full when they are changed.
func (a *Attacher) Limit(ctx context.Context, r attach.Request) error {
	return blockdev.Op("firecracker.Limit", r.Volume, a.limit(ctx, r))
}

func (a *Attacher) limit(ctx context.Context, r attach.Request) error {
	i, err := a.describe(ctx, r.Target)
	if err != nil {
		return err
	}
	found, _, err := a.find(ctx, r)
	if err != nil || found == nil {
		return err
	}
	return a.rate(ctx, r, i, *found)
}

// rate gives a drive the limits of a request, unless it has them.
func (a *Attacher) rate(ctx context.Context, r attach.Request, i instance, found drive) error {
	want, err := vmsocket.RatesOf(r.Limits, r.ReadOnly)
	if err != nil {
		return err
	}
	if found.Rates == nil {
		found.Rates = &vmsocket.Rates{}
	}
	if want.Same(*found.Rates) {
		return nil
	}
	if i.State == notStarted { // PATCH is for booted ones
		return a.put(ctx, r)
	}
	return a.patch(ctx, r, partialDrive{Rates: every(want)})
}

// every names both budgets, for what a PATCH does not name stays: one without a size
// bounds nothing.
func every(want vmsocket.Rates) *vmsocket.Rates {
	if want.Bandwidth == nil {
		want.Bandwidth = &vmsocket.Bucket{}
	}
	if want.Ops == nil {
		want.Ops = &vmsocket.Bucket{}
	}
	return &want
}
