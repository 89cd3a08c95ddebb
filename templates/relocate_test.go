package templates_test

import (
	"bytes"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/templates"
	"holdfast/templates/remote"
)

// below is the store of f under another address: a directory of it.
func (f *farRig) below(name string, files remote.Files) (url string) {
	f.t.Helper()
	dir := filepath.Join(f.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		f.t.Fatal(err)
	}
	for _, from := range []string{files.Image, files.Chunks, files.Manifest} {
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(from)), b, 0o600)
		}
		if err != nil {
			f.t.Fatal(err)
		}
	}
	return f.url + name + "/" + filepath.Base(files.Manifest)
}

func (f *farRig) relocate(version, manifest string) (templates.Revision, error) {
	return f.Relocate(f.t.Context(), workspace, templates.Relocation{Template: "far", Version: version, Manifest: manifest, Actor: actor})
}

// reads gives a file of a draft that is layered.
func (f *farRig) reads(id blockdev.ID, name string) string {
	f.t.Helper()
	b, err := f.pool.Access(f.t.Context(), id, true)
	if err != nil {
		f.t.Fatal(err)
	}
	var content bytes.Buffer
	err = filesystem.NewTools().ReadFileIn(f.t.Context(), b, filesystem.Ext4, name, &content)
	if err := errors.Join(err, b.Close()); err != nil {
		f.t.Fatal(err)
	}
	return content.String()
}

// gone takes what was published first out of the store.
func gone(t *testing.T, files remote.Files) {
	t.Helper()
	for _, name := range []string{files.Image, files.Chunks, files.Manifest} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRelocate: volumes that were made before and after of a version, and of what was
// rolled back to it, have their bytes from where its files are by now; over restarts,
// and without any record.
func TestRelocate(t *testing.T) {
	f := newFarRig(t)
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
	back, err := f.Rollback(t.Context(), workspace, "far", "1", actor)
	if err != nil {
		t.Fatal(err)
	}
	before, err := f.hydrated(v, v.ImageBytes)
	if err != nil {
		t.Fatal(err)
	}
	to := f.below("moved", files)
	gone(t, files)
	for range 2 { // again is the same
		moved, err := f.relocate("1", to)
		if err != nil || moved.Remote.Manifest != to || moved.Remote.Image != f.url+"moved/"+name+".image" || moved.ID != v.ID || moved.Digest != v.Digest {
			t.Fatalf("%+v, %v", moved, err)
		}
	}
	f.expectStagingEmpty()
	if got := f.reads(before, "file"); got != "content" {
		t.Errorf("a volume from before reads %q", got)
	}
	check := func(when string) {
		t.Helper()
		got, err := f.Template(workspace, "far")
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range got.Revisions {
			if want := r.ID != other.ID; strings.Contains(r.Remote.Image, "/moved/") != want {
				t.Errorf("%s: version %s is at %s", when, r.Name, r.Remote.Image)
			}
			id, err := f.hydrated(r, r.ImageBytes)
			if err != nil {
				t.Fatal(err)
			}
			want := "content"
			if r.ID == other.ID {
				want = "two"
			}
			if got := f.reads(id, "file"); got != want {
				t.Errorf("%s: version %s reads %q", when, r.Name, got)
			}
		}
	}
	check("at once")
	f.reopen()
	check("after a restart")
	f.wipeStore()
	check("without any record")
	if _, err := f.DeleteRevision(t.Context(), workspace, "far", "1", actor); err != nil {
		t.Fatal(err)
	}
	third := f.below("third", remote.Files{Image: filepath.Join(f.dir, "moved", name+".image"), Chunks: filepath.Join(f.dir, "moved", name+".chunks"), Manifest: filepath.Join(f.dir, "moved", name+".json")})
	if moved, err := f.relocate(back.Name, third); err != nil || moved.ID != back.ID {
		t.Fatalf("what was rolled back to a version that was deleted: %+v, %v", moved, err)
	}
	if err := os.RemoveAll(filepath.Join(f.dir, "moved")); err != nil {
		t.Fatal(err)
	}
	id, err := f.hydrated(back, back.ImageBytes)
	if err != nil {
		t.Fatal(err)
	}
	if got := f.reads(id, "file"); got != "content" {
		t.Errorf("moved again it reads %q", got)
	}
}

// TestRelocateRefused: what is not the same bytes, not allowed, not there or not remote
// changes nothing.
func TestRelocateRefused(t *testing.T) {
	f := newFarRig(t)
	name, files := f.publish("content")
	v, err := f.register(name, files.Digest)
	if err != nil {
		t.Fatal(err)
	}
	second, _ := f.publish("two")
	f.push("far", pack(t, file("file", "here")))
	elsewhere := httptest.NewServer(http.FileServer(http.Dir(f.dir)))
	defer elsewhere.Close()
	without := f.below("without", files)
	if err := os.Remove(filepath.Join(f.dir, "without", name+".image")); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		version, url string
		want         error
	}{
		"other bytes":    {"1", f.url + second + ".json", remote.ErrStore},
		"no image":       {"1", without, remote.ErrStore},
		"nothing there":  {"1", f.url + "none.json", remote.ErrStore},
		"not allowed":    {"1", elsewhere.URL + "/" + name + ".json", remote.ErrNotAllowed},
		"signed":         {"1", f.url + name + ".json?key=1", remote.ErrInvalidURL},
		"not remote":     {"2", f.url + name + ".json", templates.ErrInvalid},
		"no such one":    {"9", f.url + name + ".json", templates.ErrNotFound},
		"latest is here": {"", f.url + name + ".json", templates.ErrInvalid},
	} {
		if _, err := f.relocate(c.version, c.url); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
		got, err := f.Template(workspace, "far")
		if err != nil || *got.Revisions[0].Remote != *v.Remote {
			t.Errorf("%s: %+v, %v", what, got.Revisions[0].Remote, err)
		}
		f.expectStagingEmpty()
	}
}

// TestCrashWhileRelocating cuts a relocation at every side effect: at the next start the
// version, and the pool, agree where its bytes are, whichever it is; and the same again
// makes it so.
func TestCrashWhileRelocating(t *testing.T) {
	f := newFarRig(t)
	name, files := f.publish("content")
	v, err := f.register(name, files.Digest)
	if err != nil {
		t.Fatal(err)
	}
	places := []string{f.url + filepath.Base(files.Manifest), f.below("moved", files)}
	at := func() (recorded, asked string) {
		t.Helper()
		got, err := f.Template(workspace, "far")
		if err != nil {
			t.Fatal(err)
		}
		base, chunks, err := f.pool.RemoteBaseOf(t.Context(), v.ID)
		if err := errors.Join(err, chunks.Close()); err != nil {
			t.Fatal(err)
		}
		return got.Revisions[0].Remote.Image, base.URL
	}
	for n := 1; ; n++ {
		to := places[n%2]
		f.close()
		f.fuse = &fuse{at: n}
		err := f.tryOpen()
		if err == nil {
			_, err = f.relocate("1", to)
		}
		blown, where := f.fuse.blown, f.fuse.where
		f.close()
		f.fuse = nil
		f.open()
		recorded, asked := at()
		if recorded != asked {
			t.Errorf("after a crash at %s it is at %s and asked for at %s", where, recorded, asked)
		}
		if !blown {
			if err != nil || recorded != strings.TrimSuffix(to, ".json")+".image" {
				t.Errorf("%s, %v", recorded, err)
			}
			if n < 5 {
				t.Errorf("only %d points", n)
			}
			t.Logf("%d points", n-1)
			return
		}
		if _, err := f.relocate("1", to); err != nil {
			t.Fatalf("again after a crash at %s: %v", where, err)
		}
		if recorded, asked := at(); recorded != strings.TrimSuffix(to, ".json")+".image" || asked != recorded {
			t.Errorf("again after a crash at %s it is at %s and asked for at %s", where, recorded, asked)
		}
	}
}
