package templates_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/serve/control"
	"holdfast/internal/run"
	"holdfast/templates"
	"holdfast/templates/remote"
)

// farRig is a rig with a store, which is an ordinary web server.
type farRig struct {
	*rig
	url  string
	dir  string // of the store
	away atomic.Bool
}

func newFarRig(t *testing.T) *farRig {
	t.Helper()
	f := &farRig{dir: t.TempDir()}
	files := http.FileServer(http.Dir(f.dir))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f.away.Load() {
			http.Error(w, "not now", http.StatusServiceUnavailable)
			return
		}
		files.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	f.url = server.URL + "/"
	stores, err := remote.NewStores([]string{f.url})
	if err != nil {
		t.Fatal(err)
	}
	run, err := os.MkdirTemp("", "far-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	workers, err := control.New(control.Options{Program: "/none", Dir: filepath.Join(run, "w")}) // nothing is served here
	if err != nil {
		t.Fatal(err)
	}
	f.rig = reflinkRig(t, 1<<30, nil)
	f.workers, f.tune = workers, func(o *templates.Options) { o.Stores = stores }
	f.reopen()
	return f
}

// publish pushes a version with a file, and publishes it.
func (f *farRig) publish(content string) (name string, files remote.Files) {
	f.t.Helper()
	f.put("app")
	v := f.push("app", pack(f.t, file("file", content)))
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		err := f.Publish(f.t.Context(), workspace, "app", templates.Publication{}, func(templates.Revision) io.Writer { return w })
		_ = w.CloseWithError(err)
		sent <- err
	}()
	files, err := remote.Publish(f.dir, r, nil)
	if err := errors.Join(err, <-sent); err != nil {
		f.t.Fatal(err)
	}
	return "app-" + v.Name, files
}

func (f *farRig) register(name, digest string) (templates.Revision, error) {
	return f.Register(f.t.Context(), workspace, templates.Registration{Template: "far", Manifest: f.url + name + ".json", Digest: digest, Actor: actor})
}

// hydrated makes a volume's draft and gives its bytes.
func (f *farRig) hydrated(v templates.Revision, size int64) (blockdev.ID, error) {
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	return id, f.Hydrate(f.t.Context(), id, templates.SourceSpec{Filesystem: filesystem.Ext4, Size: size, Revision: v.ID})
}

// TestRegister: volumes of a registered version begin without the store, read what was
// published, and what would need all of its bytes here says so.
func TestRegister(t *testing.T) {
	f := newFarRig(t)
	ctx := t.Context()
	name, files := f.publish("content")
	v, err := f.register(name, files.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if v.Status != templates.Ready || v.ImageBytes != files.Size || v.Remote == nil || v.Remote.Image != f.url+name+".image" || v.Digest != files.Digest {
		t.Errorf("%+v, %+v", v, v.Remote)
	}
	if again, err := f.register(name, files.Digest); err != nil || again.ID != v.ID {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	f.expectStagingEmpty()

	f.away.Store(true)
	f.reopen()
	id, err := f.hydrated(v, v.ImageBytes)
	if err != nil {
		t.Fatal(err)
	}
	b, err := f.pool.Access(ctx, id, false)
	if err != nil {
		t.Fatal(err)
	}
	const uuid = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f9"
	tools := filesystem.NewTools()
	if err := tools.IdentifyIn(ctx, b, b.Size(), filesystem.Ext4, uuid); err != nil {
		t.Errorf("without the store: %v", err)
	}
	if size, err := tools.SizeIn(ctx, b, filesystem.Ext4); err != nil || size != v.ImageBytes {
		t.Errorf("its filesystem has %d bytes, %v", size, err)
	}
	if got, err := f.Verify(ctx, workspace, "far", "1"); err != nil || got.Status != templates.Ready || got.VerifiedAt.IsZero() {
		t.Errorf("verified without the store: %+v, %v", got, err)
	}
	f.away.Store(false)
	var content bytes.Buffer
	if err := tools.ReadFileIn(ctx, b, filesystem.Ext4, "file", &content); err != nil || content.String() != "content" {
		t.Errorf("its file: %q, %v", content.String(), err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}

	if _, err := f.hydrated(v, v.ImageBytes-mib); !errors.Is(err, templates.ErrTooSmall) {
		t.Errorf("smaller than the image: %v", err)
	}
	xfs := templates.SourceSpec{Filesystem: filesystem.XFS, Size: 512 * mib, Revision: v.ID}
	if err := f.Hydrate(ctx, blockdevtest.NewID(blockdev.PrefixVolume), xfs); !errors.Is(err, templates.ErrInvalid) {
		t.Errorf("another filesystem: %v", err)
	}
	nowhere := func(templates.Revision) io.Writer { return io.Discard }
	archive := f.Archive(ctx, workspace, "far", "", func(templates.Revision, int64) io.Writer { return io.Discard })
	for what, err := range map[string]error{
		"archive": archive, "publish": f.Publish(ctx, workspace, "far", templates.Publication{}, nowhere),
		"diff": f.Diff(ctx, workspace, "far", "1", "1", nil, nil),
	} {
		if !errors.Is(err, templates.ErrRemote) {
			t.Errorf("%s: %v", what, err)
		}
	}
	info, err := f.pool.Stat(ctx, v.ID)
	if err != nil || info.Layers == 0 {
		t.Errorf("its image was brought here: %+v, %v", info, err)
	}
}

// TestPublishIsBounded: nobody has an image made that no volume and no store could have.
func TestPublishIsBounded(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.MaxImageBytes = 1 << 30 })
	r.put("app")
	r.push("app", pack(t, file("file", "content")))
	for _, size := range []int64{1<<10 + 1, 1 << 30, 1 << 44, 1<<44 + 64, 1 << 62} { // in MiB; some are small as bytes
		err := r.Publish(t.Context(), workspace, "app", templates.Publication{SizeMiB: size}, func(templates.Revision) io.Writer { return io.Discard })
		if !errors.Is(err, templates.ErrInvalid) || !strings.Contains(err.Error(), "at most 1024 MB") {
			t.Errorf("%d MiB: %v", size, err)
		}
	}
	if made := r.Stats().Sources; made != 0 {
		t.Errorf("%d images were made", made)
	}
}

// TestRegisteredLife: registered versions are kept, rolled back to, found damaged and
// deleted as others are, and others are pushed beside them.
func TestRegisteredLife(t *testing.T) {
	f := newFarRig(t)
	ctx := t.Context()
	first, files := f.publish("one")
	v1, err := f.register(first, files.Digest)
	if err != nil {
		t.Fatal(err)
	}
	second, files2 := f.publish("two")
	if _, err := f.register(second, files2.Digest); err != nil {
		t.Fatal(err)
	}
	f.push("far", pack(t, file("file", "three")))
	f.away.Store(true)
	back, err := f.Rollback(ctx, workspace, "far", "1", actor)
	if err != nil || back.Remote == nil || back.Name != "4" || back.RollbackOf != 1 {
		t.Fatalf("%+v, %v", back, err)
	}
	if _, err := f.DeleteRevision(ctx, workspace, "far", "1", actor); err != nil {
		t.Error(err)
	}
	f.wipeStore()
	if got, err := f.Template(workspace, "far"); err != nil || len(got.Revisions) != 3 || got.Latest().ID != back.ID || *got.Latest().Remote != *v1.Remote {
		t.Errorf("rebuilt: %+v, %v", got, err)
	}
	if _, err := f.hydrated(back, back.ImageBytes); err != nil {
		t.Errorf("of what is left of a deleted version: %v", err)
	}

	chunks, err := filepath.Glob(filepath.Join(f.dirOf(back.ID), "chunks-*"))
	if err != nil || len(chunks) != 1 {
		t.Fatalf("%q, %v", chunks, err)
	}
	b, err := os.ReadFile(chunks[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(chunks[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := f.Verify(ctx, workspace, "far", "4"); err != nil || got.Status != templates.Failed || !got.Damaged {
		t.Errorf("with other chunks: %+v, %v", got, err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(chunks[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := f.Verify(ctx, workspace, "far", "4"); err != nil || got.Status != templates.Ready {
		t.Errorf("with its own again: %+v, %v", got, err)
	}
	if _, err := f.Delete(ctx, workspace, "far", actor); err != nil {
		t.Error(err)
	}
}

func (f *farRig) dirOf(id blockdev.ID) string { return filepath.Dir(f.imagePath(id)) }

// TestRegisterRefused: what is not what it should be leaves nothing.
func TestRegisterRefused(t *testing.T) {
	f := newFarRig(t)
	name, files := f.publish("content")
	if err := run1(t, "cp", files.Image, files.Image+".kept"); err != nil {
		t.Fatal(err)
	}
	before := f.listing()
	for what, c := range map[string]struct {
		change func() error
		digest string
		want   error
	}{
		"another digest": {func() error { return nil }, "sha256:" + strings.Repeat("00", 32), remote.ErrStore},
		"other chunks":   {func() error { return os.WriteFile(files.Chunks, []byte("other"), 0o600) }, files.Digest, remote.ErrStore},
		"other bytes":    {func() error { return os.WriteFile(files.Image, make([]byte, files.Size), 0o600) }, files.Digest, remote.ErrStore},
		"no image":       {func() error { return os.Remove(files.Image) }, files.Digest, remote.ErrStore},
	} {
		kept, err := os.ReadFile(files.Chunks)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.change(); err != nil {
			t.Fatal(err)
		}
		if _, err := f.register(name, c.digest); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
		if err := errors.Join(os.WriteFile(files.Chunks, kept, 0o600), run1(t, "cp", files.Image+".kept", files.Image)); err != nil {
			t.Fatal(err)
		}
		if far, err := f.Template(workspace, "far"); err == nil && len(far.Revisions) > 0 {
			t.Errorf("%s left %+v", what, far.Revisions)
		}
		f.expectStagingEmpty()
		f.expectPool(1 + f.Stats().Sources)
	}
	if _, err := f.Delete(t.Context(), workspace, "far", actor); err != nil {
		t.Error(err)
	}
	if after := f.listing(); after != before {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
	_, err := f.Register(t.Context(), workspace, templates.Registration{Template: "far", Manifest: "http://169.254.169.254/x.json", Digest: files.Digest})
	if !errors.Is(err, remote.ErrNotAllowed) {
		t.Errorf("somewhere else: %v", err)
	}
}

func run1(t *testing.T, args ...string) error {
	t.Helper()
	_, err := run.Run(t.Context(), run.Cmd{Args: args})
	return err
}

// TestCrashWhileRegistering cuts a registration at every side effect: then there is a
// version that volumes can be made of, or nothing of one.
func TestCrashWhileRegistering(t *testing.T) {
	f := newFarRig(t)
	name, files := f.publish("content")
	for n := 1; ; n++ {
		f.close()
		f.fuse = &fuse{at: n}
		err := f.tryOpen()
		if err == nil {
			_, err = f.register(name, files.Digest)
		}
		if !f.fuse.blown {
			if err != nil {
				t.Fatal(err)
			}
			if n < 10 {
				t.Errorf("only %d points", n)
			}
			t.Logf("%d points", n-1)
			return
		}
		where := f.fuse.where
		if err == nil {
			t.Logf("nobody noticed the crash at %s", where)
		}
		f.close()
		f.fuse = nil
		f.open()
		images := 1 + f.Stats().Sources
		far, err := f.Template(workspace, "far")
		if v := far.Latest(); err == nil && v != nil {
			images++
			if id, err := f.hydrated(*v, v.ImageBytes); err != nil {
				t.Errorf("after a crash at %s: %v", where, err)
			} else if err := f.pool.Remove(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		f.expectPool(images)
		f.expectStagingEmpty()
		if err == nil {
			if _, err := f.Delete(t.Context(), workspace, "far", actor); err != nil {
				t.Errorf("after a crash at %s: %v", where, err)
			}
		}
	}
}
