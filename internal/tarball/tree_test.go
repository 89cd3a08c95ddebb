package tarball

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/tree"
)

func planned(t *testing.T, dir string) *Plan {
	t.Helper()
	p, err := New(t.Context(), dir)
	must(t, err)
	return p
}

// read makes the tree that a directory is.
func read(t *testing.T, dir string) tree.Tree {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "store")
	must(t, err)
	defer f.Close()
	s := tree.NewStore(f)
	defer s.Close()
	root, err := os.Open(dir)
	must(t, err)
	defer root.Close()
	got, _, err := tree.ReadDirectory(t.Context(), root, tree.Limits{Bytes: 1 << 40, Entries: 1 << 20, Text: 1 << 30}, s)
	must(t, err)
	return got
}

func differences(t *testing.T, a, b tree.Tree) string {
	t.Helper()
	var text strings.Builder
	must(t, tree.Diff(a.Source(), b.Source(), func(c tree.Change) error {
		if c.Path != "." { // a tar of a directory does not say what that is
			fmt.Fprintf(&text, "%s %q %v\n", c.Action, c.Path, c.Aspects)
		}
		return nil
	}))
	return text.String()
}

func regularTree(t *testing.T) string {
	t.Helper()
	dir := sampleTree(t)
	must(t, os.Remove(filepath.Join(dir, "pipe")))
	must(t, os.WriteFile(filepath.Join(dir, "big"), bytes.Repeat([]byte("0123456789abcdef"), 150_000), 0o644))
	f, err := os.Create(filepath.Join(dir, "sparse"))
	must(t, err)
	must(t, f.Truncate(100<<20))
	_, err = f.WriteAt([]byte("middle"), 50<<20+100)
	must(t, err)
	must(t, f.Close())
	must(t, syscall.Setxattr(filepath.Join(dir, "hello"), "user.x", []byte("y"), 0))
	return dir
}

// The tree of a plan is that of its archive: of the directory.
func TestTreeOfAPlan(t *testing.T) {
	dir := regularTree(t)
	p := planned(t, dir)
	got, err := p.Tree(t.Context(), nil)
	must(t, err)
	if d := differences(t, read(t, dir), got); d != "" {
		t.Errorf("the plan's tree is another one:\n%s", d)
	}
	c := p.Chunks()
	defer c.Close()
	for i := range got.Nodes {
		n := &got.Nodes[i]
		for k, d := range n.Digests {
			b := make([]byte, min(tree.Chunk, n.Size-int64(k)*tree.Chunk))
			must(t, c.Read(n, k, b))
			if tree.DigestOf(b) != d {
				t.Errorf("chunk %d of %q", k, n.Path)
			}
		}
	}
}

func TestTreeOfWhatChanges(t *testing.T) {
	dir := regularTree(t)
	p := planned(t, dir)
	got, err := p.Tree(t.Context(), nil)
	must(t, err)
	big := filepath.Join(dir, "big")
	at := time.Unix(5, 5)
	must(t, os.WriteFile(big, bytes.Repeat([]byte("0123456789abcdeF"), 150_000), 0o644))
	c := p.Chunks()
	defer c.Close()
	n := got.Find("big")
	if err := c.Read(n, 0, make([]byte, tree.Chunk)); !errors.Is(err, ErrChanged) {
		t.Errorf("a file that was written to: %v", err)
	}
	if _, err := p.Tree(t.Context(), nil); !errors.Is(err, ErrChanged) {
		t.Errorf("a file that was written to: %v", err)
	}
	must(t, os.Chtimes(big, at, at))
	must(t, os.Remove(big))
	if err := c.Read(n, 0, make([]byte, tree.Chunk)); !errors.Is(err, ErrChanged) {
		t.Errorf("a file that is gone: %v", err)
	}
	withPipe := planned(t, sampleTree(t))
	if _, err := withPipe.Tree(t.Context(), nil); !errors.Is(err, ErrNoTree) {
		t.Errorf("a pipe: %v", err)
	}
}

func TestExtract(t *testing.T) {
	dir := regularTree(t)
	p := planned(t, dir)
	r := p.Reader()
	defer r.Close()
	out := filepath.Join(t.TempDir(), "new")
	done, err := Extract(t.Context(), r, out)
	must(t, err)
	if done.Entries != p.Entries() || done.Bytes != p.Bytes {
		t.Errorf("%+v of %d entries and %d bytes", done, p.Entries(), p.Bytes)
	}
	if d := differences(t, read(t, dir), read(t, out)); d != "" {
		t.Errorf("unpacked otherwise:\n%s", d)
	}
	var st syscall.Stat_t
	must(t, syscall.Stat(filepath.Join(out, "sparse"), &st))
	if st.Blocks*512 > 1<<20 {
		t.Errorf("a hole takes %d bytes", st.Blocks*512)
	}
	if _, err := Extract(t.Context(), bytes.NewReader(nil), out); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("into what is not empty: %v", err)
	}
}

// Whatever an archive says, nothing outside of the directory changes.
func TestExtractHostile(t *testing.T) {
	type entries []tar.Header
	link := func(name, to string) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}
	}
	hard := func(name, to string) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}
	}
	file := func(name string) tar.Header { return tar.Header{Name: name, Mode: 0o644, Size: 4} }
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	must(t, os.WriteFile(secret, []byte("safe"), 0o600))
	for what, list := range map[string]entries{
		"above":             {file("../secret")},
		"far above":         {file("a/../../secret")},
		"absolute":          {file(secret)},
		"through a link":    {link("l", outside), file("l/secret")},
		"through two links": {link("m", outside), link("l", "m"), file("l/secret")},
		"over a link":       {link("l", secret), file("l")},
		"a hard link out":   {hard("h", "../secret")},
		"a hard link away":  {hard("h", secret)},
		"a link's target":   {link("l", outside), hard("h", "l/secret")},
		"a directory link":  {link("d", outside), {Name: "d/", Typeflag: tar.TypeDir, Mode: 0o777}},
		"a device":          {{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		"a pipe":            {{Name: "p", Typeflag: tar.TypeFifo}},
		"twice":             {file("f"), file("f")},
		"a file below one":  {file("f"), file("f/g")},
		"no name":           {file(".")},
		"a later directory": {{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}, link("d/l", outside), {Name: "d/l/x/", Typeflag: tar.TypeDir, Mode: 0o777}},
	} {
		t.Run(strings.ReplaceAll(what, " ", "-"), func(t *testing.T) {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, h := range list {
				must(t, w.WriteHeader(&h))
				if h.Size > 0 {
					_, err := w.Write([]byte("evil"))
					must(t, err)
				}
			}
			must(t, w.Close())
			out := filepath.Join(t.TempDir(), "out")
			if _, err := Extract(t.Context(), &b, out); !errors.Is(err, ErrUnsafe) {
				t.Errorf("%v", err)
			}
			if got, err := os.ReadFile(secret); err != nil || string(got) != "safe" {
				t.Fatalf("outside: %q, %v", got, err)
			}
			if names, err := os.ReadDir(outside); err != nil || len(names) != 1 {
				t.Fatalf("outside: %v, %v", names, err)
			}
		})
	}
	cut := bytes.NewReader(func() []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		h := file("f")
		must(t, w.WriteHeader(&h))
		return b.Bytes()
	}())
	if _, err := Extract(t.Context(), cut, filepath.Join(t.TempDir(), "cut")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("an archive that was cut off: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Extract(ctx, bytes.NewReader(nil), filepath.Join(t.TempDir(), "x")); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
