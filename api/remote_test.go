package api_test

import (
	"strings"
	"testing"
	"time"

	"holdfast/api"
)

// TestRemoteVersions: only who operates the host says where bytes may be fetched, and
// users learn the store's host and no more.
func TestRemoteVersions(t *testing.T) {
	w := newWorld(t)
	const line, body = "POST /v0/volume_templates/far/remote", `{"manifest":"https://store.example/secret/path/far.json","digest":"sha256:good","version":"first"}`
	const here = "X-Blaxel-Workspace: main"
	w.as(adminKey, line, body).refused(403, "FORBIDDEN", "control-plane")
	w.as(nodeKey, line, body).refused(400, "INVALID_REQUEST", "X-Blaxel-Workspace")
	r := w.as(nodeKey, line, body, here).is(200)
	v := into[api.TemplateVersion](r)
	if v.TemplateName != "far" || v.Name != "first" || v.Status != "READY" || v.Remote == nil || *v.Remote != (api.RemoteVersion{Host: "store.example", Filesystem: "ext4", Size: 64}) {
		t.Errorf("%+v, %+v", v, v.Remote)
	}
	if strings.Contains(string(r.Body), "secret") {
		t.Errorf("the answer tells where in the store: %s", r.Body)
	}
	w.as(nodeKey, line, `{"digest":"sha256:good"}`, here).refused(400, "INVALID_REQUEST", "manifest")
	w.as(nodeKey, line, `{"manifest":"https://store.example/m.json"}`, here).refused(400, "INVALID_REQUEST", "digest")
	w.as(nodeKey, line, `{"manifest":"https://store.example/m.json","digest":"sha256:bad"}`, here).refused(400, "MANIFEST_REFUSED", "")
	w.as(nodeKey, line, `{"manifest":"http://169.254.169.254/latest","digest":"sha256:good"}`, here).refused(403, "STORE_NOT_ALLOWED", "")
	const move, to = "PUT /v0/volume_templates/far/versions/first/remote", `{"manifest":"https://store.example/secret/next/far.json"}`
	w.as(adminKey, move, to).refused(403, "FORBIDDEN", "control-plane")
	w.as(nodeKey, move, to).refused(400, "INVALID_REQUEST", "X-Blaxel-Workspace")
	r = w.as(nodeKey, move, to, here).is(200)
	if v := into[api.TemplateVersion](r); v.Name != "first" || v.Remote == nil || v.Remote.Host != "store.example" || strings.Contains(string(r.Body), "secret") {
		t.Errorf("moved: %s", r.Body)
	}
	w.as(nodeKey, move, `{}`, here).refused(400, "INVALID_REQUEST", "manifest")
	w.as(nodeKey, move, `{"manifest":"http://169.254.169.254/latest"}`, here).refused(403, "STORE_NOT_ALLOWED", "")
	w.as(nodeKey, "PUT /v0/volume_templates/far/versions/none/remote", to, here).refused(404, "NOT_FOUND", "")
	w.request("POST /v0/volumes", `{"metadata":{"name":"orphan"},"spec":{"size":10}}`).is(200)
	const orphan = "PUT /v0/volumes/orphan/remote"
	w.as(adminKey, orphan, to).refused(403, "FORBIDDEN", "control-plane")
	w.as(nodeKey, orphan, to).refused(400, "INVALID_REQUEST", "X-Blaxel-Workspace")
	if v := into[api.Volume](w.as(nodeKey, orphan, to, here).is(200)); v.Metadata.Name != "orphan" {
		t.Errorf("%+v", v.Metadata)
	}
	w.as(nodeKey, orphan, `{}`, here).refused(400, "INVALID_REQUEST", "manifest")
	w.as(nodeKey, orphan, `{"manifest":"http://169.254.169.254/latest"}`, here).refused(403, "STORE_NOT_ALLOWED", "")
	w.as(nodeKey, "PUT /v0/volumes/none/remote", to, here).refused(404, "NOT_FOUND", "")
	w.shelf.registryFails = true
	w.as(nodeKey, orphan, to, here).refused(502, "STORE_FAILED", "")
	w.as(nodeKey, line, body, here).refused(502, "STORE_FAILED", "")
	w.as(nodeKey, move, to, here).refused(502, "STORE_FAILED", "")

	w.push("app", 10)
	image := w.request("GET /v0/volume_templates/app/image?filesystem=xfs&size=300", nil).is(200)
	if string(image.Body) != "app xfs 300" || image.Header.Get("X-Holdfast-Version") != "1" {
		t.Errorf("%q, %v", image.Body, image.Header)
	}
	w.request("GET /v0/volume_templates/app/image?size=0", nil).refused(400, "INVALID_REQUEST", "size")
	w.request("GET /v0/volume_templates/app/image?version=9", nil).refused(404, "NOT_FOUND", "")
}

// TestConcurrentImages: who reads slowly holds an image in the pool, and there are few
// places for that.
func TestConcurrentImages(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.Uploads, o.Limits.UploadWait = 1, 10*time.Millisecond })
	w.push("app", 10)
	<-w.shelf.begun
	w.shelf.hold = make(chan struct{})
	const line = "GET /v0/volume_templates/app/image?size=300"
	done := make(chan reply)
	go func() { done <- w.request(line, nil) }()
	<-w.shelf.begun
	w.as(readerKey, line, nil).refused(429, "TOO_MANY_REQUESTS", "images that are published")
	close(w.shelf.hold)
	(<-done).is(200)
	w.request(line, nil).is(200)
}
