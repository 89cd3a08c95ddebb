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
	"holdfast/internal/sys"
	"holdfast/templates"
)

// numbers are those of a template's revisions, with a mark on those not READY.
func (r *rig) numbers(name string) string {
	r.t.Helper()
	t, err := r.Template(workspace, name)
	if err != nil {
		r.t.Fatal(err)
	}
	var all []string
	for _, v := range t.Revisions {
		text := fmt.Sprint(v.Number)
		if v.Status != templates.Ready {
			text += "!"
		}
		if v.Pinned != nil {
			text += "p"
		}
		all = append(all, text)
	}
	return strings.Join(all, " ")
}

func (r *rig) imagePath(id blockdev.ID) string {
	return filepath.Join(r.dir, "pool", "images", string(id), "image")
}

func TestRollback(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	ctx := t.Context()
	r.put("app")
	one := r.push("app", pack(t, file("a", "one")))
	r.push("app", pack(t, file("a", "two")))
	v, err := r.Rollback(ctx, workspace, "app", "1", "ann")
	if err != nil {
		t.Fatal(err)
	}
	if v.Number != 3 || v.Name != "3" || v.RollbackOf != 1 || v.CreatedBy != "ann" || v.ImageDigest != one.ImageDigest || v.ID == one.ID {
		t.Errorf("%+v", v)
	}
	for _, ref := range []string{"app", "app:latest", "app:3"} {
		if _, got, err := r.Resolve(ctx, workspace, ref); err != nil || got.ID != v.ID {
			t.Errorf("%s is %+v, %v", ref, got, err)
		}
	}
	dir := r.mounted(templates.SourceSpec{Filesystem: "ext4", Size: 16 * mib, Revision: v.ID})
	if b, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(b) != "one" {
		t.Errorf("%q, %v", b, err)
	}
	// All blocks are shared: the copy owns nothing.
	f, err := os.Open(r.imagePath(v.ID))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if m, err := sys.MapFile(f, 10_000); err != nil || m.Allocated == 0 || m.Shared != m.Allocated {
		t.Errorf("the copy has bytes of its own: %+v, %v", m, err)
	}
	// Asked again, as after a lost answer, it is done already.
	if again, err := r.Rollback(ctx, workspace, "app", "1", "ann"); err != nil || again.ID != v.ID {
		t.Errorf("%+v, %v", again, err)
	}
	if self, err := r.Rollback(ctx, workspace, "app", "latest", "ann"); err != nil || self.ID != v.ID {
		t.Errorf("%+v, %v", self, err)
	}
	if got := r.numbers("app"); got != "1 2 3" {
		t.Error(got)
	}
	// History goes on from there, and the old one can go.
	if four := r.push("app", pack(t, file("a", "four"))); four.Number != 4 {
		t.Errorf("%+v", four)
	}
	if _, err := r.DeleteRevision(ctx, workspace, "app", "1", actor); err != nil {
		t.Fatal(err)
	}
	if got, err := r.Verify(ctx, workspace, "app", "3"); err != nil || got.Status != templates.Ready {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRollbackRefuses(t *testing.T) {
	r := plainRig(t, nil)
	ctx := t.Context()
	r.put("app")
	r.begin("app", "")
	for _, version := range []string{"1", "2", "latest", "", "../x"} {
		if _, err := r.Rollback(ctx, workspace, "app", version, actor); !errors.Is(err, templates.ErrNotFound) {
			t.Errorf("%q: %v", version, err)
		}
	}
	if _, err := r.Rollback(ctx, "other", "app", "1", actor); !errors.Is(err, templates.ErrNotFound) {
		t.Error(err)
	}
	// Without reflink the image is copied.
	r.push("app", pack(t, file("a", "one")))
	r.push("app", pack(t, file("a", "two")))
	v, err := r.Rollback(ctx, workspace, "app", "2", actor)
	if err != nil || v.RollbackOf != 2 {
		t.Fatalf("%+v, %v", v, err)
	}
	if got, err := r.Verify(ctx, workspace, "app", v.Name); err != nil || got.Status != templates.Ready {
		t.Errorf("%+v, %v", got, err)
	}
}

// A crash at any point of a rollback and of a pin leaves them done or not begun.
func TestCrashWhileRollingBack(t *testing.T) {
	blockdevtest.LeakCheck(t)
	dir := blockdevtest.ReflinkDir(t, blockdevtest.Size(1<<30))
	r := newRig(t, dir, nil)
	r.put("app")
	r.push("app", pack(t, file("a", "one")))
	for n, last := 1, 2; ; n++ {
		r.push("app", pack(t, file("a", fmt.Sprint(n))))
		last++
		r.close()
		r.fuse = &fuse{}
		r.open()
		r.fuse.at = r.fuse.seen + n
		v, err := r.Rollback(t.Context(), workspace, "app", "1", actor)
		var pinned error
		if err == nil {
			_, pinned = r.Pin(t.Context(), workspace, "app", v.Name, actor)
		}
		blown, where := r.fuse.blown, r.fuse.where
		r.fuse = nil
		r.reopen()
		got, gone := r.Template(workspace, "app")
		if gone != nil {
			t.Fatal(gone)
		}
		newest := got.Latest()
		if newest == nil || newest.Status != templates.Ready {
			t.Fatalf("at %s: %s", where, r.numbers("app"))
		}
		if done := newest.RollbackOf == 1; err == nil && !done || err == nil && pinned == nil && newest.Pinned == nil {
			t.Errorf("at %s: acknowledged and lost: %s", where, r.numbers("app"))
		}
		r.expectPool(len(got.Revisions))
		before := r.listing()
		r.wipeStore()
		if after := r.listing(); after != before {
			t.Errorf("at %s: without the store:\n%s\nbefore:\n%s", where, after, before)
		}
		if !blown {
			if err != nil || pinned != nil {
				t.Fatal(err, pinned)
			}
			if n < 8 {
				t.Errorf("only %d points", n)
			}
			return
		}
		if t.Failed() {
			return
		}
	}
}
