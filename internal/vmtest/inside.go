package vmtest

import (
	"archive/tar"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/guest"
	"holdfast/internal/guest/agent"
	"holdfast/internal/run"
)

// Inside reports whether this process runs in a guest.
func Inside() bool { return os.Getenv("HOLDFAST_GUEST") == "1" }

// Disks are the nodes of the blank disks of the guest that this process runs in.
func Disks() []string { return strings.Fields(os.Getenv("HOLDFAST_GUEST_DISKS")) }

// insideTime bounds a package's tests in a guest, when go test has no bound.
const insideTime = 10 * time.Minute

// Main is for TestMain of a package whose tests need a guest: on the host it runs
// the whole test program in one, with the same flags, and gives its exit code. In
// the guest, and to list tests, it runs the tests.
func Main(m *testing.M, o Options) int { return MainWith(m, o) }

// Program is where MainWith has put a program.
func Program(importPath string) string { return "/tmp/job/" + filepath.Base(importPath) }

// MainWith is Main for tests that need programs of the project in the guest. They are
// built as they are installed, without C.
func MainWith(m *testing.M, o Options, importPaths ...string) int {
	if !flag.Parsed() {
		flag.Parse()
	}
	if Inside() || flag.Lookup("test.list").Value.String() != "" {
		return m.Run()
	}
	if blockdevtest.Waived(blockdevtest.VM) {
		fmt.Printf("SKIP: these tests run in a guest; needs %s, waived by %s\n", blockdevtest.VM, blockdevtest.SkipVariable)
		return 0
	}
	code, err := inside(context.Background(), o, importPaths)
	if err != nil {
		fmt.Fprintln(os.Stderr, "in the guest:", err)
		return max(code, 1)
	}
	return code
}

// bound is a little less than what go test allows, so that the guest ends first and
// its console is shown.
func bound() time.Duration {
	if limit, ok := flag.Lookup("test.timeout").Value.(flag.Getter).Get().(time.Duration); ok && limit > 2*time.Minute {
		return limit - time.Minute
	}
	return insideTime
}

func inside(ctx context.Context, o Options, importPaths []string) (code int, err error) {
	ctx, cancel := context.WithTimeout(ctx, bound())
	defer cancel()
	v, err := guest.Open(ctx, o)
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	args, back := rewrite(os.Args[1:])
	if err := send(ctx, v, back); err != nil {
		return 1, err
	}
	if err := sendPrograms(ctx, v, importPaths); err != nil {
		return 1, err
	}
	var disks []string
	for n := range o.Disks {
		disk, err := v.Disk(ctx, fmt.Sprintf("disk%d", n))
		if err != nil {
			return 1, err
		}
		disks = append(disks, disk)
	}
	command := agent.Command{Args: append([]string{"/tmp/job/test"}, args...), Dir: "/tmp/job/package", Env: guestEnvironment(disks)}
	err = v.Command(ctx, command, nil, os.Stdout, os.Stderr)
	var failed *agent.ExitError
	switch {
	case errors.As(err, &failed) && failed.Result.Code > 0:
		code = failed.Result.Code
	case err != nil:
		return 1, err
	}
	return code, bring(ctx, v, back)
}

// guestEnvironment is what a test in the guest sees of the environment here.
func guestEnvironment(disks []string) []string {
	env := []string{"HOLDFAST_GUEST_DISKS=" + strings.Join(disks, " "), "TMPDIR=/tmp"}
	for _, e := range os.Environ() {
		if strings.HasPrefix(e, "HOLDFAST_") || strings.HasPrefix(e, "GO") && !strings.HasPrefix(e, "GOCACHE") && !strings.HasPrefix(e, "GOTMPDIR") {
			env = append(env, e)
		}
	}
	return env
}

// outputs are the flags of a test program that name a file or directory to write.
var outputs = []string{"coverprofile", "gocoverdir", "cpuprofile", "memprofile", "blockprofile", "mutexprofile", "trace", "testlogfile"}

// rewrite gives the flags for the guest, and which of its files come back where.
func rewrite(args []string) (there []string, back map[string]string) {
	back = map[string]string{}
	for n, arg := range args {
		name, value, found := strings.Cut(strings.TrimPrefix(arg, "-test."), "=")
		switch {
		case !strings.HasPrefix(arg, "-test.") || !found || value == "":
		case name == "outputdir":
			arg = "-test.outputdir=/tmp/job/out"
		case slices.Contains(outputs, name):
			file := fmt.Sprintf("f%d", n)
			back[file] = value
			arg = "-test." + name + "=/tmp/job/out/" + file
		}
		there = append(there, arg)
	}
	return there, back
}

// send puts the test program and its testdata into the guest.
func send(ctx context.Context, v *guest.VM, back map[string]string) error {
	return unpack(ctx, v, func(w io.Writer) error { return writeJob(w, back) })
}

// sendPrograms builds programs and puts them beside the test program.
func sendPrograms(ctx context.Context, v *guest.VM, importPaths []string) error {
	if len(importPaths) == 0 {
		return nil
	}
	dir, err := os.MkdirTemp("", "programs")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, path := range importPaths {
		_, err := run.Run(ctx, run.Cmd{
			Args: []string{"go", "build", "-buildvcs=false", "-o", filepath.Join(dir, filepath.Base(path)), path},
			Env:  append(os.Environ(), "CGO_ENABLED=0"),
		})
		if err != nil {
			return err
		}
	}
	return unpack(ctx, v, func(w io.Writer) error {
		t := tar.NewWriter(w)
		for _, path := range importPaths {
			name := filepath.Base(path)
			if err := addFile(t, name, filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		return t.Close()
	})
}

// unpack has the guest unpack an archive.
func unpack(ctx context.Context, v *guest.VM, write func(io.Writer) error) error {
	r, w := io.Pipe()
	go func() { w.CloseWithError(write(w)) }()
	defer r.Close()
	return v.Command(ctx, agent.Command{Args: []string{"sh", "-c", "mkdir -p /tmp/job && tar -x -C /tmp/job"}}, r, nil, nil)
}

func writeJob(to io.Writer, back map[string]string) error {
	t := tar.NewWriter(to)
	for _, dir := range []string{"package/", "out/"} {
		if err := t.WriteHeader(&tar.Header{Name: dir, Mode: 0o755, Typeflag: tar.TypeDir}); err != nil {
			return err
		}
	}
	for file, here := range back {
		if info, err := os.Stat(here); err == nil && info.IsDir() {
			if err := t.WriteHeader(&tar.Header{Name: "out/" + file + "/", Mode: 0o755, Typeflag: tar.TypeDir}); err != nil {
				return err
			}
		}
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	if err := addFile(t, "test", program); err != nil {
		return err
	}
	err = filepath.WalkDir("testdata", func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return addFile(t, "package/"+filepath.ToSlash(path), path)
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return t.Close()
}

func addFile(t *tar.Writer, name, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := t.WriteHeader(&tar.Header{Name: name, Mode: int64(info.Mode().Perm()), Size: info.Size(), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err = io.Copy(t, f)
	return err
}

// bring fetches what the test program wrote.
func bring(ctx context.Context, v *guest.VM, back map[string]string) error {
	if len(back) == 0 {
		return nil
	}
	r, w := io.Pipe()
	go func() {
		w.CloseWithError(v.Command(ctx, agent.Command{Args: []string{"tar", "-c", "-C", "/tmp/job/out", "."}}, nil, w, nil))
	}()
	defer r.Close()
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if err := keep(t, filepath.Clean(h.Name), back); err != nil {
			return err
		}
	}
}

// keep writes one of the guest's files where it was wanted.
func keep(from io.Reader, name string, back map[string]string) error {
	top, rest, _ := strings.Cut(name, "/")
	to, wanted := back[top]
	if !wanted {
		return nil
	}
	if rest != "" {
		to = filepath.Join(to, filepath.Base(rest))
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Close())
}
