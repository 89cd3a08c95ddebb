package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

const module = "holdfast"

// root is the top of the tree, from this package's directory.
var root = filepath.Join("..", "..")

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath   string
	Name         string
	Dir          string
	Doc          string
	Standard     bool
	GoFiles      []string
	Imports      []string // of the package itself
	TestImports  []string // of its tests, inside and outside of the package
	XTestImports []string
	Deps         []string // all that Imports lead to
	Module       *struct{ Path, Version string }
}

func (p pkg) ours() bool {
	return p.ImportPath == module || strings.HasPrefix(p.ImportPath, module+"/")
}

// room is the import path within the module: "blockdev/loop".
func (p pkg) room() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

// forTests tells whether the package exists for tests: by its name ("apitest"),
// or as one of the rigs.
func (p pkg) forTests() bool {
	return strings.HasSuffix(p.ImportPath, "test") || matches(p.room(), "internal/powercut", "internal/vmtest")
}

func (p pkg) testImports() []string {
	return append(append([]string{}, p.TestImports...), p.XTestImports...)
}

// load lists the packages of the module and everything that they or their
// tests import, by import path.
var load = sync.OnceValues(func() (map[string]pkg, error) {
	cmd := exec.Command("go", "list", "-deps", "-test", "-json=ImportPath,Name,Dir,Doc,Standard,GoFiles,Imports,TestImports,XTestImports,Deps,Module,ForTest", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, errors.Join(err, errors.New(stderr.String()))
	}
	all := map[string]pkg{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			pkg
			ForTest string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		// Variants made for a test binary repeat what the plain package says.
		if p.ForTest == "" && !strings.HasSuffix(p.ImportPath, ".test") {
			all[p.ImportPath] = p.pkg
		}
	}
})

// packages gives all packages, and those of the module.
func packages(t *testing.T) (all map[string]pkg, ours []pkg) {
	t.Helper()
	all, err := load()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for _, p := range all {
		if p.ours() {
			ours = append(ours, p)
		}
	}
	if len(ours) < 5 {
		t.Fatalf("go list shows %d packages of %s: the rules would hold for nothing", len(ours), module)
	}
	return all, ours
}

// matches tells whether a path is one of the patterns: "a/b" is that package,
// "a/..." is a and all below it.
func matches(path string, patterns ...string) bool {
	for _, p := range patterns {
		if tree, ok := strings.CutSuffix(p, "/..."); ok {
			if path == tree || strings.HasPrefix(path, tree+"/") {
				return true
			}
		} else if path == p {
			return true
		}
	}
	return false
}
