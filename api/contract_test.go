package api_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"holdfast/api"
	"holdfast/blockdev/attach"
	"holdfast/engine"
)

// TestWhatImplementersGetWrong is the contract's own list of traps, in its order.
func TestWhatImplementersGetWrong(t *testing.T) {
	for _, trap := range []struct {
		name string
		test func(*testing.T, *world)
	}{
		{"01 both authentication headers", bothHeaders},
		{"02 numeric code and string error", numericCode},
		{"03 no retry of a conflict", noRetry},
		{"04 JSON on everything, DELETE is 200 with the volume", jsonEverywhere},
		{"05 PUT is a merge, and 404 when missing", putMerges},
		{"06 both listing shapes", bothShapes},
		{"07 nothing is null, cursors agree", nothingNull},
		{"08 sizes are MiB everywhere", sizesInMiB},
		{"09 the template's default size", templateDefault},
		{"10 upload without a key, exactly 200", uploadWithoutKey},
		{"11 404 after DELETE", goneAfterDelete},
		{"12 usable right after create", usableAtOnce},
		{"13 q searches labels, total ignores it", searchLabels},
		{"14 unescaped names in paths", unescapedNames},
		{"15 region is free text and may be absent", freeRegion},
		{"16 400 for a bad template, 403 for quota", badTemplateAndQuota},
		{"17 a repeated POST after a lost answer", repeatedPost},
	} {
		t.Run(trap.name, func(t *testing.T) { trap.test(t, newWorld(t)) })
	}
}

func bothHeaders(t *testing.T, w *world) {
	h := w.handler
	for _, header := range []string{"Authorization: Bearer ", "X-Blaxel-Authorization: Bearer "} {
		send(t, h, "GET /v0/volumes", nil, header+adminKey, "X-Blaxel-Workspace: main").is(200)
		send(t, h, "GET /v0/volumes?workspace=main", nil, header+adminKey).is(200)
		send(t, h, "GET /v0/volumes", nil, header+"wrong").refused(401, "UNAUTHORIZED", "")
	}
	send(t, h, "GET /v0/volumes", nil).refused(401, "UNAUTHORIZED", "")
}

func numericCode(t *testing.T, w *world) {
	w.create("x")
	r := w.request("POST /v0/volumes", newVolume("x", nil)).refused(409, "VOLUME_ALREADY_EXISTS", "Volume x already exists")
	if !tsContinues(r) || !pyKnowsError(r) {
		t.Errorf("%s", r.Body)
	}
}

func noRetry(t *testing.T, w *world) {
	w.create("x")
	for line, body := range map[string]any{
		"POST /v0/volumes": newVolume("x", nil), "GET /v0/volumes/none": nil, "POST /v0/volume_templates": `{}`, "GET /nowhere": nil, "PATCH /v0/volumes": nil,
	} {
		if r := w.request(line, body); r.Code < 400 || r.Header.Get("X-Should-Retry") != "false" {
			t.Errorf("%s: %d, X-Should-Retry %q", line, r.Code, r.Header.Get("X-Should-Retry"))
		}
	}
}

func jsonEverywhere(t *testing.T, w *world) {
	w.create("x")
	for _, line := range []string{
		"GET /v0/volumes", "GET /v0/volumes/x", "GET /v0/volumes/none", "GET /", "GET /v0", "GET /v0/", "GET /v0//volumes", "GET /v0/volumes/",
		"GET /v0/./volumes", "PATCH /v0/volumes", "DELETE /v0/volumes", "OPTIONS /v0/volumes", "GET /healthz", "GET /v1/volumes", "DELETE /v0/volumes/x",
	} {
		r := w.request(line, nil)
		if got := r.Header.Get("Content-Type"); got != "application/json" {
			t.Errorf("%s: Content-Type %q: %s", line, got, r.Body)
		}
		if r.Code == 405 && !strings.Contains(r.Header.Get("Allow"), "GET") {
			t.Errorf("%s: Allow %q", line, r.Header.Get("Allow"))
		}
	}
	w.create("y")
	if v := into[api.Volume](w.request("DELETE /v0/volumes/y", nil).is(200)); v.Metadata.Name != "y" || v.Status != "DELETING" {
		t.Errorf("%+v", v)
	}
}

func putMerges(t *testing.T, w *world) {
	w.request("POST /v0/volumes", `{"metadata":{"name":"x","displayName":"X","labels":{"a":"1"},"externalId":"e"},"spec":{"size":10}}`).is(200)
	for _, body := range []string{
		`{"spec":{"size":20}}`,
		`{"metadata":null,"spec":null}`,
		`{}`,
		`{"metadata":{"name":"x","displayName":null,"labels":null,"externalId":null},"spec":{"size":null,"region":null,"template":null}}`,
		`{"metadata":{"name":"x","workspace":"other","createdAt":"1999-01-01T00:00:00Z","createdBy":"eve","plan":"p","url":"u"},"spec":{"size":20,"infrastructureId":"i"},"status":"FAILED","state":{"attachedTo":"sandbox:evil"},"events":[]}`,
	} {
		v := into[api.Volume](w.request("PUT /v0/volumes/x", body).is(200))
		if v.Spec.Size != 20 || v.Metadata.DisplayName != "X" || v.Metadata.Labels["a"] != "1" || v.Metadata.ExternalID != "e" || v.Metadata.Workspace != "main" ||
			v.Metadata.CreatedBy != "ann" || strings.HasPrefix(v.Metadata.CreatedAt, "1999") || v.Status != "DEPLOYED" || v.State.AttachedTo != "" {
			t.Errorf("after %s: %+v", body, v)
		}
	}
	echo := w.request("GET /v0/volumes/x", nil).is(200)
	w.request("PUT /v0/volumes/x", string(echo.Body)).is(200)
	if v := into[api.Volume](w.request("PUT /v0/volumes/x", `{"metadata":{"labels":{"b":"2"}}}`).is(200)); v.Metadata.Labels["a"] != "" || v.Metadata.Labels["b"] != "2" {
		t.Errorf("labels are replaced as a whole: %+v", v.Metadata.Labels)
	}
	w.request("PUT /v0/volumes/missing", `{"spec":{"size":1}}`).refused(404, "NOT_FOUND", "")
	w.request("GET /v0/volumes/missing", nil).is(404)
}

func bothShapes(t *testing.T, w *world) {
	w.create("x")
	h, auth := w.handler, "Authorization: Bearer "+adminKey
	for _, version := range []string{"", "Blaxel-Version: 2026-04-16"} {
		full := into[[]api.Volume](send(t, h, "GET /v0/volumes", nil, auth, version).is(200))
		if len(full) != 1 || full[0].Spec.Filesystem != "ext4" || full[0].Events == nil {
			t.Errorf("%q: %+v", version, full)
		}
	}
	page := send(t, h, "GET /v0/volumes", nil, auth, "Blaxel-Version: 2026-04-28").is(200)
	if l := into[api.VolumeList](page); len(l.Data) != 1 || l.Meta.Total != 1 || strings.Contains(string(page.Body), "events") {
		t.Errorf("%s", page.Body)
	}
	for _, version := range []string{"2026-04-16", "2026-04-28"} {
		into[[]api.Template](send(t, h, "GET /v0/volume_templates", nil, auth, "Blaxel-Version: "+version).is(200))
	}
	for _, version := range []string{"2026-99-99", "2026-04-28.preview", "latest", "2026-04-2"} {
		send(t, h, "GET /v0/volumes", nil, auth, "Blaxel-Version: "+version).refused(400, "invalid_api_version",
			`Unknown API version "`+version+`". Valid versions: 2026-04-16, 2026-04-28.`)
	}
}

func nothingNull(t *testing.T, w *world) {
	for _, line := range []string{"GET /v0/volumes", "GET /v0/volume_templates", "GET /v0/keys", "GET /v0/audit"} {
		if r := w.request(line, nil).is(200); strings.Contains(string(r.Body), "null") {
			t.Errorf("%s: %s", line, r.Body)
		}
	}
	w.create("x")
	for _, line := range []string{"GET /v0/volumes", "GET /v0/volumes/x", "GET /v0/volumes/x/attachments"} {
		if r := w.request(line, nil).is(200); strings.Contains(string(r.Body), "null") {
			t.Errorf("%s: %s", line, r.Body)
		}
	}
	l := into[api.VolumeList](w.request("GET /v0/volumes", nil))
	if l.Meta.HasMore || l.Meta.NextCursor != "" {
		t.Errorf("%+v", l.Meta)
	}
}

func sizesInMiB(t *testing.T, w *world) {
	w.request("POST /v0/volumes", newVolume("x", object{"size": 512})).is(200)
	l := into[api.VolumeList](w.request("GET /v0/volumes", nil))
	v := into[api.Volume](w.request("GET /v0/volumes/x", nil))
	if l.Data[0].Spec.Size != 512 || v.Spec.Size != 512 || v.State.Sizes.Wanted != 512<<20 {
		t.Errorf("%+v, %+v", l.Data[0].Spec, v)
	}
	w.request("POST /v0/volumes", newVolume("one", object{"size": 1})).is(200)
}

// push makes a READY version.
func (w *world) push(name string, defaultSize int64) {
	w.t.Helper()
	target := w.request("PUT /v0/volume_templates/"+name+"?upload=true", object{"spec": object{"defaultSize": defaultSize}}).is(200).Header.Get("X-Blaxel-Upload-Url")
	send(w.t, w.handler, "PUT "+target, "archive", "Content-Type: application/x-tar").is(200)
}

func templateDefault(t *testing.T, w *world) {
	w.push("demo", 64)
	for body, want := range map[string]int64{`{"template":"demo"}`: 64, `{"template":"demo:latest","size":1024}`: 1024, `{"template":"demo:1","size":null}`: 64} {
		v := into[api.Volume](w.request("POST /v0/volumes", `{"spec":`+body+`}`).is(200))
		if v.Spec.Size != want || v.Spec.Template != "demo:1" {
			t.Errorf("%s: %+v", body, v.Spec)
		}
	}
	w.request("POST /v0/volumes", `{"spec":{"template":"demo","size":9}}`).refused(400, "INVALID_REQUEST", "spec.size")
}

func uploadWithoutKey(t *testing.T, w *world) {
	target := w.request("POST /v0/volume_templates?upload=true", `{"metadata":{"name":"demo"}}`).is(200).Header.Get("X-Blaxel-Upload-Url")
	if !strings.HasPrefix(target, "http://example.com/uploads/") {
		t.Fatalf("not absolute: %q", target)
	}
	send(t, w.handler, "PUT "+strings.Replace(target, "good", "evil", 1), "archive", "Content-Type: application/x-tar").refused(400, "UPLOAD_URL_INVALID", "")
	target = w.request("PUT /v0/volume_templates/demo?upload=true", `{}`).is(200).Header.Get("X-Blaxel-Upload-Url")
	r := send(t, w.handler, "PUT "+target, "archive", "Content-Type: application/x-tar").is(http.StatusOK)
	if v := into[api.TemplateVersion](r); v.Status != "READY" || v.Name != "2" {
		t.Errorf("%+v", v)
	}
	send(t, w.handler, "PUT "+target, "archive", "Content-Type: application/x-tar").refused(400, "UPLOAD_URL_INVALID", "")
	if got := into[api.Template](w.request("GET /v0/volume_templates/demo", nil)).State; got.LatestVersion != "2" || got.VersionCount != 2 || got.Status != "ready" {
		t.Errorf("an unfinished version is not the latest: %+v", got)
	}
}

func goneAfterDelete(t *testing.T, w *world) {
	w.create("x")
	w.request("DELETE /v0/volumes/x", nil).is(200)
	w.request("GET /v0/volumes/x", nil).is(404)
	if l := into[api.VolumeList](w.request("GET /v0/volumes", nil)); len(l.Data) != 0 || l.Meta.Total != 0 {
		t.Errorf("%+v", l)
	}
	w.create("x") // the name is free
}

func usableAtOnce(t *testing.T, w *world) {
	if v := w.create("x"); v.Status != "DEPLOYED" {
		t.Errorf("%+v", v)
	}
	a := into[api.Attachment](w.request("POST /v0/volumes/x/attachments", attachTo("sandbox:my-sandbox", "/srv/a")).is(200))
	v := into[api.Volume](w.request("GET /v0/volumes/x", nil))
	if v.State.AttachedTo != "sandbox:my-sandbox" || len(v.State.Attachments) != 1 || v.State.Attachments[0].ID != a.ID {
		t.Errorf("%+v", v.State)
	}
	w.request("DELETE /v0/volumes/x", nil).refused(409, "VOLUME_ATTACHED", "sandbox:my-sandbox")
}

func attachTo(holder, path string) object {
	return object{"holder": holder, "target": attach.Target{Type: "host", Path: path}}
}

func searchLabels(t *testing.T, w *world) {
	w.request("POST /v0/volumes", `{"metadata":{"name":"x","labels":{"env":"integration-test"}},"spec":{"size":1}}`).is(200)
	w.create("y")
	l := into[api.VolumeList](w.request("GET /v0/volumes?q=integration-test", nil))
	if len(l.Data) != 1 || l.Meta.Total != 2 {
		t.Errorf("%+v", l)
	}
}

func unescapedNames(t *testing.T, w *world) {
	w.create("a")
	for _, path := range []string{"a/b", "a/../b", "a/b/c/d", "a?x=1/../b", "a%2f..%2fa"} {
		if r := w.request("GET /v0/volumes/"+path, nil); r.Code != 404 && !strings.HasPrefix(path, "a?") {
			t.Errorf("%s: %d %s", path, r.Code, r.Body)
		}
	}
}

func freeRegion(t *testing.T, w *world) {
	for region, want := range map[string]string{"us-was-1": "us-was-1", "eu-dub-1": "eu-dub-1", "": "us-pdx-1"} {
		spec := object{"size": 1}
		if region != "" {
			spec["region"] = region
		}
		if v := into[api.Volume](w.request("POST /v0/volumes", newVolume("v-"+want, spec)).is(200)); v.Spec.Region != want {
			t.Errorf("%q: %+v", region, v.Spec)
		}
	}
}

func badTemplateAndQuota(t *testing.T, w *world) {
	for _, ref := range []string{"none", "none:1", "none:latest", "a:b:c", "UPPER"} {
		w.request("POST /v0/volumes", newVolume("x", object{"template": ref})).refused(400, "INVALID_REQUEST", "spec.template")
	}
	if err := w.engine.SetQuota(context.Background(), "main", engine.Quota{LargestMiB: 16384}); err != nil {
		t.Fatal(err)
	}
	w.request("POST /v0/volumes", newVolume("ok", object{"size": 16384})).is(200)
	w.request("POST /v0/volumes", newVolume("big", object{"size": 20480})).refused(403, "QUOTA_EXCEEDED", "")
}

func repeatedPost(t *testing.T, w *world) {
	w.create("x")
	w.request("POST /v0/volumes", newVolume("x", nil), "X-Stainless-Retry-Count: 1").is(409)
	body := newVolume("y", nil)
	first := w.request("POST /v0/volumes", body, "Idempotency-Key: k-1").is(200)
	again := w.request("POST /v0/volumes", body, "Idempotency-Key: k-1").is(200)
	if string(first.Body) != string(again.Body) {
		t.Errorf("a replay differs:\n%s\n%s", first.Body, again.Body)
	}
	w.request("POST /v0/volumes", newVolume("z", nil), "Idempotency-Key: k-1").refused(409, "CONFLICT", "")
	w.request("POST /v0/volumes", body, "Idempotency-Key: "+strings.Repeat("k", 256)).refused(400, "INVALID_REQUEST", "Idempotency-Key")
	w.request("GET /v0/volumes/z", nil).is(404)
}

func TestEveryRouteIsDocumented(t *testing.T) {
	w := newWorld(t)
	for _, pattern := range api.Patterns() {
		method, path, _ := strings.Cut(pattern, " ")
		if !strings.Contains(string(api.OpenAPI()), `"`+path+`"`) {
			t.Errorf("%s %s is not in openapi.json", method, path)
		}
	}
	rec := httptest.NewRecorder()
	w.handler.ServeHTTP(rec, httptest.NewRequest("GET", "/openapi.json", nil))
	doc := into[struct {
		Info  struct{ Version string }
		Paths map[string]map[string]any
	}](reply{t, "openapi", rec.Code, rec.Header(), rec.Body.Bytes()})
	if doc.Info.Version != "1.2.3" {
		t.Errorf("version %q", doc.Info.Version)
	}
	routes := map[string]bool{}
	for _, p := range api.Patterns() {
		routes[p] = true
	}
	documented := 0
	for path, operations := range doc.Paths {
		for method := range operations {
			if method == "parameters" {
				continue
			}
			documented++
			if !routes[strings.ToUpper(method)+" "+path] {
				t.Errorf("%s %s is documented and not served", method, path)
			}
		}
	}
	if documented != len(routes) {
		t.Errorf("%d operations documented, %d served", documented, len(routes))
	}
}

// An import answers like an upload, and says whose fault a failure is.
func TestImport(t *testing.T) {
	w := newWorld(t)
	v := into[api.TemplateVersion](w.request("POST /v0/volume_templates/app/import", `{"image":"registry.example/app:1","platform":"linux/amd64","version":"first"}`).is(200))
	if v.Name != "first" || v.TemplateName != "app" || v.Status != "READY" {
		t.Errorf("%+v", v)
	}
	if e := w.audit.last(t); e.Action != "template.version.import" || e.Resource != "app:first" {
		t.Errorf("%+v", e)
	}
	w.request("POST /v0/volume_templates/app/import", `{"image":"registry.example/app:1","platform":null}`).is(200)
	w.request("POST /v0/volume_templates/app/import", `{"image":"elsewhere/app:1"}`).refused(403, "REGISTRY_NOT_ALLOWED", "not listed")
	w.request("POST /v0/volume_templates/app/import", `{"image":"registry.example/app:2"}`).refused(400, "IMAGE_NOT_FOUND", "app:2")
	w.request("POST /v0/volume_templates/UPPER/import", `{"image":"registry.example/app:1"}`).refused(400, "INVALID_REQUEST", "name")
	w.shelf.registryFails = true
	w.request("POST /v0/volume_templates/app/import", `{"image":"registry.example/app:1"}`).refused(502, "REGISTRY_FAILED", "")
}
