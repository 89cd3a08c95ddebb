package client

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// recorded is what a server saw.
type recorded struct {
	method, uri, body string
	header            http.Header
}

// serve answers every request with status and body, and tells what came.
func serve(t *testing.T, status int, body string) (*Client, func() recorded) {
	t.Helper()
	var last recorded
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		last = recorded{r.Method, r.RequestURI, string(b), r.Header}
		w.Header().Set("X-Request-Id", "req-1")
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	c, err := New(Options{URL: s.URL + "/v0/", Key: "hf_secret", Workspace: "main"})
	must(t, err)
	t.Cleanup(c.Close)
	return c, func() recorded { return last }
}

func TestRefusalsAreTyped(t *testing.T) {
	for _, c := range []struct {
		status        int
		body          string
		code, message string
	}{
		{409, `{"code":409,"error":"VOLUME_ATTACHED","message":"held by sandbox:web"}`, "VOLUME_ATTACHED", "held by sandbox:web"},
		{502, `<html>bad gateway</html>`, "Bad Gateway", ""},
		{404, `{"error":{"code":"WORKLOAD_NOT_FOUND"}}`, "Not Found", ""},
	} {
		cl, _ := serve(t, c.status, c.body)
		_, err := cl.Volume(t.Context(), "data")
		var e *Error
		if !errors.As(err, &e) || e.Status != c.status || e.Code != c.code || e.Message != c.message || e.RequestID != "req-1" {
			t.Errorf("%d %s: got %#v", c.status, c.body, err)
		}
		if err.Error() == "" || Status(err) != c.status {
			t.Errorf("%d: message %q, status %d", c.status, err, Status(err))
		}
	}
}

func TestRequestSaysWhoAsksForWhat(t *testing.T) {
	cl, last := serve(t, 200, `{}`)
	size := int64(2048)
	_, err := cl.UpdateVolume(t.Context(), "data", VolumeChange{SizeMiB: &size, Labels: map[string]string{}})
	must(t, err)
	got := last()
	if got.method != "PUT" || got.uri != "/v0/volumes/data" || got.body != `{"metadata":{"labels":{}},"spec":{"size":2048}}` {
		t.Errorf("sent %s %s %s", got.method, got.uri, got.body)
	}
	for k, want := range map[string]string{
		"Authorization": "Bearer hf_secret", "X-Blaxel-Workspace": "main", "Blaxel-Version": Version, "Content-Type": "application/json",
	} {
		if v := got.header.Get(k); v != want {
			t.Errorf("%s: %q, want %q", k, v, want)
		}
	}
}

func TestNamesStayInTheirPlace(t *testing.T) {
	cl, last := serve(t, 200, `{}`)
	for name, want := range map[string]string{
		"a/b": "/v0/volumes/a%2Fb", "..": "/v0/volumes/%2E%2E", ".": "/v0/volumes/%2E", "a?b#c": "/v0/volumes/a%3Fb%23c", "é": "/v0/volumes/%C3%A9",
	} {
		_, err := cl.Volume(t.Context(), name)
		must(t, err)
		if got := last().uri; got != want {
			t.Errorf("%q: asked for %s, want %s", name, got, want)
		}
	}
	if _, err := cl.Volume(t.Context(), ""); err == nil {
		t.Error("an empty name asked for the whole list")
	}
}

func TestAllPagesAreWalked(t *testing.T) {
	pages := map[string]string{
		"":   `{"data":[{"metadata":{"name":"a"}},{"metadata":{"name":"b"}}],"meta":{"hasMore":true,"nextCursor":"c1"}}`,
		"c1": `{"data":[{"metadata":{"name":"c"}}],"meta":{"hasMore":false,"nextCursor":""}}`,
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("sort") != "name:asc" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		_, _ = io.WriteString(w, pages[r.URL.Query().Get("cursor")])
	}))
	defer s.Close()
	cl, err := New(Options{URL: s.URL})
	must(t, err)
	var names string
	for v, err := range cl.Volumes(t.Context(), VolumeQuery{Sort: "name:asc"}) {
		must(t, err)
		names += v.Metadata.Name
	}
	if names != "abc" {
		t.Errorf("walked %q", names)
	}
}

// TestPushOverSocket: the upload goes to the socket whatever host the server
// put into its URL, without a key, with its exact length, and is counted.
func TestPushOverSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	must(t, err)
	var uploaded recorded
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		switch {
		case r.Method == "PUT" && r.URL.Path == "/v0/volume_templates/t" && r.URL.RawQuery == "upload=true&version=v1":
			w.Header().Set("X-Blaxel-Upload-Url", "https://elsewhere.example:9/uploads/u1?signature=s")
		case r.Method == "PUT" && r.URL.Path == "/uploads/u1":
			uploaded = recorded{r.Method, r.RequestURI, string(b), r.Header.Clone()}
			if r.ContentLength != 5 {
				w.WriteHeader(http.StatusBadRequest)
			}
		}
		_, _ = io.WriteString(w, `{"metadata":{"name":"t"},"state":{"latestVersion":"1"}}`)
	})
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}} //nolint:gosec // a test
	s.Start()
	defer s.Close()
	cl, err := New(Options{Socket: socket, Workspace: "main"})
	must(t, err)
	var counted int64
	got, err := cl.PushTemplate(t.Context(), Push{Name: "t", Version: "v1", Archive: strings.NewReader("hello"), Length: 5,
		Progress: func(n int64) { counted = n }})
	must(t, err)
	if got.State.LatestVersion != "1" || counted != 5 || uploaded.body != "hello" || uploaded.uri != "/uploads/u1?signature=s" {
		t.Errorf("got %+v, counted %d, uploaded %+v", got, counted, uploaded)
	}
	if a := uploaded.header.Get("Authorization"); a != "" {
		t.Errorf("the upload carried credentials: %q", a)
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for _, o := range []Options{{}, {URL: "http://x", Socket: "/y"}, {URL: "ftp://x"}, {URL: "::"}, {URL: "localhost:80"}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
}

func TestCancelledContext(t *testing.T) {
	cl, _ := serve(t, 200, `{}`)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := cl.Volume(ctx, "x"); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}
