package apitest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"holdfast/api"
)

// Handler wraps h: every request and answer that passes is held against the
// document, and t fails when
//   - an answer is not one that the document describes, down to its last field,
//   - a request that the document forbids is not refused with a 4xx,
//   - a path that the document does not have is not a 404 or 405.
//
// Bodies are kept in memory.
func Handler(t testing.TB, h http.Handler) http.Handler {
	t.Helper()
	router := documented(t)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		broken := err != nil // a client that stopped in the middle
		r.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body), &failing{err}))
		got := httptest.NewRecorder()
		h.ServeHTTP(got, r)
		if !broken {
			check(t, router, r, body, got.Result())
		}
		for k, v := range got.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(got.Code)
		_, _ = w.Write(got.Body.Bytes())
	})
}

// failing ends a body as the original did.
type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	return 0, io.EOF
}

// RoundTripper wraps base (nil: http.DefaultTransport) like Handler does, for
// tests that talk to a server over the network. Bodies are kept in memory.
func RoundTripper(t testing.TB, base http.RoundTripper) http.RoundTripper {
	t.Helper()
	if base == nil {
		base = http.DefaultTransport
	}
	return &roundTripper{t, base, documented(t)}
}

type roundTripper struct {
	t      testing.TB
	base   http.RoundTripper
	router routers.Router
}

func (rt *roundTripper) RoundTrip(r *http.Request) (*http.Response, error) {
	var body []byte
	if r.Body != nil {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		_ = r.Body.Close()
		body, r.Body = b, io.NopCloser(bytes.NewReader(b))
	}
	resp, err := rt.base.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	_ = resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(answer))
	check(rt.t, rt.router, r, body, resp)
	resp.Body = io.NopCloser(bytes.NewReader(answer))
	return resp, nil
}

var (
	once   sync.Once
	loaded routers.Router
	broken error
)

// documented loads the document once; it must itself be valid.
func documented(t testing.TB) routers.Router {
	t.Helper()
	once.Do(func() {
		var doc *openapi3.T
		if doc, broken = openapi3.NewLoader().LoadFromData(api.OpenAPI()); broken != nil {
			return
		}
		if broken = doc.Validate(context.Background()); broken != nil {
			return
		}
		openapi3filter.RegisterBodyDecoder("application/x-tar", openapi3filter.FileBodyDecoder)
		openapi3filter.RegisterBodyDecoder("text/html", openapi3filter.FileBodyDecoder)
		loaded, broken = gorillamux.NewRouter(doc)
	})
	if broken != nil {
		t.Fatalf("OpenAPI document: %v", broken)
	}
	return loaded
}

func check(t testing.TB, router routers.Router, r *http.Request, body []byte, resp *http.Response) {
	t.Helper()
	what := fmt.Sprintf("%s %s answered %d", r.Method, r.URL, resp.StatusCode)
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("%s: body: %v", what, err)
		return
	}
	route, params, err := router.FindRoute(r)
	if err != nil {
		if resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s: the document has no such operation: %v", what, err)
		}
		return
	}
	asked := r.Clone(context.Background())
	asked.Body = io.NopCloser(bytes.NewReader(body))
	options := &openapi3filter.Options{
		MultiError: true, IncludeResponseStatus: true, AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, SkipSettingDefaults: true,
	}
	in := &openapi3filter.RequestValidationInput{Request: asked, PathParams: params, Route: route, Options: options}
	if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil && resp.StatusCode < 400 {
		t.Errorf("%s: the document forbids the request: %v\n%s", what, err, clip(body))
	}
	if r.Method == http.MethodHead {
		return
	}
	out := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: resp.StatusCode, Header: resp.Header, Body: io.NopCloser(bytes.NewReader(answer)), Options: options,
	}
	if err := openapi3filter.ValidateResponse(context.Background(), out); err != nil {
		t.Errorf("%s: the document does not describe the answer: %v\n%s", what, err, clip(answer))
	}
}

func clip(b []byte) []byte { return b[:min(len(b), 2000)] }
