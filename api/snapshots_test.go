package api_test

import (
	"strings"
	"testing"

	"holdfast/api"
	"holdfast/engine"
)

func (w *world) snap(volume, name string, labels object) api.Snapshot {
	w.t.Helper()
	return into[api.Snapshot](w.request("POST /v0/volumes/"+volume+"/snapshots", object{"metadata": object{"name": name, "labels": labels}}).is(200))
}

func TestSnapshots(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	s := w.snap("x", "first", object{"kind": "manual"})
	if s.Metadata.Name != "first" || !strings.HasPrefix(s.Metadata.ID, "snp-") || s.Metadata.Workspace != "main" || s.Metadata.CreatedBy != "ann" || s.Metadata.Labels["kind"] != "manual" ||
		s.Spec.Volume != "x" || s.Spec.Size != 1 || s.Spec.Filesystem != "ext4" || s.Spec.Consistency != "crash" || s.Status != "READY" || s.State.Space != nil {
		t.Errorf("%+v", s)
	}
	if e := w.audit.last(t); e.Action != "snapshot.create" || e.Resource != "x/first" || e.Principal != "ann" || e.Status != 200 {
		t.Errorf("%+v", e)
	}
	bare := into[api.Snapshot](w.request("POST /v0/volumes/x/snapshots", nil).is(200)) // all that is in the body may be left out
	if !strings.HasPrefix(bare.Metadata.Name, "snapshot-") {
		t.Errorf("%+v", bare)
	}
	for _, line := range []string{"GET /v0/volumes/x/snapshots/first", "GET /v0/volumes/x/snapshots/" + s.Metadata.ID, "GET /v0/snapshots/" + s.Metadata.ID} {
		got := into[api.Snapshot](w.as(readerKey, line, nil).is(200))
		if got.Metadata.ID != s.Metadata.ID || got.State.Space == nil || got.State.Space.Exclusive == nil {
			t.Errorf("%s: %+v", line, got)
		}
	}
	fork := into[api.Volume](w.request("POST /v0/volumes", newVolume("fork", object{"snapshot": "x/first"})).is(200))
	if fork.Spec.Snapshot != "x/first" || fork.Spec.Size != 1 || fork.Spec.Filesystem != "ext4" {
		t.Errorf("%+v", fork)
	}
	w.request("PUT /v0/volumes/fork", `{"spec":{"snapshot":"x/first"}}`).is(200) // clients echo it
	w.request("PUT /v0/volumes/fork", `{"spec":{"snapshot":"x/other"}}`).refused(400, "INVALID_REQUEST", "spec.snapshot")
	w.request("DELETE /v0/volumes/x", nil).is(200)
	w.request("GET /v0/volumes/x/snapshots", nil).is(404)
	w.request("DELETE /v0/volumes/x/snapshots/first", nil).is(404)
	if l := into[api.SnapshotList](w.request("GET /v0/snapshots", nil).is(200)); l.Meta.Total != 2 || l.Data[1].Metadata.ID != s.Metadata.ID {
		t.Errorf("%+v", l)
	}
	if gone := into[api.Snapshot](w.request("DELETE /v0/snapshots/"+s.Metadata.ID, nil).is(200)); gone.Status != "DELETING" {
		t.Errorf("%+v", gone)
	}
	w.request("DELETE /v0/snapshots/"+s.Metadata.ID, nil).refused(404, "NOT_FOUND", "snp-")
	if e := w.audit.last(t); e.Action != "snapshot.delete" || e.Status != 404 {
		t.Errorf("%+v", e)
	}
}

func TestSnapshotPages(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	w.create("y")
	for _, name := range []string{"a", "b", "c"} {
		w.snap("x", name, object{"n": name})
	}
	w.snap("y", "other", nil)
	page := into[api.SnapshotList](w.request("GET /v0/volumes/x/snapshots?limit=2&sort=name:asc", nil).is(200))
	if len(page.Data) != 2 || page.Data[0].Metadata.Name != "a" || !page.Meta.HasMore || page.Meta.Total != 3 {
		t.Fatalf("%+v", page)
	}
	next := "/v0/volumes/x/snapshots?limit=2&sort=name:asc&cursor=" + page.Meta.NextCursor
	if page = into[api.SnapshotList](w.request("GET "+next, nil).is(200)); len(page.Data) != 1 || page.Data[0].Metadata.Name != "c" || page.Meta.HasMore {
		t.Errorf("%+v", page)
	}
	w.request("GET "+strings.Replace(next, "/x/", "/y/", 1), nil).refused(400, "INVALID_CURSOR", "")
	w.request("GET "+strings.Replace(next, "volumes/x/", "", 1), nil).refused(400, "INVALID_CURSOR", "")
	w.request("GET /v0/snapshots?limit=0", nil).refused(400, "INVALID_REQUEST", "limit")
	w.request("GET /v0/snapshots?sort=size", nil).refused(400, "INVALID_REQUEST", "sort")
	if l := into[api.SnapshotList](w.request("GET /v0/snapshots?label=n=b", nil).is(200)); len(l.Data) != 1 || l.Data[0].Metadata.Name != "b" {
		t.Errorf("%+v", l)
	}
	if l := into[api.SnapshotList](w.as(foreignKey, "GET /v0/snapshots", nil).is(200)); len(l.Data) != 0 {
		t.Errorf("another workspace's snapshots: %+v", l)
	}
}

func TestSnapshotsRefused(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	s := w.snap("x", "taken", nil)
	w.request("POST /v0/volumes/x/snapshots", `{"metadata":{"name":"taken"}}`).refused(409, "ALREADY_EXISTS", "taken")
	w.request("POST /v0/volumes/x/snapshots", `{"metadata":{"name":"Bad"}}`).refused(400, "INVALID_REQUEST", "metadata.name")
	w.request("POST /v0/volumes/x/snapshots", `{"spec":{"consistency":"perfect"}}`).refused(400, "INVALID_REQUEST", "spec.consistency")
	w.request("POST /v0/volumes/x/snapshots", `[]`).refused(400, "INVALID_REQUEST", "body")
	w.request("POST /v0/volumes", newVolume("f", object{"snapshot": "x/absent"})).refused(400, "INVALID_REQUEST", "spec.snapshot")
	w.request("POST /v0/volumes", `{"metadata":{"name":"f"},"spec":{"snapshot":"x/taken","template":"t"}}`).refused(400, "INVALID_REQUEST", "not from both")
	w.as(foreignKey, "GET /v0/snapshots/"+s.Metadata.ID, nil).refused(404, "NOT_FOUND", "")
	w.as(foreignKey, "DELETE /v0/snapshots/"+s.Metadata.ID, nil).refused(404, "NOT_FOUND", "")
	w.as(foreignKey, "POST /v0/volumes", newVolume("f", object{"snapshot": s.Metadata.ID})).refused(400, "INVALID_REQUEST", "spec.snapshot")
	if err := w.engine.SetQuota(t.Context(), "main", engine.Quota{Snapshots: 1}); err != nil {
		t.Fatal(err)
	}
	w.request("POST /v0/volumes/x/snapshots", nil).refused(403, "QUOTA_EXCEEDED", "1 snapshots")
	if q := into[api.QuotaBody](w.as(nodeKey, "PUT /v0/workspaces/main/quota", `{"snapshots":2}`).is(200)); q.Snapshots != 2 {
		t.Errorf("%+v", q)
	}
	const key = "Idempotency-Key: again"
	first := w.request("POST /v0/volumes/x/snapshots", nil, key).is(200)
	if again := w.request("POST /v0/volumes/x/snapshots", nil, key).is(200); string(again.Body) != string(first.Body) {
		t.Errorf("%s, then %s", first.Body, again.Body)
	}
	w.request("POST /v0/volumes/x/snapshots", `{"metadata":{"name":"else"}}`, key).refused(409, "CONFLICT", "another request")
}
