package cloudhypervisor

import (
	"context"
	"net/http"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
)

// Counters implements attach.Meter by the VMM's counters, which know reads and writes.
func (a *Attacher) Counters(ctx context.Context, r attach.Request) (blockdev.Counters, error) {
	c, err := a.counters(ctx, r)
	return c, blockdev.Op("cloudhypervisor.Counters", r.Volume, err)
}

func (a *Attacher) counters(ctx context.Context, r attach.Request) (blockdev.Counters, error) {
	var devices map[string]map[string]int64 // VmCounters
	if err := a.do(ctx, r.Target, http.MethodGet, "vm.counters", nil, &devices); err != nil {
		return blockdev.Counters{}, refusal(err)
	}
	of, there := devices[diskID(r.Volume)]
	if !there {
		return blockdev.Counters{}, blockdev.ErrNotFound
	}
	return blockdev.Counters{Reads: of["read_ops"], ReadBytes: of["read_bytes"], Writes: of["write_ops"], WriteBytes: of["write_bytes"]}, nil
}
