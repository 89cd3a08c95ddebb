package api_test

import (
	"testing"

	"holdfast/api"
	"holdfast/blockdev"
	"holdfast/templates"
)

func TestTemplateHistory(t *testing.T) {
	w := newWorld(t)
	w.push("app", 10)
	w.push("app", 20)
	w.request("POST /v0/volumes", newVolume("made", object{"template": "app:1", "size": 20})).is(200)
	one, err := w.shelf.Template("main", "app")
	if err != nil {
		t.Fatal(err)
	}
	w.shelf.sources = map[blockdev.ID][]templates.SourceSpec{one.Revisions[0].ID: {{Filesystem: "ext4", Size: 20 << 20}}}
	w.shelf.all["main/app"].Events = []templates.Event{{Time: w.now(), Type: templates.Retired, Version: "0", Message: "too old"}}
	h := into[api.TemplateHistory](w.request("GET /v0/volume_templates/app/history", nil).is(200))
	if len(h.Versions) != 2 || h.Versions[0].Volumes.Count != 1 || h.Versions[0].Volumes.Names[0] != "made" || len(h.Versions[0].Sources) != 1 ||
		h.Versions[1].Volumes.Count != 0 || h.Versions[1].Number != 2 || len(h.Events) != 1 || h.Events[0].Type != "retired" {
		t.Errorf("%+v", h)
	}
	w.request("GET /v0/volume_templates/none/history", nil).refused(404, "NOT_FOUND", "")
	w.request("DELETE /v0/volumes/made", nil).is(200)
	h = into[api.TemplateHistory](w.request("GET /v0/volume_templates/app/history", nil).is(200))
	if h.Versions[0].Volumes.Count != 0 {
		t.Errorf("a deleted volume is counted: %+v", h.Versions[0].Volumes)
	}
}

func TestPinRollbackVerify(t *testing.T) {
	w := newWorld(t)
	w.push("app", 10)
	w.push("app", 20)
	v := into[api.TemplateVersion](w.request("PUT /v0/volume_templates/app/versions/1/pin", nil).is(200))
	if v.Pinned == nil || v.Pinned.By != "ann" {
		t.Errorf("%+v", v)
	}
	w.request("DELETE /v0/volume_templates/app/versions/1", nil).refused(409, "VERSION_PINNED", "")
	if v = into[api.TemplateVersion](w.request("DELETE /v0/volume_templates/app/versions/1/pin", nil).is(200)); v.Pinned != nil {
		t.Errorf("%+v", v)
	}
	v = into[api.TemplateVersion](w.request("POST /v0/volume_templates/app/rollback", object{"version": "1"}).is(200))
	if v.Number != 3 || v.RollbackOf != 1 || v.CreatedBy != "ann" {
		t.Errorf("%+v", v)
	}
	w.request("POST /v0/volume_templates/app/rollback", object{}).refused(400, "INVALID_REQUEST", "version")
	w.request("POST /v0/volume_templates/app/rollback", object{"version": "9"}).refused(404, "NOT_FOUND", "")
	w.request("POST /v0/volume_templates/app/rollback", object{"version": 1}).refused(400, "INVALID_REQUEST", "version")
	for _, line := range []string{"PUT /v0/volume_templates/app/versions/9/pin", "DELETE /v0/volume_templates/app/versions/9/pin", "POST /v0/volume_templates/app/versions/9/verify"} {
		w.request(line, nil).refused(404, "NOT_FOUND", "")
	}
	if v = into[api.TemplateVersion](w.request("POST /v0/volume_templates/app/versions/2/verify", nil).is(200)); v.Status != "READY" || v.VerifiedAt == "" {
		t.Errorf("%+v", v)
	}
	w.shelf.broken = true
	if v = into[api.TemplateVersion](w.request("POST /v0/volume_templates/app/versions/3/verify", nil).is(200)); v.Status != "FAILED" || !v.Damaged || v.Failure == "" {
		t.Errorf("%+v", v)
	}
	w.request("POST /v0/volume_templates/app/rollback", object{"version": "3"}).refused(409, "VERSION_DAMAGED", "")
	// The newest one is damaged: there is no latest one, and no older one in its place.
	got := into[api.Template](w.request("GET /v0/volume_templates/app", nil).is(200))
	if got.State.Status != "error" || got.State.LatestVersion != "" {
		t.Errorf("%+v", got.State)
	}
}

func TestRetentionOnTheWire(t *testing.T) {
	w := newWorld(t)
	set := func(retention any) *api.Retention {
		t.Helper()
		return into[api.Template](w.request("PUT /v0/volume_templates/app", object{"spec": object{"retention": retention}}).is(200)).Spec.Retention
	}
	if r := set(object{"versions": 5, "days": 30}); r == nil || *r != (api.Retention{Versions: 5, Days: 30}) {
		t.Errorf("%+v", r)
	}
	if r := set(object{"days": 7}); r == nil || *r != (api.Retention{Versions: 5, Days: 7}) {
		t.Errorf("a merge: %+v", r)
	}
	if r := set(nil); r == nil || r.Versions != 5 {
		t.Errorf("null is not given: %+v", r)
	}
	if r := set(object{"versions": 0, "days": 0}); r != nil {
		t.Errorf("back to the node's: %+v", r)
	}
	w.request("PUT /v0/volume_templates/app", `{"spec":{"retention":{"versions":"five"}}}`).refused(400, "INVALID_REQUEST", "retention")
}
