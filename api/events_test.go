package api_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"holdfast/api"
)

func (w *world) events(key, query string) api.EventList {
	w.t.Helper()
	r := w.as(key, "GET /v0/events"+query, nil)
	if r.Code != http.StatusOK {
		w.t.Fatalf("events%s: %d %s", query, r.Code, r.Body)
	}
	var list api.EventList
	if err := json.Unmarshal(r.Body, &list); err != nil {
		w.t.Fatal(err)
	}
	return list
}

func TestEvents(t *testing.T) {
	w := newWorld(t)
	if r := w.as(writerKey, "POST /v0/volumes", `{"metadata":{"name":"one"},"spec":{"size":8}}`); r.Code != 200 {
		t.Fatal(r.Code, r.Body)
	}
	first := w.events(readerKey, "")
	if len(first.Data) != 1 || first.Data[0].Volume != "one" || first.Data[0].Type != "deployment" || first.Lost {
		t.Fatalf("after a create: %+v", first)
	}
	if none := w.events(readerKey, "?after="+first.Next); len(none.Data) != 0 || none.Next != first.Next {
		t.Errorf("nothing has happened since: %+v", none)
	}
	if foreign := w.events(foreignKey, ""); len(foreign.Data) != 0 {
		t.Errorf("another workspace sees %+v", foreign.Data)
	}

	came := make(chan api.EventList, 1)
	go func() { came <- w.events(readerKey, "?wait=30&after="+first.Next) }()
	if r := w.as(writerKey, "PUT /v0/volumes/one", `{"spec":{"size":16}}`); r.Code != 200 {
		t.Fatal(r.Code, r.Body)
	}
	if next := <-came; len(next.Data) != 1 || next.Data[0].Type != "resize" {
		t.Errorf("a waiting request got %+v", next)
	}
	if r := w.as(writerKey, "DELETE /v0/volumes/one", nil); r.Code != 200 {
		t.Fatal(r.Code, r.Body)
	}
	all := w.events(nodeKey, "?limit=2")
	if len(all.Data) != 2 || all.Data[0].Type != "resize" || all.Data[1].Type != "deletion" || all.Data[1].Workspace != "main" {
		t.Errorf("the two newest of all workspaces: %+v", all)
	}
	if cut := w.events(readerKey, "?limit=1&after="+first.Next); len(cut.Data) != 1 || !cut.Lost {
		t.Errorf("one of two: %+v", cut)
	}
	for _, query := range []string{"?after=x", "?after=-1", "?limit=0", "?wait=x", "?wait=-1"} {
		if r := w.as(readerKey, "GET /v0/events"+query, nil); r.Code != 400 {
			t.Errorf("%s: %d", query, r.Code)
		}
	}
}

// TestEventsEndWithTheServer: who waits for events is in nobody's way.
func TestEventsEndWithTheServer(t *testing.T) {
	w := newWorld(t)
	done := make(chan api.EventList, 1)
	go func() { done <- w.events(readerKey, "?wait=30") }()
	w.server.Drain()
	if list := <-done; len(list.Data) != 0 {
		t.Errorf("%+v", list)
	}
}

func TestWhoAmI(t *testing.T) {
	w := newWorld(t)
	for key, want := range map[string]string{
		readerKey: `"role":"reader","workspace":"main","controlPlane":false`,
		nodeKey:   `"role":"admin","controlPlane":true`,
	} {
		if r := w.as(key, "GET /v0/whoami", nil); r.Code != 200 || !strings.Contains(string(r.Body), want) {
			t.Errorf("%s: %d %s, want %s in it", key, r.Code, r.Body, want)
		}
	}
}

// TestPage: anybody gets it, and a browser lets it do nothing but ask this server.
func TestPage(t *testing.T) {
	w := newWorld(t)
	r := send(t, w.handler, "GET /ui", nil)
	policy := r.Header.Get("Content-Security-Policy")
	if r.Code != 200 || !strings.Contains(policy, "default-src 'none'") || strings.Contains(policy, "unsafe") {
		t.Errorf("%d, policy %q", r.Code, policy)
	}
	for _, never := range []string{"innerHTML", "outerHTML", "document.write", "insertAdjacentHTML", "eval(", "http://", "https://", "localStorage", "document.cookie", `style="`, "onclick="} {
		if strings.Contains(string(r.Body), never) {
			t.Errorf("the page has %q in it", never)
		}
	}
	if r := send(t, w.handler, "GET /ui", nil, "Accept-Encoding: gzip"); r.Header.Get("Content-Encoding") != "gzip" || len(r.Body) > 16<<10 {
		t.Errorf("packed: %d bytes, %q", len(r.Body), r.Header.Get("Content-Encoding"))
	}
}
