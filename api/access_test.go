package api_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
	"holdfast/engine"
)

func (w *world) as(key, line string, body any, headers ...string) reply {
	w.t.Helper()
	return w.request(line, body, append([]string{"Authorization: Bearer " + key}, headers...)...)
}

// TestRolesAndScopes asks each route with each kind of key. A refusal by access
// is a 401 or 403 and comes before anything else is looked at.
func TestRolesAndScopes(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.FailureRate = -1 })
	// The least that each route takes.
	least := map[string]string{}
	for pattern, key := range map[string]string{
		"GET /v0/volumes": readerKey, "POST /v0/volumes": writerKey, "GET /v0/volumes/{name}": readerKey, "PUT /v0/volumes/{name}": writerKey,
		"DELETE /v0/volumes/{name}": writerKey, "GET /v0/volumes/by-external-id/{externalId}": readerKey,
		"GET /v0/volumes/{name}/attachments": readerKey, "POST /v0/volumes/{name}/attachments": writerKey,
		"GET /v0/volumes/{name}/attachments/{id}": readerKey, "DELETE /v0/volumes/{name}/attachments/{id}": writerKey,
		"PUT /v0/volumes/{name}/attachments/{id}/limits": writerKey,
		"GET /v0/volumes/{name}/stats":                   readerKey, "GET /v0/volumes/{name}/io": readerKey, "GET /v0/io": readerKey, "POST /v0/volumes/{name}/trim": writerKey,
		"POST /v0/volumes/{name}/freeze": writerKey, "POST /v0/volumes/{name}/thaw": writerKey,
		"POST /v0/volumes/{name}/capture": writerKey, "POST /v0/volumes/{name}/sanitize": writerKey, "POST /v0/volumes/{name}/move": writerKey,
		"PUT /v0/volumes/{name}/remote":    nodeKey,
		"GET /v0/volumes/{name}/snapshots": readerKey, "POST /v0/volumes/{name}/snapshots": writerKey,
		"GET /v0/volumes/{name}/snapshots/{snapshot}": readerKey, "DELETE /v0/volumes/{name}/snapshots/{snapshot}": writerKey,
		"GET /v0/snapshots": readerKey, "GET /v0/snapshots/{snapshot}": readerKey, "DELETE /v0/snapshots/{snapshot}": writerKey,
		"GET /v0/volumes/{name}/files": readerKey, "GET /v0/volumes/{name}/files/content": readerKey,
		"GET /v0/volume_templates": readerKey, "POST /v0/volume_templates": writerKey, "GET /v0/volume_templates/{name}": readerKey,
		"POST /v0/volume_templates/{name}/import": writerKey, "POST /v0/volume_templates/{name}/remote": nodeKey, "GET /v0/volume_templates/{name}/image": readerKey,
		"PUT /v0/volume_templates/{name}": writerKey, "DELETE /v0/volume_templates/{name}": writerKey,
		"DELETE /v0/volume_templates/{name}/versions/{version}": writerKey,
		"GET /v0/volume_templates/{name}/diff":                  readerKey, "GET /v0/volume_templates/{name}/archive": readerKey,
		"POST /uploads/{id}/known": "", "PUT /uploads/{id}/delta": "",
		"GET /v0/volume_templates/{name}/history": readerKey, "POST /v0/volume_templates/{name}/rollback": writerKey,
		"PUT /v0/volume_templates/{name}/versions/{version}/pin": writerKey, "DELETE /v0/volume_templates/{name}/versions/{version}/pin": writerKey,
		"POST /v0/volume_templates/{name}/versions/{version}/verify": writerKey, "PUT /v0/volume_templates/{name}/versions/{version}/remote": nodeKey,
		"GET /v0/sandboxes": readerKey, "POST /v0/sandboxes": writerKey, "GET /v0/sandboxes/{name}": readerKey, "PUT /v0/sandboxes/{name}": writerKey,
		"DELETE /v0/sandboxes/{name}": writerKey, "GET /v0/sandboxes/by-external-id/{externalId}": readerKey,
		"GET /v0/sandboxes/{name}/run/process": readerKey, "POST /v0/sandboxes/{name}/run/process": writerKey,
		"GET /v0/sandboxes/{name}/run/process/{process}": readerKey, "DELETE /v0/sandboxes/{name}/run/process/{process}": writerKey,
		"DELETE /v0/sandboxes/{name}/run/process/{process}/kill": writerKey, "GET /v0/sandboxes/{name}/run/process/{process}/logs": readerKey,
		"GET /v0/sandboxes/{name}/run/process/{process}/logs/stream": readerKey, "POST /v0/sandboxes/{name}/run/process/{process}/stdin": writerKey,
		"DELETE /v0/sandboxes/{name}/run/process/{process}/stdin": writerKey,
		"GET /v0/sandboxes/{name}/run/filesystem/{path}":          readerKey, "PUT /v0/sandboxes/{name}/run/filesystem/{path}": writerKey,
		"DELETE /v0/sandboxes/{name}/run/filesystem/{path}": writerKey, "PUT /v0/sandboxes/{name}/run/filesystem/tree/{path}": writerKey,
		"POST /v0/sandboxes/{name}/run/filesystem-multipart/initiate/{path}":   writerKey,
		"PUT /v0/sandboxes/{name}/run/filesystem-multipart/{upload}/part":      writerKey,
		"POST /v0/sandboxes/{name}/run/filesystem-multipart/{upload}/complete": writerKey,
		"DELETE /v0/sandboxes/{name}/run/filesystem-multipart/{upload}/abort":  writerKey,
		"GET /v0/keys": adminKey, "POST /v0/keys": adminKey, "DELETE /v0/keys/{id}": adminKey,
		"GET /v0/workspaces": readerKey, "POST /v0/workspaces": nodeKey, "GET /v0/workspaces/{name}": readerKey, "PUT /v0/workspaces/{name}": nodeKey,
		"GET /v0/workspaces/{name}/quota": readerKey, "PUT /v0/workspaces/{name}/quota": nodeKey,
		"GET /v0/pools": nodeKey, "GET /v0/doctor": nodeKey, "GET /v0/audit": adminKey, "GET /v0/whoami": readerKey, "GET /v0/features": readerKey, "GET /v0/events": readerKey, "GET /ui": "",
		"GET /healthz": "", "GET /readyz": "", "GET /metrics": "", "GET /openapi.json": "", "PUT /uploads/{id}": "", "POST /oauth/token": "", "POST /v0/oauth/token": "",
	} {
		least[pattern] = key
	}
	rank := map[string]int{"": 0, readerKey: 1, writerKey: 2, adminKey: 3, nodeKey: 4}
	fill := strings.NewReplacer("{name}", "nothing", "{externalId}", "nothing", "{id}", "nothing", "{version}", "nothing",
		"{snapshot}", "nothing", "{process}", "nothing", "{path}", "nothing", "{upload}", "nothing")
	for _, pattern := range api.Patterns() {
		need, known := least[pattern]
		if !known {
			t.Errorf("%s: this test does not say who may ask it", pattern)
		}
		for key := range rank {
			headers := []string{"Authorization: Bearer " + key, "Content-Type: application/json", "X-Blaxel-Workspace: main"}
			if key == "" {
				headers[0] = "Authorization: "
			}
			var body any
			if strings.HasPrefix(pattern, "P") {
				body = `{"spec":{"size":0}}`
			}
			if strings.Contains(pattern, "/uploads/") {
				body, headers[1] = "archive", "Content-Type: application/x-tar"
			}
			r := send(t, w.handler, fill.Replace(pattern), body, headers...)
			refused := r.Code == 403 || r.Code == 401
			if strings.Contains(pattern, "/oauth/") {
				continue // its 401 is about what it is asked for
			}
			if refused != (rank[key] < rank[need]) {
				t.Errorf("%s with %q: %d %s", pattern, key, r.Code, r.Body)
			}
		}
	}
}

func TestWorkspaces(t *testing.T) {
	w := newWorld(t)
	w.create("mine")
	const theirs = "X-Blaxel-Workspace: other"
	w.as(adminKey, "GET /v0/volumes", nil, theirs).refused(403, "FORBIDDEN", "no rights in this workspace")
	missing := w.as(adminKey, "GET /v0/volumes", nil, "X-Blaxel-Workspace: nowhere")
	foreign := w.as(adminKey, "GET /v0/volumes", nil, theirs)
	if string(missing.Body) != string(foreign.Body) || missing.Code != foreign.Code {
		t.Errorf("a foreign workspace can be told from a missing one: %s, %s", foreign.Body, missing.Body)
	}
	w.as(adminKey, "GET /v0/volumes?workspace=other", nil, "X-Blaxel-Workspace: main").refused(400, "INVALID_REQUEST", "workspace")
	w.as(adminKey, "GET /v0/volumes?workspace=main", nil, "X-Blaxel-Workspace: main").is(200)
	w.as(nodeKey, "GET /v0/volumes", nil).refused(400, "INVALID_REQUEST", "X-Blaxel-Workspace")
	w.as(nodeKey, "GET /v0/volumes", nil, "X-Blaxel-Workspace: ../etc").refused(400, "INVALID_REQUEST", "workspace")
	w.as(nodeKey, "POST /v0/volumes", newVolume("x", nil), "X-Blaxel-Workspace: nowhere").refused(404, "NOT_FOUND", "")
	if l := into[api.VolumeList](w.as(nodeKey, "GET /v0/volumes", nil, "X-Blaxel-Workspace: main").is(200)); len(l.Data) != 1 {
		t.Errorf("%+v", l)
	}
	w.as(nodeKey, "POST /v0/volumes", newVolume("made-for-them", nil), theirs).is(200)
	w.as(foreignKey, "GET /v0/volumes/made-for-them", nil).is(200)
}

// TestForeignAndMissingLookTheSame compares whole answers: a workspace learns
// nothing about another one's names.
func TestForeignAndMissingLookTheSame(t *testing.T) {
	w := newWorld(t)
	w.request("POST /v0/volumes", `{"metadata":{"name":"secret","externalId":"secret"},"spec":{"size":1}}`).is(200)
	w.push("secret", 10)
	a := into[api.Attachment](w.request("POST /v0/volumes/secret/attachments", attachTo("sandbox:s", "/srv/a")).is(200))
	for _, line := range []string{
		"GET /v0/volumes/secret", "PUT /v0/volumes/secret", "DELETE /v0/volumes/secret", "GET /v0/volumes/by-external-id/secret",
		"GET /v0/volumes/secret/attachments", "POST /v0/volumes/secret/attachments", "GET /v0/volumes/secret/attachments/" + a.ID, "DELETE /v0/volumes/secret/attachments/" + a.ID,
		"PUT /v0/volumes/secret/attachments/" + a.ID + "/limits",
		"GET /v0/volumes/secret/stats", "GET /v0/volumes/secret/io", "POST /v0/volumes/secret/trim", "POST /v0/volumes/secret/freeze", "POST /v0/volumes/secret/thaw",
		"GET /v0/volumes/secret/snapshots", "POST /v0/volumes/secret/snapshots", "GET /v0/volumes/secret/snapshots/s", "DELETE /v0/volumes/secret/snapshots/s",
		"GET /v0/volumes/secret/files?path=/", "GET /v0/volumes/secret/files/content?path=/etc",
		"GET /v0/volume_templates/secret", "DELETE /v0/volume_templates/secret", "DELETE /v0/volume_templates/secret/versions/1",
		"GET /v0/volume_templates/secret/diff?from=1", "GET /v0/volume_templates/secret/archive", "GET /v0/volume_templates/secret/image",
		"GET /v0/volume_templates/secret/history", "POST /v0/volume_templates/secret/versions/1/verify",
		"PUT /v0/volume_templates/secret/versions/1/pin", "DELETE /v0/volume_templates/secret/versions/1/pin",
		"GET /v0/workspaces/main", "GET /v0/workspaces/main/quota",
	} {
		var body any
		if strings.HasPrefix(line, "P") {
			body = attachTo("sandbox:s", "/srv/b")
		}
		foreign := w.as(foreignKey, line, body)
		free := strings.NewReplacer("secret", "absent", "workspaces/main", "workspaces/absent").Replace(line)
		missing := w.as(foreignKey, free, body)
		same := strings.NewReplacer("absent", "secret").Replace(string(missing.Body))
		if strings.Contains(line, "/workspaces/") {
			same = strings.NewReplacer("absent", "main").Replace(string(missing.Body))
		}
		if foreign.Code != 404 || missing.Code != 404 || string(foreign.Body) != same {
			t.Errorf("%s: %d %s, but %d %s for a missing one", line, foreign.Code, foreign.Body, missing.Code, missing.Body)
		}
	}
	w.as(foreignKey, "POST /v0/volumes", newVolume("secret", object{"template": "secret"})).refused(400, "INVALID_REQUEST", "spec.template")
	w.as(foreignKey, "POST /v0/volumes", newVolume("secret", nil)).is(200)
}

func TestAttachNeedsControlPlaneUnlessAllowed(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.TenantsAttach = false })
	w.create("x")
	w.request("POST /v0/volumes/x/attachments", attachTo("sandbox:s", "/srv/a")).refused(403, "FORBIDDEN", "control-plane key")
	w.as(nodeKey, "POST /v0/volumes/x/attachments", attachTo("sandbox:s", "/srv/a"), "X-Blaxel-Workspace: main").is(200)
}

// launching tells where its volumes are, and a secret with it.
type launching struct{ *toyAttacher }

const secretURI = "nbds://host.example:10810/secret"

func (launching) Launch(context.Context, attach.Request, filesystem.Type) (attach.Launch, error) {
	return attach.Launch{URI: secretURI}, nil
}

// TestExportNamesAreSecret: an export's name opens the volume to who has a certificate:
// keys that may not attach do not learn it.
func TestExportNamesAreSecret(t *testing.T) {
	for _, tenants := range []bool{false, true} {
		w := newWorldWith(t, func(o *engine.Options) {
			o.Attachers["host"] = launching{o.Attachers["host"].(*toyAttacher)}
		}, func(o *api.Options) { o.TenantsAttach = tenants })
		w.create("x")
		const here = "X-Blaxel-Workspace: main"
		body := object{"holder": "sandbox:s", "target": attach.Target{Type: "host", Path: "/srv/a", Transport: "tls"}}
		made := w.as(nodeKey, "POST /v0/volumes/x/attachments", body, here).is(200)
		if !strings.Contains(string(made.Body), secretURI) {
			t.Errorf("who attaches is not told where: %s", made.Body)
		}
		line := "GET /v0/volumes/x/attachments/" + into[api.Attachment](made).ID
		if told := w.as(nodeKey, line, nil, here).is(200); !strings.Contains(string(told.Body), secretURI) {
			t.Errorf("the operator is not told where: %s", told.Body)
		}
		for _, key := range []string{adminKey, readerKey} {
			for _, line := range []string{line, "GET /v0/volumes/x/attachments", "GET /v0/volumes/x"} {
				got := w.as(key, line, nil)
				if told := strings.Contains(string(got.Body), "/secret"); got.Code != 200 || told != (tenants && strings.Contains(line, "attachments/")) {
					t.Errorf("tenants attach: %v; %s: %d %s", tenants, line, got.Code, got.Body)
				}
			}
		}
	}
}

func TestRateOfAKey(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.KeyRate, o.Limits.KeyBurst = 0.5, 3 })
	for range 3 {
		w.request("GET /v0/volumes", nil).is(200)
	}
	r := w.request("GET /v0/volumes", nil).refused(429, "TOO_MANY_REQUESTS", "rate")
	if r.Header.Get("Retry-After") != "2" {
		t.Errorf("Retry-After %q: a token comes every 2 s", r.Header.Get("Retry-After"))
	}
	w.as(readerKey, "GET /v0/volumes", nil).is(200) // another key
	send(t, w.local, "GET /v0/volumes", nil, "X-Blaxel-Workspace: main").is(200)
	w.pass(2 * time.Second)
	w.request("GET /v0/volumes", nil).is(200)
	w.request("GET /v0/volumes", nil).is(429)
}

func TestFailedAuthenticationsAreLimited(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.FailureRate, o.Limits.FailureBurst = 1, 2 })
	for range 2 {
		w.as("wrong", "GET /v0/volumes", nil).is(401)
	}
	w.as("wrong", "GET /v0/volumes", nil).refused(429, "TOO_MANY_REQUESTS", "address")
	send(t, w.handler, "POST /oauth/token", `{"grant_type":"client_credentials","client_secret":"wrong"}`).is(429)
	w.request("GET /v0/volumes", nil).is(200) // a valid key from the same address
	w.pass(time.Second)
	w.as("wrong", "GET /v0/volumes", nil).is(401)
}

func TestKeys(t *testing.T) {
	w := newWorld(t)
	made := into[api.CreatedKey](w.request("POST /v0/keys", `{"name":"ci","role":"reader","expiresAt":"2027-01-01T00:00:00Z"}`).is(200))
	if made.Secret == "" || made.Workspace != "main" || made.Role != api.Reader || made.ExpiresAt != "2027-01-01T00:00:00Z" || made.CreatedBy != "ann" {
		t.Fatalf("%+v", made)
	}
	w.as(made.Secret, "GET /v0/volumes", nil).is(200)
	w.as(made.Secret, "POST /v0/volumes", newVolume("x", nil)).is(403)
	if r := w.request("GET /v0/keys", nil).is(200); strings.Contains(string(r.Body), made.Secret) || len(into[[]api.KeyBody](r)) != 1 {
		t.Errorf("%s", r.Body)
	}
	if l := into[[]api.KeyBody](w.as(foreignKey, "GET /v0/keys", nil).is(200)); len(l) != 0 {
		t.Errorf("another workspace's keys: %+v", l)
	}
	w.as(foreignKey, "DELETE /v0/keys/"+made.ID, nil).is(404)
	if k := into[api.KeyBody](w.request("DELETE /v0/keys/"+made.ID, nil).is(200)); k.RevokedAt == "" {
		t.Errorf("%+v", k)
	}
	w.as(made.Secret, "GET /v0/volumes", nil).is(401)
	if strings.Contains(w.log.String(), made.Secret) || strings.Contains(w.log.String(), adminKey) {
		t.Error("a secret is in the log")
	}
	for body, part := range map[string]string{
		`{"role":"root"}`: "role", `{"expiresAt":"2020-01-01T00:00:00Z"}`: "expiresAt", `{"expiresAt":"soon"}`: "expiresAt",
		`{"name":"` + strings.Repeat("x", 64) + `"}`: "name",
	} {
		w.request("POST /v0/keys", body).refused(400, "INVALID_REQUEST", part)
	}
	w.request("POST /v0/keys", `{"controlPlane":true}`).refused(403, "FORBIDDEN", "control-plane")
	w.request("POST /v0/keys", `{"workspace":"other"}`).refused(403, "FORBIDDEN", "workspace")
	w.as(nodeKey, "POST /v0/keys", `{}`).refused(400, "INVALID_REQUEST", "workspace")
	w.as(nodeKey, "POST /v0/keys", `{"workspace":"UPPER"}`).refused(400, "INVALID_REQUEST", "workspace")
	other := into[api.CreatedKey](w.as(nodeKey, "POST /v0/keys", `{"workspace":"other"}`).is(200))
	if other.Workspace != "other" || other.Role != api.Writer {
		t.Errorf("%+v", other)
	}
	if k := into[api.CreatedKey](w.as(nodeKey, "POST /v0/keys", `{"controlPlane":true,"role":"admin"}`).is(200)); !k.ControlPlane || k.Workspace != "" {
		t.Errorf("%+v", k)
	}
	if l := into[[]api.KeyBody](w.as(nodeKey, "GET /v0/keys", nil).is(200)); len(l) != 3 {
		t.Errorf("all keys: %+v", l)
	}
}

func TestTokens(t *testing.T) {
	w := newWorld(t)
	const basic = "Authorization: Basic aWQ6aGZfYWRtaW5fb2ZfbWFpbg==" // id:hf_admin_of_main
	for _, path := range []string{"/oauth/token", "/v0/oauth/token"} {
		tok := into[api.Token](send(t, w.handler, "POST "+path, `{"grant_type":"client_credentials"}`, basic).is(200))
		if tok.ExpiresIn != 3600 || tok.TokenType != "Bearer" {
			t.Errorf("%+v", tok)
		}
		send(t, w.handler, "GET /v0/volumes", nil, "X-Blaxel-Authorization: Bearer "+tok.AccessToken).is(200)
	}
	send(t, w.handler, "POST /oauth/token", "grant_type=client_credentials&client_secret="+adminKey, "Content-Type: application/x-www-form-urlencoded").is(200)
	send(t, w.handler, "POST /oauth/token", `{"grant_type":"client_credentials"}`).refused(401, "UNAUTHORIZED", "")
	send(t, w.handler, "POST /oauth/token", `{"grant_type":"password"}`, basic).refused(400, "INVALID_REQUEST", "grant_type")
	send(t, w.handler, "POST /oauth/token", ``, basic).refused(400, "INVALID_REQUEST", "body")
}

func TestWorkspacesAndQuotas(t *testing.T) {
	w := newWorld(t)
	ws := into[api.WorkspaceBody](w.request("GET /v0/workspaces/main", nil).is(200))
	if ws.ID == "" || ws.Name != "main" || ws.DisplayName != "main" {
		t.Errorf("%+v", ws)
	}
	w.request("PUT /v0/workspaces/new", `{}`).is(403)
	w.as(nodeKey, "PUT /v0/workspaces/new", `{"displayName":"New one"}`).is(200)
	w.as(nodeKey, "POST /v0/workspaces", `{"name":"newer"}`).is(200)
	w.as(nodeKey, "POST /v0/workspaces", `{}`).refused(400, "INVALID_REQUEST", "name")
	w.as(nodeKey, "PUT /v0/workspaces/UPPER", `{}`).refused(400, "INVALID_REQUEST", "name")
	w.as(nodeKey, "PUT /v0/workspaces/new", `{"name":"old"}`).refused(400, "INVALID_REQUEST", "name")
	if l := into[[]api.WorkspaceBody](w.as(nodeKey, "GET /v0/workspaces", nil).is(200)); len(l) != 4 {
		t.Errorf("%+v", l)
	}
	if l := into[[]api.WorkspaceBody](w.request("GET /v0/workspaces", nil).is(200)); len(l) != 1 || l[0].Name != "main" {
		t.Errorf("a workspace sees itself: %+v", l)
	}
	w.request("PUT /v0/workspaces/main/quota", `{"volumes":9}`).is(403)
	q := into[api.QuotaBody](w.as(nodeKey, "PUT /v0/workspaces/main/quota", `{"volumes":1,"mib":null}`).is(200))
	if q != (api.QuotaBody{Volumes: 1}) {
		t.Errorf("%+v", q)
	}
	if q := into[api.QuotaBody](w.as(nodeKey, "PUT /v0/workspaces/main/quota", `{"largestMiB":64}`).is(200)); q != (api.QuotaBody{Volumes: 1, LargestMiB: 64}) {
		t.Errorf("a merge: %+v", q)
	}
	if q := into[api.QuotaBody](w.request("GET /v0/workspaces/main/quota", nil).is(200)); q.Volumes != 1 {
		t.Errorf("%+v", q)
	}
	w.create("one")
	w.request("POST /v0/volumes", newVolume("two", nil)).refused(403, "QUOTA_EXCEEDED", "")
	w.request("PUT /v0/volumes/one", `{"spec":{"size":65}}`).refused(403, "QUOTA_EXCEEDED", "")
	for _, bad := range []string{`{"volumes":-1}`, `{"mib":"many"}`, `{"largestMiB":1.5}`, `{"mib":9223372036854775807}`} {
		w.as(nodeKey, "PUT /v0/workspaces/main/quota", bad).refused(400, "INVALID_REQUEST", "must be a whole number")
	}
	w.as(nodeKey, "PUT /v0/workspaces/nowhere/quota", `{"volumes":1}`).is(404)
}

func TestLocalHandler(t *testing.T) {
	w := newWorld(t)
	const main = "X-Blaxel-Workspace: main"
	send(t, w.local, "POST /v0/volumes", newVolume("x", nil), main).is(200)
	send(t, w.local, "GET /v0/volumes", nil).refused(400, "INVALID_REQUEST", "X-Blaxel-Workspace")
	send(t, w.local, "GET /v0/volumes", nil, main, "Authorization: Bearer wrong").is(200) // nobody asks for a key here
	if e := w.audit.last(t); e.Remote != "local" || e.Principal != "local" || e.Workspace != "main" {
		t.Errorf("%+v", e)
	}
	pools := into[[]api.Pool](send(t, w.local, "GET /v0/pools", nil).is(200))
	if len(pools) != 1 || pools[0].Provisioned != 1<<20 || pools[0].Volumes != 1 || pools[0].Quarantined == nil {
		t.Errorf("%+v", pools)
	}
	send(t, w.local, "GET /v0/doctor", nil).is(200)
}
