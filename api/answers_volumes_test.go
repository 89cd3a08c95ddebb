package api_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev/attach"
	"holdfast/engine"
)

// once makes a function that can be called again.
func once(fn func()) func() { return sync.OnceFunc(fn) }

// onHost is a target that every world can attach to.
var onHost = attach.Target{Type: "host", Path: "/a/b"}

func (w *world) makeVolume() {
	w.t.Helper()
	w.request("POST /v0/volumes", newVolume("v", object{"size": 4})).is(200)
}

// attached attaches the volume v; id is what its attachment is called then.
func (w *world) attached(readOnly bool) {
	w.t.Helper()
	_, err := w.engine.Attach(w.t.Context(), "main", "v", engine.AttachVolume{
		Holder: "sandbox:s1", Target: onHost, ReadOnly: readOnly,
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) attachments() []engine.Attachment {
	w.t.Helper()
	v, err := w.engine.Volume("main", "v")
	if err != nil {
		w.t.Fatal(err)
	}
	return v.Attachments
}

// until waits for the volume's attachment to be in a phase.
func (w *world) until(phase engine.AttachmentPhase) {
	w.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if a := w.attachments(); len(a) == 1 && a[0].Phase == phase {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("no attachment becomes %s: %+v", phase, w.attachments())
		}
	}
}

// attaching begins to attach the volume, which goes no further than the gate.
func (w *world) attaching() (release func()) {
	gate := make(chan struct{})
	w.sandboxes.be(func(a *toyAttacher) { a.gate = gate })
	go func() {
		_, _ = w.engine.Attach(context.Background(), "main", "v", engine.AttachVolume{Holder: "sandbox:s1", Target: onHost})
	}()
	w.until(engine.Attaching)
	return once(func() {
		w.sandboxes.be(func(a *toyAttacher) { a.gate = nil })
		close(gate)
	})
}

var attachmentStates = map[string]state{
	"no volume": {enter: func(w *world) func() { return nil }},
	"being created": {enter: func(w *world) func() {
		begun, gate := make(chan struct{}), make(chan struct{})
		var first sync.Once
		w.pool.Failpoint = func(point string) error {
			first.Do(func() { close(begun); <-gate })
			return nil
		}
		go func() {
			_, _ = w.engine.CreateVolume(context.Background(), engine.CreateVolume{Workspace: "main", Name: "v", SizeMiB: new(int64(4))})
		}()
		<-begun
		return once(func() { close(gate) })
	}},
	"detached": {enter: func(w *world) func() { w.makeVolume(); return nil }},
	"being moved": {enter: func(w *world) func() {
		w.makeVolume()
		w.as(writerKey, "POST /v0/volumes/v/move", `{"pool":"second"}`).is(200)
		return nil
	}},
	"attaching": {enter: func(w *world) func() {
		w.makeVolume()
		return w.attaching()
	}},
	"attaching, hangs": {limit: 400 * time.Millisecond, enter: func(w *world) func() {
		w.makeVolume()
		gate := make(chan struct{})
		w.sandboxes.be(func(a *toyAttacher) { a.gate = gate })
		w.t.Cleanup(func() { close(gate) })
		_, err := w.engine.Attach(w.t.Context(), "main", "v", engine.AttachVolume{Holder: "sandbox:s1", Target: onHost})
		if !errors.Is(err, engine.ErrHanging) {
			w.t.Fatalf("attaching to a sandbox that hangs: %v", err)
		}
		return nil
	}},
	"attached, writer": {enter: func(w *world) func() { w.makeVolume(); w.attached(false); return nil }},
	"attached, reader": {enter: func(w *world) func() { w.makeVolume(); w.attached(true); return nil }},
	"attached, files open": {enter: func(w *world) func() {
		w.makeVolume()
		w.attached(false)
		w.sandboxes.be(func(a *toyAttacher) { a.busy = true })
		return nil
	}},
	"attached, frozen": {enter: func(w *world) func() {
		w.makeVolume()
		w.attached(false)
		w.as(writerKey, "POST /v0/volumes/v/freeze", `{"timeout":"60s"}`).is(200)
		return nil
	}},
	"attached, sandbox died": {enter: func(w *world) func() {
		w.makeVolume()
		w.attached(false)
		w.sandboxes.be(func(a *toyAttacher) { a.gone = true })
		return nil
	}},
	"detaching, held": {enter: func(w *world) func() {
		w.makeVolume()
		w.attached(false)
		w.stage.mu.Lock()
		w.stage.held = true
		w.stage.mu.Unlock()
		if _, err := w.engine.Detach(w.t.Context(), "main", "v", w.attachments()[0].ID, ""); err == nil {
			w.t.Fatal("it is held and was detached")
		}
		w.until(engine.Detaching)
		return nil
	}},
	"deleted": {enter: func(w *world) func() {
		w.makeVolume()
		w.as(writerKey, "DELETE /v0/volumes/v", nil).is(200)
		return nil
	}},
}

var volumeRequests = map[string]request{
	"get":                     {line: "GET /v0/volumes/v", as: readerKey},
	"list":                    {line: "GET /v0/volumes", as: readerKey},
	"change labels":           {line: "PUT /v0/volumes/v", body: `{"metadata":{"labels":{"a":"b"}}}`},
	"grow":                    {line: "PUT /v0/volumes/v", body: `{"spec":{"size":64}}`},
	"shrink":                  {line: "PUT /v0/volumes/v", body: `{"spec":{"size":2}}`},
	"create again":            {line: "POST /v0/volumes", body: `{"metadata":{"name":"v"},"spec":{"size":1}}`},
	"delete":                  {line: "DELETE /v0/volumes/v"},
	"attach, the same":        {line: "POST /v0/volumes/v/attachments", body: attachBody("s1", false, false)},
	"attach, another writer":  {line: "POST /v0/volumes/v/attachments", body: attachBody("s2", false, false)},
	"attach, another reader":  {line: "POST /v0/volumes/v/attachments", body: attachBody("s2", true, false)},
	"attach, writer by force": {line: "POST /v0/volumes/v/attachments", body: attachBody("s2", false, true)},
	"list attachments":        {line: "GET /v0/volumes/v/attachments", as: readerKey},
	"get attachment":          {line: "GET /v0/volumes/v/attachments/{id}", as: readerKey},
	"detach":                  {line: "DELETE /v0/volumes/v/attachments/{id}"},
	"detach by force":         {line: "DELETE /v0/volumes/v/attachments/{id}?force=true"},
	"stats":                   {line: "GET /v0/volumes/v/stats", as: readerKey},
	"trim":                    {line: "POST /v0/volumes/v/trim"},
	"freeze":                  {line: "POST /v0/volumes/v/freeze", body: `{"timeout":"10s"}`},
	"thaw":                    {line: "POST /v0/volumes/v/thaw"},
	"capture":                 {line: "POST /v0/volumes/v/capture", body: `{"template":"made"}`},
	"snapshot":                {line: "POST /v0/volumes/v/snapshots"},
	"snapshot, filesystem":    {line: "POST /v0/volumes/v/snapshots", body: `{"spec":{"consistency":"filesystem"}}`},
	"list snapshots":          {line: "GET /v0/volumes/v/snapshots", as: readerKey},
	"sanitize":                {line: "POST /v0/volumes/v/sanitize", body: `{"name":"clean"}`},
	"move":                    {line: "POST /v0/volumes/v/move", body: `{"pool":"second"}`},
	"move, where it is":       {line: "POST /v0/volumes/v/move", body: `{"pool":"default"}`},
	"set limits":              {line: "PUT /v0/volumes/v/attachments/{id}/limits", body: `{"readIops":100}`},
	"list files":              {line: "GET /v0/volumes/v/files?path=/", as: readerKey},
}

// attachBody asks for an attachment. That of s1 has another place than all others.
func attachBody(sandbox string, readOnly, force bool) object {
	path := "/a/b"
	if sandbox != "s1" {
		path = "/a/" + sandbox
	}
	return object{"holder": "sandbox:" + sandbox, "target": object{"type": "host", "path": path}, "readOnly": readOnly, "force": force}
}

func TestAnswersOfVolumes(t *testing.T) {
	makeWorld := func(t *testing.T, limit time.Duration) *world { return newWorldOfTwo(t, limit) }
	holdAnswers(t, "Volumes and attachments", makeWorld, attachmentStates, volumeRequests)
}
