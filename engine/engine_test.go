package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/filesystem"
	"holdfast/metadata"
)

func (w *world) create(name string, size int64) Volume {
	w.t.Helper()
	v, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Name: name, SizeMiB: mib(size)})
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func hostAttach(path string, readOnly bool) AttachVolume {
	return AttachVolume{Holder: "sandbox:box", Target: attach.Target{Type: "host", Path: path}, ReadOnly: readOnly}
}

func TestCreateSaysWhatIsWrong(t *testing.T) {
	w := newWorld(t)
	w.engine.o.Regions = []string{"here", "there"}
	w.engine.o.MaxSizeMiB = 2000
	long := strings.Repeat("x", 300)
	many := map[string]string{}
	for i := range maxLabels + 1 {
		many[fmt.Sprint("k", i)] = "v"
	}
	for name, c := range map[string]struct {
		r     CreateVolume
		kind  error
		field string
	}{
		"name upper":       {CreateVolume{Name: "A"}, ErrInvalid, "metadata.name"},
		"name too long":    {CreateVolume{Name: strings.Repeat("a", 50)}, ErrInvalid, "metadata.name"},
		"name as path":     {CreateVolume{Name: "../a"}, ErrInvalid, "metadata.name"},
		"name ends hyphen": {CreateVolume{Name: "a-"}, ErrInvalid, "metadata.name"},
		"display name":     {CreateVolume{DisplayName: long}, ErrInvalid, "metadata.displayName"},
		"external id":      {CreateVolume{ExternalID: "has spaces!"}, ErrInvalid, "metadata.externalId"},
		"external long":    {CreateVolume{ExternalID: strings.Repeat("a", 65)}, ErrInvalid, "metadata.externalId"},
		"label key":        {CreateVolume{Labels: map[string]string{"": "v"}}, ErrInvalid, "metadata.labels"},
		"label value":      {CreateVolume{Labels: map[string]string{"k": long}}, ErrInvalid, "metadata.labels"},
		"labels":           {CreateVolume{Labels: many}, ErrInvalid, "metadata.labels"},
		"region":           {CreateVolume{Region: "nowhere"}, ErrInvalid, "spec.region"},
		"filesystem":       {CreateVolume{Filesystem: "zfs"}, ErrInvalid, "spec.filesystem"},
		"size zero":        {CreateVolume{SizeMiB: mib(0)}, ErrInvalid, "spec.size"},
		"size negative":    {CreateVolume{SizeMiB: mib(-5)}, ErrInvalid, "spec.size"},
		"size huge":        {CreateVolume{SizeMiB: mib(1 << 62)}, ErrInvalid, "spec.size"},
		"size over max":    {CreateVolume{SizeMiB: mib(2001)}, ErrQuota, "spec.size"},
		"xfs too small":    {CreateVolume{Filesystem: "xfs", SizeMiB: mib(299)}, ErrInvalid, "spec.size"},
		"btrfs too small":  {CreateVolume{Filesystem: "btrfs", SizeMiB: mib(108)}, ErrInvalid, "spec.size"},
		"no template":      {CreateVolume{Template: "nope"}, ErrInvalid, "spec.template"},
		"no revision":      {CreateVolume{Template: "demo:7"}, ErrInvalid, "spec.template"},
		"bad reference":    {CreateVolume{Template: "a b:c"}, ErrInvalid, "spec.template"},
		"raw template":     {CreateVolume{Template: "demo", Filesystem: "none"}, ErrInvalid, "spec.filesystem"},
		"template fits":    {CreateVolume{Template: "demo", SizeMiB: mib(9)}, ErrInvalid, "spec.size"},
	} {
		t.Run(name, func(t *testing.T) {
			c.r.Workspace = space
			if c.r.Name == "" {
				c.r.Name = "fine"
			}
			_, err := w.engine.CreateVolume(context.Background(), c.r)
			var p *Problem
			if !errors.As(err, &p) || !errors.Is(err, c.kind) || p.Field != c.field {
				t.Fatalf("got %v (%T)", err, err)
			}
		})
	}
	w.verifyConsistent(t)
	if page, _ := w.engine.List(space, Query{}); page.Total != 0 {
		t.Fatalf("%d volumes are left", page.Total)
	}
}

func TestDefaultSizes(t *testing.T) {
	w := newWorld(t)
	blank, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space})
	if err != nil || blank.SizeMiB != DefaultSizeMiB || !strings.HasPrefix(blank.Name, "volume-") || blank.Region != "here" {
		t.Fatalf("%+v, %v", blank, err)
	}
	filled, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Template: "demo:latest"})
	if err != nil || filled.SizeMiB != 20 || filled.Template != "demo:1" {
		t.Fatalf("%+v, %v", filled, err)
	}
}

// TestOneNameIsMadeOnce lets many callers create one name at once.
func TestOneNameIsMadeOnce(t *testing.T) {
	w := newWorld(t)
	var made, refused atomic.Int32
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			_, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Name: "one", SizeMiB: mib(1)})
			switch {
			case err == nil:
				made.Add(1)
			case errors.Is(err, ErrExists):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 1 || refused.Load() != 31 {
		t.Fatalf("%d made, %d refused", made.Load(), refused.Load())
	}
	w.verifyConsistent(t)
}

func TestIdempotencyKey(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	r := CreateVolume{Workspace: space, SizeMiB: mib(2), IdempotencyKey: "k1"}
	var wg sync.WaitGroup
	ids := make(chan blockdev.ID, 16)
	for range 16 {
		wg.Go(func() {
			v, err := w.engine.CreateVolume(ctx, r)
			if err != nil {
				t.Error(err)
			}
			ids <- v.ID
		})
	}
	wg.Wait()
	first := <-ids
	for range 15 {
		if id := <-ids; id != first {
			t.Fatalf("two volumes: %s and %s", first, id)
		}
	}
	w.restart(false)
	again, err := w.engine.CreateVolume(ctx, r)
	if err != nil || again.ID != first {
		t.Fatalf("after a restart: %s, %v", again.ID, err)
	}
	other := r
	other.SizeMiB = mib(3)
	if _, err := w.engine.CreateVolume(ctx, other); !errors.Is(err, ErrConflict) {
		t.Fatalf("another request under the key: %v", err)
	}
	elsewhere := r
	elsewhere.Workspace = "other"
	if v, err := w.engine.CreateVolume(ctx, elsewhere); err != nil || v.ID == first {
		t.Fatalf("the key in another workspace: %s, %v", v.ID, err)
	}
	failing := CreateVolume{Workspace: space, Name: "small", Template: "demo", SizeMiB: mib(1), IdempotencyKey: "k2"}
	if _, err := w.engine.CreateVolume(ctx, failing); !errors.Is(err, ErrInvalid) {
		t.Fatal(err)
	}
	failing.SizeMiB = mib(10)
	if _, err := w.engine.CreateVolume(ctx, failing); err != nil {
		t.Fatalf("a failed create keeps its key: %v", err)
	}
}

func TestShrinkingIsRefused(t *testing.T) {
	w := newWorld(t)
	w.create("a", 8)
	_, err := w.engine.ChangeVolume(context.Background(), space, "a", ChangeVolume{SizeMiB: mib(4)})
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "8 MB") {
		t.Fatalf("got %v", err)
	}
}

// TestChangeMerges is what the clients send back: everything, some of it, nulls.
func TestChangeMerges(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	text := func(s string) *string { return &s }
	v, err := w.engine.CreateVolume(ctx, CreateVolume{Workspace: space, Name: "a", Template: "demo:1", DisplayName: "A", Labels: map[string]string{"k": "v"}, ExternalID: "x-1"})
	if err != nil {
		t.Fatal(err)
	}
	same, err := w.engine.ChangeVolume(ctx, space, "a", ChangeVolume{DisplayName: text("A"), SizeMiB: mib(20), Region: text("here"), Template: text("demo"), Filesystem: text("ext4")})
	if err != nil || same.Sequence != v.Sequence {
		t.Fatalf("an echo changed something: %+v, %v", same, err)
	}
	got, err := w.engine.ChangeVolume(ctx, space, "a", ChangeVolume{ExternalID: text("x-2"), Labels: map[string]string{}})
	if err != nil || got.DisplayName != "A" || len(got.Labels) != 0 || got.ExternalID != "x-2" {
		t.Fatalf("%+v, %v", got, err)
	}
	if _, err := w.engine.VolumeByExternalID(space, "x-1"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("the old external id: %v", err)
	}
	if found, err := w.engine.VolumeByExternalID(space, "x-2"); err != nil || found.Name != "a" {
		t.Fatalf("the new external id: %v", err)
	}
	for name, c := range map[string]ChangeVolume{
		"region": {Region: text("there")}, "filesystem": {Filesystem: text("xfs")}, "template": {Template: text("demo:2")},
	} {
		if _, err := w.engine.ChangeVolume(ctx, space, "a", c); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s changed: %v", name, err)
		}
	}
}

func TestQuotaAndPoolBoundPromises(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	if err := w.engine.SetQuota(ctx, space, Quota{Volumes: 2, MiB: 100, LargestMiB: 60}); err != nil {
		t.Fatal(err)
	}
	refuse := func(what string, err error, kind error) {
		t.Helper()
		if !errors.Is(err, kind) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	attempt := func(name string, size int64) error {
		_, err := w.engine.CreateVolume(ctx, CreateVolume{Workspace: space, Name: name, SizeMiB: mib(size)})
		return err
	}
	refuse("too large", attempt("a", 61), ErrQuota)
	w.create("a", 60)
	refuse("too much together", attempt("b", 41), ErrQuota)
	w.create("b", 40)
	refuse("too many", attempt("c", 1), ErrQuota)
	_, err := w.engine.ChangeVolume(ctx, space, "b", ChangeVolume{SizeMiB: mib(41)})
	refuse("growing over the quota", err, ErrQuota)
	w.restart(false)
	refuse("too many after a restart", attempt("c", 1), ErrQuota)
	if _, err := w.engine.DeleteVolume(ctx, space, "a", ""); err != nil {
		t.Fatal(err)
	}
	if err := attempt("c", 1); err != nil {
		t.Fatalf("after a delete: %v", err)
	}
	_, err = w.engine.CreateVolume(ctx, CreateVolume{Workspace: "other", SizeMiB: mib(64 << 10)})
	refuse("the pool is promised", err, ErrNoSpace)
	w.verifyConsistent(t)
}

func TestOneWriterOrManyReaders(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.create("a", 4)
	writer, err := w.engine.Attach(ctx, space, "a", hostAttach("/w", false))
	if err != nil || writer.Epoch != 1 || writer.Phase != Attached {
		t.Fatalf("%+v, %v", writer, err)
	}
	if again, err := w.engine.Attach(ctx, space, "a", hostAttach("/w", false)); err != nil || again.ID != writer.ID {
		t.Fatalf("the same request again: %+v, %v", again, err)
	}
	for _, readOnly := range []bool{false, true} {
		_, err := w.engine.Attach(ctx, space, "a", hostAttach("/x", readOnly))
		if !errors.Is(err, ErrAttached) || !strings.Contains(err.Error(), "sandbox:box") {
			t.Fatalf("beside a writer (read-only %v): %v", readOnly, err)
		}
	}
	if _, err := w.engine.DeleteVolume(ctx, space, "a", ""); !errors.Is(err, ErrAttached) {
		t.Fatalf("delete while attached: %v", err)
	}
	if _, err := w.engine.ListDir(ctx, space, "a", "/"); !errors.Is(err, ErrAttached) {
		t.Fatalf("reading files while attached: %v", err)
	}
	if _, err := w.engine.Detach(ctx, space, "a", writer.ID, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := w.engine.Detach(ctx, space, "a", writer.ID, ""); !errors.Is(err, ErrNotFound) {
		t.Fatalf("detach again: %v", err)
	}
	for i := range 5 {
		if _, err := w.engine.Attach(ctx, space, "a", hostAttach(fmt.Sprint("/r", i), true)); err != nil {
			t.Fatalf("reader %d: %v", i, err)
		}
	}
	if _, err := w.engine.Attach(ctx, space, "a", hostAttach("/w", false)); !errors.Is(err, ErrAttached) {
		t.Fatalf("a writer beside readers: %v", err)
	}
	v, _ := w.engine.Volume(space, "a")
	if v.AttachedTo() != "sandbox:box" || len(v.Attachments) != 5 || v.Epoch != 1 {
		t.Fatalf("%+v", v)
	}
	w.verifyConsistent(t)
}

func TestBusyDetachChangesNothing(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.create("a", 4)
	a, err := w.engine.Attach(ctx, space, "a", hostAttach("/w", false))
	if err != nil {
		t.Fatal(err)
	}
	p := place(attach.Request{Target: a.Target})
	w.kernel.busy[p] = true
	if _, err := w.engine.Detach(ctx, space, "a", a.ID, ""); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "close its files") {
		t.Fatalf("got %v", err)
	}
	v, _ := w.engine.Volume(space, "a")
	if v.Attachments[0].Phase != Attached || v.Attachments[0].Failure == "" || !w.sees("a", p) {
		t.Fatalf("%+v", v.Attachments[0])
	}
	delete(w.kernel.busy, p)
	if _, err := w.engine.Detach(ctx, space, "a", a.ID, ""); err != nil {
		t.Fatal(err)
	}
	w.verifyConsistent(t)
}

// TestADeadSandboxLetsGo: a container that died is noticed and released, with an event.
func TestADeadSandboxLetsGo(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.create("a", 4)
	r := AttachVolume{Holder: "sandbox:box", Target: attach.Target{Type: "runc", Container: "box"}, MountPath: "/data"}
	if _, err := w.engine.Attach(ctx, space, "a", r); err != nil {
		t.Fatal(err)
	}
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	if v, _ := w.engine.Volume(space, "a"); len(v.Attachments) != 1 {
		t.Fatal("a healthy attachment was released")
	}
	w.kernel.dead["box"] = true
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	v, _ := w.engine.Volume(space, "a")
	if len(v.Attachments) != 0 || v.AttachedTo() != "" {
		t.Fatalf("%+v", v.Attachments)
	}
	if last := v.Events[len(v.Events)-2]; !strings.Contains(last.Message, "gone") {
		t.Fatalf("events: %+v", v.Events)
	}
	w.verifyConsistent(t)
	if _, err := w.engine.Attach(ctx, space, "a", r); !errors.Is(err, ErrConflict) {
		t.Fatalf("attach to a dead container: %v", err)
	}
	w.verifyConsistent(t)
}

// TestADeadSandboxIsInNobodysWay: before it is noticed in the background, a dead
// container neither blocks the next one, nor a delete, nor stands for a new
// container of its name.
func TestADeadSandboxIsInNobodysWay(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.create("a", 4)
	in := func(box string) AttachVolume {
		return AttachVolume{Holder: "sandbox:" + box, Target: attach.Target{Type: "runc", Container: box}, MountPath: "/data"}
	}
	first, err := w.engine.Attach(ctx, space, "a", in("box"))
	if err != nil {
		t.Fatal(err)
	}
	w.kernel.boots++ // every process is another one now; "box" runs again
	clear(w.kernel.visible)
	again, err := w.engine.Attach(ctx, space, "a", in("box"))
	if err != nil || again.ID == first.ID || !w.sees("a", "|box|/data") {
		t.Fatalf("the container of the same name: %+v, %v", again, err)
	}
	w.kernel.dead["box"] = true
	if _, err := w.engine.Attach(ctx, space, "a", in("other")); err != nil {
		t.Fatalf("another container after the first died: %v", err)
	}
	w.kernel.dead["other"] = true
	if _, err := w.engine.DeleteVolume(ctx, space, "a", ""); err != nil {
		t.Fatalf("delete after the container died: %v", err)
	}
}

// TestADirtyVolumeIsRecoveredBeforeItIsRead: its last use ended with the power.
func TestADirtyVolumeIsRecoveredBeforeItIsRead(t *testing.T) {
	w := newWorld(t)
	v := w.create("a", 4)
	w.kernel.dirty[string(v.ID)] = true
	entries, err := w.engine.ListDir(context.Background(), space, "a", "/")
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v, %v", entries, err)
	}
	w.verifyConsistent(t)
}

func TestRawVolumesAreNotMounted(t *testing.T) {
	w := newWorld(t)
	if _, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space, Name: "raw", Filesystem: "none", SizeMiB: mib(1)}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.engine.Attach(context.Background(), space, "raw", hostAttach("/x", false)); !errors.Is(err, ErrUnsupported) {
		t.Fatalf("got %v", err)
	}
}

// TestRebuild empties the store and lets the images tell what there was.
func TestRebuild(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.create("a", 4)
	w.create("b", 8)
	if _, err := w.engine.ChangeVolume(ctx, space, "b", ChangeVolume{SizeMiB: mib(16), Labels: map[string]string{"k": "v"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.engine.Attach(ctx, space, "a", hostAttach("/w", false)); err != nil {
		t.Fatal(err)
	}
	if err := w.engine.SetQuota(ctx, space, Quota{Volumes: 9}); err != nil {
		t.Fatal(err)
	}
	before := fmt.Sprintf("%+v", w.engine.volumes())
	other := newWorld(t)
	w.store, other.store = other.store, w.store
	w.restart(false)
	if after := fmt.Sprintf("%+v", w.engine.volumes()); after != before {
		t.Fatalf("before %s\nafter  %s", before, after)
	}
	if q := w.engine.Quota(space); q.Volumes != 9 {
		t.Fatalf("quota %+v", q)
	}
	if !w.sees("a", "/w||") {
		t.Fatal("the attachment is gone")
	}
	w.verifyConsistent(t)
}

func TestAReadyVolumeWithoutImageFailsAndStays(t *testing.T) {
	w := newWorld(t)
	v := w.create("a", 4)
	if err := w.pool.Remove(context.Background(), v.ID); err != nil {
		t.Fatal(err)
	}
	w.restart(false)
	got, err := w.engine.Volume(space, "a")
	if err != nil || got.Status() != StatusFailed {
		t.Fatalf("%+v, %v", got, err)
	}
	if _, err := w.engine.DeleteVolume(context.Background(), space, "a", ""); err != nil {
		t.Fatalf("a failed volume can be deleted: %v", err)
	}
	if _, err := w.engine.Volume(space, "a"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
}

// failing is a pool whose flushes fail.
type failing struct{ blockdev.Backend }

func (f failing) Describe(context.Context, blockdev.ID, []byte) error {
	return blockdev.Op("test.Describe", "", fmt.Errorf("%w: EIO", blockdev.ErrFailed))
}

func TestALostWriteStopsTheEngine(t *testing.T) {
	w := newWorld(t)
	w.create("a", 4)
	var told atomic.Int32
	w.engine.o.OnFailure = func(error) { told.Add(1) }
	w.engine.o.Pool = failing{w.pool}
	for range 3 {
		if _, err := w.engine.ChangeVolume(context.Background(), space, "a", ChangeVolume{SizeMiB: mib(8)}); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
	}
	if told.Load() != 1 || w.engine.Healthy() == nil {
		t.Fatalf("told %d times, healthy %v", told.Load(), w.engine.Healthy())
	}
}

// stubborn is an attacher whose work fails after it was done, and whose undoing
// fails at first.
type stubborn struct {
	attacher
	refusals *int
}

func (s stubborn) Attach(ctx context.Context, r attach.Request) error {
	return errors.Join(s.attacher.Attach(ctx, r), errInjected)
}

func (s stubborn) Detach(ctx context.Context, r attach.Request) error {
	if *s.refusals > 0 {
		*s.refusals--
		return errInjected
	}
	return s.attacher.Detach(ctx, r)
}

// TestAFailedAttachDoesNotComeTrueLater: its caller was told that it failed.
func TestAFailedAttachDoesNotComeTrueLater(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.create("a", 4)
	refusals := 1
	w.engine.o.Attachers["host"] = stubborn{attacher{w, true}, &refusals}
	if _, err := w.engine.Attach(ctx, space, "a", hostAttach("/w", false)); !errors.Is(err, errInjected) {
		t.Fatalf("got %v", err)
	}
	if v, _ := w.engine.Volume(space, "a"); len(v.Attachments) != 1 || v.Attachments[0].Phase != Detaching {
		t.Fatalf("%+v", v.Attachments)
	}
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	if v, _ := w.engine.Volume(space, "a"); len(v.Attachments) != 0 || w.sees("a", "/w||") {
		t.Fatalf("%+v", v.Attachments)
	}
	w.verifyConsistent(t)
}

// damaged is a filesystem that cannot be grown.
type damaged struct {
	toyFS
	tries *int
}

func (d damaged) Grow(context.Context, string, filesystem.Type) error {
	*d.tries++
	return filesystem.ErrDamaged
}

// TestWhatDoesNotSettleIsPostponed: a checker that fails is not run all the time.
func TestWhatDoesNotSettleIsPostponed(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.create("a", 4)
	tries := 0
	w.engine.o.Filesystems = damaged{toyFS{w}, &tries}
	if _, err := w.engine.ChangeVolume(ctx, space, "a", ChangeVolume{SizeMiB: mib(8)}); err != nil || w.engine.pendingReason(w.engine.volumes()[0].ID) == "" {
		t.Fatalf("growth of a damaged filesystem is not pending: %v", err)
	}
	for range 10 {
		if err := w.engine.tend(ctx); err != nil && !errors.Is(err, filesystem.ErrDamaged) {
			t.Fatal(err)
		}
	}
	if tries != 2 { // the change's own, and the first in the background
		t.Fatalf("%d tries in a moment", tries)
	}
	w.mu.Lock()
	w.clock = w.clock.Add(time.Hour)
	w.mu.Unlock()
	if err := w.engine.tend(ctx); !errors.Is(err, filesystem.ErrDamaged) || tries != 3 {
		t.Fatalf("an hour later: %d tries, %v", tries, err)
	}
	w.engine.o.Filesystems = toyFS{w}
	w.mu.Lock()
	w.clock = w.clock.Add(time.Hour)
	w.mu.Unlock()
	if err := w.engine.tend(ctx); err != nil {
		t.Fatal(err)
	}
	w.verifyConsistent(t)
}

// TestAFullMetadataDiskIsNotAFullPool: the operator has to look elsewhere.
func TestAFullMetadataDiskIsNotAFullPool(t *testing.T) {
	if err := userError(fmt.Errorf("create: %w", metadata.ErrNoSpace)); errors.Is(err, ErrNoSpace) || !errors.Is(err, metadata.ErrNoSpace) {
		t.Fatalf("got %v", err)
	}
}

// full is a pool that has no room for another description.
type full struct{ blockdev.Backend }

func (f full) Describe(context.Context, blockdev.ID, []byte) error {
	return blockdev.Op("test.Describe", "", blockdev.ErrNoSpace)
}

// TestAFullPoolCanBeEmptied: detach and delete need no room.
func TestAFullPoolCanBeEmptied(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.create("a", 4)
	w.create("b", 4)
	a, err := w.engine.Attach(ctx, space, "a", hostAttach("/w", false))
	if err != nil {
		t.Fatal(err)
	}
	w.engine.o.Pool = full{w.pool}
	if _, err := w.engine.ChangeVolume(ctx, space, "a", ChangeVolume{Labels: map[string]string{"k": "v"}}); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("a change on a full pool: %v", err)
	}
	if _, err := w.engine.Detach(ctx, space, "a", a.ID, ""); err != nil {
		t.Fatalf("detach: %v", err)
	}
	if _, err := w.engine.DeleteVolume(ctx, space, "b", ""); err != nil {
		t.Fatalf("delete: %v", err)
	}
	w.verifyConsistent(t)
	w.restart(false)
	if v, err := w.engine.Volume(space, "a"); err != nil || len(v.Attachments) != 0 {
		t.Fatalf("after a restart: %+v, %v", v, err)
	}
	w.verifyConsistent(t)
}

func TestCloseRefusesNewWork(t *testing.T) {
	w := newWorld(t)
	if err := w.engine.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.engine.CreateVolume(context.Background(), CreateVolume{Workspace: space}); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("got %v", err)
	}
}

// TestStep is the whole table of what is next.
func TestStep(t *testing.T) {
	const m = filesystem.MiB
	ready := Volume{Phase: Ready, SizeMiB: 10, Filesystem: filesystem.Ext4}
	with := func(change func(*Volume)) Volume { v := ready; change(&v); return v }
	for _, c := range []struct {
		name string
		v    Volume
		f    facts
		want action
	}{
		{"new", Volume{Phase: Allocating}, facts{}, actAllocate},
		{"half-filled", Volume{Phase: Hydrating}, facts{}, actAllocate},
		{"published, not recorded", Volume{Phase: Allocating}, facts{published: true}, actAdopt},
		{"deleting", Volume{Phase: Deleting}, facts{published: true}, actRemove},
		{"image lost", ready, facts{}, actMissing},
		{"settled", ready, facts{published: true, device: 10 * m, filesystem: 10 * m}, actNothing},
		{"rounding", ready, facts{published: true, device: 10 * m, filesystem: 10*m - 4096}, actNothing},
		{"device small", ready, facts{published: true, device: 5 * m, filesystem: 5 * m}, actDevice},
		{"filesystem small", ready, facts{published: true, device: 10 * m, filesystem: 5 * m}, actOffline},
		{"filesystem small, mounted", ready, facts{published: true, device: 10 * m, filesystem: 5 * m, mounted: true}, actMounted},
		{"a tail of no use", ready, facts{published: true, device: 10 * m, filesystem: 5 * m, filled: true}, actNothing},
		{"interrupted growth", with(func(v *Volume) { v.CheckFirst = true }), facts{published: true, device: 10 * m, filesystem: 10 * m}, actOffline},
		{"interrupted growth, mounted", with(func(v *Volume) { v.CheckFirst = true }), facts{published: true, device: 10 * m, filesystem: 10 * m, mounted: true}, actNothing},
		{"raw", with(func(v *Volume) { v.Filesystem = filesystem.None }), facts{published: true, device: 10 * m}, actNothing},
		{"tainted", with(func(v *Volume) { v.Tainted = true }), facts{published: true, device: 10 * m, filesystem: 5 * m}, actNothing},
	} {
		if got := step(c.v, c.f); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
