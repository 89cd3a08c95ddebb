package daemon

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/meter"
)

// mostServices bounds how many volumes have metrics of their own: a busy one makes
// some 70 series.
const mostServices = 1000

var (
	serviceWorkers   = desc("workers", "Workers that serve volumes now, and say so.")
	serviceSilent    = desc("workers_silent", "Workers that have not answered in time: their processes are stopped, or hang.")
	serviceOmitted   = desc("workers_not_shown", "Of the workers, those without metrics of their own: there are too many.")
	serviceClients   = desc("volume_clients", "Virtual machines or connections that have a served volume now.", "volume", "kind")
	serviceErrors    = desc("volume_errors_total", "Requests of a served volume that failed, by kind.", "volume", "kind")
	serviceBytes     = desc("volume_bytes_total", "Bytes that were moved or discarded, by kind of request.", "volume", "kind")
	serviceDuration  = desc("volume_request_duration_seconds", "Time of the requests of a served volume, by kind.", "volume", "kind")
	serviceInside    = desc("volume_requests_inside", "Requests of a served volume that are being served.", "volume")
	serviceWaiting   = desc("volume_waiting_requests", "Requests of a served volume that wait now, by what for.", "volume", "cause")
	serviceWaited    = desc("volume_wait_seconds_total", "Time that requests of a served volume have waited, by what for.", "volume", "cause")
	serviceFailed    = desc("volume_failed", "1 when a flush of a served volume has failed: no write is acknowledged any more.", "volume")
	serviceLayers    = desc("volume_sealed_layers", "Layers below the top one of a served volume.", "volume")
	serviceAbsent    = desc("volume_absent_bytes", "Bytes of a served volume that its top layer does not hold (yet).", "volume")
	serviceCopied    = desc("volume_hydrated_bytes_total", "Bytes that were fetched from the base of a served volume.", "volume")
	serviceUnhealthy = desc("volume_source_failing_seconds", "How long the base of a served volume has been failing; 0 while it answers.", "volume")
)

var serviceDescs = []*prometheus.Desc{
	serviceWorkers, serviceSilent, serviceOmitted, serviceClients, serviceErrors, serviceBytes, serviceDuration, serviceInside, serviceWaiting, serviceWaited,
	serviceFailed, serviceLayers, serviceAbsent, serviceCopied, serviceUnhealthy,
}

// serviceBounds are the buckets of latencies: powers of four from 16 µs to 17 s,
// each the bound of one of the meter's own.
var serviceBounds = func() (bounds []time.Duration) {
	for shift := 14; shift <= 34; shift += 2 {
		bounds = append(bounds, 1<<shift)
	}
	return bounds
}()

// services tells of each volume that a worker serves, by the volume's id: no
// tenant's text is a label.
func (c *nodeCollector) services(ctx context.Context, ch chan<- prometheus.Metric) {
	all, silent := c.n.engine.Services(ctx)
	shown := slices.Sorted(maps.Keys(all))
	if len(shown) > mostServices {
		shown = shown[:mostServices]
	}
	ch <- prometheus.MustNewConstMetric(serviceWorkers, prometheus.GaugeValue, float64(len(all)))
	ch <- prometheus.MustNewConstMetric(serviceSilent, prometheus.GaugeValue, float64(silent))
	ch <- prometheus.MustNewConstMetric(serviceOmitted, prometheus.GaugeValue, float64(len(all)-len(shown)))
	for _, id := range shown {
		service(ch, id, all[id], time.Now())
	}
}

func service(ch chan<- prometheus.Metric, id blockdev.ID, s serve.Service, now time.Time) {
	volume := string(id)
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{volume}, labels...)...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, append([]string{volume}, labels...)...)
	}
	gauge(serviceClients, float64(s.Clients), string(s.Kind))
	gauge(serviceInside, float64(s.Meter.Inside))
	failed := 0.0
	if s.Failed != "" {
		failed = 1
	}
	gauge(serviceFailed, failed)
	for i := range s.Meter.Kinds {
		k, kind := &s.Meter.Kinds[i], meter.Kind(i).String()
		if k.Requests == 0 {
			continue
		}
		counter(serviceErrors, float64(k.Errors), kind)
		counter(serviceBytes, float64(k.Bytes), kind)
		ch <- prometheus.MustNewConstHistogram(serviceDuration, k.Requests, k.Time.Seconds(), latencyBuckets(k), volume, kind)
	}
	for i, w := range s.Meter.Waits {
		gauge(serviceWaiting, float64(w.Now), meter.Cause(i).String())
		counter(serviceWaited, w.Time.Seconds(), meter.Cause(i).String())
	}
	if l := s.Layers; l != nil {
		failing := 0.0
		if !l.FailingSince.IsZero() {
			failing = now.Sub(l.FailingSince).Seconds()
		}
		gauge(serviceLayers, float64(l.Sealed))
		gauge(serviceAbsent, float64(l.Size-l.Held))
		counter(serviceCopied, float64(l.Copied))
		gauge(serviceUnhealthy, failing)
	}
}

// latencyBuckets adds the meter's fine buckets up, as Prometheus has them: each
// counts all that are faster.
func latencyBuckets(k *meter.Counted) map[float64]uint64 {
	buckets := make(map[float64]uint64, len(serviceBounds))
	below, fine := uint64(0), 0
	for _, bound := range serviceBounds {
		for ; fine < meter.Buckets-1 && meter.UpperBound(fine) <= bound; fine++ {
			below += k.Latency[fine]
		}
		buckets[bound.Seconds()] = below
	}
	return buckets
}
