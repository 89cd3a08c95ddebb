package api_test

import (
	"net/http/httptest"
	"strings"
	"testing"
)

// fuzz sends raw requests past the document's checks; only the status counts:
// nothing that a client can write is our error.
func fuzz(f *testing.F, method, target, version string, answers ...int) {
	w := newWorld(f)
	h := w.server.Handler()
	f.Fuzz(func(t *testing.T, text string) {
		path, body := target, ""
		if method == "GET" {
			path += text
		} else {
			body = text
		}
		req := httptest.NewRequest(method, target, strings.NewReader(body))
		req.URL.RawQuery = strings.TrimPrefix(path, target)
		req.Header.Set("Authorization", "Bearer "+adminKey)
		req.Header.Set("Blaxel-Version", version)
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, req)
		for _, a := range answers {
			if rec.Code == a {
				return
			}
		}
		t.Fatalf("%q: %d %s", text, rec.Code, rec.Body)
	})
}

func FuzzListQuery(f *testing.F) {
	for _, seed := range []string{
		"limit=1&cursor=AAAA", "q=%zz", "label=a=b&label=a=c", "status=deployed,,x", "sort=name:asc&anchor=end", "limit=99999999999999999999",
		"cursor=" + strings.Repeat("A", 100), "q=\x00\xff", ";", "workspace=main&workspace=main", "externalId=%00", "limit=-0", "q=ſK",
	} {
		f.Add(seed)
	}
	fuzz(f, "GET", "/v0/volumes", "2026-04-28", 200, 400, 403)
}

func FuzzVolumeBody(f *testing.F) {
	for _, seed := range []string{
		`{"metadata":{"name":"a"},"spec":{"size":1}}`, `{"spec":{"size":1e999}}`, `{"spec":{"size":-0}}`, `{"metadata":{"labels":{"":""}}}`,
		"{\"metadata\":{\"name\":\"\xff\"}}", `{"spec":{"size":"\u0000"}}`, `{"METADATA":{"NAME":"b"}}`, `{"metadata":{"name":"c","name":"d"}}`, `{"spec":{"size": 1 }}`, "\ufeff{}",
		`{"spec":{"template":":"}}`, `{"spec":{"size":9223372036854775807}}`, `{"spec":{"size":01}}`,
	} {
		f.Add(seed)
	}
	fuzz(f, "PUT", "/v0/volumes/missing", "2026-04-28", 400, 404, 413)
}

func FuzzFilePath(f *testing.F) {
	for _, seed := range []string{"path=/", "path=/../..", "path=%00", "path=/%ff", "path=/a//b", "path=" + strings.Repeat("/a", 3000)} {
		f.Add(seed)
	}
	fuzz(f, "GET", "/v0/volumes/missing/files", "2026-04-28", 400, 403, 404)
}
