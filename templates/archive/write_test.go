package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/tree"
	"holdfast/templates/archive"
)

// storeChunks reads chunks out of a tree's own store.
type storeChunks struct{ f *os.File }

func (s storeChunks) Chunk(_ context.Context, n *tree.Node, k int, b []byte) error {
	clear(b)
	begin := int64(k) * tree.Chunk
	for _, r := range n.Runs {
		from, to := max(r.Offset, begin), min(r.Offset+r.Length, begin+int64(len(b)))
		if from < to {
			if _, err := s.f.ReadAt(b[from-begin:to-begin], r.At+from-r.Offset); err != nil {
				return err
			}
		}
	}
	return nil
}

// treeOf reads a directory into a tree and a store.
func treeOf(t *testing.T, dir string) (tree.Tree, storeChunks) {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "store")
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	s := tree.NewStore(f)
	defer s.Close()
	root, err := os.Open(dir)
	must(t, err)
	defer root.Close()
	got, _, err := tree.ReadDirectory(t.Context(), root, tree.Limits{Bytes: 1 << 40, Entries: 1 << 20, Text: 1 << 30}, s)
	must(t, err)
	return got, storeChunks{f}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// difficult is a directory with what an archive must be able to say.
func difficult(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, body string) {
		must(t, os.MkdirAll(filepath.Dir(at(name)), 0o755))
		must(t, os.WriteFile(at(name), []byte(body), 0o644))
	}
	write("a/plain", "text")
	write("a-b", "sorts after a/plain")
	write("-dash and space", "x")
	write("café-日本語-🚀.txt", "odd")
	write("not-utf8-\xff\xfe", "bytes")
	write(strings.Repeat("n", 255), "long name")
	write(strings.Repeat("deep/", 39)+"file", "40 deep")
	write("line\nfeed", "x")
	write(strings.Repeat("x", 100), "exactly the field")
	write("empty", "")
	write("exact", strings.Repeat("b", 512))
	write("big", strings.Repeat("0123456789abcdef", 200_000)) // more than a chunk
	write("hard", "linked")
	must(t, os.Mkdir(at("z-dir"), 0o1777))
	must(t, os.Link(at("hard"), at("z-dir/other")))
	must(t, os.Link(at("hard"), at("a/first")))
	must(t, os.Symlink(strings.Repeat("t", 200), at("long-link")))
	must(t, os.Symlink("ziel-ü", at("link")))
	must(t, os.Link(at("link"), at("link-again")))
	must(t, os.Mkdir(at("empty-dir"), 0o700))
	sparse := func(name string, size int64, data map[int64]string) {
		f, err := os.Create(at(name))
		must(t, err)
		must(t, f.Truncate(size))
		for off, s := range data {
			_, err := f.WriteAt([]byte(s), off)
			must(t, err)
		}
		must(t, f.Close())
	}
	sparse("sparse", 512<<20, map[int64]string{0: "begin", 100 << 20: strings.Repeat("middle", 5000), 512<<20 - 3: "end"})
	sparse("hole", 300<<20, nil)
	sparse("ends-in-hole", 3<<20+5, map[int64]string{4096: "data"})
	sparse("café-sparse", 1<<20, map[int64]string{1<<20 - 1: "e"})
	many := map[int64]string{}
	for i := range int64(9000) {
		many[i*8192] = "x"
	}
	sparse("many-holes", 9000*8192, many)
	must(t, syscall.Setxattr(at("a/plain"), "user.note", []byte("value\x00with\nbytes"), 0))
	must(t, syscall.Setxattr(at("empty-dir"), "user.empty", nil, 0))
	must(t, os.Chown(at("exact"), 3_000_000, 70000))
	must(t, os.Chmod(at("a-b"), 0))
	must(t, os.Chmod(at("exact"), 0o7777&0o777|os.ModeSetuid|os.ModeSetgid|os.ModeSticky))
	for name, when := range map[string]time.Time{
		"a-b": time.Unix(-5, 250_000_000), "empty": time.Unix(-1, 500_000_000), "exact": time.Unix(1<<33, 1), "big": time.Unix(1, 0), "a": time.Unix(7, 700),
	} {
		must(t, os.Chtimes(at(name), when, when))
	}
	must(t, os.Chtimes(dir, time.Unix(99, 99), time.Unix(99, 99)))
	return dir
}

func TestWrite(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("needs root for owners")
	}
	dir := difficult(t)
	want, store := treeOf(t, dir)
	var out bytes.Buffer
	must(t, archive.Write(t.Context(), &out, want.Source(), store))
	if got, err := archive.Length(t.Context(), want.Source()); err != nil || got != int64(out.Len()) {
		t.Errorf("Length tells %d, it is %d, %v", got, out.Len(), err)
	}
	if out.Len() > 90<<20 {
		t.Errorf("%d bytes: holes are written", out.Len())
	}
	var again bytes.Buffer
	must(t, archive.Write(t.Context(), &again, want.Source(), store))
	if !bytes.Equal(out.Bytes(), again.Bytes()) {
		t.Error("two archives of one tree differ")
	}
	// Another program reads it, and finds the same.
	unpacked := t.TempDir()
	cmd := exec.Command("tar", "-x", "-p", "--same-owner", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", unpacked)
	cmd.Stdin = bytes.NewReader(out.Bytes())
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, b)
	}
	got, _ := treeOf(t, unpacked)
	if d := diff(t, want, got); d != "" {
		t.Errorf("GNU tar unpacks something else:\n%s", d)
	}
}

// The contents are asked for a chunk at a time, and an error of theirs ends it.
func TestWriteErrors(t *testing.T) {
	b := tree.NewBuilder()
	size := int64(3*tree.Chunk + 5)
	must(t, b.File("f", tree.Attributes{}, &tree.Content{Size: size, Digests: []tree.Digest{{1}, {}, {2}, {3}}}))
	tr := b.Tree()
	var asked []string
	chunks := chunksFunc(func(n *tree.Node, k int, b []byte) error {
		asked = append(asked, fmt.Sprintf("%s/%d:%d", n.Path, k, len(b)))
		for i := range b {
			b[i] = byte(k) + 1
		}
		return nil
	})
	var out bytes.Buffer
	must(t, archive.Write(t.Context(), &out, tr.Source(), chunks))
	if got := fmt.Sprint(asked); got != "[f/0:1048576 f/2:1048576 f/3:5]" {
		t.Error(got)
	}
	r := tar.NewReader(&out)
	for range 2 {
		_, err := r.Next()
		must(t, err)
	}
	body, err := io.ReadAll(r)
	must(t, err)
	if int64(len(body)) != size || body[0] != 1 || body[tree.Chunk] != 0 || body[2*tree.Chunk] != 3 || body[size-1] != 4 {
		t.Errorf("%d bytes", len(body))
	}
	wrong := errors.New("wrong")
	failing := chunksFunc(func(*tree.Node, int, []byte) error { return wrong })
	if err := archive.Write(t.Context(), io.Discard, tr.Source(), failing); !errors.Is(err, wrong) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := archive.Write(ctx, io.Discard, tr.Source(), chunks); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

type chunksFunc func(n *tree.Node, k int, b []byte) error

func (f chunksFunc) Chunk(_ context.Context, n *tree.Node, k int, b []byte) error { return f(n, k, b) }

func diff(t *testing.T, a, b tree.Tree) string {
	t.Helper()
	var text strings.Builder
	must(t, tree.Diff(a.Source(), b.Source(), func(c tree.Change) error {
		fmt.Fprintf(&text, "%s %q %v\n", c.Action, c.Path, c.Aspects)
		if c.Before != nil && c.After != nil {
			fmt.Fprintf(&text, "  %+v\n  %+v\n", brief(*c.Before), brief(*c.After))
		}
		return nil
	}))
	return text.String()
}

func brief(n tree.Node) tree.Node {
	n.Digests, n.Runs = nil, nil
	return n
}
