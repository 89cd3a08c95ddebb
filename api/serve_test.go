package api_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/engine"
	"holdfast/templates"
)

func TestRequestID(t *testing.T) {
	w := newWorld(t)
	const trace = "0af7651916cd43dd8448eb211c80319c"
	r := w.request("GET /v0/volumes", nil, "Traceparent: 00-"+trace+"-b7ad6b7169203331-01")
	if got := r.Header.Get("X-Request-Id"); got != trace {
		t.Errorf("X-Request-Id %q", got)
	}
	if !strings.Contains(w.log.String(), trace) {
		t.Error("the trace id is not in the log")
	}
	seen := map[string]bool{}
	for _, bad := range []string{
		"", "x", "00-" + strings.ToUpper(trace) + "-b7ad6b7169203331-01", "00-00000000000000000000000000000000-b7ad6b7169203331-01",
		"ff-" + trace + "-b7ad6b7169203331-01", "00-" + trace + "-b7ad6b7169203331", "00-0af7651916cd43dd8448eb211c80319\n-b7ad6b7169203331-01",
	} {
		id := w.request("GET /v0/volumes", nil, "Traceparent: "+bad).Header.Get("X-Request-Id")
		if !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(id) || id == trace || seen[id] {
			t.Errorf("%q: X-Request-Id %q", bad, id)
		}
		seen[id] = true
	}
}

func TestLogLine(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	target := w.request("PUT /v0/volume_templates/demo?upload=true", `{}`).Header.Get("X-Blaxel-Upload-Url")
	send(t, w.handler, "PUT "+target, "archive", "Content-Type: application/x-tar").is(200)
	log := w.log.String()
	for _, part := range []string{`"workspace":"main"`, `"principal":"ann"`, `"resource":"x"`, `"route":"/v0/volumes"`, `"status":200`, `"resource":"demo:1"`} {
		if !strings.Contains(log, part) {
			t.Errorf("%s is not in the log: %s", part, log)
		}
	}
	for _, secret := range []string{adminKey, "signature", "good"} {
		if strings.Contains(log, secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
}

func TestAudit(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	if e := w.audit.last(t); e.Action != "volume.create" || e.Resource != "x" || e.Principal != "ann" || e.KeyID != "key-admin" || e.Workspace != "main" ||
		e.Status != 200 || e.Error != "" || e.Request == "" || e.Remote == "" || e.Time.IsZero() {
		t.Errorf("%+v", e)
	}
	w.request("POST /v0/volumes", newVolume("x", nil)).is(409)
	if e := w.audit.last(t); e.Status != 409 || e.Error != "VOLUME_ALREADY_EXISTS" || e.Resource != "x" {
		t.Errorf("%+v", e)
	}
	w.as(readerKey, "DELETE /v0/volumes/x", nil).is(403)
	if e := w.audit.last(t); e.Status != 403 || e.Action != "volume.delete" || e.Principal != "ron" {
		t.Errorf("a refused mutation: %+v", e)
	}
	count := len(w.audit.entries)
	w.request("GET /v0/volumes", nil).is(200)
	w.as("wrong", "DELETE /v0/volumes/x", nil).is(401)
	send(t, w.handler, "PUT /uploads/rev-1?expires=1&signature=evil", "x", "Content-Type: application/x-tar").is(400)
	if len(w.audit.entries) != count {
		t.Errorf("reads and strangers fill the log: %+v", w.audit.last(t))
	}
	w.push("demo", 10)
	if e := w.audit.last(t); e.Action != "template.version.upload" || e.Resource != "demo:1" || e.Workspace != "main" {
		t.Errorf("%+v", e)
	}
	list := into[[]api.AuditEntry](w.request("GET /v0/audit?limit=2", nil).is(200))
	if len(list) != 2 || list[0].Action != "template.version.upload" || list[1].Action != "template.update" {
		t.Errorf("newest first: %+v", list)
	}
	if l := into[[]api.AuditEntry](w.as(foreignKey, "GET /v0/audit", nil).is(200)); len(l) != 0 {
		t.Errorf("another workspace's entries: %+v", l)
	}
	if l := into[[]api.AuditEntry](w.as(nodeKey, "GET /v0/audit?limit=5000", nil).is(200)); len(l) != len(w.audit.entries) {
		t.Errorf("%d of %d", len(l), len(w.audit.entries))
	}
	w.request("GET /v0/audit?limit=0", nil).refused(400, "INVALID_REQUEST", "limit")
	w.audit.fail = errors.New("disk full")
	w.create("y") // what is done is done
	if !strings.Contains(w.log.String(), "audit entry not written") {
		t.Error("nobody is told that the audit log fails")
	}
}

// panicking is an engine with a bug.
type panicking struct{ api.Engine }

func (panicking) Volume(string, string) (engine.Volume, error) { panic("a bug") }

func TestPanicIsAnAnswer(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Engine = panicking{o.Engine} })
	w.request("GET /v0/volumes/x", nil).refused(500, "INTERNAL_ERROR", "internal error")
	if log := w.log.String(); !strings.Contains(log, "a bug") || !strings.Contains(log, "serve_test.go") {
		t.Error("the log has no stack")
	}
	w.request("GET /v0/volumes", nil).is(200)
}

func TestDraining(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	send(t, w.handler, "GET /readyz", nil).is(200)
	w.server.Drain()
	r := w.request("POST /v0/volumes", newVolume("y", nil)).refused(503, "SERVICE_UNAVAILABLE", "")
	if r.Header.Get("Connection") != "close" || r.Header.Get("Retry-After") == "" {
		t.Errorf("%+v", r.Header)
	}
	w.request("DELETE /v0/volumes/x", nil).is(503)
	w.request("GET /v0/volumes/x", nil).is(200)
	send(t, w.handler, "GET /readyz", nil).is(503)
	send(t, w.handler, "GET /healthz", nil).is(200)
}

func TestReadiness(t *testing.T) {
	var why error
	w := newWorld(t, func(o *api.Options) { o.Ready = func(context.Context) error { return why } })
	send(t, w.handler, "GET /readyz", nil).is(200)
	why = errors.New("the pool is gone")
	send(t, w.handler, "GET /readyz", nil).refused(503, "SERVICE_UNAVAILABLE", "the pool is gone")
}

func TestMetrics(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	w.request("GET /v0/volumes/none", nil).is(404)
	w.request("BREW /v0/volumes", nil).is(405)
	w.request("GET /nowhere/at/all", nil).is(404)
	text := string(send(t, w.handler, "GET /metrics", nil).is(200).Body)
	for _, line := range []string{
		`holdfast_http_request_duration_seconds_count{method="POST",route="/v0/volumes",status="2xx"} 1`,
		`holdfast_http_request_duration_seconds_count{method="GET",route="/v0/volumes/{name}",status="4xx"} 1`,
		`holdfast_http_request_duration_seconds_count{method="other",route="unmatched",status="4xx"} 1`,
		`holdfast_http_errors_total{error="NOT_FOUND"} 2`,
	} {
		if !strings.Contains(text, line) {
			t.Errorf("no %s in:\n%s", line, text)
		}
	}
	hidden := newWorld(t, func(o *api.Options) { o.LocalMetricsOnly = true })
	send(t, hidden.handler, "GET /metrics", nil).refused(404, "NOT_FOUND", "")
	send(t, hidden.local, "GET /metrics", nil).is(200)
}

// slow is an engine that does not finish while its caller waits.
type slow struct{ api.Engine }

func (slow) DeleteVolume(ctx context.Context, _, _, _ string) (engine.Volume, error) {
	<-ctx.Done()
	return engine.Volume{}, ctx.Err()
}

func TestRequestTimeout(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Engine, o.Limits.Request = slow{o.Engine}, 10*time.Millisecond })
	w.request("DELETE /v0/volumes/x", nil).refused(504, "TIMEOUT", "may still finish")
}

// listen serves the world over TCP without the checks of apitest, which read whole bodies.
func (w *world) listen() string {
	w.t.Helper()
	s := httptest.NewUnstartedServer(nil)
	s.Config = api.HTTPServer(w.server.Handler(), w.options.Limits)
	s.Start()
	w.t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// talk sends the beginning of a request and reads the answer.
func talk(t testing.TB, addr, raw string) (*http.Response, string) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	if _, err := io.WriteString(c, raw); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

func TestBodiesThatNeverCome(t *testing.T) {
	w := newWorld(t, func(o *api.Options) {
		o.Limits.Request, o.Limits.TransferIdle = time.Second, time.Second
	})
	target := w.request("PUT /v0/volume_templates/demo?upload=true", `{}`).Header.Get("X-Blaxel-Upload-Url")
	addr := w.listen()
	path := target[strings.Index(target, "/uploads"):]
	resp, body := talk(t, addr, "PUT "+path+" HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
	if resp.StatusCode != 400 || !strings.Contains(body, "ARCHIVE_REFUSED") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	resp, body = talk(t, addr, "POST /v0/volumes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "+adminKey+"\r\nContent-Length: 100\r\n\r\n{\"metadata\":")
	if resp.StatusCode != 400 || !strings.Contains(body, "broke off") || !resp.Close {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

// TestConnectionOutlivesDeadlines: the deadlines of one request must not hit the
// next one on the same connection.
func TestConnectionOutlivesDeadlines(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.Request = time.Second })
	c, err := net.Dial("tcp", w.listen())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	in := bufio.NewReader(c)
	body := `{"spec":{"size":0}}` // refused before the engine is asked
	for i := range 3 {
		if i > 0 {
			time.Sleep(1200 * time.Millisecond) // longer than the deadlines of the request before
		}
		fmt.Fprintf(c, "POST /v0/volumes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s", adminKey, len(body), body)
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 400 {
			t.Fatalf("request %d: %d, %v", i, resp.StatusCode, err)
		}
	}
}

// TestContextLivesWhileArchiveIsBuilt: the deadline of the last read must not
// end a request that works on after it.
func TestContextLivesWhileArchiveIsBuilt(t *testing.T) {
	w := newWorld(t, func(o *api.Options) {
		o.Limits.Request, o.Limits.TransferIdle = time.Second, time.Second
	})
	b := &builder{Library: w.shelf, reached: make(chan struct{}), ended: make(chan error, 1)}
	w.options.Library = b
	var err error
	if w.server, err = api.New(w.options); err != nil {
		t.Fatal(err)
	}
	addr := w.listen()
	resp, body := talk(t, addr, "PUT /uploads/x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nfull")
	if err := <-b.ended; err != nil {
		t.Errorf("the request ended while its archive was being built: %v", err)
	}
	if resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

// builder reads an archive and works for several idle times before it is READY.
type builder struct {
	api.Library
	reached chan struct{}
	ended   chan error
}

func (b *builder) Ingest(ctx context.Context, _ templates.Upload, _ int64, body io.Reader) (templates.Revision, error) {
	if _, err := io.Copy(io.Discard, body); err != nil {
		return templates.Revision{}, err
	}
	select {
	case <-ctx.Done():
		b.ended <- ctx.Err()
	case <-time.After(2 * time.Second): // twice as long as any deadline
		b.ended <- nil
	}
	return templates.Revision{Name: "1", Template: "t", Status: templates.Ready}, nil
}

func TestConcurrentUploads(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.Uploads, o.Limits.UploadWait = 1, 10*time.Millisecond })
	w.shelf.hold = make(chan struct{})
	start := func() string {
		return w.request("PUT /v0/volume_templates/demo?upload=true", `{}`).is(200).Header.Get("X-Blaxel-Upload-Url")
	}
	first, second := start(), start()
	done := make(chan reply)
	go func() {
		done <- send(t, w.handler, "PUT "+first, "archive", "Content-Type: application/x-tar")
	}()
	<-w.shelf.begun
	r := send(t, w.handler, "PUT "+second, "archive", "Content-Type: application/x-tar").refused(429, "TOO_MANY_REQUESTS", "uploads")
	if r.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	close(w.shelf.hold)
	(<-done).is(200)
	send(t, w.handler, "PUT "+second, "archive", "Content-Type: application/x-tar").is(200)
}

func TestUploadURLBase(t *testing.T) {
	for _, c := range []struct{ public, host, want string }{
		{"", "holdfast.example:8443", "http://holdfast.example:8443/uploads/"},
		{"https://volumes.example/", "10.0.0.1", "https://volumes.example/uploads/"},
	} {
		w := newWorld(t, func(o *api.Options) { o.PublicURL = c.public })
		req := httptest.NewRequest("PUT", "/v0/volume_templates/t?upload=true", strings.NewReader("{}"))
		req.Host = c.host
		req.Header.Set("Authorization", "Bearer "+adminKey)
		rec := httptest.NewRecorder()
		w.server.Handler().ServeHTTP(rec, req)
		if got := rec.Header().Get("X-Blaxel-Upload-Url"); !strings.HasPrefix(got, c.want) {
			t.Errorf("%q, want %s...", got, c.want)
		}
	}
	w := newWorld(t)
	s := httptest.NewTLSServer(w.server.Handler())
	defer s.Close()
	client := s.Client()
	client.Transport = apitest.RoundTripper(t, client.Transport)
	req, err := http.NewRequest("PUT", s.URL+"/v0/volume_templates/t?upload=true", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+adminKey)
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if got := resp.Header.Get("X-Blaxel-Upload-Url"); !strings.HasPrefix(got, s.URL+"/uploads/") {
		t.Errorf("over TLS: %q", got)
	}
}

func TestFiles(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	w.fs.files = map[string]string{"/a.txt": "hello", "/sub/empty": "", "/sub/b\xff": "odd", "/sub/it's \"é\".html": "<script>"}
	list := into[api.FileList](w.request("GET /v0/volumes/x/files", nil).is(200))
	if len(list.Entries) != 1 || list.Entries[0].Name != "a.txt" || list.Entries[0].Mode != "4644" || list.Entries[0].Size != 5 || list.Path != "/" {
		t.Errorf("%+v", list)
	}
	for _, e := range into[api.FileList](w.request("GET /v0/volumes/x/files?path=/sub/", nil).is(200)).Entries {
		if strings.HasPrefix(e.Name, "b") && (e.Name != "b\uFFFD" || string(e.Bytes) != "b\xff") {
			t.Errorf("a name that is not UTF-8: %+v", e)
		}
	}
	r := w.request("GET /v0/volumes/x/files/content?path=/a.txt", nil).is(200)
	if string(r.Body) != "hello" || r.Header.Get("Content-Type") != "application/octet-stream" || r.Header.Get("X-Content-Type-Options") != "nosniff" ||
		r.Header.Get("Content-Disposition") != `attachment; filename=a.txt` {
		t.Errorf("%s %+v", r.Body, r.Header)
	}
	if r := w.request("GET /v0/volumes/x/files/content?path=/sub/empty", nil).is(200); len(r.Body) != 0 || r.Header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("%q %+v", r.Body, r.Header)
	}
	if r := w.request("GET /v0/volumes/x/files/content?path=/sub/it%27s%20%22%C3%A9%22.html", nil).is(200); !strings.HasPrefix(r.Header.Get("Content-Disposition"), "attachment; filename*=utf-8''") {
		t.Errorf("%+v", r.Header)
	}
	if r := w.request("GET /v0/volumes/x/files/content?path=/sub/b%FF", nil).is(200); string(r.Body) != "odd" || !strings.HasPrefix(r.Header.Get("Content-Disposition"), "attachment") {
		t.Errorf("%q %+v", r.Body, r.Header)
	}
	w.request("GET /v0/volumes/x/files/content?path=/none", nil).refused(404, "NOT_FOUND", "/none")
	w.request("GET /v0/volumes/x/files?path=/none", nil).refused(404, "NOT_FOUND", "/none")
	for _, bad := range []string{"a.txt", "/../etc", "/a/../b", "//a", "/a/./b", "/a%00b", "/" + strings.Repeat("a", 4096)} {
		w.request("GET /v0/volumes/x/files?path="+bad, nil).refused(400, "INVALID_REQUEST", "path")
		w.request("GET /v0/volumes/x/files/content?path="+bad, nil).refused(400, "INVALID_REQUEST", "path")
	}
	w.request("GET /v0/volumes/x/files/content", nil).refused(400, "INVALID_REQUEST", "path")
	w.request("POST /v0/volumes/x/attachments", attachTo("sandbox:s", "/srv/a")).is(200)
	w.request("GET /v0/volumes/x/files", nil).refused(409, "VOLUME_ATTACHED", "sandbox:s")
}

// TestDownloadThatBreaksOff: half a file must not look like a whole one.
func TestDownloadThatBreaksOff(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	w.fs.files = map[string]string{"/a": "first half"}
	w.fs.fail = errors.New("read error")
	req, err := http.NewRequest("GET", "http://"+w.listen()+"/v0/volumes/x/files/content?path=/a", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+adminKey)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return // cut before the header was sent
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("status %d and %q without an error", resp.StatusCode, body)
	}
}

func TestAttachments(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	base := "/v0/volumes/x/attachments"
	first := w.request("POST "+base, attachTo("sandbox:a", "/srv/a")).is(200)
	a := into[api.Attachment](first)
	if a.Phase != "attached" || a.Epoch != 1 || a.Kind != "block" || a.Socket != "" || a.Target.Path != "/srv/a" || a.CreatedBy != "ann" {
		t.Errorf("%+v", a)
	}
	if again := w.request("POST "+base, attachTo("sandbox:a", "/srv/a")).is(200); string(again.Body) != string(first.Body) {
		t.Errorf("the same request twice: %s, %s", first.Body, again.Body)
	}
	w.request("POST "+base, attachTo("sandbox:b", "/srv/b")).refused(409, "VOLUME_ATTACHED", "sandbox:a")
	if l := into[[]api.Attachment](w.request("GET "+base, nil).is(200)); len(l) != 1 || l[0].ID != a.ID {
		t.Errorf("%+v", l)
	}
	w.request("GET "+base+"/"+a.ID, nil).is(200)
	w.request("GET "+base+"/none", nil).refused(404, "NOT_FOUND", "none")
	w.request("DELETE "+base+"/none", nil).refused(404, "NOT_FOUND", "none")
	w.request("DELETE "+base+"/"+a.ID, nil).is(200)
	w.request("DELETE "+base+"/"+a.ID, nil).is(404)
	for body, part := range map[string]string{
		`{"holder":"nobody","target":{"type":"host","path":"/srv/a"}}`:   "holder",
		`{"holder":"sandbox:a","target":{"type":"ssh","path":"/srv/a"}}`: "target.type",
		`{"holder":"sandbox:a","target":{"type":5}}`:                     "target.type",
		`{"holder":"sandbox:a"}`:                                         "target",
	} {
		w.request("POST "+base, body).refused(400, "INVALID_REQUEST", part)
	}
	if r := w.request("POST "+base, `{"holder":"sandbox:a","target":{"type":"host"}}`); r.Code != 400 || r.Header.Get("X-Should-Retry") != "false" {
		t.Errorf("%d %s", r.Code, r.Body)
	}
	for i := range 3 {
		body := attachTo(fmt.Sprintf("sandbox:r%d", i), fmt.Sprintf("/srv/r%d", i))
		body["readOnly"] = true
		w.request("POST "+base, body).is(200)
	}
	if v := into[api.Volume](w.request("GET /v0/volumes/x", nil).is(200)); len(v.State.Attachments) != 3 || v.State.AttachedTo != "sandbox:r0" {
		t.Errorf("many readers: %+v", v.State)
	}
}
