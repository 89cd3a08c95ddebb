package api_test

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/sparse"
	"holdfast/engine"
	"holdfast/templates"
)

// noSpaceBound lets templates have the room that they ask for.
type noSpaceBound struct{}

func (noSpaceBound) Reserve(int64, string) (func(), error) { return func() {}, nil }

// newTemplateWorld is a world whose templates and pool are real.
func newTemplateWorld(t *testing.T, _ time.Duration) *world {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Ext4)
	w := newWorld(t)
	log := slog.New(slog.DiscardHandler)
	w.poolDir = filepath.Join(t.TempDir(), "pool")
	pool, err := sparse.Open(t.Context(), w.poolDir, sparse.Options{Host: "test", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Shutdown)
	library, err := templates.Open(t.Context(), templates.Options{
		Store: w.store, SideLog: w.side, Pool: pool, Space: noSpaceBound{}, Staging: pool.Staging(), Manifests: pool.Manifests(),
		Secret: bytes.Repeat([]byte("s"), 32), Log: log, Now: w.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = library.Close() })
	w.library = library
	w.engine, err = engine.New(t.Context(), engine.Options{
		Store: w.store, SideLog: w.side, Pool: pool, PoolName: "default", PoolKind: "sparse", Library: library, Stage: w.stage,
		Filesystems: filesystem.NewTools(), Attachers: map[string]attach.Attacher{"host": w.sandboxes}, Limiter: toyLimiter{},
		Ledger: engine.NewLedger(engine.LedgerOptions{Total: 64 << 30, Ratio: 1}), Log: log, DefaultRegion: "us-pdx-1", Now: w.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.engine.Close(context.Background()) })
	w.options.Engine, w.options.Library = w.engine, library
	if w.server, err = api.New(w.options); err != nil {
		t.Fatal(err)
	}
	w.handler, w.local = apitest.Handler(t, w.server.Handler()), apitest.Handler(t, w.server.LocalHandler())
	return w
}

// tarOf is an archive of one file.
func tarOf(name, content string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg})
	_, _ = io.WriteString(w, content)
	_ = w.Close()
	return b.Bytes()
}

// promised asks for an upload URL of the template t.
func (w *world) promised() {
	w.t.Helper()
	r := w.as(writerKey, "PUT /v0/volume_templates/t?upload=true", `{}`)
	if r.Code == http.StatusNotFound { // bl does the same
		r = w.as(writerKey, "POST /v0/volume_templates?upload=true", `{"metadata":{"name":"t"}}`)
	}
	_, target, _ := strings.Cut(r.is(200).Header.Get("X-Blaxel-Upload-Url"), "/uploads/")
	w.uploadURL = "/uploads/" + target
}

// put sends an archive to the URL that was promised.
func (w *world) put(archive []byte) reply {
	w.t.Helper()
	return send(w.t, w.handler, "PUT "+w.uploadURL, string(archive), "Content-Type: application/x-tar")
}

func (w *world) version(content string) {
	w.t.Helper()
	w.promised()
	w.put(tarOf("file", content)).is(200)
}

// damage flips a byte in the image of the only revision.
func (w *world) damage() {
	w.t.Helper()
	images, err := filepath.Glob(filepath.Join(w.poolDir, "images", "rev-*", "image"))
	if err != nil || len(images) != 1 {
		w.t.Fatalf("images %v, %v", images, err)
	}
	f, err := os.OpenFile(images[0], os.O_RDWR, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, 1100)
	if err == nil {
		b[0] ^= 1
		_, err = f.WriteAt(b, 1100)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

var templateStates = map[string]state{
	"no template": {enter: func(w *world) func() {
		w.uploadURL = "/uploads/rev-00000000000000000000000000?expires=1&signature=00"
		return nil
	}},
	"no version": {enter: func(w *world) func() { w.template(); return nil }},
	"promised":   {enter: func(w *world) func() { w.promised(); return nil }},
	"uploading": {enter: func(w *world) func() {
		w.promised()
		return w.uploading()
	}},
	"failed": {enter: func(w *world) func() {
		w.promised()
		w.put(tarOf("../escape", "x")).is(400)
		return nil
	}},
	"ready":        {enter: func(w *world) func() { w.version("one"); return nil }},
	"two versions": {enter: func(w *world) func() { w.version("one"); w.version("two"); return nil }},
	"ready, pinned": {enter: func(w *world) func() {
		w.version("one")
		w.as(writerKey, "PUT /v0/volume_templates/t/versions/1/pin", nil).is(200)
		return nil
	}},
	"ready, in use": {enter: func(w *world) func() {
		w.version("one")
		w.as(writerKey, "POST /v0/volumes", `{"metadata":{"name":"user"},"spec":{"size":32,"template":"t:1"}}`).is(200)
		return nil
	}},
	"damaged": {enter: func(w *world) func() {
		w.version("one")
		w.damage()
		w.as(writerKey, "POST /v0/volume_templates/t/versions/1/verify", nil)
		return nil
	}},
	"deleted": {enter: func(w *world) func() {
		w.version("one")
		w.as(writerKey, "DELETE /v0/volume_templates/t", nil).is(200)
		return nil
	}},
}

func (w *world) template() {
	w.t.Helper()
	w.as(writerKey, "POST /v0/volume_templates", `{"metadata":{"name":"t"}}`).is(200)
	w.uploadURL = "/uploads/rev-00000000000000000000000000?expires=1&signature=00"
}

// uploading begins to send an archive, whose end waits for release.
func (w *world) uploading() (release func()) {
	archive := tarOf("file", "one")
	begun, gate := make(chan struct{}), make(chan struct{})
	body := &halting{Reader: bytes.NewReader(archive), begun: begun, gate: gate}
	target, err := url.Parse(w.uploadURL)
	if err != nil {
		w.t.Fatal(err)
	}
	u := templates.Upload{
		ID: strings.TrimPrefix(target.Path, templates.UploadPath), Expires: target.Query().Get("expires"), Signature: target.Query().Get("signature"),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = w.library.Ingest(context.Background(), u, int64(len(archive)), body)
	}()
	<-begun
	release = once(func() { close(gate) })
	w.t.Cleanup(func() { // it writes to the pool's directory to its end
		release()
		<-done
	})
	return release
}

// halting is a body whose end comes when the gate opens.
type halting struct {
	*bytes.Reader
	begun, gate chan struct{}
	halted      bool
}

func (h *halting) Read(p []byte) (int, error) {
	if h.Len() < 1024 && !h.halted {
		h.halted = true
		close(h.begun)
		<-h.gate
	}
	return h.Reader.Read(p[:min(len(p), 512)])
}

var templateRequests = map[string]request{
	"get":                   {line: "GET /v0/volume_templates/t", as: readerKey},
	"list":                  {line: "GET /v0/volume_templates", as: readerKey},
	"history":               {line: "GET /v0/volume_templates/t/history", as: readerKey},
	"create":                {line: "POST /v0/volume_templates", body: `{"metadata":{"name":"t"}}`},
	"change":                {line: "PUT /v0/volume_templates/t", body: `{"spec":{"defaultSize":64}}`},
	"begin an upload":       {line: "PUT /v0/volume_templates/t?upload=true", body: `{}`},
	"upload":                {line: "PUT {upload}", body: string(tarOf("file", "other")), tar: true},
	"upload what is bad":    {line: "PUT {upload}", body: string(tarOf("/etc/../../x", "other")), tar: true},
	"volume from latest":    {line: "POST /v0/volumes", body: `{"metadata":{"name":"v"},"spec":{"size":32,"template":"t"}}`},
	"volume from 1":         {line: "POST /v0/volumes", body: `{"metadata":{"name":"v"},"spec":{"size":32,"template":"t:1"}}`},
	"volume too small":      {line: "POST /v0/volumes", body: `{"metadata":{"name":"v"},"spec":{"size":1,"template":"t:2","filesystem":"xfs"}}`},
	"pin 1":                 {line: "PUT /v0/volume_templates/t/versions/1/pin"},
	"unpin 1":               {line: "DELETE /v0/volume_templates/t/versions/1/pin"},
	"roll back to 1":        {line: "POST /v0/volume_templates/t/rollback", body: `{"version":"1"}`},
	"verify 1":              {line: "POST /v0/volume_templates/t/versions/1/verify"},
	"compare 1 with latest": {line: "GET /v0/volume_templates/t/diff?from=1&to=latest", as: readerKey},
	"pull latest":           {line: "GET /v0/volume_templates/t/archive", as: readerKey},
	"delete version 1":      {line: "DELETE /v0/volume_templates/t/versions/1"},
	"delete":                {line: "DELETE /v0/volume_templates/t"},
}

func TestAnswersOfTemplates(t *testing.T) {
	holdAnswers(t, "Templates", newTemplateWorld, templateStates, templateRequests)
}
