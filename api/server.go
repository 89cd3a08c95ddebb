package api

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options are what a Server is made of. Engine, Library, Auth and Secret are required.
type Options struct {
	Engine  Engine
	Library Library
	Auth    Access

	Sandboxes Sandboxes // nil: their routes answer 404

	Audit   Auditor              // nil: no audit log
	Metrics *prometheus.Registry // nil: the server's own; the caller may register more
	Log     *slog.Logger         // nil: slog.Default
	Secret  []byte               // signs cursors; at least 32 bytes
	Limits  Limits

	PublicURL        string                        // base of upload URLs, "https://host:port"; empty: from each request
	LocalMetricsOnly bool                          // /metrics only on the local handler
	TenantsAttach    bool                          // a workspace's key may attach to sandboxes; else only the control plane: targets are the host's
	Ready            func(context.Context) error   // nil: always; the reason why not shows in /readyz
	Doctor           func(context.Context) []Check // what the node has and lacks; nil: nothing is told
	Now              func() time.Time              // nil: time.Now
	Version          string                        // of the daemon, in /healthz and the OpenAPI document
}

// Server answers the API. It is safe for concurrent use.
type Server struct {
	o        Options
	log      *slog.Logger
	now      func() time.Time
	routes   *table
	metrics  *meters
	keys     *limiters // per API key
	failures *limiters // failed authentications per address
	uploads  chan struct{}
	images   chan struct{} // of templates that are published: each holds one in the pool
	texts    chan struct{} // large files of sandboxes that are answered inside JSON
	page     *page
	draining atomic.Bool
	drained  chan struct{} // closed by Drain: who waits for something to happen goes home
}

// New checks the options and builds the routes.
func New(o Options) (*Server, error) {
	if o.Engine == nil || o.Library == nil || o.Auth == nil {
		return nil, errors.New("api: Engine, Library and Auth are required")
	}
	if len(o.Secret) < 32 {
		return nil, errors.New("api: Secret must have at least 32 bytes")
	}
	o.Limits = o.Limits.withDefaults()
	o.PublicURL = strings.TrimRight(o.PublicURL, "/")
	s := &Server{o: o, log: o.Log, now: o.Now, page: newPage(), drained: make(chan struct{})}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.o.Metrics == nil {
		s.o.Metrics = prometheus.NewRegistry()
	}
	m, err := newMeters(s.o.Metrics)
	if err != nil {
		return nil, err
	}
	s.metrics = m
	s.keys = newLimiters(o.Limits.KeyRate, o.Limits.KeyBurst, s.now)
	s.failures = newLimiters(o.Limits.FailureRate, o.Limits.FailureBurst, s.now)
	s.uploads = make(chan struct{}, o.Limits.Uploads)
	s.images = make(chan struct{}, o.Limits.Uploads)
	s.texts = make(chan struct{}, textsAtATime)
	s.routes = newTable(allRoutes(), run)
	return s, nil
}

// Handler serves clients on the network: each request to /v0 carries a key.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, false) })
}

// LocalHandler serves the unix socket. Who can open the socket (its file mode
// is 0600) is a control-plane admin, without a key; the workspace is named by
// X-Blaxel-Workspace. Never put it on a network address.
func (s *Server) LocalHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, true) })
}

// Drain refuses new mutations from now on, answers /readyz with 503 and asks
// clients to close their connections. Requests under way are not touched.
func (s *Server) Drain() {
	if !s.draining.Swap(true) {
		close(s.drained)
	}
}
