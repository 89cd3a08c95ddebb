package templates_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/templates"
)

// events collects what a library tells.
type events struct {
	mu  sync.Mutex
	all []string
}

func (e *events) add(h templates.Happening) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, fmt.Sprintf("%s/%s:%s %s: %s", h.Workspace, h.Template, h.Version, h.Type, h.Message))
}

// take gives what was told since the last call.
func (e *events) take() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer func() { e.all = nil }()
	return strings.Join(e.all, "\n")
}

func TestPins(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.KeepRevisions = 2 })
	ctx := t.Context()
	r.put("app")
	r.push("app", pack(t, file("a", "1")))
	v, err := r.Pin(ctx, workspace, "app", "1", "ann")
	if err != nil || v.Pinned == nil || v.Pinned.By != "ann" || v.Pinned.At.IsZero() {
		t.Fatalf("%+v, %v", v, err)
	}
	if again, err := r.Pin(ctx, workspace, "app", "latest", "bob"); err != nil || again.Pinned.By != "ann" {
		t.Errorf("pinned twice: %+v, %v", again.Pinned, err)
	}
	for i := range 4 {
		r.push("app", pack(t, file("a", fmt.Sprint(i))))
	}
	if got := r.numbers("app"); got != "1p 4 5" {
		t.Errorf("kept %s", got)
	}
	refused := func() {
		t.Helper()
		if _, err := r.DeleteRevision(ctx, workspace, "app", "1", actor); !errors.Is(err, templates.ErrPinned) || !strings.Contains(err.Error(), "ann") {
			t.Errorf("a pinned version: %v", err)
		}
		if _, err := r.Delete(ctx, workspace, "app", actor); !errors.Is(err, templates.ErrPinned) {
			t.Errorf("a template with a pinned version: %v", err)
		}
	}
	refused()
	// The pin is known without the store, and without what is in memory.
	before := r.listing()
	r.wipeStore()
	if after := r.listing(); after != before {
		t.Errorf("without the store:\n%s\nbefore:\n%s", after, before)
	}
	refused()
	r.push("app", pack(t, file("a", "more")))
	if got := r.numbers("app"); got != "1p 5 6" {
		t.Errorf("kept %s", got)
	}
	for range 2 {
		if v, err := r.Unpin(ctx, workspace, "app", "1", "ann"); err != nil || v.Pinned != nil {
			t.Fatalf("%+v, %v", v, err)
		}
	}
	r.reopen()
	if _, err := r.DeleteRevision(ctx, workspace, "app", "1", actor); err != nil {
		t.Error(err)
	}
	r.begin("app", "never")
	for version, want := range map[string]error{"9": templates.ErrNotFound, "never": templates.ErrInvalid, "../5": templates.ErrNotFound} {
		if _, err := r.Pin(ctx, workspace, "app", version, actor); !errors.Is(err, want) {
			t.Errorf("%s: %v", version, err)
		}
	}
	if _, err := r.Pin(ctx, "other", "app", "5", actor); !errors.Is(err, templates.ErrNotFound) {
		t.Error(err)
	}
	r.expectPool(2)
}

func TestRetentionByAge(t *testing.T) {
	var told events
	r := plainRig(t, func(o *templates.Options) { o.OnEvent = told.add; o.KeepAge = 10 * 24 * time.Hour })
	ctx := t.Context()
	r.put("app")
	for i := range 4 {
		r.push("app", pack(t, file("a", fmt.Sprint(i))))
		r.clock.advance(24 * time.Hour)
	}
	if _, err := r.Pin(ctx, workspace, "app", "1", actor); err != nil {
		t.Fatal(err)
	}
	retain := func(want, wantEvents string) {
		t.Helper()
		if err := r.Retain(ctx); err != nil {
			t.Fatal(err)
		}
		if got := r.numbers("app"); got != want {
			t.Errorf("kept %q, want %q", got, want)
		}
		if got := told.take(); got != wantEvents {
			t.Errorf("told:\n%s\nwant:\n%s", got, wantEvents)
		}
	}
	retain("1p 2 3 4", "")
	r.clock.advance(7*24*time.Hour + time.Minute) // 2 is ten days old
	retain("1p 3 4", "main/app:2 retired: versions are kept for 10 days")
	// The template's own choice counts for more than the node's.
	if _, _, err := r.Put(ctx, workspace, "app", templates.Change{KeepDays: ptr(1000)}, false); err != nil {
		t.Fatal(err)
	}
	r.clock.advance(300 * 24 * time.Hour)
	retain("1p 3 4", "")
	if _, _, err := r.Put(ctx, workspace, "app", templates.Change{KeepDays: ptr(1)}, false); err != nil {
		t.Fatal(err)
	}
	// What a volume waits for, and what is being read, is not taken.
	three, err := r.Template(workspace, "app")
	if err != nil {
		t.Fatal(err)
	}
	waiting := map[blockdev.ID]bool{three.Revisions[1].ID: true}
	r.Await(func() map[blockdev.ID]bool { return waiting })
	retain("1p 3 4", "")
	waiting = nil
	retain("1p 4", "main/app:3 retired: versions are kept for 1 day")
	// The newest one stays, however old, also across a restart.
	r.reopen()
	r.clock.advance(3000 * 24 * time.Hour)
	retain("1p 4", "")
	if got, err := r.Template(workspace, "app"); err != nil || len(got.Events) != 2 || got.Events[1].Version != "3" {
		t.Errorf("%+v, %v", got.Events, err)
	}
	before := r.listing()
	r.wipeStore()
	if after := r.listing(); after != before {
		t.Errorf("without the store:\n%s\nbefore:\n%s", after, before)
	}
	// By count, as the template says.
	if _, _, err := r.Put(ctx, workspace, "app", templates.Change{KeepVersions: ptr(1), KeepDays: ptr(0)}, false); err != nil {
		t.Fatal(err)
	}
	r.push("app", pack(t, file("a", "new")))
	if got := r.numbers("app"); got != "1p 5" {
		t.Errorf("kept %s", got)
	}
	if got := told.take(); got != "main/app:4 retired: of unpinned versions 1 is kept" {
		t.Error(got)
	}
	for _, c := range []templates.Change{{KeepDays: ptr(-1)}, {KeepDays: ptr(36501)}, {KeepVersions: ptr(-1)}, {KeepVersions: ptr(301)}} {
		if _, _, err := r.Put(ctx, workspace, "app", c, false); !errors.Is(err, templates.ErrInvalid) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// An upload that was begun earlier and ends later does not take the newest away.
func TestRetentionOutOfOrder(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.KeepRevisions = 1 })
	r.put("app")
	first, second := r.begin("app", "a"), r.begin("app", "b")
	for _, u := range []upload{second, first} {
		if _, err := r.send(u, pack(t, file("x", u.id))); err != nil {
			// The later one's end drops the earlier one's URL.
			if !errors.Is(err, templates.ErrUploadGone) {
				t.Fatal(err)
			}
		}
	}
	if _, v, err := r.Resolve(t.Context(), workspace, "app"); err != nil || v.Name != "b" {
		t.Errorf("%+v, %v", v, err)
	}
}
