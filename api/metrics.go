package api

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// meters are the server's own metrics. Labels are routes and words of ours,
// never a tenant's text.
type meters struct {
	durations *prometheus.HistogramVec
	inFlight  prometheus.Gauge
	errors    *prometheus.CounterVec
	denied    prometheus.Counter
	uploading prometheus.Gauge
	handler   http.Handler
}

func newMeters(reg *prometheus.Registry) (*meters, error) {
	m := &meters{
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "holdfast_http_request_duration_seconds",
			Help:    "Time from the request's header to the end of the answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"route", "method", "status"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "holdfast_http_requests_in_flight", Help: "Requests being answered."}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_http_errors_total", Help: "Answers that are errors, by error word."}, []string{"error"}),
		denied: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "holdfast_http_authentication_failures_total", Help: "Requests with missing or invalid credentials."}),
		uploading: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "holdfast_http_uploads_in_progress", Help: "Template archives being received."}),
	}
	for _, c := range []prometheus.Collector{m.durations, m.inFlight, m.errors, m.denied, m.uploading} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("api: metrics: %w", err)
		}
	}
	m.handler = promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
	return m, nil
}

func (m *meters) done(route, method string, status int, d time.Duration) {
	m.durations.WithLabelValues(route, method, strconv.Itoa(status/100)+"xx").Observe(d.Seconds())
}
