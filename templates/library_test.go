package templates_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/templates"
)

func ptr[T any](v T) *T { return &v }

// listing is all templates as JSON.
func (r *rig) listing() string {
	r.t.Helper()
	list, err := r.List(workspace)
	if err != nil {
		r.t.Fatal(err)
	}
	b, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

// plainRig is a rig for what needs no reflink and few bytes.
func plainRig(t *testing.T, tune func(*templates.Options)) *rig {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4)
	blockdevtest.LeakCheck(t)
	return newRig(t, t.TempDir(), tune)
}

func TestPut(t *testing.T) {
	r := plainRig(t, nil)
	ctx := t.Context()
	if _, _, err := r.Put(ctx, workspace, "tools", templates.Change{}, false); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("change of a missing one: %v", err)
	}
	first, created, err := r.Put(ctx, workspace, "tools", templates.Change{
		DisplayName: ptr("Tools"), Labels: map[string]string{"a": "b"}, DefaultSizeMiB: ptr(int64(2048)), Actor: "one",
	}, true)
	if err != nil || !created || first.CreatedBy != "one" || first.NextNumber != 1 {
		t.Fatalf("%+v, %v, %v", first, created, err)
	}
	second, created, err := r.Put(ctx, workspace, "tools", templates.Change{Description: ptr("d"), Actor: "two"}, true)
	if err != nil || created {
		t.Fatalf("%v, %v", created, err)
	}
	want := first
	want.Description, want.UpdatedBy, want.UpdatedAt = "d", "two", second.UpdatedAt
	if a, b := fmt.Sprint(second), fmt.Sprint(want); a != b || !second.UpdatedAt.After(first.UpdatedAt) {
		t.Errorf("a change that is to merge:\n%s\n%s", a, b)
	}
	if cleared, _, err := r.Put(ctx, workspace, "tools", templates.Change{Labels: map[string]string{}}, true); err != nil || len(cleared.Labels) != 0 {
		t.Errorf("labels are %v, %v", cleared.Labels, err)
	}
	first.Labels["a"] = "changed by the caller"
	if got, err := r.Template("other", "tools"); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("another workspace sees %v, %v", got, err)
	}
	before := r.listing()
	r.reopen()
	if after := r.listing(); after != before {
		t.Errorf("after a restart:\n%s\nbefore:\n%s", after, before)
	}
}

func TestPutRefuses(t *testing.T) {
	r := plainRig(t, nil)
	labels := map[string]string{}
	for i := range 65 {
		labels[fmt.Sprint(i)] = "x"
	}
	for name, c := range map[string]templates.Change{
		"": {}, "Upper": {}, "-a": {}, "a-": {}, "a_b": {}, "a/b": {}, "../x": {}, strings.Repeat("a", 50): {}, "a\n": {}, "ä": {},
		"d1": {DisplayName: ptr(strings.Repeat("ä", 64))},
		"d2": {DisplayName: ptr("\xff")},
		"d3": {Description: ptr(strings.Repeat("x", 1025))},
		"s1": {DefaultSizeMiB: ptr(int64(0))},
		"s2": {DefaultSizeMiB: ptr(int64(-1))},
		"s3": {DefaultSizeMiB: ptr(int64(1) << 60)},
		"l1": {Labels: labels},
		"l2": {Labels: map[string]string{"": "x"}},
		"l3": {Labels: map[string]string{strings.Repeat("k", 64): "x"}},
		"l4": {Labels: map[string]string{"k": strings.Repeat("v", 256)}},
		"l5": {Labels: map[string]string{"a=b": "x"}},
	} {
		if _, _, err := r.Put(t.Context(), workspace, name, c, true); !errors.Is(err, templates.ErrInvalid) {
			t.Errorf("%q %+v: %v", name, c, err)
		}
	}
	if got := r.listing(); got != "[]" {
		t.Errorf("left behind: %s", got)
	}
}

func TestResolve(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	archive := pack(t, file("a", "1"))
	r.push("app", archive)
	if _, err := r.send(r.begin("app", "v2.0"), archive); err != nil {
		t.Fatal(err)
	}
	r.begin("app", "") // never sent: 3
	if _, err := r.send(r.begin("app", ""), []byte("no archive")); !errors.Is(err, templates.ErrArchive) {
		t.Fatal(err)
	}
	for ref, want := range map[string]int{
		"app": 2, "app:latest": 2, "app:1": 1, "app:2": 2, "app:v2.0": 2,
		"app:3": 0, "app:4": 0, "app:5": 0, "app:v3": 0, "other": 0, "app:": 0, ":1": 0, "app:1:2": 0, "app:../1": 0,
	} {
		_, v, err := r.Resolve(t.Context(), workspace, ref)
		if want == 0 {
			if !errors.Is(err, templates.ErrNotFound) && !errors.Is(err, templates.ErrInvalid) {
				t.Errorf("%s: %v, %v", ref, v.Number, err)
			}
			continue
		}
		if err != nil || v.Number != want {
			t.Errorf("%s: %d, %v; want %d", ref, v.Number, err, want)
		}
	}
	if _, _, err := r.Resolve(t.Context(), "other", "app"); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("another workspace: %v", err)
	}
}

func TestVersionNames(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	ctx := t.Context()
	for _, version := range []string{"latest", "2", "0", "01", "-x", "x-", "a b", "a/b", "a:b", strings.Repeat("v", 64)} {
		if _, err := r.BeginUpload(ctx, workspace, "app", version, actor); !errors.Is(err, templates.ErrInvalid) {
			t.Errorf("version %q: %v", version, err)
		}
	}
	old := r.begin("app", "v9")
	u := r.begin("app", "v9") // a client that tries again
	if _, err := r.send(old, pack(t)); !errors.Is(err, templates.ErrUploadGone) {
		t.Errorf("the URL that was replaced: %v", err)
	}
	if _, err := r.send(u, pack(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.BeginUpload(ctx, workspace, "app", "v9", actor); !errors.Is(err, templates.ErrInvalid) {
		t.Errorf("a name that is taken: %v", err)
	}
	if _, err := r.BeginUpload(ctx, workspace, "app", "3", actor); err != nil {
		t.Errorf("its own number: %v", err)
	}
	if _, err := r.BeginUpload(ctx, workspace, "none", "", actor); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("no template: %v", err)
	}
}

func TestDelete(t *testing.T) {
	r := plainRig(t, nil)
	ctx := t.Context()
	r.put("app")
	archive := pack(t, file("a", "1"))
	one := r.push("app", archive)
	if _, err := r.DeleteRevision(ctx, workspace, "app", "1", actor); !errors.Is(err, templates.ErrLastRevision) {
		t.Errorf("the only version: %v", err)
	}
	r.begin("app", "")
	if _, err := r.DeleteRevision(ctx, workspace, "app", "latest", actor); !errors.Is(err, templates.ErrLastRevision) {
		t.Errorf("the only version that is ready: %v", err)
	}
	r.push("app", archive)
	if _, err := r.DeleteRevision(ctx, workspace, "app", "9", actor); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("a version that is not there: %v", err)
	}
	spec := templates.SourceSpec{Filesystem: "ext4", Size: 4 * mib, Revision: one.ID}
	source, release, err := r.Source(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	left, err := r.DeleteRevision(ctx, workspace, "app", "1", actor)
	if err != nil || len(left.Revisions) != 1 || left.Revisions[0].Number != 3 {
		t.Fatalf("%+v, %v", left.Revisions, err)
	}
	if _, err := r.pool.Stat(ctx, one.ID); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("the image of a deleted version: %v", err)
	}
	if _, err := r.pool.Stat(ctx, source); err != nil {
		t.Errorf("a source that is in use: %v", err)
	}
	if _, _, err := r.Source(ctx, spec); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("a source of a deleted version: %v", err)
	}
	release()
	release()
	was, err := r.Delete(ctx, workspace, "app", actor)
	if err != nil || len(was.Revisions) != 1 {
		t.Fatalf("%+v, %v", was, err)
	}
	if _, err := r.Delete(ctx, workspace, "app", actor); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	r.reopen()
	r.expectPool(0)
	if got := r.listing(); got != "[]" {
		t.Errorf("left: %s", got)
	}
	if made := r.put("app"); made.NextNumber != 1 || len(made.Revisions) != 0 {
		t.Errorf("made again: %+v", made)
	}
	r.reopen()
	if r.Bytes() != 0 {
		t.Errorf("nothing accounts for %d bytes", r.Bytes())
	}
}

// expectPool checks how many images there are, and that none is open or a draft.
func (r *rig) expectPool(images int) {
	r.t.Helper()
	infos, err := r.pool.List(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	if len(infos) != images {
		r.t.Errorf("%d images in the pool, want %d", len(infos), images)
	}
	for _, info := range infos {
		if info.Draft || info.Open {
			r.t.Errorf("left in the pool: %s draft %v open %v", info.ID, info.Draft, info.Open)
		}
	}
	if q, err := r.pool.Quarantined(r.t.Context()); err != nil || len(q) != 0 {
		r.t.Errorf("quarantined: %v, %v", q, err)
	}
}

func TestRetention(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.KeepRevisions = 2 })
	r.put("app")
	for i := range 4 {
		r.begin("app", "")
		if _, err := r.send(r.begin("app", ""), []byte("rubbish")); !errors.Is(err, templates.ErrArchive) {
			t.Fatal(err)
		}
		r.push("app", pack(t, file("a", fmt.Sprint(i))))
	}
	got, err := r.Template(workspace, "app")
	if err != nil {
		t.Fatal(err)
	}
	var numbers []int
	for _, v := range got.Revisions {
		numbers = append(numbers, v.Number)
	}
	if fmt.Sprint(numbers) != "[9 12]" {
		t.Errorf("kept %v", numbers)
	}
	r.expectPool(2)
	// URLs that are never used do not pile up.
	for range 100 {
		r.begin("app", "")
	}
	if got, _ = r.Template(workspace, "app"); len(got.Revisions) > 2+32 {
		t.Errorf("%d revisions", len(got.Revisions))
	}
	r.clock.advance(2 * time.Hour)
	r.begin("app", "")
	if got, _ = r.Template(workspace, "app"); len(got.Revisions) != 3 {
		t.Errorf("%d revisions after the URLs expired", len(got.Revisions))
	}
}
