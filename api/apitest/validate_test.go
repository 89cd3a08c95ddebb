package apitest

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// spy counts what a test would have failed with.
type spy struct {
	testing.TB
	errors []string
}

func (s *spy) Errorf(format string, args ...any) {
	s.errors = append(s.errors, fmt.Sprintf(format, args...))
}

type finding struct {
	name, line, body   string // of the request
	status             int
	contentType, reply string
	wrong              string // part of what is found; empty: all is well
}

func (c finding) judge(t *testing.T, s *spy) {
	t.Helper()
	found := strings.Join(s.errors, "\n")
	if (c.wrong == "") != (found == "") || !strings.Contains(found, c.wrong) {
		t.Errorf("found %q, want %q", found, c.wrong)
	}
}

// TestCheckFindsWhatIsWrong: a check that cannot fail proves nothing.
func TestCheckFindsWhatIsWrong(t *testing.T) {
	const (
		jsonType = "application/json"
		health   = `{"status":"ok"}`
		refusal  = `{"code":404,"error":"NOT_FOUND","message":"m"}`
	)
	for _, c := range []finding{
		{"fine", "GET /healthz", "", 200, jsonType, health, ""},
		{"undocumented field", "GET /healthz", "", 200, jsonType, `{"status":"ok","secret":1}`, "does not describe the answer"},
		{"missing field", "GET /healthz", "", 200, jsonType, `{}`, "does not describe the answer"},
		{"wrong type", "GET /healthz", "", 200, jsonType, `{"status":200}`, "does not describe the answer"},
		{"wrong content type", "GET /healthz", "", 200, "text/html", health, "does not describe the answer"},
		{"not JSON", "GET /healthz", "", 200, jsonType, `ok`, "does not describe the answer"},
		{"undocumented status", "GET /healthz", "", 201, jsonType, health, "does not describe the answer"},
		{"refusal", "GET /v0/volumes/x", "", 404, jsonType, refusal, ""},
		{"error without its word", "GET /v0/volumes/x", "", 404, jsonType, `{"code":404,"message":"m"}`, "does not describe the answer"},
		{"code as text", "GET /v0/volumes/x", "", 404, jsonType, `{"code":"404","error":"e","message":"m"}`, "does not describe the answer"},
		{"unknown path", "GET /nowhere", "", 404, jsonType, refusal, ""},
		{"unknown path answered", "GET /nowhere", "", 200, jsonType, health, "no such operation"},
		{"forbidden request taken", "POST /v0/workspaces", `{"name":"UPPER"}`, 200, jsonType, health, "forbids the request"},
		{"forbidden parameter taken", "GET /v0/audit?limit=0", "", 200, jsonType, `[]`, "forbids the request"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if got, err := io.ReadAll(r.Body); err != nil || string(got) != c.body {
					t.Errorf("the handler got %q, %v", got, err)
				}
				w.Header().Set("Content-Type", c.contentType)
				w.Header().Set("X-Request-Id", "1")
				w.Header().Set("X-Should-Retry", "false")
				w.WriteHeader(c.status)
				_, _ = io.WriteString(w, c.reply)
			})
			method, target, _ := strings.Cut(c.line, " ")
			request := func(url string) *http.Request {
				r := httptest.NewRequest(method, url+target, strings.NewReader(c.body))
				r.Header.Set("Content-Type", jsonType)
				r.RequestURI = ""
				return r
			}
			inside := &spy{TB: t}
			rec := httptest.NewRecorder()
			Handler(inside, h).ServeHTTP(rec, request(""))
			if rec.Code != c.status || rec.Body.String() != c.reply {
				t.Errorf("the answer was changed: %d %s", rec.Code, rec.Body)
			}
			c.judge(t, inside)

			server := httptest.NewServer(h)
			defer server.Close()
			outside := &spy{TB: t}
			resp, err := (&http.Client{Transport: RoundTripper(outside, nil)}).Do(request(server.URL))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err != nil || string(got) != c.reply {
				t.Errorf("the answer was changed: %s, %v", got, err)
			}
			c.judge(t, outside)
		})
	}
}
