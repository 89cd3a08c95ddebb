package sandbox

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"holdfast/internal/run"
	"holdfast/internal/sys"
	"holdfast/templates/oci"
)

// image is what a sandbox starts from.
type image struct {
	dir string   // its root filesystem
	env []string // KEY=VALUE
	cwd string   // where commands run that name no directory
}

// images finds the root filesystem for the image name that a client sends.
type images struct {
	dir        string             // where made ones are kept
	named      map[string]*source // by name without its tag, or with it
	registries *oci.Registries    // nil: none
	log        *slog.Logger
	tool       string // the host's busybox
	placed     string // a copy of it that sandboxes have
	minimal    string
}

// find gives the image for a name. configured is false when the operator has
// named none like it: then it is the minimal one.
func (im *images) find(ctx context.Context, name string) (found image, configured bool, err error) {
	for _, key := range []string{name, withoutTag(name)} {
		if s, ok := im.named[key]; ok {
			found, err = s.get(ctx, im)
			return found, true, err
		}
	}
	return image{dir: im.minimal, cwd: "/"}, false, nil
}

// withoutTag cuts off what follows the last colon of the last part: a port stays.
func withoutTag(name string) string {
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		return name[:i]
	}
	return name
}

// openImages makes the minimal image, unless it is there: of this busybox.
func openImages(ctx context.Context, dir string, o Options) (*images, error) {
	named := map[string]*source{}
	for name, text := range o.Images {
		named[name] = &source{text: text}
		place, _, _ := strings.Cut(strings.TrimPrefix(text, "oci:"), "#")
		if !filepath.IsAbs(place) {
			continue // of a registry
		}
		if info, err := os.Stat(place); err != nil || !info.IsDir() && place == text {
			return nil, fmt.Errorf("image %s: %s is not a directory", name, place)
		}
	}
	tool, err := run.Look("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w (package busybox-static)", err)
	}
	if tool, err = filepath.EvalSymlinks(tool); err != nil {
		return nil, err
	}
	if err := checkStatic(tool); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	im := &images{dir: dir, named: named, registries: o.Registries, log: o.Log, tool: tool}
	im.minimal, err = im.makeMinimal(ctx)
	return im, err
}

// minimalForm changes when the minimal image is made in another way.
const minimalForm = "2"

func (im *images) makeMinimal(ctx context.Context) (string, error) {
	program, err := os.ReadFile(im.tool)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append(program, minimalForm...))
	dir := filepath.Join(im.dir, "minimal-"+hex.EncodeToString(sum[:6]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	applets, err := run.Run(ctx, run.Cmd{Args: []string{im.tool, "--list"}})
	if err != nil {
		return "", fmt.Errorf("busybox: %w", err)
	}
	draft, err := os.MkdirTemp(im.dir, "draft-")
	if err != nil {
		return "", err
	}
	err = fillMinimal(draft, program, strings.Fields(string(applets.Stdout)))
	if err == nil {
		err = os.Rename(draft, dir)
	}
	if err != nil {
		return "", errors.Join(err, os.RemoveAll(draft))
	}
	return dir, sys.SyncDir(im.dir)
}

// printenv is for programs that look at their environment with it; Debian's
// busybox has none.
const printenv = `#!/bin/sh
[ $# -gt 0 ] || exec env
for name; do
	case $name in *[!A-Za-z0-9_]*|[0-9]*|'') exit 1 ;; esac
	eval "[ -n \"\${$name+set}\" ]" || exit 1
	eval "printf '%s\\n' \"\$$name\""
done
`

// fillMinimal makes the least that programs expect of a Unix.
func fillMinimal(dir string, program []byte, applets []string) error {
	errs := []error{os.Chmod(dir, 0o755)} //nolint:gosec // a root directory
	for _, d := range []string{"bin", "dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "usr", "usr/bin", "usr/local", "usr/local/bin", "var", "var/tmp"} {
		errs = append(errs, os.Mkdir(filepath.Join(dir, d), 0o755)) //nolint:gosec // for everybody in the sandbox
	}
	for d, mode := range map[string]os.FileMode{"tmp": 0o777 | os.ModeSticky, "var/tmp": 0o777 | os.ModeSticky, "root": 0o700} {
		errs = append(errs, os.Chmod(filepath.Join(dir, d), mode))
	}
	for name, text := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
		"etc/group":  "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
		"etc/hosts":  "127.0.0.1 localhost\n::1 localhost\n",
	} {
		errs = append(errs, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644)) //nolint:gosec // for everybody in the sandbox
	}
	errs = append(errs, os.WriteFile(filepath.Join(dir, "bin/busybox"), program, 0o755))           //nolint:gosec // a program
	errs = append(errs, os.WriteFile(filepath.Join(dir, "bin/printenv"), []byte(printenv), 0o755)) //nolint:gosec // a program
	for _, a := range applets {
		if a == "busybox" || a == "printenv" || a != filepath.Base(a) {
			continue
		}
		errs = append(errs, os.Symlink("busybox", filepath.Join(dir, "bin", a)))
	}
	return errors.Join(errs...)
}

// checkStatic refuses a busybox that needs a loader and libraries: it must run in
// any image.
func checkStatic(tool string) error {
	f, err := elf.Open(tool)
	if err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	defer f.Close() //nolint:errcheck // read side
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("busybox needs shared libraries: install the static one (package busybox-static)")
		}
	}
	return nil
}

// placeTool copies busybox to where sandboxes have it from: a mount of the host's
// own would show them the host's disk, and an upgrade would pull it away.
func (im *images) placeTool(to string) error {
	program, err := os.ReadFile(im.tool)
	if err != nil {
		return err
	}
	im.placed = to
	if there, err := os.ReadFile(to); err == nil && bytes.Equal(there, program) {
		return nil
	}
	if err := os.WriteFile(to+".new", program, 0o755); err != nil { //nolint:gosec // a program
		return err
	}
	return os.Rename(to+".new", to)
}
