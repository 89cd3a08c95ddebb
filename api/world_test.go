package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/pools"
	"holdfast/engine"
	"holdfast/metadata"
	"holdfast/templates"
)

// world is a server over the real engine, whose pool is in memory.
type world struct {
	t         testing.TB
	store     *metadata.Store
	side      *metadata.SideLog
	pool      *blockdevtest.Memory
	fs        *toyFS
	shelf     *shelf
	engine    *engine.Engine
	access    *access
	audit     *auditLog
	stage     *toyStage
	library   *templates.Library // of newTemplateWorld
	poolDir   string             // likewise
	uploadURL string             // path and query of the newest one
	// sandboxes are where volumes are attached to.
	sandboxes *toyAttacher
	log       *syncBuffer
	options   api.Options
	server    *api.Server
	handler   http.Handler // held against the OpenAPI document
	local     http.Handler

	mu    sync.Mutex
	clock time.Time
}

// The keys of the world.
const (
	adminKey   = "hf_admin_of_main"
	readerKey  = "hf_reader_of_main"
	writerKey  = "hf_writer_of_main"
	foreignKey = "hf_admin_of_other"
	nodeKey    = "hf_control_plane"
)

func newWorld(t testing.TB, change ...func(*api.Options)) *world {
	t.Helper()
	return newPatientWorld(t, 0, change...)
}

// newPatientWorld is newWorld with a limit for the steps of an attachment; 0: the
// engine's own.
func newPatientWorld(t testing.TB, limit time.Duration, change ...func(*api.Options)) *world {
	t.Helper()
	return newWorldWith(t, func(o *engine.Options) { o.StepLimit = limit }, change...)
}

// newWorldOfTwo is newPatientWorld with a second pool. Nobody moves volumes along.
func newWorldOfTwo(t testing.TB, limit time.Duration) *world {
	t.Helper()
	return newWorldWith(t, func(o *engine.Options) {
		set, err := pools.New(
			pools.Pool{Name: o.PoolName, Kind: o.PoolKind, Backend: o.Pool},
			pools.Pool{Name: "second", Kind: o.PoolKind, Backend: blockdevtest.NewMemory()},
		)
		if err != nil {
			t.Fatal(err)
		}
		o.Pool, o.StepLimit = set, limit
		o.Others = []engine.OtherPool{{Name: "second", Kind: o.PoolKind, Ledger: engine.NewLedger(engine.LedgerOptions{Total: 64 << 30, Ratio: 1})}}
		o.Copy = func(context.Context, string, string, int64, int64) (next, copied int64, err error) {
			return 0, 0, errors.ErrUnsupported
		}
	})
}

// newWorldWith is newWorld with other options of the engine.
func newWorldWith(t testing.TB, set func(*engine.Options), change ...func(*api.Options)) *world {
	t.Helper()
	w := &world{t: t, sandboxes: &toyAttacher{}, stage: &toyStage{mounted: map[blockdev.ID]bool{}}, pool: blockdevtest.NewMemory(), clock: time.Date(2026, 11, 23, 12, 0, 0, 123456789, time.UTC), log: &syncBuffer{}, audit: &auditLog{}}
	w.fs = &toyFS{pool: w.pool, sizes: map[string]int64{}, files: map[string]string{}}
	w.shelf = newShelf(w)
	w.access = newAccess()
	store, err := metadata.Open(filepath.Join(t.TempDir(), "db"), metadata.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	side, err := metadata.OpenSideLog(filepath.Join(t.TempDir(), "side.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = side.Close() })
	w.store, w.side = store, side
	options := engine.Options{
		Store: store, SideLog: side, Pool: w.pool, PoolName: "default", PoolKind: "memory", Library: w.shelf, Stage: w.stage,
		Filesystems: w.fs, Sanitizer: toySanitizer{w.fs}, Attachers: map[string]attach.Attacher{"host": w.sandboxes}, Limiter: toyLimiter{}, Ledger: engine.NewLedger(engine.LedgerOptions{Total: 64 << 30, Ratio: 1}),
		Log: slog.New(slog.DiscardHandler), DefaultRegion: "us-pdx-1", Now: w.now,
	}
	set(&options)
	if w.engine, err = engine.New(t.Context(), options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.engine.Close(context.Background()) })
	if err := w.engine.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.options = api.Options{
		Engine: w.engine, Library: w.shelf, Auth: w.access, Audit: w.audit, Secret: bytes.Repeat([]byte("s"), 32), TenantsAttach: true,
		Log: slog.New(slog.NewJSONHandler(w.log, nil)), Now: w.now, Version: "1.2.3",
	}
	for _, c := range change {
		c(&w.options)
	}
	w.server, err = api.New(w.options)
	if err != nil {
		t.Fatal(err)
	}
	w.handler, w.local = apitest.Handler(t, w.server.Handler()), apitest.Handler(t, w.server.LocalHandler())
	return w
}

// now ticks: no two records have the same time.
func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock = w.clock.Add(time.Microsecond)
	return w.clock
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock = w.clock.Add(d)
}

// reply is an answer, read.
type reply struct {
	t      testing.TB
	what   string
	Code   int
	Header http.Header
	Body   []byte
}

// request is a call in a test: "GET /v0/volumes", a body (nil: none), headers "Name: value".
func (w *world) request(line string, body any, headers ...string) reply {
	w.t.Helper()
	return send(w.t, w.handler, line, body, append([]string{"Blaxel-Version: 2026-04-28", "Authorization: Bearer " + adminKey}, headers...)...)
}

func send(t testing.TB, h http.Handler, line string, body any, headers ...string) reply {
	t.Helper()
	method, target, _ := strings.Cut(line, " ")
	var r io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		r = strings.NewReader(b)
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		r = bytes.NewReader(raw)
	}
	req := httptest.NewRequest(method, target, r)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		if v == "" {
			req.Header.Del(k)
			continue
		}
		req.Header.Set(k, v)
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	return reply{t, line, rec.Code, rec.Header(), rec.Body.Bytes()}
}

// is fails the test unless the answer has the status; it gives the answer back.
func (r reply) is(status int) reply {
	r.t.Helper()
	if r.Code != status {
		r.t.Fatalf("%s: status %d, want %d: %s", r.what, r.Code, status, r.Body)
	}
	return r
}

// refused checks an error's status, word and (a part of) its message.
func (r reply) refused(status int, word, part string) reply {
	r.t.Helper()
	e := into[api.ErrorBody](r.is(status))
	if e.Code != status || e.Error != word || !strings.Contains(e.Message, part) {
		r.t.Fatalf("%s: %s, want code %d, error %s, message with %q", r.what, r.Body, status, word, part)
	}
	return r
}

func into[T any](r reply) (v T) {
	r.t.Helper()
	if err := json.Unmarshal(r.Body, &v); err != nil {
		r.t.Fatalf("%s: %v: %s", r.what, err, r.Body)
	}
	return v
}

type object = map[string]any

func newVolume(name string, spec object) object {
	if spec == nil {
		spec = object{"size": 1}
	}
	return object{"metadata": object{"name": name}, "spec": spec}
}

func (w *world) create(name string) api.Volume {
	w.t.Helper()
	return into[api.Volume](w.request("POST /v0/volumes", newVolume(name, nil)).is(200))
}

// toyFS knows the size of the filesystem in each image; xfs grows only mounted,
// ext4 only unmounted.
type toyFS struct {
	pool  *blockdevtest.Memory
	mu    sync.Mutex
	sizes map[string]int64
	files map[string]string // path in any volume -> content
	fail  error             // of ReadFile, after the content
}

func (f *toyFS) set(path string, size int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sizes[path] = size
}

func (f *toyFS) Identify(context.Context, string, filesystem.Type, string) error { return nil }

func (f *toyFS) Size(_ context.Context, path string, _ filesystem.Type) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sizes[path], nil
}

// IdentifyIn and the others are asked of what is layered: the image is full of it.
func (f *toyFS) IdentifyIn(context.Context, filesystem.Image, int64, filesystem.Type, string) error {
	return nil
}

func (f *toyFS) SizeIn(_ context.Context, image io.ReaderAt, _ filesystem.Type) (int64, error) {
	return image.(blockdev.Bytes).Size(), nil
}

func (f *toyFS) ListDirIn(ctx context.Context, _ io.ReaderAt, t filesystem.Type, dir string) ([]filesystem.Entry, error) {
	return f.ListDir(ctx, "", t, dir)
}

func (f *toyFS) ReadFileIn(ctx context.Context, _ io.ReaderAt, t filesystem.Type, file string, to io.Writer) error {
	return f.ReadFile(ctx, "", t, file, to)
}

func (f *toyFS) UsageIn(ctx context.Context, image io.ReaderAt, t filesystem.Type) (filesystem.Usage, error) {
	size, err := f.SizeIn(ctx, image, t)
	return filesystem.Usage{Total: size, Free: size}, err
}

func (f *toyFS) SizeMounted(ctx context.Context, dir string, t filesystem.Type) (int64, error) {
	return f.Size(ctx, "mem:"+dir, t)
}

func (*toyFS) Preen(context.Context, string) error { return nil }

func (f *toyFS) Grow(_ context.Context, path string, t filesystem.Type) error {
	if t != filesystem.Ext4 {
		return filesystem.ErrNeedsMount
	}
	return f.grow(path)
}

func (f *toyFS) GrowMounted(_ context.Context, dir string, t filesystem.Type) error {
	if t == filesystem.Ext4 {
		return filesystem.ErrCannotGrowMounted
	}
	return f.grow("mem:" + dir)
}

func (f *toyFS) grow(path string) error {
	image, err := f.pool.Image(path)
	if err != nil {
		return err
	}
	f.set(path, image.Size())
	return nil
}

func (f *toyFS) ListDir(_ context.Context, _ string, _ filesystem.Type, dir string) (list []filesystem.Entry, err error) {
	for file, content := range f.files {
		if path.Dir(file) == dir {
			list = append(list, filesystem.Entry{Name: path.Base(file), Mode: 0o644 | fs.ModeSetuid, Size: int64(len(content)), UID: 1000})
		}
	}
	if len(list) == 0 && dir != "/" {
		return nil, fmt.Errorf("%w: %s", filesystem.ErrNoFile, dir)
	}
	return list, nil
}

func (f *toyFS) ReadFile(_ context.Context, _ string, _ filesystem.Type, file string, to io.Writer) error {
	content, ok := f.files[file]
	if !ok {
		return fmt.Errorf("%w: %s", filesystem.ErrNoFile, file)
	}
	if _, err := io.WriteString(to, content); err != nil {
		return err
	}
	return f.fail
}

func (f *toyFS) Usage(ctx context.Context, path string, t filesystem.Type) (filesystem.Usage, error) {
	size, err := f.Size(ctx, path, t)
	return filesystem.Usage{Total: size, Used: size / 4, Free: size - size/4, Inodes: 100, UsedInodes: 11, FreeInodes: 89}, err
}

func (f *toyFS) UsageMounted(ctx context.Context, dir string, t filesystem.Type) (filesystem.Usage, error) {
	return f.Usage(ctx, "mem:"+dir, t)
}

func (f *toyFS) SyncMounted(context.Context, string, filesystem.Type) error { return nil }

func (f *toyFS) TrimMounted(context.Context, string, filesystem.Type, int64, int64) (filesystem.Trimmed, error) {
	return filesystem.Trimmed{Discarded: 4096, Done: true}, nil
}

func (f *toyFS) Recovers(context.Context, string, filesystem.Type) (bool, error) { return true, nil }

func (f *toyFS) Freeze(string) error { return nil }
func (f *toyFS) Thaw(string) error   { return nil }

type toyStage struct {
	mu      sync.Mutex
	mounted map[blockdev.ID]bool
	held    bool // something on the host uses what is mounted
}

func (s *toyStage) Mount(_ context.Context, id blockdev.ID, _ blockdev.Endpoint, _ filesystem.Type) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mounted[id] = true
	return string(id), nil
}

func (s *toyStage) Unmount(_ context.Context, id blockdev.ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held && s.mounted[id] {
		return fmt.Errorf("%w: the volume's filesystem is still held", blockdev.ErrBusy)
	}
	delete(s.mounted, id)
	return nil
}

func (*toyStage) Shutdown(context.Context, blockdev.ID, bool) error  { return nil }
func (*toyStage) Abandon(context.Context, blockdev.ID, string) error { return nil }

func (s *toyStage) Mounted(_ context.Context, id blockdev.ID) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mounted[id] {
		return string(id), nil
	}
	return "", nil
}

func (s *toyStage) Volumes(context.Context) (map[blockdev.ID]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[blockdev.ID]string{}
	for id := range s.mounted {
		all[id] = string(id)
	}
	return all, nil
}

// toyAttacher puts volumes nowhere. Its moods are those of a sandbox.
type toyAttacher struct {
	mu   sync.Mutex
	gate chan struct{} // not nil: attaching waits until it is closed, and for nothing else
	busy bool          // files are open
	gone bool          // it has died
}

func (a *toyAttacher) mood() (gate chan struct{}, busy, gone bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.gate, a.busy, a.gone
}

func (a *toyAttacher) be(change func(*toyAttacher)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change(a)
}

func (*toyAttacher) Needs() attach.Needs { return attach.Needs{Mount: true} }
func (*toyAttacher) Resolve(_ context.Context, t attach.Target, _ string) (attach.Target, error) {
	if t.Path == "" {
		return t, blockdev.Op("host.Resolve", "", fmt.Errorf("%w: secret/path/of/the/host", blockdev.ErrInvalid))
	}
	return t, nil
}

func (a *toyAttacher) Attach(context.Context, attach.Request) error {
	if gate, _, _ := a.mood(); gate != nil {
		<-gate
	}
	return nil
}

func (a *toyAttacher) Detach(context.Context, attach.Request) error {
	if _, busy, gone := a.mood(); busy && !gone {
		return fmt.Errorf("%w: process 1 (sh) has files open", blockdev.ErrBusy)
	}
	return nil
}

func (*toyAttacher) Fence(context.Context, attach.Request) error { return attach.ErrCannotFence }

func (a *toyAttacher) Probe(context.Context, attach.Request) (attach.State, error) {
	if _, _, gone := a.mood(); gone {
		return attach.StateGone, nil
	}
	return attach.StateAttached, nil
}

// toyLimiter limits nothing, and says so.
type toyLimiter struct{}

func (toyLimiter) Explain(attach.Target, bool) (blockdev.Enforcement, error) {
	return blockdev.Enforcement{Mechanism: "toy", Gaps: []string{"everything"}}, nil
}

func (toyLimiter) Apply(context.Context, string, attach.Target, bool, blockdev.Limits) error {
	return nil
}

// auditLog keeps entries in memory.
type auditLog struct {
	mu      sync.Mutex
	entries []api.Entry
	fail    error
}

func (a *auditLog) Record(_ context.Context, e api.Entry) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fail != nil {
		return a.fail
	}
	a.entries = append(a.entries, e)
	return nil
}

func (a *auditLog) Recent(_ context.Context, workspace string, limit int) (list []api.Entry, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := len(a.entries) - 1; i >= 0 && len(list) < limit; i-- {
		if e := a.entries[i]; workspace == "" || e.Workspace == workspace {
			list = append(list, e)
		}
	}
	return list, nil
}

// last is the newest entry.
func (a *auditLog) last(t testing.TB) api.Entry {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.entries) == 0 {
		t.Fatal("no audit entry")
	}
	return a.entries[len(a.entries)-1]
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// toySanitizer makes an empty toy filesystem.
type toySanitizer struct{ fs *toyFS }

func (s toySanitizer) Copy(ctx context.Context, _ string, _ filesystem.Type, to string) (filesystem.Copied, error) {
	return filesystem.Copied{Entries: 1}, s.fs.grow(to)
}
