package archtest

import (
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// allowed is what may stand at the top. A new room needs a decision.
var allowed = []string{
	"go.mod", "go.sum", "README.md", "LICENSE", "Makefile",
	"cmd", "engine", "blockdev", "templates", "metadata", "api", "bench", "internal", "docs", "deploy",
}

// made is what builds leave at the top; git ignores it.
var made = []string{"bin", "coverage", "node_modules"}

func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		n := e.Name()
		if strings.HasPrefix(n, ".") || slices.Contains(made, n) || slices.Contains([]string{".test", ".out", ".prof"}, path.Ext(n)) {
			continue
		}
		if !slices.Contains(allowed, n) {
			t.Errorf("%s stands at the top of the tree; what may is %v", n, allowed)
		}
	}
	for _, n := range []string{"LICENSE", "Makefile", "README.md", "go.mod"} {
		if _, err := os.Stat(filepath.Join(root, n)); err != nil {
			t.Error(err)
		}
	}
}

// purposeless names say what code is made of, not what it is for.
var purposeless = []string{"util", "utils", "common", "helper", "helpers", "misc", "types", "base", "lib", "pkg"}

func TestRoomsHaveAPurpose(t *testing.T) {
	_, ours := packages(t)
	for _, p := range ours {
		for _, part := range strings.Split(p.room(), "/") {
			if slices.Contains(purposeless, part) {
				t.Errorf("%s: a room called %q says nothing of its purpose", p.ImportPath, part)
			}
		}
		for _, f := range p.GoFiles {
			if slices.Contains(purposeless, strings.TrimSuffix(f, ".go")) {
				t.Errorf("%s/%s: a file of this name says nothing of its purpose", p.ImportPath, f)
			}
		}
	}
}

// shortestDoc is, in letters, less than one sentence that explains a package.
const shortestDoc = 80

func TestPackageDocs(t *testing.T) {
	_, ours := packages(t)
	for _, p := range ours {
		if len(p.GoFiles) == 0 {
			continue // tests only
		}
		src, err := os.ReadFile(filepath.Join(p.Dir, "doc.go"))
		if err != nil {
			t.Errorf("%s has no doc.go: a package says what it is for in one place", p.ImportPath)
			continue
		}
		begin := "// Package " + p.Name + " "
		if p.Name == "main" {
			begin = "// Command " + path.Base(p.ImportPath) + " "
		}
		text := string(src)
		if !strings.HasPrefix(text, begin) && !strings.Contains(text, "\n"+begin) {
			t.Errorf("%s/doc.go does not begin %q", p.ImportPath, begin+"...")
		}
		comment, _, _ := strings.Cut(text, "\npackage ")
		if len(comment) < shortestDoc {
			t.Errorf("%s/doc.go: %d letters explain nothing", p.ImportPath, len(comment))
		}
	}
}

// longest is where a file stops being one thing that a reader can hold.
const longest = 600

func TestFilesAreShort(t *testing.T) {
	_, ours := packages(t)
	for _, p := range ours {
		for _, f := range p.GoFiles {
			src, err := os.ReadFile(filepath.Join(p.Dir, f))
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(src), "\n"); n > longest {
				t.Errorf("%s/%s has %d lines, more than %d: has it one purpose?", p.ImportPath, f, n, longest)
			}
		}
	}
}
