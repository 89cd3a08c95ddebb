package api_test

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/engine"
)

// toyBoxes answers lists and file requests; all else is not asked here.
type toyBoxes struct {
	api.Sandboxes

	all  []api.Sandbox
	read []string // paths that were asked for
}

func (b *toyBoxes) List(workspace string) []api.Sandbox {
	return slices.DeleteFunc(slices.Clone(b.all), func(s api.Sandbox) bool { return s.Metadata.Workspace != workspace })
}

func (b *toyBoxes) Look(_ context.Context, _, _, path string) (api.SandboxEntry, error) {
	b.read = append(b.read, path)
	return api.SandboxEntry{Dir: true}, nil
}

func (b *toyBoxes) WriteFile(_ context.Context, _, _, path, permissions string, from io.Reader) error {
	text, err := io.ReadAll(from)
	b.read = append(b.read, fmt.Sprintf("%s %s %s", path, permissions, text))
	return err
}

func (b *toyBoxes) Create(context.Context, api.NewSandbox, bool) (api.Sandbox, error) {
	return api.Sandbox{}, &engine.Problem{Kind: api.ErrSandboxCreating, Message: "Sandbox x is being created"}
}

func newBoxes(t *testing.T) (*world, *toyBoxes) {
	b := &toyBoxes{}
	for i, name := range []string{"beta", "alpha", "delta", "gamma"} {
		made := time.Date(2026, 11, 23, 12, 0, i/2, 0, time.UTC).Format(time.RFC3339Nano) // two at a time
		b.all = append(b.all, api.Sandbox{
			Metadata: api.SandboxMetadata{Metadata: api.Metadata{
				Name: name, Workspace: "main", CreatedAt: made, UpdatedAt: made, ExternalID: "ext-" + name, Labels: map[string]string{"n": fmt.Sprint(i), "team": "Red"},
			}},
			Events: []api.Event{}, Status: map[bool]string{true: "FAILED", false: "DEPLOYED"}[name == "delta"],
		})
	}
	b.all = append(b.all, api.Sandbox{Metadata: api.SandboxMetadata{Metadata: api.Metadata{Name: "foreign", Workspace: "other"}}, Events: []api.Event{}, Status: "DEPLOYED"})
	return newWorld(t, func(o *api.Options) { o.Sandboxes = b }), b
}

func TestSandboxPages(t *testing.T) {
	w, _ := newBoxes(t)
	for query, want := range map[string]string{
		"":                              "gamma delta beta alpha",
		"sort=createdAt:asc":            "alpha beta delta gamma",
		"sort=name:asc":                 "alpha beta delta gamma",
		"sort=name:desc":                "gamma delta beta alpha",
		"status=failed":                 "delta",
		"status=DEPLOYED&sort=name:asc": "alpha beta gamma",
		"q=eta":                         "beta",
		"q=red&sort=name:asc":           "alpha beta delta gamma",
		"externalId=ext-alpha":          "alpha",
		"label=n=3":                     "gamma",
		"label=n=9":                     "",
		"anchor=end&limit=1":            "alpha",
		"showTerminated=true&limit=500": "gamma delta beta alpha",
	} {
		for _, limit := range []string{"", "1", "3"} {
			if strings.Contains(query, "limit") && limit != "" {
				continue
			}
			var seen []string
			cursor := ""
			for range 10 {
				line := "GET /v0/sandboxes?" + query
				if limit != "" {
					line += "&limit=" + limit
				}
				if cursor != "" {
					line += "&cursor=" + cursor
				}
				l := into[api.SandboxList](w.request(line, nil).is(200))
				for _, s := range l.Data {
					seen = append(seen, s.Metadata.Name)
					if !strings.HasSuffix(s.Metadata.URL, "/v0/sandboxes/"+s.Metadata.Name+"/run") {
						t.Errorf("url %q", s.Metadata.URL)
					}
				}
				if l.Meta.Total != 4 || l.Meta.HasMore != (l.Meta.NextCursor != "") || limit == "1" && len(l.Data) > 1 {
					t.Errorf("%s: %+v", query, l.Meta)
				}
				if cursor = l.Meta.NextCursor; cursor == "" {
					break
				}
			}
			if got := strings.Join(seen, " "); got != want {
				t.Errorf("%s, limit %q: %q, want %q", query, limit, got, want)
			}
		}
	}
	l := into[api.SandboxList](w.request("GET /v0/sandboxes?limit=1", nil).is(200))
	for _, other := range []string{"sandboxes?limit=1&sort=name:asc", "sandboxes?q=be", "volumes?limit=1"} {
		mark := map[bool]string{true: "&", false: "?"}[strings.Contains(other, "?")]
		w.request("GET /v0/"+other+mark+"cursor="+l.Meta.NextCursor, nil).refused(400, "INVALID_CURSOR", "")
	}
	if all := into[[]api.Sandbox](w.request("GET /v0/sandboxes", nil, "Blaxel-Version: 2026-04-16").is(200)); len(all) != 4 {
		t.Errorf("%+v", all)
	}
}

// TestPathsOfFiles: one segment or many, with or without the leading slash, and
// never out of the sandbox or into another route.
func TestPathsOfFiles(t *testing.T) {
	w, b := newBoxes(t)
	for sent, want := range map[string]string{
		"%2Fdata%2Ff": "/data/f", "data": "/data", "%2F": "/", "": "/", "%2Fdata%2F..%2F..%2Fetc": "/etc", "..%2F..%2Fx": "/x",
		"%2Fa%20b%25%3F": "/a b%?", "%2Fcaf%C3%A9": "/café", "%252F": "/%2F", "process": "/process",
	} {
		b.read = nil
		w.request("GET /v0/sandboxes/alpha/run/filesystem/"+sent, nil)
		if len(b.read) != 1 || b.read[0] != want {
			t.Errorf("%q: asked for %q, want %q", sent, b.read, want)
		}
	}
	// As clients send it that do not encode; the document has no such path.
	for sent, want := range map[string]string{"/data/f": "/data/f", "data/f": "/data/f", "//data//f": "/data/f", "/data/../x": "/x", "/tree": "/tree"} {
		b.read = nil
		r := send(t, w.server.Handler(), "GET /v0/sandboxes/alpha/run/filesystem/"+sent, nil, "Authorization: Bearer "+adminKey)
		if r.Code != 200 || len(b.read) != 1 || b.read[0] != want {
			t.Errorf("%q: %d, asked for %q, want %q", sent, r.Code, b.read, want)
		}
	}
	for _, sent := range []string{"/v0/sandboxes/alpha/../volumes", "/v0//sandboxes/alpha/run/filesystem/x", "/v0/sandboxes/alpha/run/../process", "/v0/sandboxes//run/filesystem/x"} {
		b.read = nil
		if r := send(t, w.server.Handler(), "GET "+sent, nil, "Authorization: Bearer "+adminKey); r.Code != 404 || len(b.read) > 0 {
			t.Errorf("%q: %d, asked for %q", sent, r.Code, b.read)
		}
	}
	b.read = nil
	w.request("PUT /v0/sandboxes/alpha/run/filesystem/tree/%2Fd", `{"files":{"../../up":"1","a/b":"2"}}`).is(200)
	slices.Sort(b.read)
	if got := fmt.Sprint(b.read); got != "[/d /d/a/b  2 /d/up  1]" {
		t.Errorf("%s", got)
	}
	for _, bad := range []string{"8", "rwx", "77777", "-1", "0o644"} {
		w.request("PUT /v0/sandboxes/alpha/run/filesystem/%2Ff", map[string]string{"content": "", "permissions": bad}).refused(400, "INVALID_REQUEST", "permissions")
	}
	w.request("PUT /v0/sandboxes/alpha/run/filesystem/%2Ff", `{"content":"x","permissions":"4755"}`).is(200)
}

// TestSandboxFailure: POST has another shape of error, everything else the usual one.
func TestSandboxFailure(t *testing.T) {
	w, _ := newBoxes(t)
	r := w.request("POST /v0/sandboxes", `{"metadata":{"name":"x"}}`)
	f := into[api.SandboxFailure](r)
	if r.Code != 409 || f.Code != "SANDBOX_ALREADY_EXISTS" || f.StatusCode != 409 || f.Reason != "CREATION_IN_PROGRESS" || f.SandboxName != "x" || f.Workspace != "main" || f.Message == "" {
		t.Errorf("%d %s", r.Code, r.Body)
	}
	if r.Header.Get("X-Should-Retry") != "false" {
		t.Error("a Go client would repeat this")
	}
	for key, want := range map[string]int{readerKey: 403, "wrong": 401} {
		r := w.as(key, "POST /v0/sandboxes", `{}`)
		if f := into[api.SandboxFailure](r); r.Code != want || f.StatusCode != want || f.Code == "" {
			t.Errorf("%d %s", r.Code, r.Body)
		}
	}
	none := newWorld(t)
	if r := none.request("POST /v0/sandboxes", `{}`); r.Code != 404 || !strings.Contains(string(r.Body), "not enabled") {
		t.Errorf("%d %s", r.Code, r.Body)
	}
	none.request("GET /v0/sandboxes", nil).refused(404, "NOT_FOUND", "not enabled")
	none.request("GET /v0/sandboxes/x/run/process", nil).refused(404, "NOT_FOUND", "not enabled")
}

// TestFeatures: a client learns from them whether sandboxes can have ephemeral volumes.
func TestFeatures(t *testing.T) {
	without := newWorld(t)
	if f := into[api.FeaturesBody](without.request("GET /v0/features", nil).is(200)); len(f.Features) != 0 {
		t.Errorf("without sandboxes: %+v", f)
	}
	with, _ := newBoxes(t)
	if f := into[api.FeaturesBody](with.request("GET /v0/features", nil).is(200)); !f.Features["generation_mk31"] {
		t.Errorf("with sandboxes: %+v", f)
	}
}
