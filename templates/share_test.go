package templates_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/tree"
	"holdfast/internal/sys"
	"holdfast/templates"
	"holdfast/templates/treetest"
)

// image reads the bytes of a revision's image.
func (r *rig) image(id blockdev.ID) []byte {
	r.t.Helper()
	var all []byte
	err := r.OpenImage(r.t.Context(), id, func(f *os.File) (err error) {
		all, err = io.ReadAll(f)
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return all
}

// reordered packs a tree with the files in another order: directories first, then
// the rest backwards.
func reordered(t *testing.T, root string) []byte {
	t.Helper()
	list, err := exec.Command("find", root, "-mindepth", "1", "-printf", "%y %P\\0").Output()
	if err != nil {
		t.Fatal(err)
	}
	var dirs, rest []string
	for _, line := range strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if kind, path, _ := strings.Cut(line, " "); kind == "d" {
			dirs = append(dirs, path)
		} else {
			rest = append(rest, path)
		}
	}
	slices.Reverse(rest)
	names := filepath.Join(t.TempDir(), "names")
	if err := os.WriteFile(names, []byte(".\x00"+strings.Join(append(dirs, rest...), "\x00")), 0o600); err != nil {
		t.Fatal(err)
	}
	return tarred0(t, root, names)
}

func tarred0(t *testing.T, root, names string) []byte {
	t.Helper()
	cmd := exec.Command("tar", "-C", root, "--format=pax", "--xattrs", "--xattrs-include=*", "--no-recursion", "--null", "--verbatim-files-from", "-T", names, "-cf", "-")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	return out
}

// The same tree gives the same image: however the archive is ordered and packed,
// on a pool that shares blocks or not, with an earlier version to share with or
// without.
func TestImagesAreDeterministic(t *testing.T) {
	root := t.TempDir()
	treetest.Plant(t, root)
	archives := map[string][]byte{
		"sparse":    treetest.GNUTar(t, root, "--format=pax", "--sparse", "--sort=name", "--xattrs", "--xattrs-include=*"),
		"not":       treetest.GNUTar(t, root, "--format=pax", "--xattrs", "--xattrs-include=*"),
		"reordered": reordered(t, root),
	}
	if err := os.WriteFile(filepath.Join(root, "deep", "a", "file-0007"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := treetest.GNUTar(t, root, "--format=pax", "--xattrs", "--xattrs-include=*")
	var want []byte
	var digest string
	blockdevtest.LeakCheck(t)
	for _, pool := range []*rig{newRig(t, t.TempDir(), nil), newRig(t, blockdevtest.ReflinkDir(t, blockdevtest.Size(2<<30)), nil)} {
		for _, based := range []bool{false, true} {
			for what, archive := range archives {
				name := fmt.Sprint(what, based)
				pool.put(name)
				if based {
					pool.push(name, before)
				}
				v := pool.pushAlone(name, archive)
				have := pool.image(v.ID)
				if want == nil {
					want, digest = have, v.ImageDigest
				}
				if v.ImageDigest != digest || !bytes.Equal(have, want) {
					t.Errorf("%s, %v: image %s of %d bytes, want %s of %d", what, based, v.ImageDigest, len(have), digest, len(want))
				}
				if got, err := pool.Verify(t.Context(), workspace, name, "latest"); err != nil || got.Status != templates.Ready {
					t.Errorf("%s: its digest is not that of its bytes: %+v, %v", what, got, err)
				}
				if _, err := pool.Delete(t.Context(), workspace, name, actor); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// pushAlone makes a revision and sees to it that it was not there already.
func (r *rig) pushAlone(name string, archive []byte) templates.Revision {
	r.t.Helper()
	v := r.push(name, archive)
	app, _ := r.Template(workspace, name)
	for _, o := range app.Revisions {
		if o.ID != v.ID && o.TreeDigest == v.TreeDigest {
			r.t.Fatal("there is a version of the same tree")
		}
	}
	return v
}

// countingTools counts the filesystems that are made.
type countingTools struct {
	filesystem.Tools
	made atomic.Int64
}

func (c *countingTools) Make(ctx context.Context, path string, t filesystem.Type, o filesystem.MakeOptions) error {
	c.made.Add(1)
	return c.Tools.Make(ctx, path, t, o)
}

// A tree that the workspace has already is not built again: the version shares
// all bytes, and keeps them when the other goes. Other workspaces share nothing.
func TestIdenticalArchivesShareOneImage(t *testing.T) {
	tools := &countingTools{Tools: filesystem.NewTools()}
	r := reflinkRig(t, 2<<30, func(o *templates.Options) { o.Filesystems = tools })
	archive := many(t, 500, 40_000)
	r.put("one")
	r.put("two")
	first := r.push("one", archive)
	made := tools.made.Load()
	second := r.push("two", archive)
	if tools.made.Load() != made {
		t.Error("the same archive was built again")
	}
	if second.ImageDigest != first.ImageDigest || second.TreeDigest != first.TreeDigest || second.ID == first.ID ||
		second.MinimumBytes != first.MinimumBytes || second.Entries != first.Entries || second.ContentBytes != first.ContentBytes || second.Number != 1 {
		t.Errorf("%+v\n%+v", first, second)
	}
	if all, shared := r.mapped(second.ID).Allocated, overlap(r.places(first.ID), r.places(second.ID)); all == 0 || shared != all {
		t.Errorf("%d bytes of %d are shared", shared, all)
	}
	manifests := func() int {
		entries, err := os.ReadDir(r.pool.Manifests())
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	if n := manifests(); n != 1 {
		t.Errorf("%d manifests", n)
	}
	if _, err := r.Delete(t.Context(), workspace, "one", actor); err != nil {
		t.Fatal(err)
	}
	if got, err := r.Verify(t.Context(), workspace, "two", "1"); err != nil || got.Damaged {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := r.Manifest(t.Context(), workspace, "two"); err != nil || manifests() != 1 {
		t.Errorf("its manifest went with the other: %v", err)
	}
	if _, _, err := r.Put(t.Context(), "elsewhere", "three", templates.Change{Actor: actor}, true); err != nil {
		t.Fatal(err)
	}
	target, err := r.BeginUpload(t.Context(), "elsewhere", "three", "", actor)
	if err != nil {
		t.Fatal(err)
	}
	third, err := r.send(parse(t, target), archive)
	if err != nil || tools.made.Load() == made {
		t.Errorf("another workspace was given what this one has: %v", err)
	}
	if n := overlap(r.places(second.ID), r.places(third.ID)); n != 0 {
		t.Errorf("%d bytes are shared with another workspace", n)
	}
	if _, err := r.Delete(t.Context(), workspace, "two", actor); err != nil || manifests() != 1 {
		t.Errorf("%d manifests, %v", manifests(), err)
	}
	if _, err := r.Delete(t.Context(), "elsewhere", "three", actor); err != nil || manifests() != 0 {
		t.Errorf("%d manifests, %v", manifests(), err)
	}
}

// places tells where an image lies on the pool's device.
func (r *rig) places(id blockdev.ID) (list []sys.MappedExtent) {
	r.t.Helper()
	err := r.OpenImage(r.t.Context(), id, func(f *os.File) error {
		return sys.EachMapped(f, func(m sys.MappedExtent) error {
			list = append(list, m)
			return nil
		})
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

// overlap is how many bytes two images have in the same place.
func overlap(a, b []sys.MappedExtent) (bytes int64) {
	for _, x := range a {
		for _, y := range b {
			bytes += max(0, min(x.Physical+x.Length, y.Physical+y.Length)-max(x.Physical, y.Physical))
		}
	}
	return bytes
}

// generation packs the n-th of a line of trees of so many MiB: each has one file
// of a hundred changed since the one before.
func generation(t testing.TB, mebibytes, n int) []byte {
	t.Helper()
	const files = 1000
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	body := make([]byte, mebibytes<<20/files)
	for i := range files {
		changed := 0
		for g := range n {
			if i%100 == (g*37+5)%100 {
				changed = g + 1
			}
		}
		_, _ = rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), byte(changed)}).Read(body)
		name := fmt.Sprintf("d%02d/f%03d", i%37, i)
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Ten revisions of a tree, of which a hundredth changes each time, occupy little
// more than one: by the pool's own count of free space.
func TestRevisionsShareBlocks(t *testing.T) {
	const mebibytes = 200
	r := reflinkRig(t, 3<<30, nil)
	r.put("app")
	occupied := func() int64 {
		flush(t, r.dir)
		space, err := sys.SpaceOf(r.dir)
		if err != nil {
			t.Fatal(err)
		}
		return space.Total - space.Free
	}
	empty := occupied()
	first := r.push("app", generation(t, mebibytes, 0))
	one := r.mapped(first.ID).Allocated
	for n := range 9 {
		v := r.push("app", generation(t, mebibytes, n+1))
		t.Logf("revision %d: %d MiB of %d are those of the first, in %d pieces", n+2, overlap(r.places(first.ID), r.places(v.ID))>>20, r.mapped(v.ID).Allocated>>20, r.mapped(v.ID).Extents)
	}
	// What staging held is given back in the background.
	var ten int64
	eventually(t, func() bool {
		ten = occupied() - empty
		return ten <= one+one/3
	}, func() string { return fmt.Sprintf("one revision occupies %d MiB, ten %d", one>>20, ten>>20) })
	t.Logf("one revision occupies %d MiB, ten %d", one>>20, ten>>20)
	if one < mebibytes<<20 || ten < one {
		t.Errorf("one revision occupies %d bytes, ten %d", one, ten)
	}
	counted := r.Stats().RevisionBytes
	if counted < ten*9/10 || counted > ten*11/10 {
		t.Errorf("%d bytes are accounted for, %d occupied", counted, ten)
	}
	r.reopen()
	if again := r.Stats().RevisionBytes; again != counted {
		t.Errorf("%d bytes are accounted for after a restart, %d before", again, counted)
	}
	// A source of the last, which lies in many pieces, lies in few.
	_, last, err := r.Resolve(t.Context(), workspace, "app")
	if err != nil {
		t.Fatal(err)
	}
	source, release := r.source(templates.SourceSpec{Filesystem: filesystem.Ext4, Size: 1 << 30, Revision: last.ID})
	if m := r.mapped(source); m.Extents > 40 || r.mapped(last.ID).Extents <= 64 {
		t.Errorf("a source lies in %d pieces, its revision in %d", m.Extents, r.mapped(last.ID).Extents)
	}
	release()
	// Each is whole, and stays so when the others go.
	for n := range 9 {
		if _, err := r.DeleteRevision(t.Context(), workspace, "app", fmt.Sprint(n+1), actor); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := r.Verify(t.Context(), workspace, "app", "10"); err != nil || v.Damaged {
		t.Errorf("%+v, %v", v, err)
	}
	if bytes := r.Stats().RevisionBytes; bytes < mebibytes<<20 {
		t.Errorf("what shared its blocks accounts for %d bytes now that it is alone", bytes)
	}
}

func eventually(t testing.TB, is func() bool, what func() string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what())
		}
	}
}

func flush(t testing.TB, dir string) {
	t.Helper()
	if out, err := exec.Command("sync", "-f", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// A changed chunk of a large file is all that a revision does not share of it.
func TestLargeFilesShareUnchangedChunks(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	r.put("app")
	body := make([]byte, 64*mib+1234)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(body)
	r.push("app", pack(t, file("big", string(body)), file("a", "1")))
	copy(body[20*mib+5:], "changed")
	v := r.push("app", pack(t, file("a", "1"), file("big", string(body)), file("zz", "new")))
	if m := r.mapped(v.ID); m.Shared < 62*mib {
		t.Errorf("%d MiB of %d are shared", m.Shared/mib, m.Allocated/mib)
	}
	if v, err := r.Verify(t.Context(), workspace, "app", "latest"); err != nil || v.Damaged {
		t.Errorf("%+v, %v", v, err)
	}
}

// Damage of an image does not go over to the next version, though its manifest
// says that the bytes are the same.
func TestDamageIsNotShared(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	r.put("app")
	archive := many(t, 300, 100_000)
	one := r.push("app", archive)
	m, err := r.Manifest(t.Context(), workspace, "app")
	if err != nil {
		t.Fatal(err)
	}
	at := m.Find("dir-0001/file-000123").Runs[0].At
	f, err := os.OpenFile(filepath.Join(r.dir, "pool", "images", string(one.ID), "image"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damage"), at+10); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	archive[1024]++
	r.push("app", archive)
	if v, err := r.Verify(t.Context(), workspace, "app", "2"); err != nil || v.Damaged {
		t.Errorf("%+v, %v", v, err)
	}
	if v, err := r.Verify(t.Context(), workspace, "app", "1"); err != nil || !v.Damaged {
		t.Errorf("the damage was not noticed: %+v, %v", v, err)
	}
}

// checkManifest reads every file by what the manifest says of it.
func (r *rig) checkManifest(v templates.Revision) tree.Tree {
	r.t.Helper()
	m, err := r.Manifest(r.t.Context(), workspace, v.Template+":"+v.Name)
	if err != nil {
		r.t.Fatal(err)
	}
	all := r.image(v.ID)
	for _, n := range m.Nodes {
		body := make([]byte, n.Size)
		for _, run := range n.Runs {
			copy(body[run.Offset:run.Offset+run.Length], all[run.At:])
		}
		k := 0
		for chunk := range slices.Chunk(body, tree.Chunk) {
			if tree.DigestOf(chunk) != n.Digests[k] {
				r.t.Errorf("chunk %d of %q is not where the manifest says", k, n.Path)
			}
			k++
		}
		if k != len(n.Digests) {
			r.t.Errorf("%q has %d digests", n.Path, len(n.Digests))
		}
	}
	return m
}

// A manifest says where everything is. One that is lost, damaged or another's is
// made again from the image, and is the same.
func TestManifests(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	root := t.TempDir()
	treetest.Plant(t, root)
	r.put("app")
	v := r.push("app", treetest.GNUTar(t, root, "--format=pax", "--xattrs", "--xattrs-include=*"))
	other := r.push("app", pack(t, file("a", "1")))
	want := r.checkManifest(v)
	if want.Identity() != v.TreeDigest {
		t.Errorf("the manifest is of %s, the version of %s", want.Identity(), v.TreeDigest)
	}
	path := func(v templates.Revision) string {
		return filepath.Join(r.pool.Manifests(), strings.TrimPrefix(v.ImageDigest, "sha256:"))
	}
	good, err := os.ReadFile(path(v))
	if err != nil {
		t.Fatal(err)
	}
	for what, spoil := range map[string]func() error{
		"lost":    func() error { return os.Remove(path(v)) },
		"cut off": func() error { return os.Truncate(path(v), int64(len(good)/2)) },
		"empty":   func() error { return os.Truncate(path(v), 0) },
		"changed": func() error {
			return os.WriteFile(path(v), bytes.Replace(good, []byte("plain.txt"), []byte("plane.txt"), 1), 0o600)
		},
		"another's": func() error {
			b, err := os.ReadFile(path(other))
			return errorsJoin(err, os.WriteFile(path(v), b, 0o600))
		},
		"a later's": func() error {
			return os.WriteFile(path(v), bytes.Replace(good, []byte(`"format":1`), []byte(`"format":2`), 1), 0o600)
		},
		"not a file": func() error { return errorsJoin(os.Remove(path(v)), os.Mkdir(path(v), 0o700)) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		have := r.checkManifest(v)
		if have.Identity() != v.TreeDigest {
			t.Errorf("%s: made again it is another tree", what)
		}
		if what == "not a file" {
			if err := os.Remove(path(v)); err != nil {
				t.Fatal(err)
			}
		}
		r.checkManifest(v)
		if again, err := os.ReadFile(path(v)); what != "not a file" && (err != nil || !bytes.Equal(again, good)) {
			t.Errorf("%s: made again it is not the same (%v)", what, err)
		}
	}
	// What no version needs is gone after a restart, what one needs is not.
	stray := filepath.Join(r.pool.Manifests(), "new-123")
	if err := os.WriteFile(stray, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	if entries, err := os.ReadDir(r.pool.Manifests()); err != nil || len(entries) != 2 {
		t.Errorf("manifests %v, %v", entries, err)
	}
}

func errorsJoin(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// A revision from before there were digests and manifests works as it did: it is
// hydrated, verified, listed, and the next one shares its blocks.
func TestOldRevisions(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	r.put("app")
	archive := many(t, 300, 100_000)
	old := r.push("app", archive)
	info, err := r.pool.Stat(t.Context(), old.ID)
	if err != nil {
		t.Fatal(err)
	}
	var d map[string]any
	if err := json.Unmarshal(info.Description, &d); err != nil {
		t.Fatal(err)
	}
	revision := d["revision"].(map[string]any) //nolint:forcetypeassert // or the test fails
	delete(revision, "treeDigest")
	delete(revision, "imageDigest")
	b, err := json.Marshal(d)
	if err == nil {
		err = r.pool.Describe(t.Context(), old.ID, b)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.reopen()
	_, v, err := r.Resolve(t.Context(), workspace, "app")
	if err != nil || v.TreeDigest != "" || v.ImageDigest != "" {
		t.Fatalf("%+v, %v", v, err)
	}
	if m := r.checkManifest(v); m.Identity() != old.TreeDigest {
		t.Error("its manifest is of another tree")
	}
	dir := r.mounted(templates.SourceSpec{Filesystem: filesystem.Ext4, Size: 1 << 30, Revision: v.ID})
	if _, err := os.Stat(filepath.Join(dir, "dir-0001", "file-000123")); err != nil {
		t.Error(err)
	}
	archive[1024]++
	next := r.push("app", archive)
	if m := r.mapped(next.ID); m.Shared < m.Allocated*8/10 {
		t.Errorf("%d bytes of %d are shared with the old one", m.Shared, m.Allocated)
	}
	if _, err := r.Verify(t.Context(), workspace, "app", "1"); err != nil {
		t.Error(err)
	}
}
