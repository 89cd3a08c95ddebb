package api_test

import (
	"bytes"
	"encoding/base64"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/api/audit"
	"holdfast/api/auth"
)

// realAccess gives a world whose keys and audit log are the daemon's own.
func realAccess(t *testing.T) *world {
	w := newWorld(t)
	keys, err := auth.Open(t.Context(), auth.Options{
		Store: w.store, SideLog: w.side, Secret: bytes.Repeat([]byte("k"), 32), Log: slog.New(slog.NewJSONHandler(w.log, nil)), Now: w.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(filepath.Join(t.TempDir(), "audit.log"), audit.Options{OnFailure: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	w.options.Auth, w.options.Audit = keys, log
	if w.server, err = api.New(w.options); err != nil {
		t.Fatal(err)
	}
	w.handler, w.local = apitest.Handler(t, w.server.Handler()), apitest.Handler(t, w.server.LocalHandler())
	return w
}

// TestFromNothingToAVolume begins as an operator does: over the socket, without
// any key or workspace.
func TestFromNothingToAVolume(t *testing.T) {
	w := realAccess(t)
	w.request("GET /v0/volumes", nil).is(401)
	const acme = "X-Blaxel-Workspace: acme"
	send(t, w.local, "POST /v0/volumes", newVolume("x", nil), acme).refused(404, "NOT_FOUND", `no workspace "acme"`)
	send(t, w.local, "POST /v0/keys", `{"workspace":"acme"}`).refused(404, "NOT_FOUND", `no workspace "acme"`)
	send(t, w.local, "PUT /v0/workspaces/acme", `{"displayName":"ACME Inc."}`).is(200)
	made := into[api.CreatedKey](send(t, w.local, "POST /v0/keys", `{"workspace":"acme","role":"admin","name":"ops"}`).is(200))

	for _, header := range []string{"Authorization: Bearer ", "X-Blaxel-Authorization: Bearer "} {
		send(t, w.handler, "GET /v0/volumes", nil, header+made.Secret, acme).is(200)
	}
	basic := "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("any:"+made.Secret))
	token := into[api.Token](send(t, w.handler, "POST /v0/oauth/token", `{"grant_type":"client_credentials"}`, basic).is(200))
	v := into[api.Volume](send(t, w.handler, "POST /v0/volumes", newVolume("x", nil), "X-Blaxel-Authorization: Bearer "+token.AccessToken).is(200))
	if v.Metadata.Workspace != "acme" || v.Metadata.CreatedBy != "ops" {
		t.Errorf("%+v", v.Metadata)
	}
	entries := into[[]api.AuditEntry](send(t, w.handler, "GET /v0/audit", nil, "Authorization: Bearer "+made.Secret).is(200))
	if len(entries) == 0 || entries[0].Action != "volume.create" || entries[0].KeyID != made.ID || entries[0].Principal != "ops" {
		t.Errorf("%+v", entries)
	}

	send(t, w.handler, "DELETE /v0/keys/"+made.ID, nil, "Authorization: Bearer "+made.Secret).is(200)
	send(t, w.handler, "GET /v0/volumes", nil, "Authorization: Bearer "+made.Secret).refused(401, "UNAUTHORIZED", "")
	send(t, w.handler, "GET /v0/volumes", nil, "Authorization: Bearer "+token.AccessToken).refused(401, "UNAUTHORIZED", "")
	for _, secret := range []string{made.Secret, token.AccessToken, strings.TrimPrefix(basic, "Authorization: Basic ")} {
		if strings.Contains(w.log.String(), secret) {
			t.Error("a secret is in the log")
		}
	}
}

func TestExpiredKey(t *testing.T) {
	w := realAccess(t)
	send(t, w.local, "PUT /v0/workspaces/main", `{}`).is(200)
	made := into[api.CreatedKey](send(t, w.local, "POST /v0/keys", object{"workspace": "main", "expiresAt": w.now().Add(time.Hour)}).is(200))
	send(t, w.handler, "GET /v0/volumes", nil, "Authorization: Bearer "+made.Secret).is(200)
	w.pass(2 * time.Hour)
	send(t, w.handler, "GET /v0/volumes", nil, "Authorization: Bearer "+made.Secret).is(401)
}
