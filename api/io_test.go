package api_test

import (
	"testing"

	"holdfast/api"
	"holdfast/blockdev"
)

func TestVolumeIO(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	w.create("other")
	one := into[api.VolumeIO](w.request("GET /v0/volumes/x/io", nil).is(200))
	if one.Name != "x" || one.Worker != nil || one.Counters != nil || len(one.Waits) != 1 || one.Waits[0].Cause != "nothing" {
		t.Errorf("%+v", one)
	}
	if all := into[api.IOInUse](w.request("GET /v0/io", nil).is(200)); len(all.Data) != 0 || all.More {
		t.Errorf("%+v", all)
	}
	w.request("POST /v0/volumes/x/attachments", attachTo("sandbox:s", "/srv/a")).is(200)
	all := into[api.IOInUse](w.request("GET /v0/io", nil).is(200))
	if len(all.Data) != 1 || all.Data[0].Name != "x" || all.Data[0].Counters == nil || all.Data[0].Waits[0].Cause != "unknown" {
		t.Errorf("%+v", all)
	}
	w.request("GET /v0/volumes/absent/io", nil).refused(404, "NOT_FOUND", "absent")
}

// A worker's numbers are shown to the last field of the document.
func TestIOOfAServedVolume(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	v, err := w.engine.Volume("main", "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.pool.Open(t.Context(), v.ID, blockdev.Want{Kinds: []blockdev.Kind{blockdev.VhostUser}}); err != nil {
		t.Fatal(err)
	}
	if err := w.pool.Throttle(t.Context(), v.ID, blockdev.Limits{ReadIOPS: 50}); err != nil {
		t.Fatal(err)
	}
	s := into[api.VolumeIO](w.request("GET /v0/volumes/x/io", nil).is(200))
	worker := s.Worker
	if worker == nil || worker.Kind != "vhost-user" || worker.Limits == nil || worker.Limits.ReadIOPS != 50 || worker.Failed || len(worker.Requests) != 5 || len(worker.Waiting) != 4 {
		t.Errorf("%+v", worker)
	}
}
