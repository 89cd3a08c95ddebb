package templates_test

import (
	"archive/tar"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
	"holdfast/templates"
)

// many packs n files of random bytes in directories of a hundred.
func many(t testing.TB, n, size int) []byte {
	t.Helper()
	random := rand.NewChaCha8([32]byte{1})
	var entries []entry
	for i := range n {
		if i%100 == 0 {
			entries = append(entries, entry{tar.Header{Name: fmt.Sprintf("dir-%04d/", i/100), Typeflag: tar.TypeDir, Mode: 0o755}, ""})
		}
		body := make([]byte, size/2+i*size/n)
		_, _ = random.Read(body)
		entries = append(entries, file(fmt.Sprintf("dir-%04d/file-%06d", i/100, i), string(body)))
	}
	return pack(t, entries...)
}

// mapped tells how an image lies in the pool.
func (r *rig) mapped(id blockdev.ID) sys.Mapped {
	r.t.Helper()
	e, err := r.pool.Open(r.t.Context(), id, blockdev.Want{Kinds: []blockdev.Kind{blockdev.File}, ReadOnly: true})
	if err != nil {
		r.t.Fatal(err)
	}
	f, err := os.Open(e.Path)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	m, err := sys.MapFile(f, 1<<20)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.pool.Close(r.t.Context(), id, e.Lease); err != nil {
		r.t.Fatal(err)
	}
	return m
}

// The cost of a clone grows with the number of extents: an image has few,
// however many files are in it.
func TestImagesLieInOnePiece(t *testing.T) {
	r := reflinkRig(t, 4<<30, nil)
	r.put("many")
	archive := many(t, 20_000, 12_000)
	start := time.Now()
	v := r.push("many", archive)
	t.Logf("%d MiB in %v", len(archive)/mib, time.Since(start))
	base := r.mapped(v.ID)
	t.Logf("revision of %d MiB for %d MiB: %+v", v.MinimumBytes/mib, v.ContentBytes/mib, base)
	if base.Extents > 40 {
		t.Errorf("the revision has %d extents", base.Extents)
	}
	if waste := v.MinimumBytes - v.DataBytes; waste > v.DataBytes/8+16*mib {
		t.Errorf("the smallest volume is %d bytes for %d of data", v.MinimumBytes, v.DataBytes)
	}
	id, release, err := r.Source(t.Context(), templates.SourceSpec{Filesystem: filesystem.Ext4, Size: 10 << 30, Revision: v.ID})
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	grown := r.mapped(id)
	t.Logf("grown to 10 GiB: %+v", grown)
	if grown.Extents > base.Extents+150 {
		t.Errorf("a source of it has %d extents", grown.Extents)
	}
	stats := r.Stats()
	if info, err := r.pool.Stat(t.Context(), v.ID); err != nil || stats.RevisionBytes != info.Allocated {
		t.Errorf("revisions account for %d bytes, the pool says %d (%v)", stats.RevisionBytes, info.Allocated, err)
	}
	if stats.SourceBytes > 96*mib {
		t.Errorf("a source that shares its bytes accounts for %d", stats.SourceBytes)
	}
}

// A volume of the size class with blocks of 1 KiB is enough for a few files.
func TestSmallTemplates(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	r.put("small")
	for _, c := range []struct {
		what    string
		archive []byte
		most    int64 // MiB
	}{
		{"nothing", pack(t), 1},
		{"one file", pack(t, file("a", "b")), 1},
		{"100 files of 1 KB", many(t, 100, 1000), 1},
		{"4 MB", pack(t, file("a", strings.Repeat("x", 4_000_000))), 5},
		{"1000 empty files", many(t, 1000, 0), 1},
	} {
		v := r.push("small", c.archive)
		if v.MinimumBytes > c.most*mib {
			t.Errorf("%s: the smallest volume is %d MiB, want %d", c.what, v.MinimumBytes/mib, c.most)
		}
		spec := templates.SourceSpec{Filesystem: filesystem.Ext4, Size: v.MinimumBytes, Revision: v.ID}
		if _, release, err := r.Source(t.Context(), spec); err != nil {
			t.Errorf("%s: %v", c.what, err)
		} else {
			release()
		}
	}
}
