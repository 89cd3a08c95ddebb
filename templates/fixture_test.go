package templates_test

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/sparse"
	"holdfast/internal/run"
	"holdfast/metadata"
	"holdfast/templates"
)

const (
	workspace = "main"
	actor     = "key:test"
	mib       = 1 << 20
)

// rig is a library on a real pool, which can be closed and opened again.
type rig struct {
	*templates.Library
	t     testing.TB
	dir   string // holds the pool
	state string // holds the metadata
	pool  *sparse.Pool
	store *metadata.Store
	log   *metadata.SideLog
	space *space
	clock *clock
	fuse  *fuse // nil: nothing fails
	tune  func(*templates.Options)

	workers sparse.Workers // nil: no image is layered
}

// newRig makes a library in dir, the root of a filesystem for the pool.
func newRig(t testing.TB, dir string, tune func(*templates.Options)) *rig {
	t.Helper()
	r := &rig{t: t, dir: dir, state: t.TempDir(), space: &space{}, clock: &clock{now: time.Date(2026, 6, 1, 12, 0, 0, 123456789, time.UTC)}, tune: tune}
	r.open()
	t.Cleanup(r.close)
	return r
}

func (r *rig) open() {
	r.t.Helper()
	if err := r.tryOpen(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) tryOpen() (err error) {
	ctx := context.Background()
	logger := slog.New(slog.NewTextHandler(testWriter{r.t}, nil))
	if r.pool, err = sparse.Open(ctx, filepath.Join(r.dir, "pool"), sparse.Options{Log: logger, Workers: r.workers}); err != nil {
		return err
	}
	if r.store, err = metadata.Open(filepath.Join(r.state, "db"), metadata.Options{Log: logger, Failpoint: r.fuse.failpoint}); err != nil {
		return err
	}
	if r.log, err = metadata.OpenSideLog(filepath.Join(r.state, "side.log")); err != nil {
		return err
	}
	o := templates.Options{
		Store: r.store, SideLog: r.log, Pool: r.pool, Space: r.space, Staging: r.pool.Staging(), Manifests: r.pool.Manifests(),
		Secret: []byte("0123456789abcdef0123456789abcdef"), Log: logger, Now: r.clock.Now,
	}
	if r.tune != nil {
		r.tune(&o)
	}
	if r.fuse != nil {
		o.Failpoint = r.fuse.failpoint
		o.Pool, o.SideLog, o.Filesystems = &fusedPool{r.pool, r.fuse}, &fusedLog{r.log, r.fuse}, &fusedTools{filesystem.NewTools(), r.fuse}
	}
	r.Library, err = templates.Open(ctx, o)
	return err
}

// close is also how a crash looks from here: nothing of the library's is written.
func (r *rig) close() {
	if r.Library != nil {
		_ = r.Library.Close()
	}
	if r.log != nil {
		_ = r.log.Close()
	}
	if r.store != nil {
		_ = r.store.Close()
	}
	if r.pool != nil {
		r.pool.Shutdown()
	}
	r.Library, r.log, r.store, r.pool = nil, nil, nil, nil
}

func (r *rig) reopen() {
	r.t.Helper()
	r.close()
	r.open()
}

// put makes a template.
func (r *rig) put(name string) templates.Template {
	r.t.Helper()
	t, _, err := r.Put(r.t.Context(), workspace, name, templates.Change{Actor: actor}, true)
	if err != nil {
		r.t.Fatal(err)
	}
	return t
}

// upload is a URL taken apart.
type upload struct{ id, expires, signature string }

func (u upload) upload() templates.Upload {
	return templates.Upload{ID: u.id, Expires: u.expires, Signature: u.signature}
}

func (r *rig) begin(name, version string) upload {
	r.t.Helper()
	target, err := r.BeginUpload(r.t.Context(), workspace, name, version, actor)
	if err != nil {
		r.t.Fatal(err)
	}
	return parse(r.t, target)
}

func parse(t testing.TB, target string) upload {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	id, ok := strings.CutPrefix(u.Path, templates.UploadPath)
	if !ok {
		t.Fatalf("upload path %q", u.Path)
	}
	return upload{id, u.Query().Get("expires"), u.Query().Get("signature")}
}

func (r *rig) send(u upload, archive []byte) (templates.Revision, error) {
	return r.Ingest(r.t.Context(), u.upload(), int64(len(archive)), bytes.NewReader(archive))
}

// push makes a revision that is READY.
func (r *rig) push(name string, archive []byte) templates.Revision {
	r.t.Helper()
	v, err := r.send(r.begin(name, ""), archive)
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

// mounted clones a source, as the engine does for a volume, and mounts the clone.
func (r *rig) mounted(s templates.SourceSpec) string {
	r.t.Helper()
	ctx := r.t.Context()
	source, release, err := r.Source(ctx, s)
	if err != nil {
		r.t.Fatal(err)
	}
	defer release()
	return r.mountClone(ctx, source, s)
}

func (r *rig) mountClone(ctx context.Context, source blockdev.ID, s templates.SourceSpec) string {
	r.t.Helper()
	id := blockdevtest.NewID(blockdev.PrefixVolume)
	pool := r.pool
	if err := pool.Clone(ctx, id, source, s.Size); err != nil {
		r.t.Fatal(err)
	}
	if err := pool.Publish(ctx, id, []byte(`{}`)); err != nil {
		r.t.Fatal(err)
	}
	e, err := pool.Open(ctx, id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.Block}})
	if err != nil {
		r.t.Fatal(err)
	}
	if e.Size != s.Size {
		r.t.Errorf("the source is of %d bytes, not %d", e.Size, s.Size)
	}
	dir := r.t.TempDir()
	options := map[filesystem.Type]string{filesystem.XFS: "nouuid"}[s.Filesystem]
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"mount", "-t", string(s.Filesystem), "-o", "rw," + options, e.Path, dir}}); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if _, err := run.Run(context.Background(), run.Cmd{Args: []string{"umount", dir}}); err != nil {
			r.t.Error(err)
		}
		if err := pool.Close(context.Background(), id, e.Lease); err != nil {
			r.t.Error(err)
		}
		if err := pool.Remove(context.Background(), id); err != nil {
			r.t.Error(err)
		}
	})
	return dir
}

// space is an account without end that counts what is set aside.
type space struct {
	mu    sync.Mutex
	held  int64
	most  int64
	limit int64 // 0: none
	used  func() int64
}

// follow makes the account count what is used, and bounds it.
func (s *space) follow(used func() int64, limit int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used, s.limit = used, limit
}

type fullError struct{}

func (fullError) Error() string { return "the pool has no room" }

func (s *space) Reserve(bytes int64, _ string) (func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := s.held
	if s.used != nil {
		held += s.used()
	}
	if s.limit > 0 && held+bytes > s.limit {
		return nil, fullError{}
	}
	s.held += bytes
	s.most = max(s.most, s.held)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held -= bytes
	}, nil
}

func (s *space) reserved() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held
}

type clock struct {
	mu  sync.Mutex
	now time.Time
}

// Now moves on a little each time, as a clock does.
func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(time.Millisecond + time.Nanosecond)
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// pack makes a tar of headers and their contents.
func pack(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.body))
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type entry struct {
	tar.Header
	body string
}

func file(name, body string) entry { return entry{tar.Header{Name: name}, body} }

// reflinkRig is a rig on an XFS filesystem of its own.
func reflinkRig(t *testing.T, size int64, tune func(*templates.Options)) *rig {
	t.Helper()
	blockdevtest.LeakCheck(t)
	return newRig(t, blockdevtest.ReflinkDir(t, blockdevtest.Size(size)), tune)
}

func benchRig(b *testing.B) *rig {
	b.Helper()
	blockdevtest.LeakCheck(b)
	return newRig(b, b.TempDir(), nil)
}
