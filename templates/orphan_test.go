package templates_test

import (
	"errors"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/templates"
	"holdfast/templates/remote"
)

// TestRelocateImage: what volumes of a deleted version lack is fetched from where a
// manifest of the same bytes is, by one of them for all; while the version is there it
// is the version that moves, and what is not the same bytes, or not allowed, changes
// nothing.
func TestRelocateImage(t *testing.T) {
	f := newFarRig(t)
	ctx := t.Context()
	name, files := f.publish("content")
	v, err := f.register(name, files.Digest)
	if err != nil {
		t.Fatal(err)
	}
	second, files2 := f.publish("two")
	other, err := f.register(second, files2.Digest)
	if err != nil {
		t.Fatal(err)
	}
	var volumes []blockdev.ID
	for _, of := range []templates.Revision{v, v, other} {
		id, err := f.hydrated(of, of.ImageBytes)
		if err != nil {
			t.Fatal(err)
		}
		volumes = append(volumes, id)
	}
	to := f.below("moved", files)
	err = f.RelocateImage(ctx, volumes[0], to)
	if !errors.Is(err, templates.ErrInvalid) || !strings.Contains(err.Error(), "far:1") {
		t.Errorf("while the version is there: %v", err)
	}
	if _, err := f.DeleteRevision(ctx, workspace, "far", "1", actor); err != nil {
		t.Fatal(err)
	}
	gone(t, files)
	for what, c := range map[string]struct { // drafts: nothing fetches their bytes by itself
		id   blockdev.ID
		url  string
		want error
	}{
		"other bytes":   {volumes[0], f.url + second + ".json", remote.ErrStore},
		"nothing there": {volumes[0], f.url + name + ".json", remote.ErrStore},
		"no manifest":   {volumes[0], f.url + second + ".chunks", remote.ErrManifest},
		"not allowed":   {volumes[0], "http://127.0.0.1:1/" + name + ".json", remote.ErrNotAllowed},
		"signed":        {volumes[0], to + "?key=1", remote.ErrInvalidURL},
		"no image":      {blockdevtest.NewID(blockdev.PrefixVolume), to, templates.ErrInvalid},
	} {
		if err := f.RelocateImage(ctx, c.id, c.url); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
		f.expectStagingEmpty()
	}
	for range 2 { // again is the same
		if err := f.RelocateImage(ctx, volumes[0], to); err != nil {
			t.Fatal(err)
		}
	}
	f.expectStagingEmpty()
	check := func() {
		t.Helper()
		for i, want := range []string{"content", "content", "two"} {
			if got := f.reads(volumes[i], "file"); got != want {
				t.Errorf("volume %d reads %q", i, got)
			}
		}
	}
	f.reopen()
	check()
}
