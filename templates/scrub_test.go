package templates_test

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/templates"
)

// flip changes one byte of the data in an image, as a disk that lies would.
func (r *rig) flip(id blockdev.ID, content string) {
	r.t.Helper()
	path := r.imagePath(id)
	b, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	at := strings.Index(string(b), content)
	if at < 0 {
		r.t.Fatalf("%q is not in the image", content)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{b[at] ^ 1}, int64(at)); err != nil {
		r.t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		r.t.Fatal(err)
	}
}

func scrubbed(told *events, unclean *bool) func(*templates.Options) {
	return func(o *templates.Options) {
		o.ScrubInterval, o.ScrubRate, o.OnEvent, o.Unclean = 24*time.Hour, 1<<30, told.add, *unclean
	}
}

const contents = "what the file holds, to be found in the image"

func TestScrub(t *testing.T) {
	var told events
	unclean := false
	r := reflinkRig(t, 1<<30, scrubbed(&told, &unclean))
	ctx := t.Context()
	r.put("app")
	one := r.push("app", pack(t, file("a", "one")))
	two := r.push("app", pack(t, file("a", contents)))
	spec := templates.SourceSpec{Filesystem: "ext4", Size: 20 * mib, Revision: two.ID}
	source, release, err := r.Source(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	release()
	scrub := func(images int64) {
		t.Helper()
		before := r.Stats().Scrubbed
		if err := r.Scrub(ctx); err != nil {
			t.Fatal(err)
		}
		if got := r.Stats().Scrubbed - before; got != images {
			t.Errorf("%d images were verified, want %d", got, images)
		}
	}
	scrub(0)
	r.clock.advance(25 * time.Hour)
	scrub(2)
	scrub(0)
	if r.Stats().ScrubbedBytes == 0 {
		t.Error("nothing was read")
	}
	// When it was verified is known after a restart.
	r.reopen()
	scrub(0)
	// A cached source of that age is made anew.
	again, release, err := r.Source(ctx, spec)
	if err != nil || again == source {
		t.Errorf("%s, %v: an old source is in use", again, err)
	}
	release()

	r.flip(two.ID, contents)
	scrub(0)
	r.clock.advance(25 * time.Hour)
	scrub(2)
	if got := told.take(); got != "main/app:2 damaged: its image is not what was published" {
		t.Error(got)
	}
	damaged := func() {
		t.Helper()
		if got := r.numbers("app"); got != "1 2!" {
			t.Error(got)
		}
		if s := r.Stats(); s.Damaged != 1 || s.Revisions != 1 {
			t.Errorf("%+v", s)
		}
		app, _ := r.Template(workspace, "app")
		if v := app.Revisions[1]; !v.Damaged || !strings.HasPrefix(v.Failure, "damaged") || app.Latest() != nil {
			t.Errorf("%+v", v)
		}
		// Neither by name nor as the newest, and no older one in its place.
		for _, ref := range []string{"app", "app:latest", "app:2"} {
			if _, v, err := r.Resolve(ctx, workspace, ref); !errors.Is(err, templates.ErrDamaged) {
				t.Errorf("%s: %+v, %v", ref, v, err)
			}
		}
		if _, _, err := r.Source(ctx, spec); !errors.Is(err, templates.ErrDamaged) {
			t.Errorf("a source of a damaged version: %v", err)
		}
		if err := r.Hydrate(ctx, blockdev.ID("vol-00000000000000000000000000"), spec); !errors.Is(err, templates.ErrDamaged) {
			t.Errorf("a volume from a damaged version: %v", err)
		}
		if _, err := r.Rollback(ctx, workspace, "app", "2", actor); !errors.Is(err, templates.ErrDamaged) {
			t.Errorf("rollback to a damaged version: %v", err)
		}
		if _, got, err := r.Resolve(ctx, workspace, "app:1"); err != nil || got.ID != one.ID {
			t.Errorf("%+v, %v", got, err)
		}
	}
	damaged()
	r.reopen()
	damaged()
	r.wipeStore()
	damaged()
	if _, err := os.Stat(r.imagePath(two.ID)); err != nil {
		t.Errorf("the damaged image is kept to be looked at: %v", err)
	}
	// Ways out: roll back, and then the damaged one can go.
	three, err := r.Rollback(ctx, workspace, "app", "1", actor)
	if err != nil {
		t.Fatal(err)
	}
	if _, got, err := r.Resolve(ctx, workspace, "app"); err != nil || got.ID != three.ID {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := r.DeleteRevision(ctx, workspace, "app", "2", actor); err != nil {
		t.Error(err)
	}
	if _, err := r.pool.Stat(ctx, two.ID); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("the image is still there: %v", err)
	}
}

func TestVerify(t *testing.T) {
	var told events
	unclean := false
	r := plainRig(t, scrubbed(&told, &unclean))
	ctx := t.Context()
	r.put("app")
	one := r.push("app", pack(t, file("a", contents)))
	verify := func(version string, want templates.RevisionStatus) {
		t.Helper()
		v, err := r.Verify(ctx, workspace, "app", version)
		if err != nil || v.Status != want || v.VerifiedAt.IsZero() {
			t.Errorf("%s: %+v, %v", version, v, err)
		}
	}
	verify("1", templates.Ready)
	r.flip(one.ID, contents)
	verify("latest", templates.Failed)
	verify("latest", templates.Failed)
	if got := told.take(); strings.Count(got, "damaged") != 1 {
		t.Error(got)
	}
	// The byte is right again, as after a bad read: so is the version.
	r.flip(one.ID, string([]byte{contents[0] ^ 1})+contents[1:])
	verify("1", templates.Ready)
	if got := told.take(); !strings.Contains(got, "restored") {
		t.Error(got)
	}
	if _, _, err := r.Resolve(ctx, workspace, "app"); err != nil {
		t.Error(err)
	}
	// Shorter than it was, and gone.
	if err := os.Truncate(r.imagePath(one.ID), 4096); err != nil {
		t.Fatal(err)
	}
	verify("1", templates.Failed)
	before := r.listing()
	r.reopen()
	if after := r.listing(); after != before {
		t.Errorf("%s\nbefore:\n%s", after, before)
	}
	r.begin("app", "")
	for _, version := range []string{"2", "3", "x"} {
		if _, err := r.Verify(ctx, workspace, "app", version); !errors.Is(err, templates.ErrNotFound) {
			t.Errorf("%s: %v", version, err)
		}
	}
	if _, err := r.Verify(ctx, "other", "app", "1"); !errors.Is(err, templates.ErrNotFound) {
		t.Error(err)
	}
}

// After an unclean stop an image is verified before it is used, and only then.
func TestFirstUseAfterUncleanStop(t *testing.T) {
	var told events
	unclean := false
	r := reflinkRig(t, 1<<30, scrubbed(&told, &unclean))
	ctx := t.Context()
	r.put("app")
	one := r.push("app", pack(t, file("a", contents)))
	two := r.push("app", pack(t, file("a", "another file")))
	size := templates.SourceSpec{Filesystem: "ext4", Size: 20 * mib}
	for _, id := range []blockdev.ID{"", one.ID, two.ID} {
		spec := size
		spec.Revision = id
		_, release, err := r.Source(ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	r.close()
	r.flip(one.ID, contents)
	r.open()
	spec := size
	spec.Revision = one.ID
	if _, release, err := r.Source(ctx, spec); err != nil {
		t.Errorf("after an orderly stop nothing is verified: %v", err)
	} else {
		release()
	}
	r.close()
	unclean = true
	r.open()
	if s := r.Stats(); s.Suspect != 2 || s.Sources != 0 || s.ScrubbedBytes != 0 {
		t.Errorf("at the start: %+v", s)
	}
	r.expectPool(2)
	if _, _, err := r.Source(ctx, spec); !errors.Is(err, templates.ErrDamaged) {
		t.Errorf("a damaged image was used: %v", err)
	}
	if got := r.numbers("app"); got != "1! 2" {
		t.Error(got)
	}
	spec.Revision = two.ID
	for range 2 {
		_, release, err := r.Source(ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	if s := r.Stats(); s.Suspect != 0 || s.Damaged != 1 {
		t.Errorf("%+v", s)
	}
	if got := told.take(); !strings.Contains(got, "app:1 damaged") {
		t.Error(got)
	}
}

// A crash at any point of finding damage leaves the version READY, to be found
// again, or damaged, whatever records are lost.
func TestCrashWhileFindingDamage(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	r.push("app", pack(t, file("a", "one")))
	for n, version := 1, 2; ; n, version = n+1, version+1 {
		text := strings.Repeat("x", n) + contents
		v := r.push("app", pack(t, file("a", text)))
		r.flip(v.ID, contents)
		r.close()
		r.fuse = &fuse{at: n}
		r.open()
		_, err := r.Verify(t.Context(), workspace, "app", v.Name)
		blown, where := r.fuse.blown, r.fuse.where
		r.fuse = nil
		r.reopen()
		before := r.numbers("app")
		r.wipeStore()
		if after := r.numbers("app"); after != before {
			t.Errorf("at %s: %s without the store, %s with it", where, after, before)
		}
		if found, err := r.Verify(t.Context(), workspace, "app", v.Name); err != nil || !found.Damaged {
			t.Errorf("at %s: %+v, %v", where, found, err)
		}
		if _, _, err := r.Resolve(t.Context(), workspace, "app"); !errors.Is(err, templates.ErrDamaged) {
			t.Errorf("at %s: %v", where, err)
		}
		if !blown {
			if err != nil || n < 4 {
				t.Errorf("%d points, %v", n, err)
			}
			return
		}
		if t.Failed() {
			return
		}
	}
}
