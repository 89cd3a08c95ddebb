package api_test

import (
	"testing"
	"time"

	"holdfast/api"
)

func TestStats(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	s := into[api.Stats](w.request("GET /v0/volumes/x/stats", nil).is(200))
	if s.State != "unmounted" || s.Device != 1<<20 || s.Filesystem == nil || s.Filesystem.Source != "superblock" || s.Filesystem.UsedInodes != 11 || s.IO != nil {
		t.Errorf("%+v", s)
	}
	w.request("POST /v0/volumes/x/attachments", attachTo("sandbox:s", "/srv/a")).is(200)
	s = into[api.Stats](w.request("GET /v0/volumes/x/stats", nil).is(200))
	if s.State != "mounted" || s.Filesystem.Source != "kernel" || s.IO == nil {
		t.Errorf("%+v", s)
	}
	w.request("POST /v0/volumes", newVolume("raw", object{"size": 1, "filesystem": "none"})).is(200)
	if s := into[api.Stats](w.request("GET /v0/volumes/raw/stats", nil).is(200)); s.Filesystem != nil || s.Unknown == "" {
		t.Errorf("%+v", s)
	}
	w.request("GET /v0/volumes/absent/stats", nil).refused(404, "NOT_FOUND", "absent")
}

func TestFreezeAndThaw(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	w.request("POST /v0/volumes/x/freeze", nil).refused(409, "CONFLICT", "detached")
	w.request("POST /v0/volumes/x/attachments", attachTo("sandbox:s", "/srv/a")).is(200)
	for _, body := range []string{`{"timeout":"soon"}`, `{"timeout":"-1s"}`, `{"timeout":"1h"}`, `[]`, `{"timeout":5}`} {
		w.request("POST /v0/volumes/x/freeze", body).refused(400, "INVALID_REQUEST", "")
	}
	f := into[api.FreezeState](w.request("POST /v0/volumes/x/freeze", `{"timeout":"30s"}`).is(200))
	until, err := time.Parse(time.RFC3339Nano, f.Until)
	if left := until.Sub(w.now()); err != nil || !f.Frozen || left > 30*time.Second || left < 29*time.Second {
		t.Errorf("%+v, %v", f, err)
	}
	if e := w.audit.last(t); e.Action != "volume.freeze" || e.Resource != "x" || e.Principal != "ann" {
		t.Errorf("%+v", e)
	}
	v := into[api.Volume](w.request("GET /v0/volumes/x", nil).is(200))
	if v.State.FrozenUntil != f.Until || v.Events[len(v.Events)-1].Type != "freeze" {
		t.Errorf("%+v", v)
	}
	if s := into[api.Stats](w.request("GET /v0/volumes/x/stats", nil).is(200)); s.State != "frozen" || s.FrozenUntil != f.Until {
		t.Errorf("%+v", s)
	}
	w.request("POST /v0/volumes/x/freeze", nil).refused(409, "CONFLICT", "frozen until")
	w.request("POST /v0/volumes/x/trim", nil).refused(409, "CONFLICT", "frozen until")
	if f := into[api.FreezeState](w.request("POST /v0/volumes/x/thaw", nil).is(200)); f.Frozen || !*f.WasFrozen {
		t.Errorf("%+v", f)
	}
	if f := into[api.FreezeState](w.request("POST /v0/volumes/x/thaw", nil).is(200)); f.Frozen || *f.WasFrozen {
		t.Errorf("%+v", f)
	}
	v = into[api.Volume](w.request("GET /v0/volumes/x", nil).is(200))
	if v.State.FrozenUntil != "" || v.Events[len(v.Events)-1].Type != "thaw" {
		t.Errorf("%+v", v)
	}
	// The default is ten seconds.
	f = into[api.FreezeState](w.request("POST /v0/volumes/x/freeze", nil).is(200))
	if until, err := time.Parse(time.RFC3339Nano, f.Until); err != nil || until.Sub(w.now()) > 10*time.Second {
		t.Errorf("%+v", f)
	}
}

func TestTrim(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	r := into[api.TrimResult](w.request("POST /v0/volumes/x/trim", nil).is(200))
	if !r.Complete || r.Discarded != 4096 || r.Freed != 0 || r.Reason != "" {
		t.Errorf("%+v", r)
	}
	if e := w.audit.last(t); e.Action != "volume.trim" || e.Resource != "x" {
		t.Errorf("%+v", e)
	}
	w.request("POST /v0/volumes/x/attachments", object{"holder": "sandbox:s", "target": object{"type": "host", "path": "/srv/a"}, "readOnly": true}).is(200)
	w.request("POST /v0/volumes/x/trim", nil).refused(409, "CONFLICT", "read-only to sandbox:s")
	w.request("POST /v0/volumes", newVolume("raw", object{"size": 1, "filesystem": "none"})).is(200)
	w.request("POST /v0/volumes/raw/trim", nil).refused(409, "UNSUPPORTED", "no filesystem")
}

func TestAttachmentLimits(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	body := object{"holder": "sandbox:s", "target": object{"type": "host", "path": "/srv/a"}, "limits": object{"readIops": 100, "writeBytesPerSecond": 1 << 20}}
	a := into[api.Attachment](w.request("POST /v0/volumes/x/attachments", body).is(200))
	if a.Limits == nil || *a.Limits != (api.RateLimits{ReadIOPS: 100, WriteBytes: 1 << 20}) || a.Enforcement.Mechanism != "toy" || a.Enforcement.Gaps[0] != "everything" {
		t.Errorf("%+v", a)
	}
	line := "PUT /v0/volumes/x/attachments/" + a.ID + "/limits"
	a = into[api.Attachment](w.request(line, object{"writeIops": 50}).is(200))
	if *a.Limits != (api.RateLimits{WriteIOPS: 50}) {
		t.Errorf("%+v", a.Limits)
	}
	if e := w.audit.last(t); e.Action != "attachment.limits" || e.Resource != "x" {
		t.Errorf("%+v", e)
	}
	for body, part := range map[string]string{
		`{"readIops":1}`: "limits.readIops", `{"writeBytesPerSecond":-5}`: "limits.writeBytesPerSecond", `{"readIops":"many"}`: "readIops", `[]`: "object",
	} {
		w.request(line, body).refused(400, "INVALID_REQUEST", part)
	}
	if a := into[api.Attachment](w.request("GET /v0/volumes/x/attachments/"+a.ID, nil).is(200)); a.Limits.WriteIOPS != 50 {
		t.Errorf("%+v", a)
	}
	a = into[api.Attachment](w.request(line, object{}).is(200))
	if a.Limits != nil || a.Enforcement != nil {
		t.Errorf("%+v", a)
	}
	w.request("PUT /v0/volumes/x/attachments/att-none/limits", object{}).refused(404, "NOT_FOUND", "no attachment")

	strict := newWorld(t, func(o *api.Options) { o.TenantsAttach = false })
	strict.create("x")
	strict.request("PUT /v0/volumes/x/attachments/att-none/limits", object{}).refused(403, "FORBIDDEN", "control-plane key")
}

func TestCapture(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	c := into[api.Captured](w.request("POST /v0/volumes/x/capture", object{"template": "made", "version": "first"}).is(200))
	if c.Online || c.FrozenMilliseconds != 0 || c.Version.TemplateName != "made" || c.Version.Name != "first" || c.Version.Status != "READY" {
		t.Errorf("%+v", c)
	}
	if e := w.audit.last(t); e.Action != "volume.capture" || e.Resource != "x as made:first" {
		t.Errorf("%+v", e)
	}
	w.request("POST /v0/volumes/x/attachments", attachTo("sandbox:s", "/srv/a")).is(200)
	c = into[api.Captured](w.request("POST /v0/volumes/x/capture", object{"template": "made"}).is(200))
	if !c.Online || c.FrozenMilliseconds <= 0 || c.Version.Name != "2" {
		t.Errorf("%+v", c)
	}
	v := into[api.Volume](w.request("GET /v0/volumes/x", nil).is(200))
	if last := v.Events[len(v.Events)-1]; last.Type != "capture" || last.Message != "Captured as made:2" || v.State.FrozenUntil != "" {
		t.Errorf("%+v", v)
	}
	w.request("POST /v0/volumes", newVolume("y", object{"template": "made:1", "size": 32})).is(400)
	w.request("POST /v0/volumes", newVolume("y", object{"template": "made:first", "size": 32})).is(200)
	for body, part := range map[string]string{`{}`: "template", `{"template":"UPPER"}`: "template", `[]`: "object", `{"template":5}`: "template"} {
		w.request("POST /v0/volumes/x/capture", body).refused(400, "INVALID_REQUEST", part)
	}
	w.request("POST /v0/volumes/absent/capture", object{"template": "made"}).refused(404, "NOT_FOUND", "absent")
	w.request("POST /v0/volumes", newVolume("raw", object{"size": 1, "filesystem": "none"})).is(200)
	w.request("POST /v0/volumes/raw/capture", object{"template": "made"}).refused(409, "UNSUPPORTED", "no filesystem")
}
