package api_test

import (
	"bufio"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"holdfast/api"
)

type diffBody struct {
	From, To                string
	Entries                 []api.DiffEntry
	Added, Removed, Changed int
}

func TestDiff(t *testing.T) {
	w := newWorld(t)
	w.push("app", 10)
	w.push("app", 20)
	w.shelf.diffs = 3
	d := into[diffBody](w.request("GET /v0/volume_templates/app/diff?from=1&to=2", nil).is(200))
	if d.From != "1" || d.To != "2" || d.Added != 1 || d.Removed != 1 || d.Changed != 1 || len(d.Entries) != 3 {
		t.Fatalf("%+v", d)
	}
	if e := d.Entries[0]; e.Action != "changed" || e.Changed[0] != "mode" || e.Before.Mode != "0644" || e.After.Mode != "4755" {
		t.Errorf("%+v", e)
	}
	if e := d.Entries[1]; e.Path != "odd\uFFFD" || string(e.Bytes) != "odd\xff" || e.After.Type != "symlink" || e.Before != nil {
		t.Errorf("%+v", e)
	}
	w.shelf.diffs = 0
	if d := into[diffBody](w.request("GET /v0/volume_templates/app/diff?from=1", nil).is(200)); d.Entries == nil || len(d.Entries) != 0 {
		t.Errorf("%+v", d)
	}
	w.request("GET /v0/volume_templates/app/diff", nil).refused(400, "INVALID_REQUEST", "from")
	w.request("GET /v0/volume_templates/app/diff?from=9", nil).refused(404, "NOT_FOUND", "")
	w.request("GET /v0/volume_templates/none/diff?from=1", nil).refused(404, "NOT_FOUND", "")
}

// Any number of entries passes through; an answer that fails in the middle is no JSON.
func TestLongDiff(t *testing.T) {
	w := newWorld(t)
	w.push("app", 10)
	w.push("app", 20)
	w.shelf.diffs = 100_000
	server := httptest.NewServer(w.server.Handler()) // as it is: the other one reads whole answers
	defer server.Close()
	get := func() (lines int, err error) {
		r, err := http.NewRequestWithContext(t.Context(), "GET", server.URL+"/v0/volume_templates/app/diff?from=1&to=2", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+adminKey)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		in := bufio.NewScanner(resp.Body)
		for in.Scan() {
			lines++
		}
		return lines, in.Err()
	}
	if n, err := get(); n != 100_002 || err != nil {
		t.Errorf("%d lines, %v", n, err)
	}
	w.shelf.diffFails = errors.New("the image cannot be read")
	if n, err := get(); n == 0 || err == nil {
		t.Errorf("%d lines, %v: half an answer looks whole", n, err)
	}
}

func TestArchive(t *testing.T) {
	w := newWorld(t)
	w.push("app", 10)
	r := w.request("GET /v0/volume_templates/app/archive?version=1", nil).is(200)
	if string(r.Body) != "app" || r.Header.Get("Content-Type") != "application/x-tar" || r.Header.Get("Content-Length") != "3" || r.Header.Get("X-Holdfast-Version") != "1" {
		t.Errorf("%s %v", r.Body, r.Header)
	}
	w.request("GET /v0/volume_templates/app/archive", nil).is(200)
	w.request("GET /v0/volume_templates/app/archive?version=7", nil).refused(404, "NOT_FOUND", "")
	w.request("GET /v0/volume_templates/none/archive", nil).refused(404, "NOT_FOUND", "")
}

func TestDelta(t *testing.T) {
	w := newWorld(t)
	r := w.request("PUT /v0/volume_templates/app?upload=true", object{}).is(200)
	if r.Header.Get("X-Holdfast-Upload-Delta") != "1" {
		t.Error("nobody learns of it")
	}
	_, rest, ok := strings.Cut(r.Header.Get("X-Blaxel-Upload-Url"), "/uploads/")
	id, query, _ := strings.Cut(rest, "?")
	if !ok {
		t.Fatal(rest)
	}
	binary := "Content-Type: application/octet-stream"
	ask := func(what, query string) reply {
		return send(t, w.handler, "POST /uploads/"+id+"/known?"+query, what, binary)
	}
	if k := into[api.KnownChunks](ask("query", query).is(200)); k.Same || string(k.Known) != "\x05" {
		t.Errorf("%+v", k)
	}
	if k := into[api.KnownChunks](ask("same", query).is(200)); !k.Same || k.Known == nil {
		t.Errorf("%+v", k)
	}
	ask("what", query).refused(400, "INVALID_REQUEST", "")
	ask("query", strings.Replace(query, "good", "bad", 1)).refused(400, "UPLOAD_URL_INVALID", "")
	w.shelf.lacks = true
	send(t, w.handler, "PUT /uploads/"+id+"/delta?"+query, "delta", binary).refused(409, "CHUNKS_MISSING", "")
	w.shelf.lacks = false
	v := into[api.TemplateVersion](send(t, w.handler, "PUT /uploads/"+id+"/delta?"+query, "delta", binary).is(200))
	if v.Status != "READY" {
		t.Errorf("%+v", v)
	}
	send(t, w.handler, "PUT /uploads/"+id+"/delta?"+query, "delta", binary).refused(400, "UPLOAD_URL_INVALID", "")
}
