package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"
)

// call is one request on its way through the server.
type call struct {
	s     *Server
	w     *recorder
	r     *http.Request
	id    string // trace id of the caller's traceparent, or made here
	local bool   // over the unix socket
	start time.Time

	route     *route
	version   version
	principal Principal
	workspace string
	resource  string // name of what a mutation is about
	err       error
	word      string // the error word of the answer
}

type callKey struct{}

// serve answers one request, whatever happens on the way.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, local bool) {
	c := &call{s: s, w: &recorder{ResponseWriter: w}, id: requestID(r), local: local, start: s.now()}
	c.r = r.WithContext(context.WithValue(r.Context(), callKey{}, c))
	s.metrics.inFlight.Inc()
	defer s.metrics.inFlight.Dec()
	defer c.done()
	defer c.recovered()

	h := c.w.Header()
	h.Set("X-Request-Id", c.id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	if s.draining.Load() {
		h.Set("Connection", "close")
	}
	c.deadlines()
	mux, allowed, err := s.routes.find(c.r)
	if err != nil {
		if allowed != nil {
			h.Set("Allow", strings.Join(allowed, ", "))
		}
		c.fail(err)
		return
	}
	mux.ServeHTTP(c.w, c.r)
}

// run answers a request whose route is known. r has the path's values.
func run(r *http.Request, route *route) {
	c := r.Context().Value(callKey{}).(*call)
	c.r, c.route = r, route
	if err := c.admit(); err != nil {
		c.fail(err)
		return
	}
	c.deadlines()
	if !route.transfer {
		ctx, cancel := context.WithTimeout(c.r.Context(), c.s.o.Limits.Request)
		defer cancel()
		c.r = c.r.WithContext(ctx)
	}
	if err := route.serve(c); err != nil {
		c.fail(err)
	}
}

// admit checks everything that comes before the handler: who asks, for which
// workspace, how often, and whether the server takes mutations now.
func (c *call) admit() error {
	if c.route.scope != open {
		if err := c.authenticate(); err != nil {
			return err
		}
		v, err := parseVersion(c.r.Header.Get("Blaxel-Version"))
		if err != nil {
			return err
		}
		c.version = v
	}
	if c.route.action != "" && c.s.draining.Load() {
		return &fault{kind: ErrDraining, message: "try again when it is back", after: 5}
	}
	return nil
}

// fail answers err, unless the answer has begun: then the connection is cut, so
// that no client takes half an answer for a whole one.
func (c *call) fail(err error) {
	c.err = err
	if c.w.status != 0 {
		panic(http.ErrAbortHandler)
	}
	if c.route != nil && c.route.transfer {
		c.extendWrite()
		c.w.Header().Set("Connection", "close") // there may be a long body that nobody will read
	}
	if c.route != nil && c.route.pattern == createSandboxPattern {
		c.word = c.sandboxFailure(err)
	} else {
		c.word = writeError(c.w, err, c.id).Error
	}
	c.s.metrics.errors.WithLabelValues(c.word).Inc()
}

func (c *call) json(v any) error {
	writeJSON(c.w, http.StatusOK, v)
	return nil
}

// recovered turns a panic into a 500 and a log line.
func (c *call) recovered() {
	v := recover()
	if v == nil {
		return
	}
	if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(v)
	}
	c.s.log.Error("panic", "request", c.id, "path", c.r.URL.Path, "panic", v, "stack", string(debug.Stack()))
	if c.w.status != 0 {
		panic(http.ErrAbortHandler)
	}
	c.fail(errors.New("panic"))
}

// done counts, logs and, for a mutation, audits the request.
func (c *call) done() {
	name := "unmatched"
	if c.route != nil {
		name = c.route.name()
	}
	status, took := c.w.status, c.s.now().Sub(c.start)
	c.s.metrics.done(name, methodLabel(c.r.Method), status, took)

	level, attrs := slog.LevelInfo, []slog.Attr{
		slog.String("request", c.id), slog.String("method", clip(c.r.Method, 16)), slog.String("route", name),
		slog.String("path", clip(c.r.URL.Path, 256)), slog.Int("status", status), slog.Duration("took", took),
		slog.Int64("bytes", c.w.bytes), slog.String("remote", c.remote()),
	}
	for _, a := range []struct{ key, value string }{
		{"workspace", c.workspace}, {"principal", c.principal.actor()}, {"resource", c.resource}, {"error", c.word},
	} {
		if a.value != "" {
			attrs = append(attrs, slog.String(a.key, a.value))
		}
	}
	if c.err != nil {
		attrs = append(attrs, slog.String("cause", c.err.Error()))
	}
	if c.route != nil && c.route.scope == open && c.route.action == "" && status < 400 {
		level = slog.LevelDebug // health checks and scrapes
	}
	if status >= 500 && !errors.Is(c.err, context.Canceled) { // of a client that left
		level = slog.LevelError
	}
	c.s.log.LogAttrs(context.WithoutCancel(c.r.Context()), level, "request", attrs...)
	c.audit(status)
}

// audit records a mutation that an authenticated principal asked for, also one
// that was refused. Strangers cannot fill the log: of theirs (signed uploads)
// only what went through is in it. What was done is done: a failing log is reported, not answered.
func (c *call) audit(status int) {
	if c.s.o.Audit == nil || c.route == nil || c.route.action == "" {
		return
	}
	if stranger := c.principal.KeyID == ""; stranger && (c.route.scope != open || status >= 400) {
		return
	}
	err := c.s.o.Audit.Record(context.WithoutCancel(c.r.Context()), Entry{
		Time: c.start.UTC(), Request: c.id, Workspace: c.workspace, KeyID: c.principal.KeyID, Principal: c.principal.actor(),
		Action: c.route.action, Resource: c.resource, Remote: c.remote(), Status: status, Error: c.word,
	})
	if err != nil {
		c.s.log.Error("audit entry not written", "request", c.id, "action", c.route.action, "cause", err)
	}
}

func (c *call) remote() string {
	if c.local {
		return "local"
	}
	return c.r.RemoteAddr
}

// deadlines bound the body's reading and the answer's writing. They stay on a
// connection until they are set again, so each request sets both.
func (c *call) deadlines() {
	l, rc := c.s.o.Limits, http.NewResponseController(c.w.ResponseWriter)
	if c.route != nil && c.route.transfer {
		_ = rc.SetWriteDeadline(time.Time{}) // renewed by each read or write
		return
	}
	now := time.Now()
	// The handler's own time-out comes first, and its answer must get through.
	_ = rc.SetWriteDeadline(now.Add(l.Request + 10*time.Second))
	if c.r.ContentLength != 0 {
		_ = rc.SetReadDeadline(now.Add(l.Request))
	}
}

// recorder remembers what was answered.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (w *recorder) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(b)
	w.bytes += int64(n)
	return n, err
}

// Unwrap is for http.ResponseController.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// requestID is the trace id of a valid W3C traceparent header, else a new one.
func requestID(r *http.Request) string {
	parts := strings.Split(r.Header.Get("Traceparent"), "-")
	if len(parts) >= 4 && len(parts[0]) == 2 && len(parts[2]) == 16 && lowerHex(parts[0]) && lowerHex(parts[1]) && lowerHex(parts[2]) &&
		parts[0] != "ff" && len(parts[1]) == 32 && parts[1] != strings.Repeat("0", 32) {
		return parts[1]
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func lowerHex(s string) bool {
	return strings.IndexFunc(s, func(c rune) bool { return (c < '0' || c > '9') && (c < 'a' || c > 'f') }) < 0
}
