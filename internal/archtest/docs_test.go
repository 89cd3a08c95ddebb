package archtest

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestDependenciesAreExplained: a module that our code imports, in the product
// or in a test, is in docs/dependencies.md with the version that go.mod has.
func TestDependenciesAreExplained(t *testing.T) {
	all, ours := packages(t)
	doc := read(t, "docs/dependencies.md")
	direct := map[string]string{}
	for _, p := range ours {
		for _, i := range slices.Concat(p.Imports, p.testImports()) {
			if d, ok := all[i]; ok && d.Module != nil && d.Module.Path != module {
				direct[d.Module.Path] = d.Module.Version
			}
		}
	}
	if len(direct) < 3 {
		t.Fatalf("only %v are imported: is go list right?", direct)
	}
	for m, v := range direct {
		row := regexp.MustCompile("(?m)^\\| `" + regexp.QuoteMeta(m) + "` \\| " + regexp.QuoteMeta(strings.TrimPrefix(v, "v")) + " \\|.*$")
		if !row.MatchString(doc) {
			t.Errorf("docs/dependencies.md has no row \"| `%s` | %s | ...\"", m, strings.TrimPrefix(v, "v"))
		}
	}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| [0-9]").FindAllStringSubmatch(doc, -1) {
		if _, ok := direct[row[1]]; !ok {
			t.Errorf("docs/dependencies.md explains %s, which nothing imports", row[1])
		}
	}
}

// TestReadmeShowsTheWay: the two commands that a newcomer needs are in the
// README, and the Makefile has them.
func TestReadmeShowsTheWay(t *testing.T) {
	readme, makefile := read(t, "README.md"), read(t, "Makefile")
	for _, target := range []string{"demo", "test"} {
		if !strings.Contains(readme, "make "+target) {
			t.Errorf("README.md does not name `make %s`", target)
		}
		if !strings.Contains(makefile, "\n"+target+":") {
			t.Errorf("the Makefile has no target %s", target)
		}
	}
}

// TestDecisionsAreNumbered: docs/decisions holds NNNN-title.md, without gaps,
// and its README lists each.
func TestDecisionsAreNumbered(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(root, "docs", "decisions", "[0-9]*.md"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no decisions: %v", err)
	}
	index := read(t, "docs/decisions/README.md")
	slices.Sort(files)
	for i, f := range files {
		name := filepath.Base(f)
		var n int
		for _, d := range name[:4] {
			n = n*10 + int(d-'0')
		}
		if n != i+1 || name[4] != '-' {
			t.Errorf("%s is decision number %d", name, i+1)
		}
		if !strings.Contains(index, "("+name+")") {
			t.Errorf("docs/decisions/README.md does not list %s", name)
		}
	}
}

// TestLinkedFilesExist: a relative link of a document leads somewhere.
func TestLinkedFilesExist(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:\s]+)(#[^)]*)?\)`)
	docs := []string{"README.md"}
	err := filepath.WalkDir(filepath.Join(root, "docs"), func(p string, d os.DirEntry, err error) error {
		if err == nil && filepath.Ext(p) == ".md" {
			rel, _ := filepath.Rel(root, p)
			docs = append(docs, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range docs {
		for _, m := range link.FindAllStringSubmatch(read(t, doc), -1) {
			target := filepath.Join(root, filepath.Dir(doc), m[1])
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s, which is not there", doc, m[1])
			}
		}
	}
}
