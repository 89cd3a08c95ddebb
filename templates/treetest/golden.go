package treetest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec" //nolint:depguard // this package exists for tests
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix" //nolint:depguard // this package exists for tests
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func command(t testing.TB, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	// No setting of the machine's user or of the repository around us.
	cmd.Env = append(os.Environ(), "HOME="+dir, "LC_ALL=C.UTF-8", "GIT_CONFIG_NOSYSTEM=1", "GIT_DIR=", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.org",
		"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.org")
	cmd.Env = without(cmd.Env, "GIT_DIR=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

func without(env []string, prefix string) (kept []string) {
	for _, e := range env {
		if !strings.HasPrefix(e, prefix) {
			kept = append(kept, e)
		}
	}
	return kept
}

// Modes makes a file for each mode from 0000 to 7777, and directories with some.
func Modes(t testing.TB, root string) {
	t.Helper()
	for mode := range uint32(0o10000) {
		name := filepath.Join(root, fmt.Sprintf("files-%02o", mode>>6), fmt.Sprintf("%04o", mode))
		if mode%64 == 0 {
			must(t, os.MkdirAll(filepath.Dir(name), 0o755))
		}
		must(t, os.WriteFile(name, []byte(name[len(name)-4:]), 0o600))
		must(t, unix.Chmod(name, mode))
	}
	for _, mode := range []uint32{0, 0o001, 0o111, 0o222, 0o444, 0o700, 0o1777, 0o2755, 0o2070, 0o4711, 0o7777, 0o7000} {
		name := filepath.Join(root, fmt.Sprintf("dir-%04o", mode))
		must(t, os.Mkdir(name, 0o700))
		must(t, os.WriteFile(filepath.Join(name, "f"), []byte("x"), 0o600))
		must(t, unix.Chmod(name, mode))
	}
}

// Small makes n small files in directories of a hundred.
func Small(t testing.TB, root string, n int) {
	t.Helper()
	for i := range n {
		dir := filepath.Join(root, fmt.Sprintf("%03d", i/100))
		if i%100 == 0 {
			must(t, os.MkdirAll(dir, 0o755))
		}
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("file %d.txt", i)), bytes.Repeat([]byte{byte(i)}, i%1500), 0o640))
	}
}

// Sparse makes a sparse file of size bytes with a few islands, one at its end.
func Sparse(t testing.TB, name string, size int64) {
	t.Helper()
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(size))
	for i, at := range []int64{0, size / 4, size/2 - 100, size - 10} {
		_, err := f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 10), at)
		must(t, err)
	}
}

// Deep makes directories inside of each other, with a file in each, and names of
// 255 bytes on the way where they fit.
func Deep(t testing.TB, root string, depth int) {
	t.Helper()
	for i := range depth {
		root = filepath.Join(root, fmt.Sprintf("%s-%02d", strings.Repeat("d", 1+i%60), i))
		must(t, os.Mkdir(root, 0o755))
		must(t, os.WriteFile(filepath.Join(root, "f"), []byte(fmt.Sprint(i)), 0o644))
	}
}

// Names makes files, directories and links of every odd name, each link one of a
// group: hard-linked symbolic links as well.
func Names(t testing.TB, root string) {
	t.Helper()
	for i, name := range []string{
		" leading space", "trailing space ", "two  spaces", "-", "--", "-rf", "--help", "café-日本語-🚀.txt", "cafe\u0301", "caf\u00e9", "new\nline", "car\rriage", "tab\there",
		"\x01\x7f", "\xff\xfe not UTF-8", "\xc3\x28", "\xed\xa0\x80", `back\slash`, `quote"s'`, "*?[a]", "$HOME", "`id`", ";&|", "~", "...", ". ", "a.", ".hidden", "con", "nul.txt", "name:stream",
		strings.Repeat("n", 255), strings.Repeat("ü", 127), "\u202eright-to-left", "%2e%2e", "PaxHeaders.0", "GNUSparseFile.0", "pax_global_header", "././@LongLink"[4:],
	} {
		file, dir := filepath.Join(root, name), filepath.Join(root, fmt.Sprintf("dirs/%02d", i))
		must(t, os.WriteFile(file, []byte(name), 0o644))
		must(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
		must(t, os.Link(file, filepath.Join(dir, name, name)))
		must(t, os.Symlink(name, filepath.Join(dir, "symlink")))
		must(t, os.Link(filepath.Join(dir, "symlink"), filepath.Join(dir, "hard link to a symlink")))
	}
}

// Repository makes a git repository with some history and clones it.
func Repository(t testing.TB, root string) {
	t.Helper()
	origin := filepath.Join(t.TempDir(), "origin")
	must(t, os.MkdirAll(origin, 0o755))
	command(t, origin, "git", "init", "--quiet", "--initial-branch=main")
	for i := range 5 {
		Small(t, filepath.Join(origin, fmt.Sprintf("change-%d", i)), 60)
		must(t, os.WriteFile(filepath.Join(origin, "tool.sh"), fmt.Appendf(nil, "#!/bin/sh\necho %d\n", i), 0o755))
		if i == 2 {
			must(t, os.Symlink("tool.sh", filepath.Join(origin, "tool")))
		}
		command(t, origin, "git", "add", "--all")
		command(t, origin, "git", "commit", "--quiet", "--message", fmt.Sprintf("Change %d", i))
	}
	must(t, os.MkdirAll(root, 0o755))
	command(t, root, "git", "clone", "--quiet", "--no-local", origin, "clone")
	command(t, filepath.Join(root, "clone"), "git", "fsck", "--strict")
}

// Environment makes two Python environments whose packages are hard links into a
// cache, as uv makes them.
func Environment(t testing.TB, root string) {
	t.Helper()
	cache := filepath.Join(root, "cache", "wheels")
	for i := range 8 {
		pkg := filepath.Join(cache, fmt.Sprintf("package_%d", i))
		must(t, os.MkdirAll(filepath.Join(pkg, "__pycache__"), 0o755))
		for j := range 12 {
			must(t, os.WriteFile(filepath.Join(pkg, fmt.Sprintf("module_%d.py", j)), bytes.Repeat(fmt.Appendf(nil, "# %d\n", i*j), 50+j), 0o644))
		}
		must(t, os.WriteFile(filepath.Join(pkg, "__init__.py"), nil, 0o644))
	}
	for _, name := range []string{"one", "two"} {
		env := filepath.Join(root, name)
		command(t, root, "python3", "-m", "venv", "--without-pip", "--copies", env)
		found, err := filepath.Glob(filepath.Join(env, "lib", "python3*", "site-packages"))
		must(t, err)
		if len(found) != 1 {
			t.Fatalf("site-packages: %v", found)
		}
		command(t, root, "cp", "--archive", "--link", cache+"/.", found[0])
		command(t, root, filepath.Join(env, "bin", "python3"), "-c", "import package_7.module_3")
	}
}
