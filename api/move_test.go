package api_test

import (
	"context"
	"testing"

	"holdfast/api"
	"holdfast/engine"
)

// onItsWay is an engine whose volumes are moved half-way, and no further.
type onItsWay struct{ api.Engine }

func (e onItsWay) MoveVolume(_ context.Context, workspace, name, pool, actor string) (engine.Volume, error) {
	v, err := e.Volume(workspace, name)
	v.Move = &engine.Move{To: pool, Phase: engine.MoveCopying, Size: 8 << 20, Done: 4 << 20, Copied: 1 << 20, Failure: "the pool is full", StartedAt: v.CreatedAt}
	v.UpdatedBy = actor
	return v, err
}

func TestMove(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Engine = onItsWay{o.Engine} })
	created := w.create("x")
	v := into[api.Volume](w.request("POST /v0/volumes/x/move", `{"pool":"fast"}`).is(200))
	want := api.Move{From: "default", To: "fast", Phase: "copying", Size: 8 << 20, Done: 4 << 20, Copied: 1 << 20, Failure: "the pool is full", StartedAt: created.Metadata.CreatedAt}
	if v.State.Move == nil || *v.State.Move != want {
		t.Errorf("%+v, want %+v", v.State.Move, want)
	}
	if e := w.audit.last(t); e.Action != "volume.move" || e.Resource != "x" || e.Principal != "ann" {
		t.Errorf("%+v", e)
	}
}

func TestMoveRefused(t *testing.T) {
	w := newWorld(t)
	w.create("x")
	if v := into[api.Volume](w.request("POST /v0/volumes/x/move", `{"pool":"default"}`).is(200)); v.State.Move != nil {
		t.Errorf("where it is: %+v", v.State.Move)
	}
	w.request("POST /v0/volumes/x/move", `{"pool":"fast"}`).refused(400, "INVALID_REQUEST", "there are default")
	w.request("POST /v0/volumes/absent/move", `{"pool":"default"}`).refused(404, "NOT_FOUND", "absent")
	for _, body := range []string{`{}`, `{"pool":""}`, `{"pool":5}`, `[]`} {
		w.request("POST /v0/volumes/x/move", body).refused(400, "INVALID_REQUEST", "")
	}
}
