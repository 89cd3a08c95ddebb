package daemon

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// scrapeTime bounds what a scrape waits for the pool.
const scrapeTime = 5 * time.Second

// meters are what is told as it happens; all else is asked.
type meters struct {
	actions *prometheus.HistogramVec
	commits prometheus.Histogram
	shared  prometheus.Histogram

	templates *prometheus.CounterVec
}

// actionBuckets reach from a clone to an offline check of a large filesystem.
var actionBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}

func newMeters() *meters {
	return &meters{
		actions: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "holdfast_action_duration_seconds", Help: "Time of each action of a volume's life.", Buckets: actionBuckets},
			[]string{"action", "outcome"}),
		commits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "holdfast_metadata_commit_duration_seconds", Help: "Time of each synced commit of the record store.", Buckets: actionBuckets}),
		shared: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "holdfast_metadata_commit_updates", Help: "Updates that shared a commit.", Buckets: prometheus.ExponentialBuckets(1, 2, 8)}),
		templates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_template_events_total", Help: "Versions that retention removed, and that were found damaged or restored."}, []string{"type"}),
	}
}

func (m *meters) action(name string, d time.Duration, err error) {
	outcome := "ok"
	if err != nil {
		outcome = "error"
	}
	m.actions.WithLabelValues(name, outcome).Observe(d.Seconds())
}

func (m *meters) commit(d time.Duration, updates int) {
	m.commits.Observe(d.Seconds())
	m.shared.Observe(float64(updates))
}

// collect registers everything that is not the API server's own. All is asked
// when it is scraped, so that what is gone vanishes. No tenant's text is a label.
func (n *node) collect(reg *prometheus.Registry) error {
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "holdfast_build_info", Help: "Always 1; the labels say what runs."}, []string{"version", "go"})
	build.WithLabelValues(n.c.Version, runtime.Version()).Set(1)
	for _, c := range []prometheus.Collector{
		build, &nodeCollector{n: n}, n.meters.actions, n.meters.commits, n.meters.shared, n.meters.templates,
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := reg.Register(c); err != nil {
			return err
		}
	}
	return nil
}

// nodeCollector asks the engine, the pool and the record store.
type nodeCollector struct{ n *node }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("holdfast_"+name, help, labels, nil)
}

var (
	poolCapacity    = desc("pool_capacity_bytes", "What the pool can hold.", "pool")
	poolFree        = desc("pool_free_bytes", "Of the capacity, not occupied.", "pool")
	poolAllocated   = desc("pool_allocated_bytes", "Of the capacity, occupied.", "pool")
	poolShared      = desc("pool_shared_bytes", "Bytes that images share with others.", "pool")
	poolTrash       = desc("pool_trash_bytes", "Occupied by removed images whose space is being reclaimed.", "pool")
	poolProvisioned = desc("pool_provisioned_bytes", "Promised to volumes and snapshots.", "pool")
	poolOther       = desc("pool_other_bytes", "Held by what is not a volume: templates, sources, staging.", "pool")
	poolReserve     = desc("pool_reserve_bytes", "Kept free for deletes and metadata.", "pool")
	poolAvailable   = desc("pool_available_bytes", "What can still be promised.", "pool")
	poolQuarantined = desc("pool_quarantined_images", "Images that nothing explains.", "pool")
	volumes         = desc("volumes", "Volumes, by status.", "status")
	snapshots       = desc("snapshots", "Snapshots of volumes.")
	snapshotBytes   = desc("snapshot_promised_bytes", "The most that snapshots can come to occupy alone.")
	attachments     = desc("attachments", "Attachments, by type of target.", "type")
	phases          = desc("attachments_by_phase", "Attachments, by phase.", "phase")
	attachEvents    = desc("attachment_events_total", "What happened to attachments since the start: detaches by force that were asked for, filesystems shut down, images severed, sandboxes killed by force, sandboxes lost, steps that hung.", "event")
	hanging         = desc("hanging_volumes", "Volumes that wait for a step that hangs in the kernel.")
	storeRecords    = desc("metadata_records", "Records in all tables.")
	storeUpdates    = desc("metadata_updates_total", "Updates that are durable, since the start.")
	storeTables     = desc("metadata_table_bytes", "Allocated by the store's tables.")
	storeLogs       = desc("metadata_log_bytes", "Allocated by the store's logs.")
	storeFree       = desc("metadata_free_bytes", "Free on the store's file system.")
	healthy         = desc("healthy", "1 while the daemon can do its work.")
	scrapeErrors    = desc("scrape_errors", "Parts that could not be asked in this scrape.")
)

// Describe implements prometheus.Collector.
func (c *nodeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range append([]*prometheus.Desc{
		poolCapacity, poolFree, poolAllocated, poolShared, poolTrash, poolProvisioned, poolOther, poolReserve, poolAvailable, poolQuarantined,
		volumes, snapshots, snapshotBytes, attachments, phases, attachEvents, hanging, storeRecords, storeUpdates, storeTables, storeLogs, storeFree, healthy, scrapeErrors,
	}, slices.Concat(libraryDescs, upkeepDescs, poolHealthDescs, serviceDescs)...) {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *nodeCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTime)
	defer cancel()
	failed := 0
	var served sync.WaitGroup // beside all else, so that all of the time is theirs
	served.Go(func() { c.services(ctx, ch) })
	for _, ask := range []func(context.Context, func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) error{c.pools, c.poolHealth, c.counts, c.store, c.library, c.inUse} {
		err := ask(ctx, func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, t, v, labels...)
		})
		if err != nil {
			failed++
			c.n.log.Warn("a metric could not be read", "cause", err)
		}
	}
	served.Wait()
	ch <- prometheus.MustNewConstMetric(scrapeErrors, prometheus.GaugeValue, float64(failed))
}

type emit = func(*prometheus.Desc, prometheus.ValueType, float64, ...string)

func (c *nodeCollector) pools(ctx context.Context, out emit) error {
	pools, err := c.n.engine.Pools(ctx)
	for _, p := range pools {
		for _, m := range []struct {
			d *prometheus.Desc
			v int64
		}{
			{poolCapacity, p.Capacity.Total}, {poolFree, p.Capacity.Free}, {poolAllocated, p.Capacity.Allocated},
			{poolShared, p.Shared}, {poolTrash, p.Capacity.Trash}, {poolProvisioned, p.Provisioned}, {poolOther, p.Other},
			{poolReserve, p.Reserve}, {poolAvailable, p.Available}, {poolQuarantined, int64(len(p.Quarantined))},
		} {
			out(m.d, prometheus.GaugeValue, float64(m.v), p.Name)
		}
	}
	return err
}

func (c *nodeCollector) counts(ctx context.Context, out emit) error {
	for status, count := range c.n.engine.CountByStatus() {
		out(volumes, prometheus.GaugeValue, float64(count), string(status))
	}
	n, bytes := c.n.engine.SnapshotCounts()
	out(snapshots, prometheus.GaugeValue, float64(n))
	out(snapshotBytes, prometheus.GaugeValue, float64(bytes))
	for kind, count := range c.n.engine.Attachments() {
		out(attachments, prometheus.GaugeValue, float64(count), kind)
	}
	for phase, count := range c.n.engine.AttachmentsByPhase() {
		out(phases, prometheus.GaugeValue, float64(count), string(phase))
	}
	for event, count := range c.n.engine.Counters() {
		out(attachEvents, prometheus.CounterValue, float64(count), event)
	}
	out(hanging, prometheus.GaugeValue, float64(c.n.engine.Hanging()))
	ok := 1.0
	if c.n.healthy(ctx) != nil {
		ok = 0
	}
	out(healthy, prometheus.GaugeValue, ok)
	return nil
}

func (c *nodeCollector) store(_ context.Context, out emit) error {
	s, err := c.n.store.Stats()
	out(storeRecords, prometheus.GaugeValue, float64(s.Records))
	out(storeUpdates, prometheus.CounterValue, float64(s.Updates))
	out(storeTables, prometheus.GaugeValue, float64(s.TableBytes))
	out(storeLogs, prometheus.GaugeValue, float64(s.LogBytes))
	out(storeFree, prometheus.GaugeValue, float64(s.FreeBytes))
	return err
}
