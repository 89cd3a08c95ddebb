package archtest

import (
	"slices"
	"strings"
	"testing"
)

// only says who may import something; nobody else may.
type only struct {
	imports []string // what is guarded: import paths, "x/..." for a tree
	by      []string // rooms that may import it
	tests   bool     // tests may, wherever they are, and what exists for tests
	why     string
}

var guarded = []only{
	{
		imports: []string{"golang.org/x/sys/..."},
		by:      []string{"internal/sys", "internal/guest/init"},
		tests:   true,
		why:     "one boundary to the kernel: errno, EINTR and descriptors are handled in one place; a test may look past it, and so may the first process of a guest, which is nothing but such calls",
	},
	{
		imports: []string{"os/exec"},
		by:      []string{"internal/run", "internal/guest/agent"},
		tests:   true,
		why:     "one runner: every command has a context, a time-out, no shell, bounded output; what a guest is told to run has its bounds outside",
	},
	{
		imports: []string{"github.com/dgraph-io/badger/v4/...", "github.com/dgraph-io/ristretto/v2/..."},
		by:      []string{"metadata"},
		why:     "the database can be replaced, and its settings cannot be forgotten",
	},
	{
		imports: []string{"github.com/containerd/go-runc/..."},
		by:      []string{"blockdev/attach/runc/...", "blockdev/cage", "internal/sandbox/..."},
		why:     "go-runc cuts the chain of errors: few places re-type them",
	},
	{
		imports: []string{"oras.land/oras-go/v2/..."},
		by:      []string{"templates/oci"},
		tests:   true,
		why:     "registries are reached through one guard, which knows what the operator listed",
	},
	{
		imports: []string{"holdfast/cmd/..."},
		by:      []string{"cmd/..."},
		why:     "commands wire packages together; nothing builds on them",
	},
	{
		imports: []string{"holdfast/bench/..."},
		by:      []string{"bench/...", "cmd/holdfast"},
		why:     "what measures stays out of what is measured; the CLI starts it",
	},
	{
		imports: []string{"holdfast/api/..."},
		by:      []string{"api/...", "cmd/...", "internal/daemon", "internal/demo", "internal/localdaemon", "bench/...", "internal/sandbox/...", "internal/powercut", "internal/browsertest", "internal/push"},
		why:     "the API stands on top: rooms below it know no HTTP and no tenant's key",
	},
	{
		imports: []string{"holdfast/internal/sandbox/..."},
		by:      []string{"internal/sandbox/...", "cmd/...", "internal/daemon"},
		why:     "the sandbox runtime is an ordinary client of the engine, not a part of it",
	},
	{
		imports: []string{"holdfast/engine/..."},
		by:      []string{"engine/...", "api/...", "cmd/...", "internal/daemon", "internal/sandbox/...", "bench/...", "internal/browsertest"},
		why:     "the engine decides; mechanisms and stores below it do not ask it",
	},
	{
		imports: []string{"testing/..."},
		tests:   true,
		why:     "test code is not linked into the product",
	},
	{
		imports: []string{"github.com/getkin/kin-openapi/...", "pgregory.net/rapid/...", "github.com/rogpeppe/go-internal/...", "go.uber.org/goleak/..."},
		tests:   true,
		why:     "these are dependencies of tests; the product does not carry them",
	},
}

func TestGuardedImports(t *testing.T) {
	_, ours := packages(t)
	for _, p := range ours {
		for _, g := range guarded {
			if matches(p.room(), g.by...) || g.tests && p.forTests() {
				continue
			}
			imports := p.Imports
			if !g.tests {
				imports = slices.Concat(imports, p.testImports())
			}
			for _, i := range slices.Compact(slices.Sorted(slices.Values(imports))) {
				if matches(i, g.imports...) && i != p.ImportPath {
					t.Errorf("%s imports %s, which only %v may: %s", p.ImportPath, i, g.by, g.why)
				}
			}
		}
	}
}

// below says what a room may import of the project's own; anything else of ours
// is refused. Rooms that no line names (commands, internal/daemon, tests'
// helpers) are wiring and free, within the rules above.
type below struct {
	room string
	may  []string
	why  string
}

var layers = []below{
	{"metadata/...", nil, "metadata imports nothing of ours: it can be read, tested and replaced alone"},
	{"internal/sys", nil, "the boundary to the kernel knows nothing above it"},
	{"internal/run", nil, "the runner of commands knows nothing above it"},
	{"blockdev", nil, "the interfaces of blockdev name no implementation"},
	{"blockdev/...", []string{"blockdev/...", "internal/sys", "internal/run"}, "mechanisms know no tenant, no template and no database"},
	{"templates/...", []string{"templates/...", "blockdev/...", "metadata", "internal/sys", "internal/run"}, "templates are made of images and records, and know no volume"},
	{"engine/...", []string{"engine/...", "blockdev", "blockdev/attach", "blockdev/filesystem", "blockdev/serve", "blockdev/serve/meter", "templates", "metadata"}, "the engine decides; it sees interfaces, never a concrete backend, attacher, system call or command"},
	{"api/...", []string{"api/...", "engine", "templates/...", "metadata", "blockdev", "blockdev/attach", "blockdev/filesystem", "blockdev/serve", "blockdev/serve/meter"}, "the API asks the engine; it touches no device"},
}

func TestLayers(t *testing.T) {
	_, ours := packages(t)
	for _, p := range ours {
		for _, l := range layers {
			if !matches(p.room(), l.room) {
				continue
			}
			for _, i := range p.Imports {
				room, ok := strings.CutPrefix(i, module+"/")
				if ok && !matches(room, l.may...) {
					t.Errorf("%s imports %s: %s", p.ImportPath, i, l.why)
				}
			}
			break
		}
	}
}

// The few rooms besides blockdev's that reach for the kernel or for a command,
// each with its reason. A new one is added here on purpose or not at all.
var (
	mayUseSys = map[string]string{
		"blockdev/...":       "devices, mounts and reflinks are system calls",
		"templates/...":      "contents are shared by reflink, and images mounted to read them",
		"cmd/...":            "start-up asks what the kernel can do",
		"internal/daemon":    "the lock on the state directory",
		"internal/preflight": "probes what the host can do",
		"internal/sandbox":   "containers are set up with mounts",
		"internal/tarball":   "reads extended attributes",
		"internal/powercut":  "the rig mounts what it rebuilds",
		"bench/...":          "yardsticks are measured with the same system calls",
	}
	mayUseRun = map[string]string{
		"blockdev/...":         "mkfs, fsck and resize tools are commands",
		"internal/preflight":   "asks which tools are there",
		"internal/sandbox":     "starts runc",
		"internal/powercut":    "starts qemu-storage-daemon and mkfs",
		"internal/guest":       "starts QEMU, and makes what it boots",
		"internal/vmtest":      "assembles a boot sector",
		"internal/demo":        "the demo shows its work with ordinary commands",
		"internal/localdaemon": "runs a daemon for the demo and the bench",
		"bench/...":            "yardsticks are commands",
	}
)

func TestWhoReachesTheKernel(t *testing.T) {
	_, ours := packages(t)
	for _, c := range []struct {
		guarded string
		named   map[string]string
	}{
		{"holdfast/internal/sys", mayUseSys},
		{"holdfast/internal/run", mayUseRun},
	} {
		for _, p := range ours {
			named := false
			for pattern := range c.named {
				named = named || matches(p.room(), pattern)
			}
			if !named && slices.Contains(p.Imports, c.guarded) {
				t.Errorf("%s imports %s and no rule here names it with a reason", p.ImportPath, c.guarded)
			}
		}
	}
}

// TestEngineIsPure follows imports to their end: what the engine decides must
// not depend, by any way, on who calls it or on the database's own package.
func TestEngineIsPure(t *testing.T) {
	all, _ := packages(t)
	p, ok := all[module+"/engine"]
	if !ok {
		t.Fatal("there is no package engine")
	}
	for _, forbidden := range []string{"github.com/spf13/cobra", "github.com/containerd/go-runc", "holdfast/api", "holdfast/blockdev/sparse", "holdfast/blockdev/loop"} {
		if slices.Contains(p.Deps, forbidden) {
			t.Errorf("engine depends on %s by way of its imports", forbidden)
		}
	}
	for _, forbidden := range []string{"net/http", "os", "os/exec", "syscall", "path/filepath"} {
		if slices.Contains(p.Imports, forbidden) {
			t.Errorf("engine imports %s: it knows no system call, no command and no path", forbidden)
		}
	}
}

// TestProductCarriesNoTests looks at what the commands link in the end.
func TestProductCarriesNoTests(t *testing.T) {
	_, ours := packages(t)
	for _, p := range ours {
		if p.Name != "main" || p.forTests() {
			continue
		}
		for _, d := range p.Deps {
			if d == "testing" || (pkg{ImportPath: d}).ours() && (pkg{ImportPath: d}).forTests() {
				t.Errorf("%s links %s", p.ImportPath, d)
			}
		}
	}
}
