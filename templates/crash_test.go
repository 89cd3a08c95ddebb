package templates_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/templates"
)

// life is a short one of a template, and what of it was acknowledged.
type life struct {
	begun, done [9]bool
	first       upload
	second      upload
}

const (
	stepPut = iota
	stepBegin
	stepUpload
	stepSource
	stepUploadAgain
	stepUploadTwin
	stepDeleteVersion
	stepChange
	stepDelete
)

// live goes through a life until something fails.
func (r *rig) live() (l life, err error) {
	ctx := r.t.Context()
	spec := templates.SourceSpec{Filesystem: "ext4", Size: 20 * mib}
	for i, step := range []func() error{
		stepPut: func() error {
			_, _, err := r.Put(ctx, workspace, "app", templates.Change{Actor: actor}, true)
			return err
		},
		stepBegin: func() error {
			target, err := r.BeginUpload(ctx, workspace, "app", "", actor)
			if err == nil {
				l.first = parse(r.t, target)
			}
			return err
		},
		stepUpload: func() error {
			// The link is too long for the small class, whose trial the other one has.
			v, err := r.send(l.first, pack(r.t, file("one", "1"), file("d/e", "2"), symlink("l", strings.Repeat("x", 1023))))
			spec.Revision = v.ID
			return err
		},
		stepSource: func() error {
			_, release, err := r.Source(ctx, spec)
			if err == nil {
				release()
			}
			return err
		},
		stepUploadAgain: func() error {
			target, err := r.BeginUpload(ctx, workspace, "app", "v2", actor)
			if err == nil {
				l.second = parse(r.t, target)
				_, err = r.send(l.second, pack(r.t, file("two", "2")))
			}
			return err
		},
		stepUploadTwin: func() error { // a clone of the one before
			target, err := r.BeginUpload(ctx, workspace, "app", "twin", actor)
			if err == nil {
				_, err = r.send(parse(r.t, target), pack(r.t, file("two", "2")))
			}
			return err
		},
		stepDeleteVersion: func() error {
			_, err := r.DeleteRevision(ctx, workspace, "app", "1", actor)
			return err
		},
		stepChange: func() error {
			_, _, err := r.Put(ctx, workspace, "app", templates.Change{DisplayName: ptr("changed"), Actor: actor}, false)
			return err
		},
		stepDelete: func() error {
			_, err := r.Delete(ctx, workspace, "app", actor)
			return err
		},
	} {
		l.begun[i] = true
		if err := step(); err != nil {
			return l, fmt.Errorf("step %d: %w", i, err)
		}
		l.done[i] = true
	}
	return l, nil
}

// expect compares what there is now with what was acknowledged.
func (r *rig) expect(l life) {
	r.t.Helper()
	ctx := r.t.Context()
	app, err := r.Template(workspace, "app")
	exists := err == nil
	if l.done[stepPut] && !l.begun[stepDelete] && !exists {
		r.t.Error("the template is gone")
	}
	if l.done[stepDelete] && exists {
		r.t.Error("the template was deleted and is there")
	}
	has := func(version string, must, mustNot bool) {
		_, v, err := r.Resolve(ctx, workspace, "app:"+version)
		switch {
		case must && err != nil:
			r.t.Errorf("version %s was acknowledged: %v", version, err)
		case mustNot && err == nil:
			r.t.Errorf("version %s was deleted and is there", version)
		}
		if err != nil {
			return
		}
		_, release, err := r.Source(ctx, templates.SourceSpec{Filesystem: "ext4", Size: 16 * mib, Revision: v.ID})
		if err != nil {
			r.t.Errorf("version %s: %v", version, err)
			return
		}
		release()
	}
	has("1", l.done[stepUpload] && !l.begun[stepDeleteVersion], l.done[stepDeleteVersion])
	has("v2", l.done[stepUploadAgain] && !l.begun[stepDelete], l.done[stepDelete])
	has("twin", l.done[stepUploadTwin] && !l.begun[stepDelete], l.done[stepDelete])
	if l.done[stepChange] && !l.begun[stepDelete] && app.DisplayName != "changed" {
		r.t.Error("a change is lost")
	}
	ready := 0
	for _, v := range app.Revisions {
		if v.Status == templates.Ready {
			ready++
		}
		if v.Status == templates.Failed {
			r.t.Errorf("a version failed: %+v", v)
		}
	}
	r.expectStagingEmpty()
	r.expectManifests(app)
	r.expectPool(ready + r.Stats().Sources)
	if ready == 0 && r.Stats().Sources > 0 {
		r.t.Error("sources without their revision")
	}
}

// expectManifests: what no version needs is gone, and each version has one.
func (r *rig) expectManifests(app templates.Template) {
	r.t.Helper()
	needed := map[string]bool{}
	for _, v := range app.Revisions {
		if v.Status == templates.Ready {
			needed[strings.TrimPrefix(v.ImageDigest, "sha256:")] = true
			if m, err := r.Manifest(r.t.Context(), workspace, "app:"+v.Name); err != nil || m.Identity() != v.TreeDigest {
				r.t.Errorf("the manifest of version %s: %v", v.Name, err)
			}
		}
	}
	entries, err := os.ReadDir(r.pool.Manifests())
	if err != nil || len(entries) != len(needed) {
		r.t.Errorf("%d manifests for %d images: %v", len(entries), len(needed), err)
	}
	for _, e := range entries {
		if !needed[e.Name()] {
			r.t.Errorf("a manifest that nobody needs: %s", e.Name())
		}
	}
}

// A crash at any point of a template's life loses nothing that was
// acknowledged and leaves nothing behind; nor does a single error there.
func TestEveryCrashPoint(t *testing.T) {
	blockdevtest.LeakCheck(t)
	dir := blockdevtest.ReflinkDir(t, blockdevtest.Size(1<<30))
	for _, once := range []bool{false, true} {
		points := 0
		for n := 1; ; n++ {
			over := false
			t.Run(fmt.Sprintf("once=%v/%03d", once, n), func(t *testing.T) {
				over = crashAt(t, filepath.Join(dir, fmt.Sprint(once, n)), n, once)
			})
			if over || t.Failed() {
				break
			}
			points++
		}
		t.Logf("once=%v: %d points", once, points)
		if points < 50 && !t.Failed() {
			t.Errorf("only %d points", points)
		}
	}
}

func crashAt(t *testing.T, dir string, n int, once bool) (over bool) {
	r := newRig(t, dir, nil)
	r.close()
	r.fuse = &fuse{at: n, once: once}
	var l life
	err := r.tryOpen()
	if err == nil {
		l, err = r.live()
	}
	if !r.fuse.blown {
		if err != nil {
			t.Fatal(err)
		}
		return true
	}
	// An error may be one of those that do no harm; a crash never is.
	if !once && l.done[stepDelete] && err == nil {
		t.Logf("nobody noticed the crash at %s", r.fuse.where)
	}
	if err != nil && !errors.Is(err, errCrash) && !errors.Is(err, templates.ErrNotFound) {
		t.Errorf("at %s: %v", r.fuse.where, err)
	}
	where := r.fuse.where
	r.fuse = nil
	r.reopen()
	r.expect(l)
	before := r.listing()
	r.reopen()
	if after := r.listing(); after != before {
		t.Errorf("at %s: another restart changes it:\n%s\nbefore:\n%s", where, after, before)
	}
	if !once {
		r.wipeStore()
	}
	if after := r.listing(); after != before {
		t.Errorf("at %s: without the store:\n%s\nbefore:\n%s", where, after, before)
	}
	r.put("app")
	r.push("app", pack(t, file("after", "x")))
	if t.Failed() {
		t.Logf("crashed at %s; done %v", where, l.done)
	}
	r.close()
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
	return false
}

// wipeStore loses the database.
func (r *rig) wipeStore() {
	r.t.Helper()
	r.close()
	if err := os.RemoveAll(filepath.Join(r.state, "db")); err != nil {
		r.t.Fatal(err)
	}
	r.open()
}

func TestRebuild(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	ctx := t.Context()
	r.put("empty")
	_, _, err := r.Put(ctx, workspace, "app", templates.Change{
		DisplayName: ptr("App"), Labels: map[string]string{"z": "1", "a": "2"}, Description: ptr("d"), DefaultSizeMiB: ptr(int64(7)), Actor: actor,
	}, true)
	if err != nil {
		t.Fatal(err)
	}
	r.push("app", pack(t, file("a", "1")))
	r.push("app", pack(t, file("a", "2")))
	r.push("app", pack(t, file("a", "3")))
	if _, err := r.DeleteRevision(ctx, workspace, "app", "2", actor); err != nil {
		t.Fatal(err)
	}
	_, _ = r.send(r.begin("app", "bad"), []byte("no archive"))
	waiting := r.begin("app", "later")
	r.put("gone")
	r.push("gone", pack(t))
	if _, err := r.Delete(ctx, workspace, "gone", actor); err != nil {
		t.Fatal(err)
	}
	spec := templates.SourceSpec{Filesystem: "ext4", Size: 8 * mib}
	id, release, err := r.Source(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	release()
	before := r.listing()
	if err := r.Rebuild(ctx); err != nil {
		t.Fatal(err)
	}
	if after := r.listing(); after != before {
		t.Errorf("rebuilt:\n%s\nbefore:\n%s", after, before)
	}
	r.wipeStore()
	if after := r.listing(); after != before {
		t.Errorf("without the store:\n%s\nbefore:\n%s", after, before)
	}
	again, release, err := r.Source(ctx, spec)
	if err != nil || again != id || r.Stats().Misses != 0 {
		t.Errorf("the cache was not found again: %s, %v", again, err)
	}
	release()
	if _, err := r.send(waiting, pack(t)); err != nil {
		t.Errorf("an upload URL from before: %v", err)
	}
	// Without the side log too, what has an image is found.
	if err := os.Remove(filepath.Join(r.state, "side.log")); err != nil {
		t.Fatal(err)
	}
	r.wipeStore()
	if app, err := r.Template(workspace, "app"); err != nil || len(app.Revisions) != 3 || app.DisplayName != "App" {
		t.Errorf("from the images alone: %+v, %v", app, err)
	}
}

// A READY revision whose image is gone is not dropped in silence.
func TestLostImage(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	v := r.push("app", pack(t))
	r.push("app", pack(t))
	if err := r.pool.Remove(t.Context(), v.ID); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	app, err := r.Template(workspace, "app")
	if err != nil || app.Revisions[0].Status != templates.Failed || app.Revisions[0].Failure == "" {
		t.Fatalf("%+v, %v", app.Revisions, err)
	}
	r.push("app", pack(t)) // drops what came to nothing, not this
	if app, _ = r.Template(workspace, "app"); len(app.Revisions) != 3 {
		t.Errorf("%+v", app.Revisions)
	}
	if _, err := r.DeleteRevision(t.Context(), workspace, "app", "1", actor); err != nil {
		t.Error(err)
	}
}

// What is in the pool and not ours to explain stays where it is.
func TestForeignImages(t *testing.T) {
	r := plainRig(t, nil)
	ctx := t.Context()
	volume, odd := blockdevtest.NewID(blockdev.PrefixVolume), blockdevtest.NewID(blockdev.PrefixRevision)
	for _, id := range []blockdev.ID{volume, odd} {
		if err := r.pool.Create(ctx, id, mib); err != nil {
			t.Fatal(err)
		}
		if err := r.pool.Publish(ctx, id, []byte(`{"format":2,"kind":"revision"}`)); err != nil {
			t.Fatal(err)
		}
	}
	draft := blockdevtest.NewID(blockdev.PrefixVolume)
	if err := r.pool.Create(ctx, draft, mib); err != nil {
		t.Fatal(err)
	}
	// Staging is the library's own, and what is left there is rubbish.
	if err := os.MkdirAll(filepath.Join(r.pool.Staging(), "dir", "below"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.pool.Staging(), "left.tar"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	r.expectStagingEmpty()
	for _, id := range []blockdev.ID{volume, odd, draft} {
		if _, err := r.pool.Stat(ctx, id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// A crash while a revision is copied into another filesystem leaves two devices
// open; they go, and the revision is as it was.
func TestCrashWhileConverting(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	r.put("app")
	v := r.push("app", pack(t, file("a", "1")))
	spec := templates.SourceSpec{Filesystem: "xfs", Size: 300 * mib, Revision: v.ID}
	before := r.listing()
	for n := 1; ; n++ {
		r.close()
		r.fuse = &fuse{at: n}
		r.open()
		_, release, err := r.Source(t.Context(), spec)
		if !r.fuse.blown {
			if err != nil {
				t.Fatal(err)
			}
			release()
			if n < 12 {
				t.Errorf("only %d points", n)
			}
			return
		}
		if err == nil {
			t.Fatalf("a crash at %s went unnoticed", r.fuse.where)
		}
		where := r.fuse.where
		r.close()
		r.fuse = nil
		r.open()
		r.expectPool(1 + r.Stats().Sources)
		if after := r.listing(); after != before {
			t.Errorf("after a crash at %s:\n%s\nbefore:\n%s", where, after, before)
		}
		r.dropSources()
	}
}

// dropSources empties the cache.
func (r *rig) dropSources() {
	r.t.Helper()
	infos, err := r.pool.List(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, info := range infos {
		if strings.HasPrefix(string(info.ID), blockdev.PrefixSource) {
			if err := r.pool.Remove(r.t.Context(), info.ID); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}
