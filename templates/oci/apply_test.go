package oci

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	. "holdfast/templates/archivetest"

	"holdfast/templates/archive"
)

// tree reads what an image becomes: path to a short description.
func treeOf(t testing.TB, im *Image) map[string]string {
	t.Helper()
	r := im.Tar(t.Context())
	defer r.Close()
	var b bytes.Buffer
	if _, err := io.Copy(&b, r); err != nil {
		t.Fatal(err)
	}
	if _, err := Ingest(t.Context(), bytes.NewReader(b.Bytes())); err != nil {
		t.Fatalf("what came out is no good archive: %v", err)
	}
	tree := map[string]string{}
	for in := tar.NewReader(&b); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return tree
		}
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(h.Name, "/")
		if _, twice := tree[name]; twice {
			t.Errorf("%s came twice", name)
		}
		switch h.Typeflag {
		case tar.TypeDir:
			tree[name] = fmt.Sprintf("dir %o", h.Mode)
		case tar.TypeSymlink:
			tree[name] = "-> " + h.Linkname
		case tar.TypeLink:
			tree[name] = "= " + h.Linkname
		default:
			body, err := io.ReadAll(in)
			if err != nil {
				t.Fatal(err)
			}
			tree[name] = string(body)
		}
	}
}

func open(t testing.TB, b []byte, change ...func(*Options)) *Image {
	t.Helper()
	im, err := tryOpen(t, b, change...)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func tryOpen(t testing.TB, b []byte, change ...func(*Options)) (*Image, error) {
	t.Helper()
	o := Options{Staging: t.TempDir(), Platform: "linux/amd64"}
	for _, fn := range change {
		fn(&o)
	}
	im, err := OpenLayout(t.Context(), bytes.NewReader(b), o)
	if left, rerr := os.ReadDir(o.Staging); rerr != nil || len(left) > 0 {
		t.Errorf("staging: %v, %v", left, rerr)
	}
	if err == nil {
		t.Cleanup(func() { _ = im.Close() })
	}
	return im, err
}

func dirMode(name string, mode int64) Entry {
	e := Dir(name)
	e.Mode = mode
	return e
}

// The rules by which layers are applied, each by an image that needs it.
func TestLayers(t *testing.T) {
	hold := Holding
	for name, c := range map[string]struct {
		layers []Layer
		want   map[string]string
	}{
		"one":                {[]Layer{Plain(Dir("d/"), hold("d/f", "1"))}, map[string]string{"d": "dir 755", "d/f": "1"}},
		"three packings":     {[]Layer{Plain(hold("a", "1")), Gzipped(hold("b", "2")), Zstandard(hold("c", "3"))}, map[string]string{"a": "1", "b": "2", "c": "3"}},
		"no entries":         {[]Layer{Plain()}, map[string]string{}},
		"replaced":           {[]Layer{Plain(hold("f", "old")), Plain(hold("f", "new"))}, map[string]string{"f": "new"}},
		"twice in a layer":   {[]Layer{Plain(hold("f", "old"), hold("f", "new"))}, map[string]string{"f": "new"}},
		"whiteout":           {[]Layer{Plain(hold("d/f", "1"), hold("d/g", "2")), Plain(hold("d/.wh.f", ""))}, map[string]string{"d": "dir 755", "d/g": "2"}},
		"whiteout of a tree": {[]Layer{Plain(hold("d/e/f", "1"), hold("g", "2")), Plain(hold(".wh.d", ""))}, map[string]string{"g": "2"}},
		"whiteout of nothing": {[]Layer{Plain(hold("f", "1")), Plain(hold("x/y/.wh.z", ""), hold(".wh.nothing", ""), hold("f/.wh.g", ""))},
			map[string]string{"f": "1"}},
		"whiteout in the same layer": {[]Layer{Plain(hold("f", "old")), Plain(hold("f", "new"), hold(".wh.f", ""))}, map[string]string{"f": "new"}},
		"whiteout, then again":       {[]Layer{Plain(hold("f", "old")), Plain(hold(".wh.f", "")), Plain(hold("f", "new"))}, map[string]string{"f": "new"}},
		"whiteout of a renewed directory": {[]Layer{Plain(Dir("d"), hold("d/old", "1")), Plain(Dir("d"), hold("d/new", "2"), hold(".wh.d", ""))},
			map[string]string{"d": "dir 755", "d/new": "2"}},
		"opaque": {[]Layer{Plain(hold("d/old", "1"), hold("d/e/old", "1")), Plain(Dir("d"), hold("d/.wh..wh..opq", ""), hold("d/new", "2"))},
			map[string]string{"d": "dir 755", "d/new": "2"}},
		"opaque at the end of its layer": {[]Layer{Plain(hold("d/old", "1"), hold("d/e/old", "1")), Plain(hold("d/e/new", "2"), hold("d/.wh..wh..opq", ""))},
			map[string]string{"d": "dir 755", "d/e": "dir 755", "d/e/new": "2"}},
		"what AUFS kept":              {[]Layer{Plain(hold(".wh..wh.plnk/1.2", "x"), hold(".wh..wh.aufs", ""), hold("f", "1"))}, map[string]string{"f": "1"}},
		"file over directory":         {[]Layer{Plain(hold("d/a/b", "1")), Plain(hold("d", "file"))}, map[string]string{"d": "file"}},
		"directory entry over file":   {[]Layer{Plain(hold("d", "file")), Plain(Dir("d"), hold("d/f", "1"))}, map[string]string{"d": "dir 755", "d/f": "1"}},
		"symlink over directory":      {[]Layer{Plain(hold("d/a", "1")), Plain(Symlink("d", "e"), hold("e/b", "2"))}, map[string]string{"d": "-> e", "e": "dir 755", "e/b": "2"}},
		"directory keeps contents":    {[]Layer{Plain(hold("d/a", "1")), Plain(dirMode("d", 0o700))}, map[string]string{"d": "dir 700", "d/a": "1"}},
		"hard link":                   {[]Layer{Plain(hold("a", "1"), Link("b", "a"))}, map[string]string{"a": "1", "b": "= a"}},
		"hard link across layers":     {[]Layer{Plain(hold("z/a", "1")), Plain(Link("b", "z/a"))}, map[string]string{"b": "1", "z": "dir 755", "z/a": "= b"}},
		"hard link, first name gone":  {[]Layer{Plain(hold("a", "1")), Plain(Link("b", "a"), Link("c", "a")), Plain(hold(".wh.a", ""))}, map[string]string{"b": "1", "c": "= b"}},
		"hard link, target replaced":  {[]Layer{Plain(hold("a", "1"), Link("b", "a")), Plain(hold("a", "2"))}, map[string]string{"a": "2", "b": "1"}},
		"hard link to a symlink":      {[]Layer{Plain(Symlink("s", "/etc")), Plain(Link("t", "s"))}, map[string]string{"s": "-> /etc", "t": "= s"}},
		"hard link to itself":         {[]Layer{Plain(hold("a", "1")), Plain(Link("a", "./a"))}, map[string]string{"a": "1"}},
		"absolute names":              {[]Layer{Plain(hold("/etc/passwd", "1"), Link("/b", "/etc/passwd"))}, map[string]string{"etc": "dir 755", "etc/passwd": "= b", "b": "1"}},
		"through a symlink":           {[]Layer{Plain(Dir("usr/bin"), Symlink("bin", "usr/bin")), Plain(hold("bin/sh", "1"))}, map[string]string{"usr": "dir 755", "usr/bin": "dir 755", "bin": "-> usr/bin", "usr/bin/sh": "1"}},
		"through an absolute symlink": {[]Layer{Plain(Symlink("run", "/var/run")), Plain(hold("run/pid", "1"))}, map[string]string{"run": "-> /var/run", "var": "dir 755", "var/run": "dir 755", "var/run/pid": "1"}},
		"through a symlink that leads out": {[]Layer{Plain(Symlink("a/s", "../../../../etc")), Plain(hold("a/s/x", "1"))},
			map[string]string{"a": "dir 755", "a/s": "-> ../../../../etc", "etc": "dir 755", "etc/x": "1"}},
		"whiteout through a symlink": {[]Layer{Plain(hold("usr/bin/sh", "1"), Symlink("bin", "usr/bin")), Plain(hold("bin/.wh.sh", ""))},
			map[string]string{"usr": "dir 755", "usr/bin": "dir 755", "bin": "-> usr/bin"}},
		"an empty directory that nobody named": {[]Layer{Plain(hold("a/b/c", "1")), Plain(hold("a/b/.wh.c", ""))}, map[string]string{"a": "dir 755", "a/b": "dir 755"}},
		"root":                                 {[]Layer{Plain(dirMode("./", 0o711), hold("a", "1"))}, map[string]string{".": "dir 711", "a": "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			im := open(t, NewLayout(c.layers...).Tar())
			have := treeOf(t, im)
			for path, want := range c.want {
				if have[path] != want {
					t.Errorf("%s is %q, not %q", path, have[path], want)
				}
				delete(have, path)
			}
			if len(have) > 0 {
				t.Errorf("too much: %v", have)
			}
		})
	}
}

// What an entry says is in the tree as it is.
func TestEntriesAreKept(t *testing.T) {
	at := time.Date(2020, 2, 3, 4, 5, 6, 789000000, time.UTC)
	e := With(Holding("f", "body"), "user.a", "b\x00c")
	e.Mode, e.Uid, e.Gid, e.ModTime = 0o6751, 70000, 5, at
	im := open(t, NewLayout(Gzipped(e)).Tar())
	r := im.Tar(t.Context())
	defer r.Close()
	h, err := tar.NewReader(r).Next()
	if err != nil {
		t.Fatal(err)
	}
	if h.Mode != 0o6751 || h.Uid != 70000 || h.Gid != 5 || !h.ModTime.Equal(at) || h.PAXRecords["SCHILY.xattr.user.a"] != "b\x00c" || h.Size != 4 {
		t.Errorf("%+v", h)
	}
}

func TestConfig(t *testing.T) {
	b := NewLayout(Plain(File("a"))).Tar()
	for name, im := range map[string]*Image{"tar": open(t, b), "tar.gz": open(t, Gzip(b)), "tar.zst": open(t, Zstd(b)), "docker save": open(t, DockerSave(NewLayout(), Plain(File("a"))))} {
		c := im.Config
		if !slices.Equal(c.Env, []string{"PATH=/bin", "LANG=C"}) || !slices.Equal(c.Entrypoint, []string{"/bin/init"}) ||
			!slices.Equal(c.Cmd, []string{"serve", "--all"}) || c.WorkingDir != "/srv" || c.User != "1000:1000" || c.OS != "linux" || c.Architecture != "amd64" {
			t.Errorf("%s: %+v", name, c)
		}
		if have := treeOf(t, im); have["a"] != "x" || im.Layers() != 1 || !strings.HasPrefix(im.Digest, "sha256:") {
			t.Errorf("%s: %v, %d layers, %s", name, have, im.Layers(), im.Digest)
		}
		if again := treeOf(t, im); again["a"] != "x" {
			t.Errorf("%s: a second time: %v", name, again)
		}
	}
}

// A layout in a directory of the host is read where it is.
func TestLayoutDirectory(t *testing.T) {
	l := NewLayout(Gzipped(File("a")))
	l.Tar()
	dir := t.TempDir()
	for name, b := range l.Files {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	im, err := OpenLayoutFile(t.Context(), dir, Options{Staging: t.TempDir(), Platform: "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if have := treeOf(t, im); have["a"] != "x" {
		t.Errorf("%v", have)
	}
	file := filepath.Join(t.TempDir(), "layout.tar")
	if err := os.WriteFile(file, l.Packed(), 0o644); err != nil {
		t.Fatal(err)
	}
	im2, err := OpenLayoutFile(t.Context(), file, Options{Staging: t.TempDir(), Platform: "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	defer im2.Close()
	if have := treeOf(t, im2); have["a"] != "x" || im2.Digest != im.Digest {
		t.Errorf("%v %s", have, im2.Digest)
	}
}

// Devices are in the tar, where they are refused by name, or left out.
func TestDevices(t *testing.T) {
	b := NewLayout(Plain(Dir("dev"), Special("dev/null", tar.TypeChar), Special("dev/p", tar.TypeFifo), File("f"))).Tar()
	im := open(t, b)
	_, err := Ingest(t.Context(), im.Tar(t.Context()))
	if !errors.Is(err, archive.ErrRefused) || !strings.Contains(err.Error(), "dev/null") {
		t.Errorf("%v", err)
	}
	have := treeOf(t, open(t, b, func(o *Options) { o.OmitDevices = true }))
	if len(have) != 2 || have["f"] != "x" || have["dev"] == "" {
		t.Errorf("%v", have)
	}
}

// A layout asks for the room that it needs, step by step, and gives it back.
func TestReserve(t *testing.T) {
	b := Gzip(NewLayout(Plain(Holding("f", strings.Repeat("x", 70<<20)))).Tar())
	asked, released := 0, 0
	full := errors.New("no room")
	reserve := func(most int) func(o *Options) {
		return func(o *Options) {
			asked, released = 0, 0
			o.Reserve = func(bytes int64) (func(), error) {
				if bytes != reserveStep || asked >= most {
					return nil, full
				}
				asked++
				return func() { released++ }, nil
			}
		}
	}
	im := open(t, b, reserve(5))
	if asked != 2 || released != 0 {
		t.Errorf("asked %d times, gave back %d", asked, released)
	}
	if err := im.Close(); err != nil || released != 2 {
		t.Errorf("%v, gave back %d", err, released)
	}
	if _, err := tryOpen(t, b, reserve(1)); !errors.Is(err, full) || errors.Is(err, archive.ErrRefused) || asked != released {
		t.Errorf("without room: %v, asked %d, gave back %d", err, asked, released)
	}
}
