package templates_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/templates"
)

func (r *rig) expectStagingEmpty() {
	r.t.Helper()
	entries, err := os.ReadDir(r.pool.Staging())
	if err != nil || len(entries) != 0 {
		r.t.Errorf("staging: %v, %v", entries, err)
	}
	if held := r.space.reserved(); held != 0 {
		r.t.Errorf("%d bytes are still set aside", held)
	}
	if st := r.Stats(); st.Uploads != 0 || st.Revisions+st.Sources == 0 && r.Bytes() != 0 {
		r.t.Errorf("nothing accounts for %d bytes: %+v", r.Bytes(), st)
	}
}

func TestUploadURLs(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	archive := pack(t, file("a", "1"))
	good := r.begin("app", "")
	other := r.begin("app", "")
	bad := map[string]upload{
		"forged":         {good.id, good.expires, strings.Repeat("A", len(good.signature))},
		"no signature":   {good.id, good.expires, ""},
		"later":          {good.id, good.expires + "0", good.signature},
		"another's":      {other.id, good.expires, good.signature},
		"unknown":        {"rev-00000000000000000000000000", good.expires, good.signature},
		"path":           {"../../etc", good.expires, good.signature},
		"no expiry":      {good.id, "", good.signature},
		"expiry is text": {good.id, "never", good.signature},
	}
	for name, u := range bad {
		if _, err := r.send(u, archive); !errors.Is(err, templates.ErrUploadGone) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := r.send(good, archive); err != nil {
		t.Fatal(err)
	}
	if _, err := r.send(good, archive); !errors.Is(err, templates.ErrUploadGone) {
		t.Errorf("used again: %v", err)
	}
	r.clock.advance(time.Hour)
	if _, err := r.send(other, archive); !errors.Is(err, templates.ErrUploadGone) {
		t.Errorf("expired: %v", err)
	}
	r.expectStagingEmpty()
}

// An upload that did not come whole can be sent again to the same URL.
func TestBodies(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.MaxArchiveBytes = 8 * mib })
	r.put("app")
	archive := pack(t, file("a", strings.Repeat("x", 3_000_000)))
	u := r.begin("app", "")
	ingest := func(length int64, body io.Reader) error {
		_, err := r.Ingest(t.Context(), u.upload(), length, body)
		return err
	}
	n := int64(len(archive))
	broken := errors.New("connection reset")
	for _, c := range []struct {
		what   string
		length int64
		body   io.Reader
		want   error
	}{
		{"no length", -1, bytes.NewReader(archive), templates.ErrInvalid},
		{"larger than allowed", 8*mib + 1, bytes.NewReader(archive), templates.ErrInvalid},
		{"longer than said", n - 512, bytes.NewReader(archive), templates.ErrInvalid},
		{"shorter than said", n + 512, bytes.NewReader(archive), templates.ErrInvalid},
		{"cut in the middle", n, bytes.NewReader(archive[:1_000_000]), templates.ErrInvalid},
		{"cut at the end", n, bytes.NewReader(archive[:n-1]), templates.ErrInvalid},
		{"cut by the server", n, io.MultiReader(bytes.NewReader(archive[:1_000_000]), failing{io.ErrUnexpectedEOF}), templates.ErrInvalid},
		{"a broken connection", n, io.MultiReader(bytes.NewReader(archive[:1_000_000]), failing{broken}), broken},
		{"nothing", n, strings.NewReader(""), templates.ErrInvalid},
	} {
		if err := ingest(c.length, c.body); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.what, err)
		}
		r.expectStagingEmpty()
		if got, _ := r.Template(workspace, "app"); got.Revisions[0].Status != templates.Created {
			t.Fatalf("%s: the revision is %+v", c.what, got.Revisions[0])
		}
	}
	r.expectPool(0)
	if err := ingest(n, bytes.NewReader(archive)); err != nil {
		t.Errorf("in the end: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// A refused archive is read to its end, so that the client hears why, and the
// reason stays with the version.
func TestRefusedArchive(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	archive := pack(t, file("ok", "1"), file("../../etc/cron.d/evil", "2"), file("big", strings.Repeat("x", 9_000_000)))
	body := bytes.NewReader(archive)
	u := r.begin("app", "")
	_, err := r.Ingest(t.Context(), u.upload(), int64(len(archive)), body)
	if !errors.Is(err, templates.ErrArchive) || !strings.Contains(err.Error(), "../../etc/cron.d/evil") {
		t.Errorf("%v", err)
	}
	if body.Len() != 0 {
		t.Errorf("%d bytes were not read", body.Len())
	}
	got, _ := r.Template(workspace, "app")
	if v := got.Revisions[0]; v.Status != templates.Failed || !strings.Contains(v.Failure, "etc/cron.d/evil") {
		t.Errorf("%+v", v)
	}
	if _, err := r.send(u, pack(t)); !errors.Is(err, templates.ErrUploadGone) {
		t.Errorf("sent again: %v", err)
	}
	r.expectStagingEmpty()
	r.expectPool(0)
}

func TestUploadWithoutRoom(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	archive := pack(t, file("a", strings.Repeat("x", 3_000_000)))
	u := r.begin("app", "")
	r.space.limit = 1_000_000
	body := bytes.NewReader(archive)
	_, err := r.Ingest(t.Context(), u.upload(), int64(len(archive)), body)
	if !errors.Is(err, templates.ErrNoSpace) || !errors.Is(err, fullError{}) {
		t.Errorf("no room for staging: %v", err)
	}
	if body.Len() != len(archive) {
		t.Error("it was read before it was refused")
	}
	r.space.limit = int64(len(archive)) + 1_000_000
	if _, err := r.send(u, archive); !errors.Is(err, templates.ErrNoSpace) {
		t.Errorf("no room for the image: %v", err)
	}
	r.expectStagingEmpty()
	r.expectPool(0)
	r.space.limit = 0
	if _, err := r.send(u, archive); err != nil {
		t.Errorf("with room: %v", err)
	}
}

// A pool whose filesystem is really full refuses as well.
func TestFullPool(t *testing.T) {
	r := reflinkRig(t, 300*mib, nil)
	r.put("app")
	archive := pack(t, file("a", strings.Repeat("x", 260_000_000)))
	if _, err := r.send(r.begin("app", ""), archive); !errors.Is(err, templates.ErrNoSpace) {
		t.Errorf("%v", err)
	}
	r.expectStagingEmpty()
	r.expectPool(0)
	r.push("app", pack(t, file("a", "small")))
}

func TestConcurrentUploads(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.MaxUploads = 3 })
	r.put("app")
	archive := many(t, 300, 8000)
	var wait sync.WaitGroup
	errs := make(chan error, 12)
	for range 12 {
		u := r.begin("app", "")
		wait.Add(1)
		go func() {
			defer wait.Done()
			for {
				_, err := r.send(u, archive)
				if errors.Is(err, templates.ErrBusy) {
					time.Sleep(time.Millisecond)
					continue
				}
				errs <- err
				return
			}
		}()
	}
	wait.Wait()
	close(errs)
	for err := range errs {
		// One that became READY drops the unused ones before it.
		if err != nil && !errors.Is(err, templates.ErrUploadGone) {
			t.Error(err)
		}
	}
	if _, v, err := r.Resolve(t.Context(), workspace, "app"); err != nil || v.Number != 12 {
		t.Errorf("latest is %d, %v", v.Number, err)
	}
	r.expectStagingEmpty()
	before := r.listing()
	r.reopen()
	if after := r.listing(); after != before {
		t.Errorf("after a restart:\n%s\nbefore:\n%s", after, before)
	}
}

// One URL takes one upload at a time; the template stays while it lasts.
func TestUploadUnderWay(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.MaxUploads = 1 })
	r.put("app")
	r.push("app", pack(t))
	archive := pack(t, file("a", "1"))
	u := r.begin("app", "")
	half := make(chan struct{})
	body, feed := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := r.Ingest(ctx, u.upload(), int64(len(archive)), body)
		done <- err
	}()
	go func() {
		_, _ = feed.Write(archive[:700])
		close(half)
	}()
	<-half
	if _, err := r.send(r.begin("app", ""), archive); !errors.Is(err, templates.ErrBusy) {
		t.Errorf("above the number of uploads: %v", err)
	}
	if _, err := r.Delete(t.Context(), workspace, "app", actor); !errors.Is(err, templates.ErrInUse) {
		t.Errorf("delete: %v", err)
	}
	if _, err := r.DeleteRevision(t.Context(), workspace, "app", "2", actor); !errors.Is(err, templates.ErrInUse) {
		t.Errorf("delete of the version: %v", err)
	}
	cancel()
	_ = feed.CloseWithError(context.Canceled) // as the server's body does
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	r.expectStagingEmpty()
	if _, err := r.send(u, archive); err != nil {
		t.Errorf("again: %v", err)
	}
}
