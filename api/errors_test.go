package api_test

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/api"
	"holdfast/blockdev"
	"holdfast/engine"
	"holdfast/metadata"
	"holdfast/templates"
)

// unseen are rooms that the API may not import: those above them give their
// errors names of their own.
var unseen = []string{"../blockdev/cage", "../blockdev/filecopy", "../blockdev/filesystem/ext4fill", "../blockdev/tree", "../blockdev/attach/qmp", "../blockdev/attach/guest", "../blockdev/attach/vmsocket",
	"../blockdev/serve/vhost/frontend", "../blockdev/serve/control/wire", "../blockdev/serve/overlay"}

// TestEverySentinelHasAnAnswer reads the sources: an exported sentinel that the
// table does not name would reach a client as an internal error.
func TestEverySentinelHasAnAnswer(t *testing.T) {
	answered := selectors(t, "errors.go")
	found := 0
	for _, root := range []string{"../engine", "../templates", "../blockdev", "../metadata", "auth", "audit", "."} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && slices.Contains(unseen, path):
				return fs.SkipDir
			case d.IsDir() && (strings.HasSuffix(path, "test") || root == "." && path != "."):
				return fs.SkipDir
			case filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go"):
				return nil
			}
			for _, name := range sentinels(t, path) {
				found++
				if !answered[name] {
					t.Errorf("%s is not in the table of errors.go", name)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 40 {
		t.Fatalf("only %d sentinels found: is the search broken?", found)
	}
}

func parse(t *testing.T, path string) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// sentinels are the exported package variables ErrX, as "package.ErrX"; those of api without the package.
func sentinels(t *testing.T, path string) (names []string) {
	t.Helper()
	f := parse(t, path)
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.VAR {
			continue
		}
		for _, s := range g.Specs {
			for _, name := range s.(*ast.ValueSpec).Names {
				switch {
				case !strings.HasPrefix(name.Name, "Err"):
				case f.Name.Name == "api":
					names = append(names, name.Name)
				default:
					names = append(names, f.Name.Name+"."+name.Name)
				}
			}
		}
	}
	return names
}

// selectors are all names that the table's composite literal mentions.
func selectors(t *testing.T, path string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	for _, d := range parse(t, path).Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.VAR {
			continue
		}
		for _, s := range g.Specs {
			if v := s.(*ast.ValueSpec); v.Names[0].Name == "answers" {
				for _, line := range v.Values[0].(*ast.CompositeLit).Elts {
					switch e := line.(*ast.CompositeLit).Elts[0].(type) {
					case *ast.SelectorExpr:
						found[e.X.(*ast.Ident).Name+"."+e.Sel.Name] = true
					case *ast.Ident:
						found[e.Name] = true
					}
				}
			}
		}
	}
	return found
}

// failing is an engine whose creations fail.
type failing struct {
	api.Engine
	err error
}

func (f failing) CreateVolume(context.Context, engine.CreateVolume) (engine.Volume, error) {
	return engine.Volume{}, f.err
}

func TestErrorAnswers(t *testing.T) {
	secret := "/var/lib/holdfast/pool/vol-1"
	problem := func(kind, cause error, field string) error {
		return fmt.Errorf("engine.Create: %w", &engine.Problem{Kind: kind, Field: field, Message: "text for the user", Err: cause})
	}
	for _, c := range []struct {
		name   string
		err    error
		status int
		word   string
		says   string
		retry  bool // may be tried again by itself
	}{
		{"exists", problem(engine.ErrExists, nil, "metadata.name"), 409, "VOLUME_ALREADY_EXISTS", "metadata.name: text for the user", false},
		{"external id exists", problem(engine.ErrExists, nil, "metadata.externalId"), 409, "ALREADY_EXISTS", "text", false},
		{"quota", problem(engine.ErrQuota, nil, ""), 403, "QUOTA_EXCEEDED", "text for the user", false},
		{"no space, with its cause", problem(engine.ErrNoSpace, blockdev.ErrNoSpace, ""), 403, "POOL_FULL", "text for the user", false},
		{"kind before cause", problem(engine.ErrInvalid, templates.ErrNotFound, "spec.template"), 400, "INVALID_REQUEST", "spec.template: text", false},
		{"bare template", fmt.Errorf("%w: demo:9", templates.ErrNotFound), 400, "INVALID_REQUEST", "spec.template", false},
		{"stopping", problem(engine.ErrUnavailable, nil, ""), 503, "SERVICE_UNAVAILABLE", "text for the user", true},
		{"bare pool full", blockdev.Op("sparse.Create", "vol-1", fmt.Errorf("%s: %w", secret, blockdev.ErrNoSpace)), 403, "POOL_FULL", "pool is full", false},
		{"flush failed", blockdev.Op("sparse.Publish", "vol-1", fmt.Errorf("%s: %w", secret, blockdev.ErrFailed)), 503, "STORAGE_FAILED", "flush failed", true},
		{"base away", blockdev.Op("sparse.Access", "vol-1", fmt.Errorf("%s: %w: %w", secret, blockdev.ErrUnreachable, context.DeadlineExceeded)), 503, "BASE_UNREACHABLE", "does not answer", true},
		{"store failed", fmt.Errorf("%s: %w", secret, metadata.ErrFailed), 503, "STORAGE_FAILED", "metadata store failed", true},
		{"image missing", fmt.Errorf("%s: %w", secret, blockdev.ErrNotFound), 500, "IMAGE_MISSING", "no such image", true},
		{"too slow", fmt.Errorf("%s: %w", secret, context.DeadlineExceeded), 504, "TIMEOUT", "may still finish", true},
		{"unexpected", errors.New(secret), 500, "INTERNAL_ERROR", "internal error", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, func(o *api.Options) { o.Engine = failing{o.Engine, c.err} })
			r := w.request("POST /v0/volumes", newVolume("x", nil)).refused(c.status, c.word, c.says)
			if strings.Contains(string(r.Body), secret) {
				t.Errorf("a path of the host in the answer: %s", r.Body)
			}
			if told := r.Header.Get("X-Should-Retry") == "false"; told == c.retry {
				t.Errorf("X-Should-Retry %q for %d", r.Header.Get("X-Should-Retry"), c.status)
			}
			if (r.Header.Get("Retry-After") != "") != (c.status == 503) {
				t.Errorf("Retry-After %q for %d", r.Header.Get("Retry-After"), c.status)
			}
			if log := w.log.String(); c.status >= 500 && (!strings.Contains(log, r.Header.Get("X-Request-Id")) || !strings.Contains(log, `"level":"ERROR"`)) {
				t.Errorf("the log does not tell of request %s: %s", r.Header.Get("X-Request-Id"), log)
			}
		})
	}
}
