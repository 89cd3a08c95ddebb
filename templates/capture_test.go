package templates_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/templates"
)

// captureOf asks for a capture of a published image by cloning it.
func (r *rig) captureOf(template, version string, id blockdev.ID, t filesystem.Type, size int64) (templates.Captured, error) {
	return r.Capture(r.t.Context(), workspace, templates.Capture{
		Template: template, Version: version, Filesystem: t, Actor: actor,
		Clone: func(ctx context.Context, dst blockdev.ID) error { return r.pool.Clone(ctx, dst, id, size) },
	})
}

// TestCaptureGivesTheSameImage: a tree that went into a volume of any filesystem
// and was captured there is the tree that it was, in the same image to the bit.
func TestCaptureGivesTheSameImage(t *testing.T) {
	r := reflinkRig(t, 2<<30, nil)
	r.put("app")
	pushed := r.push("app", many(t, 300, 9_000))
	for _, fs := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		size, vol := int64(320*mib), blockdevtest.NewID(blockdev.PrefixVolume)
		must(t, r.Hydrate(t.Context(), vol, templates.SourceSpec{Filesystem: fs, Size: size, Revision: pushed.ID}))
		must(t, r.pool.Publish(t.Context(), vol, []byte("{}")))
		c, err := r.captureOf("of-"+string(fs), "", vol, fs, size)
		must(t, err)
		v := c.Revision
		if v.TreeDigest != pushed.TreeDigest || v.ImageDigest != pushed.ImageDigest || v.Status != templates.Ready || v.Entries != pushed.Entries {
			t.Errorf("%s: captured %+v, pushed %+v", fs, v, pushed)
		}
		if _, latest, err := r.Resolve(t.Context(), workspace, "of-"+string(fs)); err != nil || latest.ID != v.ID {
			t.Errorf("%s: latest is %+v, %v", fs, latest, err)
		}
		must(t, r.pool.Remove(t.Context(), vol))
	}
	r.noDrafts(t)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// noDrafts fails when something unfinished is in the pool or in staging.
func (r *rig) noDrafts(t *testing.T) {
	t.Helper()
	infos, err := r.pool.List(t.Context())
	must(t, err)
	for _, info := range infos {
		if info.Draft {
			t.Errorf("draft %s is left", info.ID)
		}
	}
	entries, err := os.ReadDir(r.pool.Staging())
	must(t, err)
	if len(entries) > 0 {
		t.Errorf("%v is left in staging", entries)
	}
}

func TestCaptureRefusals(t *testing.T) {
	r := reflinkRig(t, 2<<30, nil)
	r.put("app")
	r.push("app", many(t, 3, 100))
	broken := errors.New("no clone")
	asked := 0
	capture := func(template, version string) error {
		_, err := r.Capture(t.Context(), workspace, templates.Capture{Template: template, Version: version, Filesystem: filesystem.Ext4, Actor: actor,
			Clone: func(context.Context, blockdev.ID) error { asked++; return broken }})
		return err
	}
	for _, bad := range [][2]string{{"Bad Name", ""}, {"app", "latest"}, {"app", "1"}, {"app", "-"}} {
		if err := capture(bad[0], bad[1]); !errors.Is(err, templates.ErrInvalid) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if asked != 0 {
		t.Errorf("%d clones were made for what could be refused before", asked)
	}
	if err := capture("never", ""); !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, err := r.Template(workspace, "never"); !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("a template was made of nothing: %v", err)
	}
	// What cannot be kept is named, and leaves nothing.
	vol := blockdevtest.NewID(blockdev.PrefixVolume)
	must(t, r.pool.Create(t.Context(), vol, 320*mib))
	must(t, r.pool.Publish(t.Context(), vol, []byte("{}")))
	if _, err := r.captureOf("empty", "", vol, filesystem.Ext4, 320*mib); err == nil {
		t.Error("an image without a filesystem was captured")
	}
	tpl, err := r.Template(workspace, "empty")
	if err == nil && len(tpl.Revisions) > 0 {
		t.Errorf("%+v", tpl.Revisions)
	}
	r.noDrafts(t)
}

// TestCaptureOfWhatATemplateCannotHold names the entry.
func TestCaptureOfWhatATemplateCannotHold(t *testing.T) {
	r := reflinkRig(t, 2<<30, func(o *templates.Options) { o.MaxEntries = 50 })
	r.put("app")
	pushed := r.push("app", many(t, 20, 100))
	size, vol := int64(320*mib), blockdevtest.NewID(blockdev.PrefixVolume)
	must(t, r.Hydrate(t.Context(), vol, templates.SourceSpec{Filesystem: filesystem.XFS, Size: size, Revision: pushed.ID}))
	must(t, r.pool.Publish(t.Context(), vol, []byte("{}")))
	r.close()
	r.tune = func(o *templates.Options) { o.MaxEntries = 10 }
	r.open()
	_, err := r.captureOf("more", "", vol, filesystem.XFS, size)
	if !errors.Is(err, templates.ErrArchive) || !strings.Contains(err.Error(), "more than 10 entries") {
		t.Error(err)
	}
	r.noDrafts(t)
}
