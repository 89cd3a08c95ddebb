package qemu

import (
	"context"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qmp"
)

// Counters implements attach.Meter by QEMU's own accounting of the device.
func (a *Attacher) Counters(ctx context.Context, r attach.Request) (c blockdev.Counters, err error) {
	err = a.with(ctx, r.Target, func(m *machine) error {
		c, err = m.counters(ctx, r.Volume)
		return err
	})
	return c, blockdev.Op("qemu.Counters", r.Volume, err)
}

func (m *machine) counters(ctx context.Context, id blockdev.ID) (blockdev.Counters, error) {
	var all []struct {
		Device string `json:"qdev"` // its id, or its path where it has none: virtio-blk's is below ID
		Stats  struct {
			Reads        int64 `json:"rd_operations"`
			ReadBytes    int64 `json:"rd_bytes"`
			Writes       int64 `json:"wr_operations"`
			WriteBytes   int64 `json:"wr_bytes"`
			Discards     int64 `json:"unmap_operations"`
			DiscardBytes int64 `json:"unmap_bytes"`
			Flushes      int64 `json:"flush_operations"`
		}
	}
	if err := m.ask(ctx, "query-blockstats", qmp.Args{}, &all); err != nil {
		return blockdev.Counters{}, err
	}
	name := deviceName(id)
	for _, d := range all {
		if s := d.Stats; d.Device == name || strings.HasPrefix(d.Device, "/machine/peripheral/"+name+"/") {
			return blockdev.Counters{
				Reads: s.Reads, ReadBytes: s.ReadBytes, Writes: s.Writes, WriteBytes: s.WriteBytes,
				Discards: s.Discards, DiscardBytes: s.DiscardBytes, Flushes: s.Flushes,
			}, nil
		}
	}
	return blockdev.Counters{}, blockdev.ErrNotFound
}
