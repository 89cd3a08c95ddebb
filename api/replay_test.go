package api_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api"
)

// replay sends requests of real clients byte for byte over TCP. Only what a
// client learns from earlier answers is filled in.
type replay struct {
	t    testing.TB
	addr string
	fill map[string]string // {{name}} -> value
}

const fakeKey = "bl_fakekey123"

func newReplay(t testing.TB) (*replay, *world) {
	w := newWorld(t)
	w.access.principals[fakeKey] = api.Principal{KeyID: "key-fake", Name: "fake", Role: api.Admin, Workspace: "main"}
	s := httptest.NewUnstartedServer(nil)
	s.Config = api.HTTPServer(w.handler, api.Limits{})
	s.Start()
	t.Cleanup(s.Close)
	addr := s.Listener.Addr().String()
	return &replay{t, addr, map[string]string{"host": addr}}, w
}

func (p *replay) send(name string) reply {
	p.t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", name+".http"))
	if err != nil {
		p.t.Fatal(err)
	}
	for k, v := range p.fill {
		raw = bytes.ReplaceAll(raw, []byte("{{"+k+"}}"), []byte(v))
	}
	if i := bytes.Index(raw, []byte("{{")); i >= 0 {
		p.t.Fatalf("%s: nothing known for %.20s", name, raw[i:])
	}
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	if _, err := c.Write(raw); err != nil {
		p.t.Fatal(err)
	}
	method, _, _ := strings.Cut(string(raw), " ")
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		p.t.Fatalf("%s: %v", name, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatalf("%s: %v", name, err)
	}
	if got := resp.Header.Get("Content-Type"); got != "application/json" {
		p.t.Errorf("%s: Content-Type %q: Go clients refuse it even on 200, TypeScript gets a stream", name, got)
	}
	return reply{p.t, name, resp.StatusCode, resp.Header, body}
}

func TestReplayTypeScript(t *testing.T) {
	p, _ := newReplay(t)
	for _, name := range []string{"ts-create", "ts-create-bare", "ts-create-unnamed"} {
		v := into[api.Volume](p.send(name).is(200))
		if v.Metadata.Workspace != "main" || v.Spec.Region != "us-pdx-1" || v.Spec.Size != 1024 {
			t.Errorf("%s: %+v", name, v)
		}
	}
	if !tsContinues(p.send("ts-create").is(409)) {
		t.Error("createIfNotExists would throw on the duplicate")
	}
	v := into[api.Volume](p.send("ts-get").is(200))
	grown := into[api.Volume](p.send("ts-update").is(200))
	if grown.Spec.Size != 2048 || grown.Metadata.CreatedAt != v.Metadata.CreatedAt || grown.Metadata.CreatedBy != "fake" {
		t.Errorf("update with echoed read-only fields: %+v", grown)
	}
	if l := into[api.VolumeList](p.send("ts-list").is(200)); len(l.Data) != 3 || l.Data[0].Metadata.Name != "volume-f4fe48c5" {
		t.Errorf("newest first: %+v", l)
	}
	first := into[api.VolumeList](p.send("ts-list-first").is(200))
	p.fill["cursor"] = first.Meta.NextCursor
	second := into[api.VolumeList](p.send("ts-list-next").is(200))
	if len(first.Data) != 1 || len(second.Data) != 1 || first.Data[0].Metadata.Name == second.Data[0].Metadata.Name || first.Meta.NextCursor == second.Meta.NextCursor {
		t.Errorf("pages: %+v, %+v", first, second)
	}
	if l := into[api.VolumeList](p.send("ts-list-search").is(200)); len(l.Data) != 2 || l.Data[0].Metadata.Name != "ts-a" || l.Meta.Total != 3 {
		t.Errorf("search: %+v", l)
	}
	if code := jsonField(p.send("ts-external-id").is(404), "code"); code != 404.0 {
		t.Errorf("code of a missing external id: %v", code)
	}
	if v := into[api.Volume](p.send("ts-delete").is(200)); v.Status != "DELETING" {
		t.Errorf("deleted: %+v", v)
	}
	p.send("ts-get").is(404)
	if got := p.send("ts-template").is(200).Header.Get("X-Blaxel-Upload-Url"); !strings.HasPrefix(got, "http://"+p.addr+"/uploads/") {
		t.Errorf("upload URL %q", got)
	}
	token := into[api.Token](p.send("ts-token").is(200))
	if token.TokenType != "Bearer" || token.AccessToken == "" || token.ExpiresIn < 60 {
		t.Errorf("token: %+v", token)
	}
}

func TestReplayCLI(t *testing.T) {
	p, _ := newReplay(t)
	p.send("cli-login").is(200)
	if id, _ := jsonField(p.send("cli-login"), "id").(string); id == "" {
		t.Error("bl login stores the workspace's id: there is none")
	}
	p.send("cli-apply-put").is(404) // else bl does not create
	p.send("cli-apply-post").is(200)
	again := into[api.Volume](p.send("cli-apply-put").is(200))
	if again.Metadata.DisplayName != "CLI A" || again.Spec.Size != 2048 {
		t.Errorf("configured: %+v", again)
	}
	b := into[api.Volume](p.send("cli-apply-no-size").is(200))
	if b.Spec.Size != 1024 || b.Metadata.Labels["number"] != "12345" {
		t.Errorf("without a size: %+v", b)
	}
	list := p.send("cli-get-volumes").is(200)
	var raw struct {
		Data json.RawMessage `json:"data"`
		Meta api.PageMeta    `json:"meta"`
	}
	if err := json.Unmarshal(list.Body, &raw); err != nil || len(raw.Data) == 0 || raw.Meta.HasMore || raw.Meta.NextCursor != "" {
		t.Errorf("bl decodes data by itself: %v, %s", err, list.Body)
	}
	if _, ok := jsonField(p.send("cli-get-volume").is(200), "status").(string); !ok {
		t.Error("bl panics on a status that is not a string")
	}
	e := p.send("cli-get-odd").is(404)
	if message, _ := jsonField(e, "message").(string); message == "" {
		t.Errorf("bl prints the message: %s", e.Body)
	}
	p.send("cli-delete").is(200)
	p.send("cli-delete").is(404)
}

func TestReplayCLITemplates(t *testing.T) {
	p, _ := newReplay(t)
	p.send("cli-get-template").is(404)
	applied := p.send("cli-apply-template").is(200)
	if applied.Header.Get("X-Blaxel-Upload-Url") != "" {
		t.Error("an upload URL that nobody asked for")
	}
	for version := 1; version <= 2; version++ {
		url := p.send("cli-deploy").is(200).Header.Get("X-Blaxel-Upload-Url")
		p.fill["upload"] = strings.TrimPrefix(url, "http://"+p.addr)
		p.send("cli-upload").is(200) // exactly 200
		vt := into[api.Template](p.send("cli-get-template").is(200))
		if vt.State.Status != "ready" || vt.State.LatestVersion != string(rune('0'+version)) || vt.Spec.DefaultSize != 2048 || vt.Versions[version-1].Status != "READY" {
			t.Errorf("READY before the upload is answered: %+v", vt)
		}
	}
	p.send("cli-upload").is(400) // used
	var list []api.Template
	if err := json.Unmarshal(p.send("cli-get-templates").is(200).Body, &list); err != nil || len(list) != 1 {
		t.Errorf("templates are a bare array at every version: %v", err)
	}
	p.send("cli-delete-template").is(200)
	p.send("cli-get-template").is(404)
}

func TestReplayGo(t *testing.T) {
	p, w := newReplay(t)
	p.send("go-create").is(200)
	twice := p.send("go-create").is(409)
	if twice.Header.Get("X-Should-Retry") != "false" {
		t.Error("the SDK would send the duplicate three times")
	}
	if v := into[api.Volume](p.send("go-resize").is(200)); v.Spec.Size != 2048 || v.Metadata.Name != "go-a" || v.Metadata.Labels["language"] != "go" {
		t.Errorf("a PUT of the size alone: %+v", v)
	}
	for _, name := range []string{"volume-b", "volume-a"} {
		w.create(name)
	}
	first := into[api.VolumeList](p.send("go-list-first").is(200))
	p.fill["cursor"] = first.Meta.NextCursor
	second := into[api.VolumeList](p.send("go-list-next").is(200))
	if first.Data[0].Metadata.Name != "volume-a" || !first.Meta.HasMore || second.Data[0].Metadata.Name != "volume-b" || second.Meta.HasMore || second.Meta.NextCursor != "" {
		t.Errorf("pages: %+v, %+v", first, second)
	}
	vt := p.send("go-template-upsert").is(200)
	if b := into[api.Template](vt); b.Versions[0].Name != "v9" || vt.Header.Get("X-Blaxel-Upload-Url") == "" {
		t.Errorf("upsert: %s", vt.Body)
	}
	if p.send("go-delete").is(200); len(p.send("go-delete").is(404).Body) == 0 {
		t.Error("an empty body is an error of its own to the SDK")
	}
}

func TestReplayPython(t *testing.T) {
	p, _ := newReplay(t)
	p.send("py-create").is(200)
	if !pyKnowsError(p.send("py-create").is(409)) {
		t.Error("the client would crash on this error body")
	}
	v := into[api.Volume](p.send("py-update").is(200))
	if v.Spec.Size != 2048 || v.Spec.Region != "us-pdx-1" || v.Metadata.DisplayName != "py-a" {
		t.Errorf("null is not given: %+v", v)
	}
	if l := into[api.VolumeList](p.send("py-list").is(200)); len(l.Data) != 1 {
		t.Errorf("list: %+v", l)
	}
	if l := into[api.VolumeList](p.send("py-list-teardown").is(200)); l.Data == nil || len(l.Data) != 0 {
		t.Errorf("teardown's search: %+v", l)
	}
	gone := p.send("py-delete").is(200)
	if v := into[api.Volume](gone); v.Metadata.Name != "py-a" {
		t.Errorf("delete answers with the volume: %s", gone.Body)
	}
	if !pyKnowsError(p.send("py-delete").is(404)) {
		t.Error("the client would crash on this error body")
	}
}

func jsonField(r reply, name string) any {
	r.t.Helper()
	return into[map[string]any](r)[name]
}

// tsContinues is createIfNotExists' rule: the parsed body alone decides.
func tsContinues(r reply) bool {
	return jsonField(r, "code") == 409.0 || jsonField(r, "code") == "VOLUME_ALREADY_EXISTS"
}

// pyKnowsError is what int(response.code) and response.error need.
func pyKnowsError(r reply) bool {
	code, number := jsonField(r, "code").(float64)
	word, text := jsonField(r, "error").(string)
	return number && text && int(code) == r.Code && (r.Code != 409 || word == "VOLUME_ALREADY_EXISTS")
}
