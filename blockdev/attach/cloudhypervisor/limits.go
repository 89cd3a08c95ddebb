package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/vmsocket"
)

// errFixed: the published API has no call that changes a disk's rates.
var errFixed = fmt.Errorf("%w: Cloud Hypervisor gives a disk its limits when it is added: detach the volume, and attach it with others", errors.ErrUnsupported)

// Explain implements attach.Limiter. errors.ErrUnsupported for a writer that is bounded
// in one direction only.
func (a *Attacher) Explain(_ attach.Target, readOnly bool, l blockdev.Limits) (blockdev.Enforcement, error) {
	return vmsocket.ExplainRates("Cloud Hypervisor rate_limiter_config", l, readOnly)
}

// MayChange implements attach.Limiter: they never may.
func (a *Attacher) MayChange(attach.Target) error { return errFixed }

// Limit implements attach.Limiter: errors.ErrUnsupported unless the disk has these
// limits.
func (a *Attacher) Limit(ctx context.Context, r attach.Request) error {
	i, err := a.info(ctx, r.Target)
	if err == nil {
		if d := i.disk(r.Volume); d != nil {
			err = has(*d, r)
		}
	}
	return blockdev.Op("cloudhypervisor.Limit", r.Volume, refusal(err))
}

// has is nil for a disk that has a request's limits, or whose limits are a worker's.
func has(d disk, r attach.Request) error {
	if d.Served {
		return nil
	}
	want, err := vmsocket.RatesOf(r.Limits, r.ReadOnly)
	if err != nil {
		return err
	}
	if d.Rates == nil {
		d.Rates = &vmsocket.Rates{}
	}
	if !want.Same(*d.Rates) {
		return errFixed
	}
	return nil
}
