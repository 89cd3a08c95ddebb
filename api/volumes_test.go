package api_test

import (
	"strings"
	"testing"

	"holdfast/api"
)

// TestHydrationShows: a volume whose bytes lie in several places is ready, and says so;
// who needs them in one gets that.
func TestHydrationShows(t *testing.T) {
	w := newWorld(t)
	made := w.create("x")
	w.pool.Layered = true
	v, err := w.engine.Volume("main", "x")
	if err != nil || made.State.Sizes.Hydration != nil {
		t.Fatalf("%+v, %v", made.State.Sizes.Hydration, err)
	}
	if _, err := w.pool.Snapshot(t.Context(), "snp-00000000000000000000000000", v.ID); err != nil {
		t.Fatal(err)
	}
	got := into[api.Volume](w.request("GET /v0/volumes/x", nil).is(200))
	if h := got.State.Sizes.Hydration; got.Status != "DEPLOYED" || h == nil || h.Layers != 1 || h.Total != got.State.Sizes.Device || h.FailingSince != "" {
		t.Errorf("%s, %+v", got.Status, h)
	}
	w.request("POST /v0/volumes/x/attachments", attachTo("sandbox:a", "/srv/a")).is(200)
	if got := into[api.Volume](w.request("GET /v0/volumes/x", nil).is(200)); got.State.Sizes.Hydration != nil {
		t.Errorf("attached: %+v", got.State.Sizes.Hydration)
	}
}

func TestVolumeLife(t *testing.T) {
	w := newWorld(t)
	w.request("GET /v0/volumes/data", nil).refused(404, "NOT_FOUND", "data")
	made := into[api.Volume](w.request("POST /v0/volumes", object{
		"metadata": object{"name": "data", "displayName": "My Data", "labels": object{"env": "test"}, "externalId": "session-1"},
		"spec":     object{"size": 512},
	}).is(200))
	if made.Status != "DEPLOYED" || made.Spec.Size != 512 || made.Spec.Region != "us-pdx-1" || made.Spec.Filesystem != "ext4" ||
		made.Metadata.Workspace != "main" || made.Metadata.CreatedBy != "ann" || len(made.Events) == 0 {
		t.Fatalf("created: %+v", made)
	}
	if s := made.State.Sizes; s == nil || s.Wanted != 512<<20 || s.Device != 512<<20 || s.Filesystem != 512<<20 || s.Pending != "" {
		t.Fatalf("sizes: %+v", s)
	}
	grown := into[api.Volume](w.request("PUT /v0/volumes/data", `{"spec":{"size":1024}}`).is(200))
	if grown.Spec.Size != 1024 || grown.State.Sizes.Filesystem != 1024<<20 || grown.Metadata.DisplayName != "My Data" || grown.Metadata.Labels["env"] != "test" {
		t.Fatalf("grown: %+v", grown)
	}
	same := into[api.Volume](w.request("GET /v0/volumes/by-external-id/session-1", nil).is(200))
	if same.Metadata.Name != "data" || same.Metadata.CreatedAt != made.Metadata.CreatedAt {
		t.Fatalf("by external id: %+v", same)
	}
	gone := into[api.Volume](w.request("DELETE /v0/volumes/data", nil).is(200))
	if gone.Status != "DELETING" || gone.TerminatedAt == "" {
		t.Fatalf("deleted: %+v", gone)
	}
	w.request("GET /v0/volumes/data", nil).is(404)
	w.request("GET /v0/volumes/by-external-id/session-1", nil).is(404)
	w.request("DELETE /v0/volumes/data", nil).is(404)
}

func TestVolumeWithoutName(t *testing.T) {
	w := newWorld(t)
	v := into[api.Volume](w.request("POST /v0/volumes", `{"spec":null}`).is(200))
	if !strings.HasPrefix(v.Metadata.Name, "volume-") || v.Spec.Size != 1024 {
		t.Fatalf("made: %+v", v)
	}
	if e := w.audit.last(t); e.Resource != v.Metadata.Name {
		t.Fatalf("audit: %+v", e)
	}
}
