package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev/tree"
	"holdfast/templates/archivetest"
)

// member is one entry as it is to stand in an archive, right or wrong.
type member struct {
	tar.Header
	body string
}

// archived packs members with the standard library, which refuses what no tar
// can say; see raw for what it does not want to say.
func archived(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := m.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(m.body))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name string) member { return member{tar.Header{Name: name}, "x"} }
func dir(name string) member  { return member{tar.Header{Name: name, Typeflag: tar.TypeDir}, ""} }
func link(name, to string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}, ""}
}
func symlinkTo(name, to string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}, ""}
}

func attributed(m member, name, value string) member {
	m.Format, m.PAXRecords = tar.FormatPAX, map[string]string{attrRecord + name: value}
	return m
}

// raw makes a header block from its fields, with a right checksum.
func raw(name string, typeflag byte, size int64, body string, change ...func([]byte)) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00", size))
	copy(h[136:], "00000000000\x00")
	h[156] = typeflag
	copy(h[257:], "ustar\x0000")
	for _, fn := range change {
		fn(h)
	}
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	out := append(h, body...)
	return append(out, make([]byte, (512-len(body)%512)%512)...)
}

func ended(blocks ...[]byte) []byte { return append(bytes.Join(blocks, nil), make([]byte, 1024)...) }

func times(n int, make func(i int) member) []member {
	list := []member{}
	for i := range n {
		list = append(list, make(i))
	}
	return list
}

var limits = Limits{Bytes: 1 << 20, Entries: 100}

// hostile are the plain tars of the collection.
func hostile() (tars []archivetest.Case) {
	for _, c := range archivetest.Hostile(archivetest.Bounds{Bytes: limits.Bytes, Entries: limits.Entries, Free: 1 << 20, Ratio: 50}) {
		if strings.HasPrefix(c.Name, "tar: ") {
			tars = append(tars, c)
		}
	}
	return tars
}

func TestHostileArchives(t *testing.T) {
	cases := hostile()
	if len(cases) < 200 {
		t.Fatalf("only %d", len(cases))
	}
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			got, err := readInto(t, c.Make(), limits)
			if !errors.Is(err, ErrRefused) {
				t.Fatalf("want a refusal, have %+v and %v", got, err)
			}
			if !strings.Contains(err.Error(), c.Says) || !strings.Contains(err.Error(), c.Entry) {
				t.Errorf("%q does not say %q and name %q", err, c.Says, c.Entry)
			}
			if len(err.Error()) > 600 {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
		})
	}
}

// readInto reads an archive into a store, which is the only file that is written,
// and no larger than what came.
func readInto(t testing.TB, archive []byte, limits Limits) (tree.Tree, error) {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	store := tree.NewStore(f)
	defer store.Close()
	got, err := Read(t.Context(), bytes.NewReader(archive), limits, store)
	store.Close()
	if info, err := f.Stat(); err != nil || info.Size() > int64(8*len(archive)) {
		t.Errorf("a store of %d bytes for an archive of %d: %v", info.Size(), len(archive), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("beside the store: %v, %v", entries, err)
	}
	return got, err
}

// count tells what a tree holds, without its root.
func count(t tree.Tree) (inodes, links, bytes, data int64) {
	for i := range t.Nodes {
		n := &t.Nodes[i]
		links += int64(len(n.Links))
		bytes += n.Size
		data += n.Data()
	}
	return int64(len(t.Nodes) - 1), links, bytes, data
}

func TestAccepted(t *testing.T) {
	for name, c := range map[string]struct {
		archive []byte
		entries int64
		bytes   int64
	}{
		"nothing":                 {archived(t), 0, 0},
		"an entry for the root":   {archived(t, dir("./")), 0, 0},
		"implied directories":     {archived(t, file("a/b/c")), 3, 1},
		"dots and slashes":        {archived(t, file("./a//b/./c"), dir("a/b/")), 3, 1},
		"last of one name":        {archived(t, file("a"), member{tar.Header{Name: "a"}, "yy"}), 1, 2},
		"directory twice":         {archived(t, dir("d"), file("d/x"), dir("d/")), 2, 1},
		"hard links":              {archived(t, file("a"), link("b", "a"), link("c", "./b")), 1, 1},
		"link to a symlink":       {archived(t, symlinkTo("s", "/etc"), link("h", "s")), 1, 0},
		"symlinks of any text":    {archived(t, symlinkTo("a", "/"), symlinkTo("b", "../.."), symlinkTo("c", "c")), 3, 0},
		"git archive":             {ended(raw("pax_global_header", 'g', 52, "52 comment=0123456789012345678901234567890123456789\n"), raw("a", '0', 0, "")), 1, 0},
		"a host's label":          {archived(t, attributed(file("a"), "security.selinux", "x")), 1, 1},
		"old tar":                 {ended(raw("dir/", 0, 0, "", v7), raw("dir/f", 0, 1, "x", v7)), 2, 1},
		"padding after the end":   {append(archived(t, file("a")), make([]byte, 100_000)...), 1, 1},
		"mode with file type":     {archived(t, member{tar.Header{Name: "a", Mode: 0o100755}, ""}), 1, 0},
		"bytes at the limit":      {archived(t, member{tar.Header{Name: "a"}, strings.Repeat("b", 1<<20)}), 1, 1 << 20},
		"entries at the limit":    {archived(t, times(100, func(i int) member { return file(fmt.Sprint(i)) })...), 100, 100},
		"depth at the limit":      {archived(t, file(strings.Repeat("d/", maxDepth-1)+"x")), 100, 1},
		"name at the limit":       {archived(t, file(strings.Repeat("n", 255))), 1, 1},
		"link text at the limit":  {archived(t, symlinkTo("s", strings.Repeat("x", 4095))), 1, 0},
		"a name that is not text": {ended(raw("\xff\xfe", '0', 0, "")), 1, 0},
		"names of dots":           {archived(t, file("..."), file("..a"), file("a..")), 3, 3},
		"1901 and 2446": {archived(t, member{tar.Header{Name: "a", Format: tar.FormatGNU, ModTime: tree.FirstTime}, ""},
			member{tar.Header{Name: "b", Format: tar.FormatPAX, ModTime: tree.LastTime}, ""}), 2, 0},
	} {
		t.Run(name, func(t *testing.T) {
			l := limits
			if name == "depth at the limit" {
				l.Entries, c.entries = 1000, maxDepth
			}
			got, err := readInto(t, c.archive, l)
			if err != nil {
				t.Fatal(err)
			}
			if inodes, _, bytes, _ := count(got); inodes != c.entries || bytes != c.bytes {
				t.Errorf("%d entries and %d bytes, want %d and %d", inodes, bytes, c.entries, c.bytes)
			}
		})
	}
}

func v7(h []byte) { copy(h[257:], make([]byte, 8)) }

// An error of the reader is the reader's, not the archive's.
func TestReaderFails(t *testing.T) {
	broken := errors.New("broken")
	archive := archived(t, member{tar.Header{Name: "a"}, strings.Repeat("x", 5000)})
	for n := range len(archive) {
		if n%100 != 0 {
			continue
		}
		r := io.MultiReader(bytes.NewReader(archive[:n]), &failing{broken})
		if _, err := Read(t.Context(), r, limits, sizes{}); !errors.Is(err, broken) || errors.Is(err, ErrRefused) {
			t.Fatalf("after %d bytes: %v", n, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Read(ctx, bytes.NewReader(archive), limits, sizes{}); !errors.Is(err, context.Canceled) {
		t.Errorf("with a dead context: %v", err)
	}
}

// sizes keeps nothing of contents but their sizes.
type sizes struct{}

func (sizes) Add(ctx context.Context, r io.Reader) (*tree.Content, error) {
	n, err := io.Copy(io.Discard, r)
	return &tree.Content{Size: n}, errors.Join(ctx.Err(), err)
}

func (sizes) Flush() (int64, error) { return 0, nil }

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

func TestHoles(t *testing.T) {
	body := make([]byte, 1<<20)
	copy(body[100_000:], "island")
	body[len(body)-1] = 1
	got, err := readInto(t, archived(t, member{tar.Header{Name: "s"}, string(body)}), limits)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, bytes, data := count(got); data != 2*tree.Block || bytes != 1<<20 {
		t.Errorf("%d bytes of data of %d", data, bytes)
	}
}

// The same files make the same tree in whatever order they come, and of two of
// one name the last counts.
func TestOrderMakesNoDifference(t *testing.T) {
	members := []member{dir("d"), file("d/f"), file("i/m/plied"), symlinkTo("s", "d"), attributed(file("x"), "user.a", "b"), file("i/z")}
	for i := range members {
		members[i].ModTime = time.Unix(int64(1000*i), 0)
	}
	want, err := readInto(t, archived(t, append(members, link("l", "d/f"))...), limits)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		random.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
		before := member{tar.Header{Name: "d/f"}, "an older one"}
		got, err := readInto(t, archived(t, append(append([]member{before}, members...), link("l", "d/f"))...), limits)
		if err != nil || got.Identity() != want.Identity() {
			t.Fatalf("%+v\nwant %+v (%v)", got, want, err)
		}
	}
}

// A file has at most as many names as ext4 can count.
func TestNamesOfOneFile(t *testing.T) {
	members := append([]member{file("f")}, times(maxNames-1, func(i int) member { return link(fmt.Sprint("l", i), "f") })...)
	many := Limits{Bytes: 1 << 20, Entries: 100_000}
	if _, err := readInto(t, archived(t, members...), many); err != nil {
		t.Error(err)
	}
	if _, err := readInto(t, archived(t, append(members, link("one-more", "f"))...), many); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "65000 names") {
		t.Errorf("%v", err)
	}
}

func FuzzRead(f *testing.F) {
	for _, c := range hostile() {
		if b := c.Make(); len(b) < 20_000 {
			f.Add(b)
		}
	}
	f.Add(archived(f, dir("d"), file("d/f"), link("h", "d/f"), symlinkTo("s", "h"), attributed(file("x"), "user.a", "b")))
	f.Fuzz(func(t *testing.T, archive []byte) {
		small := Limits{Bytes: 1 << 20, Entries: 1000}
		got, err := readInto(t, archive, small)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				t.Errorf("an error that is not a refusal: %v", err)
			}
			return
		}
		if inodes, links, bytes, _ := count(got); inodes+links > small.Entries || bytes > small.Bytes {
			t.Errorf("over the limits: %d inodes, %d links, %d bytes", inodes, links, bytes)
		}
		for i := range got.Nodes {
			n := &got.Nodes[i]
			for _, path := range append([]string{n.Path}, n.Links...) {
				clean, err := cleanPath(path)
				above, _ := tree.Split(path)
				if dir := got.Find(above); err != nil || clean != path || dir == nil || dir.Kind != tree.Directory {
					t.Errorf("%q stands in %q: %v", path, above, err)
				}
			}
		}
	})
}
