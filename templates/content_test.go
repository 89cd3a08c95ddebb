package templates_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/templates"
)

// pull gives a version as a tar.
func (r *rig) pull(name, version string) ([]byte, templates.Revision, error) {
	var out bytes.Buffer
	var of templates.Revision
	length := int64(-1)
	err := r.Archive(r.t.Context(), workspace, name, version, func(v templates.Revision, n int64) io.Writer {
		of, length = v, n
		return &out
	})
	if err == nil && length != int64(out.Len()) {
		r.t.Errorf("%d bytes were announced, %d came", length, out.Len())
	}
	return out.Bytes(), of, err
}

// What was pulled and is pushed again makes the same image.
func TestPull(t *testing.T) {
	r := reflinkRig(t, 1<<30, nil)
	r.put("app")
	r.put("copy")
	odd := func(name string, typ byte, link string, mode int64) entry {
		return entry{tar.Header{Name: name, Typeflag: typ, Linkname: link, Mode: mode, ModTime: time.Unix(1_600_000_000, 123456789), Uid: 3_000_000, Gid: 7,
			Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.note": "v\x00w"}}, ""}
	}
	one := r.push("app", pack(t,
		odd("./", tar.TypeDir, "", 0o1777), odd("d/", tar.TypeDir, "", 0), file("d/café-日本語-🚀.txt", contents), file("big", strings.Repeat("0123456789abcdef", 200_000)),
		file("zeroes", strings.Repeat("\x00", 5<<20)), file("empty", ""), entry{tar.Header{Name: "z/hard", Typeflag: tar.TypeLink, Linkname: "big"}, ""},
		entry{tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("t", 300), ModTime: time.Unix(-5, 5), Format: tar.FormatPAX}, ""},
		file(strings.Repeat("n", 255), "long"), odd("suid", tar.TypeReg, "", 0o6755),
	))
	b, of, err := r.pull("app", "")
	if err != nil || of.ID != one.ID {
		t.Fatal(of, err)
	}
	if len(b) > 4<<20 {
		t.Errorf("%d bytes: holes are sent", len(b))
	}
	again, _, err := r.pull("app", "1")
	if err != nil || !bytes.Equal(b, again) {
		t.Errorf("another pull gives other bytes: %v", err)
	}
	copied := r.push("copy", b)
	if copied.TreeDigest != one.TreeDigest || copied.ImageDigest != one.ImageDigest {
		t.Errorf("pulled and pushed it is another image:\n%+v\n%+v", copied, one)
	}
	if b, _, err = r.pull("copy", "latest"); err != nil || !bytes.Equal(b, again) {
		t.Errorf("the copy gives other bytes: %v", err)
	}
	for _, version := range []string{"2", "x", "../1", "a:b"} {
		if _, _, err := r.pull("app", version); !errors.Is(err, templates.ErrNotFound) {
			t.Errorf("%s: %v", version, err)
		}
	}
	if _, _, err := r.pull("../app", ""); !errors.Is(err, templates.ErrNotFound) {
		t.Error(err)
	}
	// A manifest that is lost or damaged is made again.
	for _, hurt := range []func(path string) error{os.Remove, func(path string) error { return os.Truncate(path, 200) }} {
		if err := hurt(r.manifest(one)); err != nil {
			t.Fatal(err)
		}
		if b, _, err = r.pull("app", "1"); err != nil || !bytes.Equal(b, again) {
			t.Errorf("without its manifest: %d bytes, %v", len(b), err)
		}
	}
	// Damage is never given out as contents.
	r.flip(one.ID, contents)
	if _, _, err := r.pull("app", "1"); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("a damaged file: %v", err)
	}
	if _, _, err := r.pull("app", "1"); !errors.Is(err, templates.ErrDamaged) {
		t.Errorf("once it was noticed: %v", err)
	}
}

func (r *rig) diff(from, to string) (string, error) {
	var lines []string
	err := r.Diff(r.t.Context(), workspace, "app", from, to, func(a, b templates.Revision) {
		lines = append(lines, fmt.Sprintf("%s to %s", a.Name, b.Name))
	}, func(c templates.Difference) error {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s %v", c.Action, c.Path, c.Aspects)))
		return nil
	})
	return strings.Join(lines, "\n"), err
}

func TestDiffOfVersions(t *testing.T) {
	r := plainRig(t, nil)
	r.put("app")
	at := func(e entry, sec int64) entry { e.ModTime = time.Unix(sec, 0); return e }
	mode := at(file("mode", "m"), 1)
	mode.Mode = 0o4711
	dir := entry{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(9, 0)}, ""}
	r.push("app", pack(t, dir, at(file("same", "s"), 1), at(file("gone", "g"), 1), at(file("changed", "a"), 1), at(file("mode", "m"), 1), at(file("time", "t"), 1)))
	r.push("app", pack(t, dir, at(file("same", "s"), 1), at(file("changed", "b"), 1), mode, at(file("time", "t"), 2), at(file("new", "n"), 1)))
	want := `1 to 2
changed changed [contents]
removed gone []
changed mode [mode]
added new []
changed time [mtime]`
	for _, to := range []string{"2", "latest", ""} {
		if got, err := r.diff("1", to); err != nil || got != want {
			t.Errorf("to %q: %v\n%s", to, err, got)
		}
	}
	if got, err := r.diff("2", "2"); err != nil || got != "2 to 2" {
		t.Errorf("%v\n%s", err, got)
	}
	if _, err := r.Rollback(t.Context(), workspace, "app", "1", actor); err != nil {
		t.Fatal(err)
	}
	if got, err := r.diff("1", "3"); err != nil || got != "1 to 3" {
		t.Errorf("a rollback differs: %v\n%s", err, got)
	}
	if _, err := r.diff("1", "9"); !errors.Is(err, templates.ErrNotFound) {
		t.Error(err)
	}
}

// manifest is where a revision's is kept.
func (r *rig) manifest(v templates.Revision) string {
	return filepath.Join(r.pool.Manifests(), strings.TrimPrefix(v.ImageDigest, "sha256:"))
}
