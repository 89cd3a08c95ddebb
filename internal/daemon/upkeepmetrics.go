package daemon

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	mountedVolumes  = desc("mounted_volumes", "Volumes whose filesystem is mounted on this host.")
	frozenVolumes   = desc("frozen_volumes", "Of the mounted volumes, frozen now.")
	filesystemTotal = desc("filesystem_size_bytes", "What the mounted filesystems hold for files, together.")
	filesystemUsed  = desc("filesystem_used_bytes", "Of it, used.")
	inodesTotal     = desc("filesystem_inodes", "Inodes of the mounted filesystems, together.")
	inodesUsed      = desc("filesystem_inodes_used", "Of them, used.")
	ioBytes         = desc("io_bytes_total", "Bytes through all volumes' devices since the start, by direction.", "direction")
	ioRequests      = desc("io_requests_total", "Requests of all volumes' devices since the start, by kind.", "kind")
	trimRuns        = desc("trims_total", "Trims of volumes since the start.")
	trimFreed       = desc("trim_freed_bytes_total", "Bytes that trims gave back to the pool since the start.")
)

var upkeepDescs = []*prometheus.Desc{
	mountedVolumes, frozenVolumes, filesystemTotal, filesystemUsed, inodesTotal, inodesUsed, ioBytes, ioRequests, trimRuns, trimFreed,
}

// inUse sums over volumes: what one tenant does is not shown.
func (c *nodeCollector) inUse(ctx context.Context, out emit) error {
	u, err := c.n.engine.InUse(ctx)
	for _, m := range []struct {
		d *prometheus.Desc
		v int64
	}{
		{mountedVolumes, int64(u.Mounted)}, {frozenVolumes, int64(u.Frozen)},
		{filesystemTotal, u.Usage.Total}, {filesystemUsed, u.Usage.Used}, {inodesTotal, u.Usage.Inodes}, {inodesUsed, u.Usage.UsedInodes},
	} {
		out(m.d, prometheus.GaugeValue, float64(m.v))
	}
	for direction, n := range map[string]int64{"read": u.IO.ReadBytes, "write": u.IO.WriteBytes, "discard": u.IO.DiscardBytes} {
		out(ioBytes, prometheus.CounterValue, float64(n), direction)
	}
	for kind, n := range map[string]int64{"read": u.IO.Reads, "write": u.IO.Writes, "discard": u.IO.Discards, "flush": u.IO.Flushes} {
		out(ioRequests, prometheus.CounterValue, float64(n), kind)
	}
	runs, freed := c.n.engine.Trimmed()
	out(trimRuns, prometheus.CounterValue, float64(runs))
	out(trimFreed, prometheus.CounterValue, float64(freed))
	return err
}
