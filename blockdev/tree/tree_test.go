package tree_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/blockdev/tree"
)

func at(sec int64) tree.Attributes {
	return tree.Attributes{Mode: 0o640, UID: 1, GID: 2, ModTime: time.Unix(sec, 5)}
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func TestOrder(t *testing.T) {
	want := []string{".", "a", "a/b", "a/b/c", "a/b.txt", "a\x01", "a b", "a-b", "a.txt", "a.txt/x", "ab", "b", "\xff"}
	have := slices.Clone(want)
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(have), func(i, j int) { have[i], have[j] = have[j], have[i] })
	slices.SortFunc(have, tree.Compare)
	if !slices.Equal(have, want) {
		t.Errorf("%q", have)
	}
}

// The same files in any order are the same tree, implied directories included.
func TestBuilderIsCanonical(t *testing.T) {
	content := map[string]*tree.Content{}
	for _, name := range []string{"x", "y"} {
		content[name] = &tree.Content{Size: 1, Digests: []tree.Digest{tree.DigestOf([]byte(name))}, Runs: []tree.Run{{Length: 1}}}
	}
	steps := []func(b *tree.Builder) error{
		func(b *tree.Builder) error { return b.File("implied/deep/x", at(100), content["x"]) },
		func(b *tree.Builder) error { return b.File("implied/y", at(300), content["y"]) },
		func(b *tree.Builder) error { return b.Directory("given", at(50)) },
		func(b *tree.Builder) error { return b.Symlink("given/s", at(70), "../x") },
		func(b *tree.Builder) error { return b.File("implied.txt", at(20), content["y"]) },
		func(b *tree.Builder) error { return b.Directory("given/sub", at(60)) },
	}
	build := func(order []int) tree.Tree {
		b := tree.NewBuilder()
		for _, i := range order {
			must(t, steps[i](b))
		}
		must(t, b.Link("zlinks/h", "implied/y"), b.Link("a", "implied/y"), b.Link("given/t", "given/s"))
		return b.Tree()
	}
	order := []int{0, 1, 2, 3, 4, 5}
	want := build(order)
	var paths []string
	for _, n := range want.Nodes {
		paths = append(paths, n.Path)
	}
	if got := strings.Join(paths, " "); got != ". a given given/s given/sub implied implied/deep implied/deep/x implied.txt zlinks" {
		t.Errorf("paths %s", got)
	}
	if a := want.Find("a"); !slices.Equal(a.Links, []string{"implied/y", "zlinks/h"}) || a.Size != 1 {
		t.Errorf("%+v", a)
	}
	if s := want.Find("given/s"); s.Mode != 0o777 || !slices.Equal(s.Links, []string{"given/t"}) {
		t.Errorf("%+v", s)
	}
	for path, sec := range map[string]int64{".": 300, "implied": 300, "implied/deep": 100, "zlinks": 300, "given": 50} {
		if n := want.Find(path); n.ModTime.Unix() != sec || n.ModTime.Nanosecond() != 5 {
			t.Errorf("%s is of %v", path, n.ModTime)
		}
	}
	random := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		if have := build(order); !reflect.DeepEqual(have, want) || have.Identity() != want.Identity() {
			t.Fatalf("in order %v:\n%+v\nwant\n%+v", order, have, want)
		}
	}
}

func TestBuilderReplaces(t *testing.T) {
	b := tree.NewBuilder()
	one, two := &tree.Content{Size: 1}, &tree.Content{Size: 2}
	must(t, b.File("a", at(1), one), b.Link("b", "a"), b.File("a", at(2), two),
		b.Directory("d", at(1)), b.File("d/x", at(1), one), b.Directory("d", at(9)))
	for what, err := range map[string]error{
		"a file becomes a directory": b.Directory("a", at(1)),
		"a directory becomes a file": b.File("d", at(1), one),
		"below a file":               b.File("a/x", at(1), one),
		"a link to a directory":      b.Link("l", "d"),
		"a link to nothing":          b.Link("l", "nothing"),
		"a link over a directory":    b.Link("d", "a"),
		"a symlink over a file":      b.Symlink("a", at(1), "x"),
	} {
		if !errors.Is(err, tree.ErrNotBelow) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if b.Names() != 4 || b.Kind("a") != tree.Regular || b.Kind("l") != 0 {
		t.Errorf("%d names", b.Names())
	}
	got := b.Tree()
	if a, other, d := got.Find("a"), got.Find("b"), got.Find("d"); a.Size != 2 || a.Links != nil || other.Size != 1 || d.ModTime.Unix() != 9 {
		t.Errorf("%+v", got)
	}
}

func newStore(t testing.TB) (*tree.Store, *os.File) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "store"))
	must(t, err)
	s := tree.NewStore(f)
	t.Cleanup(func() { s.Close(); f.Close() })
	return s, f
}

// contents puts a file together again.
func contents(t testing.TB, f io.ReaderAt, c *tree.Content) []byte {
	t.Helper()
	b := make([]byte, c.Size)
	for _, r := range c.Runs {
		if r.Offset%tree.Block != 0 || r.At%tree.Block != 0 {
			t.Fatalf("run %+v", r)
		}
		_, err := f.ReadAt(b[r.Offset:r.Offset+r.Length], r.At)
		must(t, err)
	}
	return b
}

// What goes into a store comes out, without its zeroes, with the right digests,
// and the padding is zero.
func TestStore(t *testing.T) {
	s, f := newStore(t)
	random := rand.New(rand.NewPCG(5, 6))
	var bodies [][]byte
	var kept []*tree.Content
	for i := range 300 {
		body := make([]byte, random.IntN(40_000))
		if i%50 == 7 {
			body = make([]byte, 3*tree.Chunk+random.IntN(2*tree.Chunk))
		}
		for at := 0; at < len(body); at += tree.Block {
			if random.IntN(3) > 0 { // the others stay zero
				for k := at; k < min(at+tree.Block, len(body)); k++ {
					body[k] = byte(random.UintN(256))
				}
			}
		}
		if i%50 == 9 {
			body = make([]byte, 2*tree.Chunk+5) // zeroes only
		}
		c, err := s.Add(t.Context(), iotest{bytes.NewReader(body), random})
		must(t, err)
		bodies, kept = append(bodies, body), append(kept, c)
	}
	size, err := s.Flush()
	must(t, err)
	if info, err := f.Stat(); err != nil || info.Size() != size || size%tree.Block != 0 {
		t.Errorf("store of %d bytes, file %v", size, info.Size())
	}
	var used int64
	for i, c := range kept {
		if !bytes.Equal(contents(t, f, c), bodies[i]) {
			t.Fatalf("file %d differs", i)
		}
		var want []tree.Digest
		for chunk := range slices.Chunk(bodies[i], tree.Chunk) {
			d := tree.Digest(sha256.Sum256(chunk))
			if len(bytes.Trim(chunk, "\x00")) == 0 {
				d = tree.Digest{}
			}
			want = append(want, d)
		}
		if !slices.Equal(c.Digests, want) {
			t.Errorf("digests of file %d", i)
		}
		for _, r := range c.Runs {
			end := r.At + r.Length
			pad := make([]byte, (end+tree.Block-1)/tree.Block*tree.Block-end)
			_, err := f.ReadAt(pad, end)
			must(t, err)
			if len(bytes.Trim(pad, "\x00")) > 0 {
				t.Errorf("file %d is not padded with zeroes", i)
			}
			used += r.Length + int64(len(pad))
		}
	}
	if used != size {
		t.Errorf("runs use %d bytes of %d", used, size)
	}
}

// iotest reads as many bytes at once as it likes.
type iotest struct {
	r io.Reader
	n *rand.Rand
}

func (r iotest) Read(p []byte) (int, error) { return r.r.Read(p[:min(len(p), 1+r.n.IntN(100_000))]) }

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestStoreFails(t *testing.T) {
	s, f := newStore(t)
	broken := errors.New("broken")
	for _, want := range []error{broken, io.ErrUnexpectedEOF} {
		for _, before := range []int{0, 100, tree.Chunk, tree.Chunk + 1} {
			r := io.MultiReader(bytes.NewReader(make([]byte, before)), failing{want})
			if _, err := s.Add(t.Context(), r); !errors.Is(err, want) {
				t.Errorf("after %d bytes: %v", before, err)
			}
		}
	}
	must(t, f.Close())
	_, err := s.Add(t.Context(), strings.NewReader("x"))
	must(t, err)
	if _, err := s.Flush(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a write that failed: %v", err)
	}
	if _, err := s.Add(t.Context(), strings.NewReader("x")); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after a failure: %v", err)
	}
}

func sample(t testing.TB) tree.Tree {
	t.Helper()
	b := tree.NewBuilder()
	attrs := at(-5)
	attrs.Xattrs = []tree.Xattr{{Name: "user.b", Value: []byte{0, 255}}, {Name: "user.a"}}
	big := &tree.Content{Size: 1000*tree.Chunk + 5, Digests: make([]tree.Digest, 1001), Runs: []tree.Run{
		{Offset: 10 * tree.Block, Length: 2 * tree.Block, Store: 1, At: 7 * tree.Block},
		{Offset: 12 * tree.Block, Length: tree.Block, At: 100 * tree.Block},
		{Offset: 1000 * tree.Chunk, Length: 5, At: 9 * tree.Block}}}
	big.Digests[0], big.Digests[1000] = tree.DigestOf([]byte("a")), tree.DigestOf([]byte("b"))
	must(t, b.Directory(".", attrs), b.File("big", attrs, big), b.File("zero", at(1), &tree.Content{}),
		b.Symlink("dir/l", attrs, strings.Repeat("t", 4095)), b.Link("dir/\xff", "big"), b.Link("aaa", "big"))
	return b.Tree()
}

func encoded(t testing.TB, v tree.Tree) []byte {
	t.Helper()
	var b bytes.Buffer
	must(t, tree.Encode(&b, v))
	return b.Bytes()
}

func TestEncoding(t *testing.T) {
	want := sample(t)
	b := encoded(t, want)
	have, err := tree.Decode(bytes.NewReader(b), tree.Limits{})
	must(t, err)
	for i := range want.Nodes { // an empty value has no difference to none
		for j := range want.Nodes[i].Xattrs {
			if len(want.Nodes[i].Xattrs[j].Value) == 0 {
				want.Nodes[i].Xattrs[j].Value, have.Nodes[i].Xattrs[j].Value = nil, nil
			}
		}
	}
	if !reflect.DeepEqual(have, want) {
		t.Errorf("\n%+v\nwant\n%+v", have, want)
	}
	if have.Identity() != want.Identity() {
		t.Error("another identity")
	}
	// No byte of it can change, and none be missing or too many.
	for i := range b {
		c := slices.Clone(b)
		c[i] ^= 1 << (i % 8)
		if _, err := tree.Decode(bytes.NewReader(c), tree.Limits{}); !errors.Is(err, tree.ErrDamaged) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if _, err := tree.Decode(bytes.NewReader(b[:i]), tree.Limits{}); !errors.Is(err, tree.ErrDamaged) {
			t.Fatalf("cut after %d: %v", i, err)
		}
	}
	if _, err := tree.Decode(bytes.NewReader(append(slices.Clone(b), 0)), tree.Limits{}); !errors.Is(err, tree.ErrDamaged) {
		t.Errorf("a byte more: %v", err)
	}
	for what, l := range map[string]tree.Limits{"bytes": {Bytes: 1000}, "entries": {Entries: 3}, "text": {Text: 4000}} {
		if _, err := tree.Decode(bytes.NewReader(b), l); !errors.Is(err, tree.ErrDamaged) {
			t.Errorf("limit of %s: %v", what, err)
		}
	}
	broken := errors.New("broken")
	if _, err := tree.Decode(io.MultiReader(bytes.NewReader(b[:100]), failing{broken}), tree.Limits{}); !errors.Is(err, broken) {
		t.Errorf("a reader that fails: %v", err)
	}
}

// The identity is of what a tree holds, not of where.
func TestIdentity(t *testing.T) {
	want := sample(t).Identity()
	moved := sample(t)
	for i := range moved.Nodes {
		for j := range moved.Nodes[i].Runs {
			moved.Nodes[i].Runs[j].At += tree.Block
		}
	}
	if moved.Identity() != want {
		t.Error("it depends on where contents lie")
	}
	for what, change := range map[string]func(*tree.Node){
		"mode": func(n *tree.Node) { n.Mode ^= 1 }, "owner": func(n *tree.Node) { n.UID++ }, "group": func(n *tree.Node) { n.GID++ },
		"time":  func(n *tree.Node) { n.ModTime = n.ModTime.Add(1) },
		"size":  func(n *tree.Node) { n.Size++ },
		"bytes": func(n *tree.Node) { n.Digests[1000][0]++ },
		"names": func(n *tree.Node) { n.Links = n.Links[1:] },
		"attrs": func(n *tree.Node) { n.Xattrs[0].Value = []byte("x") },
	} {
		changed := sample(t)
		change(changed.Find("aaa"))
		if changed.Identity() == want {
			t.Errorf("another %s makes no difference", what)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encoded(f, sample(f)))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := tree.Decode(bytes.NewReader(b), tree.Limits{Bytes: 1 << 32, Entries: 1000, Text: 1 << 20})
		if err == nil && !bytes.Equal(encoded(t, v), b) {
			t.Error("another encoding of the same")
		}
	})
}

// A directory is read as it is, and reads as the same tree again.
func TestReadDirectory(t *testing.T) {
	dir := t.TempDir()
	p := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.MkdirAll(p("d/e"), 0o755), os.Mkdir(p("lost+found"), 0o700), os.WriteFile(p("d/f"), []byte("hello"), 0o600),
		os.Link(p("d/f"), p("a")), os.Symlink("../x", p("d/s")), os.Link(p("d/s"), p("d/t")), os.WriteFile(p("empty"), nil, 0o4711),
		unix.Mkfifo(p("pipe"), 0o600), unix.Mknod(p("null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))),
		unix.Lsetxattr(p("d/f"), "user.k", []byte("v"), 0), unix.Lsetxattr(p("d/s"), "trusted.k", []byte("w"), 0),
		os.Chmod(p("empty"), 0o711|os.ModeSetuid), os.Lchown(p("d/s"), 7, 8))
	sparse, err := os.Create(p("sparse"))
	must(t, err)
	for _, off := range []int64{5 * tree.Chunk, 5*tree.Chunk + 3*tree.Block, 40*tree.Chunk - 10} {
		_, err := sparse.WriteAt([]byte("data"), off)
		must(t, err)
	}
	must(t, sparse.Truncate(100*tree.Chunk+1), sparse.Close())
	old := time.Unix(-1<<40, 0)
	must(t, os.Chtimes(p("d/e"), old, old))

	read := func(limits tree.Limits) (tree.Tree, tree.Skipped, *os.File, error) {
		root, err := os.Open(dir)
		must(t, err)
		defer root.Close()
		s, f := newStore(t)
		v, skipped, err := tree.ReadDirectory(t.Context(), root, limits, s)
		return v, skipped, f, err
	}
	limits := tree.Limits{Bytes: 1 << 30, Entries: 100, Text: 1 << 20}
	v, skipped, f, err := read(limits)
	must(t, err)
	var paths []string
	for _, n := range v.Nodes {
		paths = append(paths, n.Path)
	}
	if got := strings.Join(paths, " "); got != ". a d d/e d/s empty sparse" {
		t.Errorf("paths %s", got)
	}
	if skipped != (tree.Skipped{Devices: 1, Pipes: 1}) {
		t.Errorf("skipped %+v", skipped)
	}
	a, s, big := v.Find("a"), v.Find("d/s"), v.Find("sparse")
	if !slices.Equal(a.Links, []string{"d/f"}) || len(a.Xattrs) != 1 || a.Digests[0] != tree.DigestOf([]byte("hello")) {
		t.Errorf("%+v", a)
	}
	if s.Target != "../x" || s.UID != 7 || s.GID != 8 || !slices.Equal(s.Links, []string{"d/t"}) || len(s.Xattrs) != 1 {
		t.Errorf("%+v", s)
	}
	if e := v.Find("empty"); e.Mode != 0o4711 || e.Size != 0 {
		t.Errorf("%+v", e)
	}
	if v.Find("d/e").ModTime.Before(tree.FirstTime) {
		t.Errorf("a time that ext4 cannot hold: %v", v.Find("d/e").ModTime)
	}
	want, err := os.ReadFile(p("sparse"))
	must(t, err)
	c := &tree.Content{Size: big.Size, Runs: big.Runs}
	if !bytes.Equal(contents(t, f, c), want) || big.Data() != 3*tree.Block || len(big.Digests) != 101 {
		t.Errorf("the sparse file: %d bytes of data, %d digests", big.Data(), len(big.Digests))
	}
	// The same bytes without holes are the same tree.
	must(t, os.WriteFile(p("sparse.new"), want, 0o644))
	info, err := os.Stat(p("sparse"))
	must(t, err, os.Chmod(p("sparse.new"), info.Mode()), os.Chtimes(p("sparse.new"), info.ModTime(), info.ModTime()))
	must(t, os.Rename(p("sparse.new"), p("sparse")))
	again, _, _, err := read(limits)
	must(t, err)
	again.Nodes[0].ModTime = v.Nodes[0].ModTime
	if again.Identity() != v.Identity() {
		t.Error("zeroes and holes are told apart")
	}
	for what, l := range map[string]tree.Limits{
		"entries": {Bytes: 1 << 30, Entries: 4, Text: 1 << 20}, "bytes": {Bytes: 100, Entries: 100, Text: 1 << 20}, "text": {Bytes: 1 << 30, Entries: 100, Text: 10},
	} {
		if _, _, _, err := read(l); !errors.Is(err, tree.ErrUnfit) {
			t.Errorf("limit of %s: %v", what, err)
		}
	}
	deep := dir
	for range tree.MaxDepth {
		deep += "/x"
		must(t, os.Mkdir(deep, 0o755))
	}
	if _, _, _, err := read(tree.Limits{Bytes: 1 << 30, Entries: 1000, Text: 1 << 20}); err != nil {
		t.Errorf("depth at the limit: %v", err)
	}
	must(t, os.Mkdir(deep+"/x", 0o755))
	if _, _, _, err := read(tree.Limits{Bytes: 1 << 30, Entries: 1000, Text: 1 << 20}); !errors.Is(err, tree.ErrUnfit) || !strings.Contains(err.Error(), "deeper") {
		t.Errorf("too deep: %v", err)
	}
}

// TestMemory states what an entry costs: see Limits.Text.
func TestMemory(t *testing.T) {
	const n = 200_000
	before := heap()
	b := tree.NewBuilder()
	for i := range n {
		c := &tree.Content{Size: 1, Digests: []tree.Digest{{1}}, Runs: []tree.Run{{Length: 1}}}
		must(t, b.File(fmt.Sprintf("directory-%04d/sub-%d/file-%07d", i/1000, i/100, i), at(int64(i)), c))
	}
	building := heap() - before
	v := b.Tree()
	done := heap() - before
	text := 0
	for _, n := range v.Nodes {
		text += len(n.Path)
	}
	t.Logf("%d bytes an entry while building, %d for the tree, of which %d are its path", building/n, done/n, text/n)
	if most := int64(600 * n); building > most || done > most {
		t.Errorf("%d and %d bytes for %d entries", building, done, n)
	}
	runtime.KeepAlive(v)
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
