package templates_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/run"
	"holdfast/templates"
)

func (r *rig) source(s templates.SourceSpec) (blockdev.ID, func()) {
	r.t.Helper()
	id, release, err := r.Source(r.t.Context(), s)
	if err != nil {
		r.t.Fatal(err)
	}
	return id, release
}

func TestBlanks(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Btrfs)
	r := reflinkRig(t, 4<<30, nil)
	for _, s := range []templates.SourceSpec{
		{Filesystem: filesystem.Ext4, Size: mib},
		{Filesystem: filesystem.Ext4, Size: 10 << 30},
		{Filesystem: filesystem.XFS, Size: 300 * mib},
		{Filesystem: filesystem.Btrfs, Size: 109 * mib},
	} {
		id, release := r.source(s)
		if again, releaseAgain := r.source(s); again != id {
			t.Errorf("%v: made twice", s)
		} else {
			releaseAgain()
		}
		release()
		dir := r.mounted(s)
		if _, err := run.Run(t.Context(), run.Cmd{Args: []string{"touch", dir + "/file"}}); err != nil {
			t.Errorf("%v: %v", s, err)
		}
	}
	if st := r.Stats(); st.Misses != 4 || st.Sources != 4 || st.SourceBytes == 0 || st.SourceBytes != r.Bytes() {
		t.Errorf("%+v", st)
	}
}

func TestSourcesThatCannotBe(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	v := r.push("app", pack(t, file("a", strings.Repeat("x", 3_000_000)), symlink("long", strings.Repeat("x", 1024))))
	for _, c := range []struct {
		s    templates.SourceSpec
		want error
		says string
	}{
		{templates.SourceSpec{Filesystem: "xfs", Size: 299 * mib}, templates.ErrTooSmall, "300 MB"},
		{templates.SourceSpec{Filesystem: "btrfs", Size: 108 * mib}, templates.ErrTooSmall, "109 MB"},
		{templates.SourceSpec{Filesystem: "ext4", Size: 0}, templates.ErrTooSmall, "1 MB"},
		{templates.SourceSpec{Filesystem: "none", Size: mib}, templates.ErrInvalid, "none"},
		{templates.SourceSpec{Filesystem: "ntfs", Size: mib}, templates.ErrInvalid, "ntfs"},
		{templates.SourceSpec{Filesystem: "ext4", Size: mib, Revision: v.ID}, templates.ErrTooSmall, fmt.Sprintf("app:1 with filesystem ext4 needs at least %d MB", v.MinimumBytes/mib)},
		{templates.SourceSpec{Filesystem: "xfs", Size: 200 * mib, Revision: v.ID}, templates.ErrTooSmall, "300 MB"},
		{templates.SourceSpec{Filesystem: "xfs", Size: 400 * mib, Revision: v.ID}, templates.ErrInvalid, "symbolic link of 1024 bytes"},
		{templates.SourceSpec{Filesystem: "ext4", Size: 9 * mib, Revision: "rev-00000000000000000000000000"}, templates.ErrNotFound, "deleted"},
	} {
		_, _, err := r.Source(t.Context(), c.s)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v", c.s, err)
		}
	}
	r.expectPool(1)
}

func symlink(name, text string) entry {
	e := file(name, "")
	e.Typeflag, e.Linkname = '2', text
	return e
}

// However many ask at once, an image is made once, and one who goes away does
// not take it from the others.
func TestManyAskForOneSource(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	v := r.push("app", pack(t, file("a", "b")))
	s := templates.SourceSpec{Filesystem: "ext4", Size: 8 * mib, Revision: v.ID}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := r.Source(gone, s); !errors.Is(err, context.Canceled) {
		t.Errorf("with a dead context: %v", err)
	}
	var wait sync.WaitGroup
	ids := make(chan blockdev.ID, 32)
	for range 32 {
		wait.Add(1)
		go func() {
			defer wait.Done()
			id, release, err := r.Source(t.Context(), s)
			if err != nil {
				t.Error(err)
				return
			}
			ids <- id
			release()
		}()
	}
	wait.Wait()
	close(ids)
	first := <-ids
	for id := range ids {
		if id != first {
			t.Errorf("two sources: %s, %s", first, id)
		}
	}
	if st := r.Stats(); st.Misses != 1 || st.Hits+st.Misses > 33 {
		t.Errorf("%+v", st)
	}
	r.expectPool(2)
}

// The cache is bounded; what is in use stays, and what was used last.
func TestCacheBound(t *testing.T) {
	r := plainRig(t, func(o *templates.Options) { o.MaxSources = 3 })
	spec := func(n int64) templates.SourceSpec {
		return templates.SourceSpec{Filesystem: "ext4", Size: n * mib}
	}
	held, release := r.source(spec(1))
	for n := int64(2); n <= 10; n++ {
		_, done := r.source(spec(n))
		done()
		_, done = r.source(spec(2)) // always in use again
		done()
	}
	if st := r.Stats(); st.Sources != 3 || st.Misses != 10 {
		t.Errorf("%+v", st)
	}
	if again, done := r.source(spec(1)); again != held {
		t.Error("a source that was in use was removed")
	} else {
		done()
	}
	release()
	if err := r.Close(); err != nil { // waits for removals
		t.Fatal(err)
	}
	used := r.Bytes()
	r.reopen()
	r.expectPool(3)
	if r.Bytes() != used {
		t.Errorf("%d bytes after a restart, %d before", r.Bytes(), used)
	}
	misses := r.Stats().Misses
	for _, n := range []int64{1, 2, 10} {
		_, done := r.source(spec(n))
		done()
	}
	if st := r.Stats(); st.Misses != misses {
		t.Errorf("the cache was not found again: %+v", st)
	}
}

// When the pool has no room, cached images that nobody uses give way.
func TestCacheGivesWay(t *testing.T) {
	r := plainRig(t, nil)
	for n := range int64(4) {
		_, release := r.source(templates.SourceSpec{Filesystem: "ext4", Size: (n + 1) * mib})
		release()
	}
	held, release := r.source(templates.SourceSpec{Filesystem: "ext4", Size: 9 * mib})
	defer release()
	r.put("app")
	u := r.begin("app", "")
	r.space.follow(r.Bytes, r.Bytes()+16*mib)
	if _, err := r.send(u, pack(t, file("a", strings.Repeat("x", 1_200_000)))); err != nil {
		t.Errorf("%v", err)
	}
	if st := r.Stats(); st.Sources != 1 {
		t.Errorf("%+v", st)
	}
	if _, err := r.pool.Stat(t.Context(), held); err != nil {
		t.Error(err)
	}
}

// A version that is deleted while a source of it is made goes when that is done.
func TestDeleteWhileASourceIsMade(t *testing.T) {
	blockdevtest.LeakCheck(t)
	r := newRig(t, blockdevtest.ReflinkDir(t, blockdevtest.Size(1<<30)), nil)
	r.put("app")
	one := r.push("app", pack(t, file("a", "1")))
	r.push("app", pack(t, file("a", "2")))
	r.close()
	slow := &slowTools{Tools: filesystem.NewTools(), entered: make(chan struct{}), leave: make(chan struct{})}
	r.tune = func(o *templates.Options) { o.Filesystems = slow }
	r.open()
	done := make(chan error)
	go func() {
		_, release, err := r.Source(t.Context(), templates.SourceSpec{Filesystem: "ext4", Size: 64 * mib, Revision: one.ID})
		if err == nil {
			release()
		}
		done <- err
	}()
	<-slow.entered
	if _, err := r.DeleteRevision(t.Context(), workspace, "app", "1", actor); err != nil {
		t.Fatal(err)
	}
	// A crash now must not bring it back.
	info, err := r.pool.Stat(t.Context(), one.ID)
	if err != nil || !strings.Contains(string(info.Description), `"deleted":true`) {
		t.Errorf("%s, %v", info.Description, err)
	}
	close(slow.leave)
	if err := <-done; err != nil {
		t.Errorf("the source under way: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.expectPool(1)
	if _, err := r.pool.Stat(t.Context(), one.ID); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("the deleted version's image: %v", err)
	}
}

type slowTools struct {
	filesystem.Tools
	entered, leave chan struct{}
}

func (s *slowTools) Grow(ctx context.Context, path string, t filesystem.Type) error {
	close(s.entered)
	<-s.leave
	return s.Tools.Grow(ctx, path, t)
}

// Without reflink the data is copied, not the holes.
func TestPoolWithoutReflink(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	v := r.push("app", pack(t, file("a", strings.Repeat("x", 5_000_000))))
	spec := templates.SourceSpec{Filesystem: "ext4", Size: 1 << 30, Revision: v.ID}
	id, release := r.source(spec)
	defer release()
	var wait sync.WaitGroup
	for range 4 { // they read one source
		wait.Add(1)
		go func() {
			defer wait.Done()
			volume := blockdevtest.NewID(blockdev.PrefixVolume)
			if err := r.Hydrate(t.Context(), volume, spec); err != nil {
				t.Error(err)
			}
			info, err := r.pool.Stat(t.Context(), volume)
			if err != nil || !info.Draft || info.Open || info.Size != spec.Size || info.Allocated > 64*mib {
				t.Errorf("%+v, %v", info, err)
			}
		}()
	}
	wait.Wait()
	info, err := r.pool.Stat(t.Context(), id)
	if err != nil || info.Size != 1<<30 || info.Allocated > 64*mib {
		t.Errorf("%+v, %v", info, err)
	}
	if st := r.Stats(); st.SourceBytes < 5_000_000 {
		t.Errorf("%+v", st)
	}
}

// BenchmarkSourceHit is what a create pays for finding its source.
func BenchmarkSourceHit(b *testing.B) {
	r := benchRig(b)
	s := templates.SourceSpec{Filesystem: "ext4", Size: 8 * mib}
	_, release, err := r.Source(b.Context(), s)
	if err != nil {
		b.Fatal(err)
	}
	release()
	for b.Loop() {
		_, release, err := r.Source(b.Context(), s)
		if err != nil {
			b.Fatal(err)
		}
		release()
	}
}
