package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
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

func special(name string, kind byte) member {
	return member{tar.Header{Name: name, Typeflag: kind, Devmajor: 1, Devminor: 3}, ""}
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

func pax(records ...string) []byte {
	var b strings.Builder
	for _, r := range records {
		n := len(r) + 3
		for len(fmt.Sprint(n))+len(r)+2 != n {
			n = len(fmt.Sprint(n)) + len(r) + 2
		}
		fmt.Fprintf(&b, "%d %s\n", n, r)
	}
	return raw("pax", tar.TypeXHeader, int64(b.Len()), b.String())
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = w.Write(b)
	_ = w.Close()
	return out.Bytes()
}

func times(n int, make func(i int) member) []member {
	list := []member{}
	for i := range n {
		list = append(list, make(i))
	}
	return list
}

var limits = Limits{Bytes: 1 << 20, Entries: 100}

// hostile is what must be refused: each with words that the refusal must have.
func hostile(t testing.TB) map[string]struct {
	archive []byte
	says    string
} {
	a := func(says string, members ...member) struct {
		archive []byte
		says    string
	} {
		return struct {
			archive []byte
			says    string
		}{archived(t, members...), says}
	}
	b := func(says string, blocks ...[]byte) struct {
		archive []byte
		says    string
	} {
		return struct {
			archive []byte
			says    string
		}{bytes.Join(blocks, nil), says}
	}
	deep := strings.Repeat("d/", maxDepth)
	good := archived(t, file("a"), file("b"))
	big := archived(t, member{tar.Header{Name: "a"}, strings.Repeat("data", 5000)})
	damaged := bytes.Clone(good)
	damaged[1024+10] ^= 1
	return map[string]struct {
		archive []byte
		says    string
	}{
		"absolute path":               a("absolute path", file("/etc/passwd")),
		"two slashes":                 a("absolute path", file("//etc/passwd")),
		"absolute directory":          a("absolute path", dir("/")),
		"parent":                      a(`".."`, file("../evil")),
		"parent in the middle":        a(`".."`, file("a/../../evil")),
		"parent that stays inside":    a(`".."`, dir("a/"), file("a/../b")),
		"parent alone":                a(`".."`, dir("..")),
		"parent after dot":            a(`".."`, file("./../evil")),
		"parent at the end":           a(`".."`, dir("a/..")),
		"empty name":                  b("empty name", ended(raw("", tar.TypeReg, 0, ""))),
		"NUL in a PAX name":           b("not a tar header", ended(pax("path=a\x00b"), raw("a", tar.TypeReg, 0, ""))),
		"file as root":                a("cannot be the root", file(".")),
		"symlink as root":             a("cannot be the root", symlinkTo("./", "/")),
		"character device":            a("device nodes", special("null", tar.TypeChar)),
		"block device":                a("device nodes", special("sda", tar.TypeBlock)),
		"fifo":                        a("named pipes", special("pipe", tar.TypeFifo)),
		"unknown type":                b(`type 'Z'`, ended(raw("a", 'Z', 0, ""))),
		"volume label":                b(`type 'V'`, ended(raw("a", 'V', 0, ""))),
		"multi-volume":                b(`type 'M'`, ended(raw("a", 'M', 0, ""))),
		"below a symlink":             a("lies below \"s\", which is a symbolic link", symlinkTo("s", "/etc"), file("s/passwd")),
		"far below a symlink":         a("below", dir("d"), symlinkTo("d/s", "/"), file("d/s/etc/cron.d/x")),
		"directory below a symlink":   a("below", symlinkTo("s", "/tmp"), dir("s/x")),
		"link below a symlink":        a("below", file("f"), symlinkTo("s", "/tmp"), link("s/x", "f")),
		"below a file":                a("which is a file", file("f"), file("f/x")),
		"below a hard link":           a("which is a file", file("f"), link("h", "f"), file("h/x")),
		"below a link to a symlink":   a("which is a symbolic link", symlinkTo("s", "/"), link("h", "s"), file("h/x")),
		"symlink becomes directory":   a("where an earlier entry is", symlinkTo("s", "/etc"), dir("s"), file("s/passwd")),
		"directory becomes symlink":   a("where an earlier entry is", dir("d"), symlinkTo("d", "/etc")),
		"implied directory, symlink":  a("where an earlier entry is", file("d/x"), symlinkTo("d", "/etc")),
		"file becomes symlink":        a("where an earlier entry is", file("f"), symlinkTo("f", "/etc/passwd")),
		"symlink becomes file":        a("where an earlier entry is", symlinkTo("f", "/etc/passwd"), file("f")),
		"file becomes directory":      a("where an earlier entry is", file("f"), dir("f")),
		"hard link over symlink":      a("where an earlier entry is", file("f"), symlinkTo("s", "/etc"), link("s", "f")),
		"hard link outside":           a(`".."`, link("h", "../../etc/shadow")),
		"hard link to absolute":       a("absolute path", link("h", "/etc/shadow")),
		"hard link to the future":     a("not an earlier entry", link("h", "f"), file("f")),
		"hard link to nothing":        a("not an earlier entry", link("h", "nothing")),
		"hard link to itself":         a("to itself", link("h", "./h")),
		"hard link to a directory":    a("to the directory", dir("d"), link("h", "d")),
		"hard link to the root":       a("to the directory", link("h", ".")),
		"hard link through a symlink": a("not an earlier entry", symlinkTo("s", "/etc"), link("h", "s/passwd")),
		"empty hard link":             b("empty name", ended(raw("h", tar.TypeLink, 0, ""))),
		"empty symlink":               b("without a target", ended(raw("s", tar.TypeSymlink, 0, ""))),
		"symlink of 4096 bytes":       a("longer than 4095", symlinkTo("s", strings.Repeat("x", 4096))),
		"name of 256 bytes":           a("longer than 255", file(strings.Repeat("n", 256))),
		"path of 4097 bytes":          a("longer than 4096", file(strings.Repeat(strings.Repeat("p", 199)+"/", 21)+"x")),
		"too deep":                    a("deeper than", file(deep+"x")),
		"too many entries":            a("more than 100", times(101, func(i int) member { return file(fmt.Sprint(i)) })...),
		"too many implied":            a("more than 100", file(strings.Repeat("d/", 99)+"e/f/g")),
		"too many hard links":         a("more than 100", append(times(99, func(i int) member { return file(fmt.Sprint(i)) }), link("l1", "1"), link("l2", "1"))...),
		"too many bytes":              a("larger than 1048576", member{tar.Header{Name: "a"}, strings.Repeat("b", 1<<20)}, file("c")),
		"bytes said, not sent":        b("larger than", ended(raw("a", tar.TypeReg, 1<<32, ""))),
		"sparse file of exabytes":     b("the most is", sparseHeader(8_000_000_000_000_000_000)),
		"sparse file of gigabytes":    b("larger than", sparseHeader(4<<30)),
		"sparse map that is broken":   b("not a tar header", ended(pax("GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=1", "GNU.sparse.size=10", "GNU.sparse.map=5,100"), raw("s", tar.TypeReg, 100, strings.Repeat("x", 100)))),
		"negative size":               b("not a tar header", ended(raw("a", tar.TypeReg, 0, "", func(h []byte) { copy(h[124:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe") }))),
		"negative owner":              b("owner", ended(raw("a", tar.TypeReg, 0, "", func(h []byte) { copy(h[108:], "\xff\xff\xff\xff\xff\xff\xff\xfe") }))),
		"owner -1":                    b("owner", ended(raw("a", tar.TypeReg, 0, "", func(h []byte) { copy(h[108:], "\x80\x00\x00\x00\xff\xff\xff\xff") }))),
		"owner above 32 bits":         b("owner", ended(raw("a", tar.TypeReg, 0, "", func(h []byte) { copy(h[108:], "\x80\x00\x00\x01\x00\x00\x00\x00") }))),
		"year 9999":                   a("modification time", member{tar.Header{Name: "a", ModTime: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)}, ""}),
		"year 1800":                   a("modification time", member{tar.Header{Name: "a", Format: tar.FormatGNU, ModTime: time.Date(1800, 1, 1, 0, 0, 0, 0, time.UTC)}, ""}),
		"attribute of no namespace":   a("is not one of", attributed(file("a"), "color", "x")),
		"attribute security.ima":      a("is not one of", attributed(file("a"), "security.ima", "x")),
		"capability on a directory":   a("is not one of", attributed(dir("a"), "security.capability", "x")),
		"attribute system.x":          a("is not one of", attributed(file("a"), "system.data", "x")),
		"default ACL on a file":       a("is not one of", attributed(file("a"), "system.posix_acl_default", "x")),
		"user attribute on a symlink": a("on a symbolic link", attributed(symlinkTo("s", "x"), "user.a", "x")),
		"attribute user.":             a("is not one of", attributed(file("a"), "user.", "x")),
		"attribute name of 256":       a("longer than 255", attributed(file("a"), "user."+strings.Repeat("n", 251), "x")),
		"attributes of 64 KiB":        a("the most is", attributed(file("a"), "user.big", strings.Repeat("v", 65536))),
		"ACL as text":                 a("ACL as text", member{tar.Header{Name: "a", Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.acl.access": "user::rwx,group::r-x,other::r-x"}}, ""}),
		"PAX header above 1 MiB":      b("longer than 1 MiB", ended(pax("comment="+strings.Repeat("c", 2<<20)), raw("a", tar.TypeReg, 0, ""))),
		"PAX header said, not sent":   b("cut off", ended(raw("pax", tar.TypeXHeader, 1<<32, ""))),
		"GNU long name above 1 MiB":   b("longer than 1 MiB", ended(raw("x", 'L', 2<<20, strings.Repeat("n", 2<<20)), raw("a", tar.TypeReg, 0, ""))),
		"PAX record without a number": b("not a tar header", ended(raw("pax", tar.TypeXHeader, 8, "xx a=b\n\n"), raw("a", tar.TypeReg, 0, ""))),
		"global path":                 b("global header", ended(raw("g", tar.TypeXGlobalHeader, 15, "15 path=/evil1\n"), raw("a", tar.TypeReg, 0, ""))),
		"path in PAX":                 b("absolute path", ended(pax("path=/etc/passwd"), raw("innocent", tar.TypeReg, 0, ""))),
		"linkpath in PAX":             b("absolute path", ended(pax("linkpath=/etc/passwd"), raw("h", tar.TypeLink, 0, ""))),
		"wrong checksum":              b("not a tar header", damaged),
		"text":                        b("not a tar header", bytes.Repeat([]byte("This is no archive.\n"), 100)),
		"short text":                  b("cut off", []byte("hello")),
		"nothing at all":              b("empty (0 bytes)"),
		"gzip":                        b("a gzip file", gzipped(big)),
		"zstd":                        b("a zstd file", append([]byte("\x28\xb5\x2f\xfd"), make([]byte, 2000)...)),
		"zip":                         b("a zip file", append([]byte("PK\x03\x04"), bytes.Repeat([]byte{1}, 2000)...)),
		"xz":                          b("a xz file", append([]byte("\xfd7zXZ\x00"), bytes.Repeat([]byte{1}, 2000)...)),
		"bzip2":                       b("a bzip2 file", append([]byte("BZh9"), bytes.Repeat([]byte{1}, 2000)...)),
		"cut in a header":             b("cut off", good[:700+512]),
		"cut in a file":               b("cut off", big[:10_000]),
		"cut between entries":         b("cut off", good[:1024]),
		"cut after the last entry":    b("cut off", good[:2048]),
		"garbage between entries":     b("not a tar header", good[:1024], bytes.Repeat([]byte("garbage!"), 64), good[1024:]),
	}
}

// sparseHeader is an old GNU sparse file: all of it a hole.
func sparseHeader(size int64) []byte {
	return ended(raw("sparse", tar.TypeGNUSparse, 0, "", func(h []byte) {
		copy(h[257:], "ustar  \x00")
		h[482] = 0
		h[483] = 0x80
		for i := range 8 {
			h[494-i] = byte(size >> (8 * i))
		}
		for i := 484; i < 487; i++ {
			h[i] = 0
		}
		// one region of no bytes at the end
		h[386] = 0x80
		for i := range 8 {
			h[397-i] = byte(size >> (8 * i))
		}
		copy(h[398:], "00000000000\x00")
	}))
}

func TestHostileArchives(t *testing.T) {
	cases := hostile(t)
	if len(cases) < 40 {
		t.Fatalf("only %d", len(cases))
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := readInto(t, c.archive, limits)
			if !errors.Is(err, ErrRefused) {
				t.Fatalf("want a refusal, have %+v and %v", got, err)
			}
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q does not say %q", err, c.says)
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
	for _, c := range hostile(f) {
		if len(c.archive) < 20_000 {
			f.Add(c.archive)
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
