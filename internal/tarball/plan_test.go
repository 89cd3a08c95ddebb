package tarball

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sampleTree is what people put on volumes, and what they should not.
func sampleTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	long := strings.Repeat("d", 150)
	must(t, os.MkdirAll(filepath.Join(dir, "a", long), 0o755))
	must(t, os.Mkdir(filepath.Join(dir, "empty"), 0o700))
	for name, text := range map[string]string{
		"hello": "hello\n", "nothing": "", "a/café-日本語-🚀.txt": "unicode",
		"a/" + long + "/" + strings.Repeat("f", 120): strings.Repeat("x", 1000),
		"a/block": strings.Repeat("y", 512), "-rf": "odd", "with space\nand line": "odd",
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o640))
	}
	must(t, os.Link(filepath.Join(dir, "hello"), filepath.Join(dir, "z-hardlink")))
	must(t, os.Symlink("../outside/"+strings.Repeat("s", 140), filepath.Join(dir, "a", "link")))
	must(t, os.Chmod(filepath.Join(dir, "a/block"), 0o4755))
	must(t, os.Chown(filepath.Join(dir, "nothing"), 12345, 3000000))
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	must(t, os.Chtimes(filepath.Join(dir, "hello"), time.Unix(1, 0), time.Unix(1700000000, 123456789)))
	return dir
}

func TestLengthIsExactAndTarReadsItBack(t *testing.T) {
	dir := sampleTree(t)
	p, err := New(t.Context(), dir)
	must(t, err)
	var b bytes.Buffer
	r := p.Reader()
	_, err = io.Copy(&b, r)
	must(t, err)
	if int64(b.Len()) != p.Length() {
		t.Fatalf("length %d was announced, %d bytes came", p.Length(), b.Len())
	}
	out := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "tar", "-xpf", "-", "--same-owner", "--numeric-owner", "-C", out)
	cmd.Stdin = &b
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, text)
	}
	want, got := list(t, dir), list(t, out)
	if want != got {
		t.Errorf("extracted tree differs:\n%s\nwant\n%s", got, want)
	}
}

// list describes a tree with everything that an archive should keep; of
// times only those of files, because extraction touches directories.
func list(t *testing.T, dir string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "find", ".", "-mindepth", "1",
		"(", "-type", "f", "-printf", "%p %m %U %G %n %s %T@\\n", "-o", "-printf", "%p %y %m %U %G %l\\n", ")")
	cmd.Dir = dir
	out, err := cmd.Output()
	must(t, err)
	lines := strings.Split(string(out), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestExtendedAttributesTravel(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	must(t, os.WriteFile(name, []byte("x"), 0o600))
	value := "binary\x00and=equals"
	must(t, syscall.Setxattr(name, "user.note", []byte(value), 0))
	p, err := New(t.Context(), dir)
	must(t, err)
	r := p.Reader()
	defer r.Close()
	h, err := tar.NewReader(r).Next()
	must(t, err)
	if got := h.PAXRecords["SCHILY.xattr.user.note"]; got != value {
		t.Errorf("attribute is %q, want %q", got, value)
	}
}

func TestSameTreeIsSameBytes(t *testing.T) {
	dir := sampleTree(t)
	var archives [2]bytes.Buffer
	for i := range archives {
		p, err := New(t.Context(), dir)
		must(t, err)
		_, err = p.WriteTo(&archives[i])
		must(t, err)
	}
	if !bytes.Equal(archives[0].Bytes(), archives[1].Bytes()) {
		t.Error("two archives of one tree differ")
	}
}

func TestChangesAreNoticed(t *testing.T) {
	change := map[string]func(t *testing.T, file string){
		"grown": func(t *testing.T, f string) { must(t, os.WriteFile(f, []byte("longer than it was"), 0o600)) },
		"cut":   func(t *testing.T, f string) { must(t, os.Truncate(f, 1)) },
		"gone":  func(t *testing.T, f string) { must(t, os.Remove(f)) },
		"touched": func(t *testing.T, f string) {
			must(t, os.Chtimes(f, time.Unix(5, 0), time.Unix(5, 0)))
		},
		"replaced by a link": func(t *testing.T, f string) {
			must(t, os.Remove(f))
			must(t, os.Symlink("/etc/passwd", f))
		},
		"replaced by a pipe": func(t *testing.T, f string) {
			must(t, os.Remove(f))
			must(t, syscall.Mkfifo(f, 0o600))
		},
	}
	for name, do := range change {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "file")
			must(t, os.WriteFile(file, []byte("content"), 0o600))
			p, err := New(t.Context(), dir)
			must(t, err)
			do(t, file)
			_, err = p.WriteTo(io.Discard)
			if !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "file") {
				t.Errorf("error is %v, want one that names the file as changed", err)
			}
		})
	}
}

func TestDevicesAreRefusedByName(t *testing.T) {
	dir := t.TempDir()
	must(t, syscall.Mknod(filepath.Join(dir, "null"), syscall.S_IFCHR|0o600, 1<<8|3))
	if _, err := New(t.Context(), dir); !errors.Is(err, ErrKind) || !strings.Contains(err.Error(), "null") {
		t.Errorf("error is %v", err)
	}
}

func TestRootMustBeADirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(file, nil, 0o600))
	if _, err := New(t.Context(), file); err == nil {
		t.Error("a file was taken for a directory")
	}
}

// A further name of a symbolic link is a link to it, as for a file.
func TestLinkedSymlinks(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Symlink("nowhere", filepath.Join(dir, "a")), os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "b"))); err != nil {
		t.Fatal(err)
	}
	plan, err := New(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	r := plan.Reader()
	defer r.Close()
	in := tar.NewReader(r)
	for _, want := range []tar.Header{{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "nowhere"}, {Name: "b", Typeflag: tar.TypeLink, Linkname: "a"}} {
		h, err := in.Next()
		if err != nil || h.Name != want.Name || h.Typeflag != want.Typeflag || h.Linkname != want.Linkname {
			t.Errorf("%+v, %v", h, err)
		}
	}
}
