package daemon

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"holdfast/blockdev"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/meter"
)

// oneService collects the metrics of a service.
type oneService struct {
	s   serve.Service
	now time.Time
}

func (o oneService) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range serviceDescs {
		ch <- d
	}
}

func (o oneService) Collect(ch chan<- prometheus.Metric) { service(ch, "vol-1", o.s, o.now) }

func TestServiceMetrics(t *testing.T) {
	var m meter.Meter
	q := m.NewQueue()
	for _, d := range []time.Duration{100 * time.Microsecond, 3 * time.Millisecond, time.Hour} {
		q.Begin()
		q.End(meter.Read, meter.Now()-int64(d), 4096, false)
	}
	q.Begin()
	q.Wait(meter.Throttle)
	now := time.Unix(1000, 0)
	s := serve.Service{Kind: blockdev.VhostUser, Clients: 1, Meter: m.Snapshot(), Failed: "x",
		Layers: &serve.Hydration{Sealed: 2, Held: 10, Size: 30, Copied: 5, FailingSince: now.Add(-time.Minute)}}
	s.Meter.Kinds[meter.Read].Time = time.Second // of the clock, else
	const want = `
# HELP holdfast_volume_absent_bytes Bytes of a served volume that its top layer does not hold (yet).
# TYPE holdfast_volume_absent_bytes gauge
holdfast_volume_absent_bytes{volume="vol-1"} 20
# HELP holdfast_volume_bytes_total Bytes that were moved or discarded, by kind of request.
# TYPE holdfast_volume_bytes_total counter
holdfast_volume_bytes_total{kind="read",volume="vol-1"} 12288
# HELP holdfast_volume_failed 1 when a flush of a served volume has failed: no write is acknowledged any more.
# TYPE holdfast_volume_failed gauge
holdfast_volume_failed{volume="vol-1"} 1
# HELP holdfast_volume_request_duration_seconds Time of the requests of a served volume, by kind.
# TYPE holdfast_volume_request_duration_seconds histogram
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="1.6384e-05"} 0
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="6.5536e-05"} 0
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="0.000262144"} 1
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="0.001048576"} 1
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="0.004194304"} 2
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="0.016777216"} 2
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="0.067108864"} 2
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="0.268435456"} 2
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="1.073741824"} 2
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="4.294967296"} 2
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="17.179869184"} 2
holdfast_volume_request_duration_seconds_bucket{kind="read",volume="vol-1",le="+Inf"} 3
holdfast_volume_request_duration_seconds_sum{kind="read",volume="vol-1"} 1
holdfast_volume_request_duration_seconds_count{kind="read",volume="vol-1"} 3
# HELP holdfast_volume_source_failing_seconds How long the base of a served volume has been failing; 0 while it answers.
# TYPE holdfast_volume_source_failing_seconds gauge
holdfast_volume_source_failing_seconds{volume="vol-1"} 60
# HELP holdfast_volume_waiting_requests Requests of a served volume that wait now, by what for.
# TYPE holdfast_volume_waiting_requests gauge
holdfast_volume_waiting_requests{cause="device",volume="vol-1"} 0
holdfast_volume_waiting_requests{cause="flush",volume="vol-1"} 0
holdfast_volume_waiting_requests{cause="hydration",volume="vol-1"} 0
holdfast_volume_waiting_requests{cause="throttle",volume="vol-1"} 1
`
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(oneService{s, now})
	answer := httptest.NewRecorder()
	promhttp.HandlerFor(reg, promhttp.HandlerOpts{}).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	got := map[string]bool{}
	for line := range strings.Lines(answer.Body.String()) {
		got[line] = true
	}
	for line := range strings.Lines(want[1:]) {
		if !got[line] {
			t.Errorf("missing: %s", line)
		}
	}
	if t.Failed() {
		t.Log(answer.Body.String())
	}
}
