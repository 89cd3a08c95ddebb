package qemu

import (
	"context"
	"errors"
	"fmt"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qmp"
)

// groupName is that of the throttle group that bounds a volume.
func groupName(id blockdev.ID) string { return "holdfast-limits-" + string(id) }

// Explain implements attach.Limiter.
func (a *Attacher) Explain(attach.Target, bool, blockdev.Limits) (blockdev.Enforcement, error) {
	return blockdev.Enforcement{
		Mechanism: "QEMU throttle group",
		Gaps:      []string{"flushes, which carry no data", "the first tenth of a second's worth, at once"},
	}, nil
}

// MayChange implements attach.Limiter: they always may.
func (a *Attacher) MayChange(attach.Target) error { return nil }

// Limit implements attach.Limiter. errors.ErrUnsupported for a volume that came into
// the machine without a throttle group.
func (a *Attacher) Limit(ctx context.Context, r attach.Request) error {
	return blockdev.Op("qemu.Limit", r.Volume, a.with(ctx, r.Target, func(m *machine) error { return m.limit(ctx, r) }))
}

// throttle is a request's limits as ThrottleLimits of QEMU's schema: all of those that
// are ours, for what is not given stays as it was. 0 is no limit.
func throttle(l blockdev.Limits) qmp.Args {
	return qmp.Args{
		"iops-total": 0, "iops-read": l.ReadIOPS, "iops-write": l.WriteIOPS,
		"bps-total": 0, "bps-read": l.ReadBytes, "bps-write": l.WriteBytes,
	}
}

// makeGroup makes the throttle group that a node needs, with a request's limits.
func (m *machine) makeGroup(ctx context.Context, r attach.Request) error {
	there, err := m.hasGroup(ctx, r.Volume)
	if err != nil {
		return err
	}
	if there { // of an earlier life of the daemon
		return m.setGroup(ctx, r)
	}
	_, err = m.Do(ctx, "object-add", qmp.Args{"qom-type": "throttle-group", "id": groupName(r.Volume), "limits": throttle(r.Limits)})
	return refusal(err)
}

func (m *machine) hasGroup(ctx context.Context, id blockdev.ID) (bool, error) {
	return m.has(ctx, "/objects", groupName(id))
}

func (m *machine) setGroup(ctx context.Context, r attach.Request) error {
	_, err := m.Do(ctx, "qom-set", qmp.Args{"path": "/objects/" + groupName(r.Volume), "property": "limits", "value": throttle(r.Limits)})
	return refusal(err)
}

// limit makes a request's limits hold for a node that is there.
func (m *machine) limit(ctx context.Context, r attach.Request) error {
	n, err := m.node(ctx, nodeName(r.Volume))
	if err != nil || n == nil {
		return err
	}
	there, err := m.hasGroup(ctx, r.Volume)
	switch {
	case err != nil:
		return err
	case n.Driver == "throttle" && there:
		return m.setGroup(ctx, r)
	case r.Limits.None():
		return nil
	}
	return fmt.Errorf("%w: the volume came into the virtual machine without a throttle group: detach and attach it", errors.ErrUnsupported)
}

// dropGroup removes the throttle group of a node that is closed.
func (m *machine) dropGroup(ctx context.Context, id blockdev.ID) error {
	there, err := m.hasGroup(ctx, id)
	if err != nil || !there {
		return err
	}
	_, err = m.Do(ctx, "object-del", qmp.Args{"id": groupName(id)})
	return refusal(err)
}
