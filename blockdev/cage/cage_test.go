package cage_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/cage"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/run"
)

// insideArgument makes this test program the process inside a cage, and
// hostileArgument a tool that has been taken over.
const (
	insideArgument  = "cage-inside"
	hostileArgument = "cage-hostile"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == insideArgument {
		os.Exit(cage.Inside())
	}
	if len(os.Args) > 2 && os.Args[1] == hostileArgument {
		os.Exit(hostile(os.Args[2:]))
	}
	if len(os.Args) > 4 && os.Args[1] == crashArgument {
		os.Exit(crash(os.Args[2:]))
	}
	if len(os.Args) > 4 && os.Args[1] == upgradeArgument {
		os.Exit(upgrade(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// Programs of tests that are no tests themselves have these.
func contextOf() context.Context { return context.Background() }
func quiet() *slog.Logger        { return slog.New(slog.DiscardHandler) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// options give cages a place of their own, which must be gone at the test's end.
func options(t testing.TB) cage.Options {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Runc, blockdevtest.Loop, blockdevtest.Ext4)
	dir, err := os.MkdirTemp("/run", "hfcage")
	must(t, err)
	must(t, os.Chmod(dir, 0o711))
	name := strings.ToLower(filepath.Base(dir))
	t.Cleanup(func() {
		left, err := os.ReadDir(dir)
		must(t, err)
		if len(left) > 0 {
			t.Errorf("left in the cages' directory: %v", left)
		}
		if groups := groupsOf(t, name); len(groups) > 0 {
			t.Errorf("left control groups: %v", groups)
		}
		must(t, os.RemoveAll(dir))
	})
	return cage.Options{
		Name: name, Dir: filepath.Join(dir, "cages"), Inside: []string{insideArgument},
		Memory: 256 << 20, Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// groupsOf finds control groups by what is in their name.
func groupsOf(t testing.TB, name string) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"*", "*/*", "*/*/*", "*/*/*/*"} {
		found, err := filepath.Glob("/sys/fs/cgroup/" + pattern + name + "-*")
		must(t, err)
		all = append(all, found...)
	}
	return all
}

func open(t testing.TB, change func(*cage.Options)) *cage.Cages {
	t.Helper()
	o := options(t)
	if change != nil {
		change(&o)
	}
	c, err := cage.Open(t.Context(), o)
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	return c
}

// image makes an empty ext4 image.
func image(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.ext4")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	must(t, filesystem.NewTools().Make(t.Context(), path, filesystem.Ext4, filesystem.MakeOptions{}))
	return path
}

func enter(t testing.TB, c *cage.Cages, path string) filesystem.Cage {
	t.Helper()
	k, err := c.Enter(t.Context(), path)
	must(t, err)
	t.Cleanup(func() { must(t, k.Close()) })
	return k
}

func TestGrow(t *testing.T) {
	blockdevtest.LeakCheck(t)
	c := open(t, func(o *cage.Options) { o.Warm = 2 })
	tools := filesystem.NewTools().In(c)
	for _, size := range []int64{4 << 20, 64 << 20} { // without a journal, and with one
		path := image(t, size)
		before, err := os.Stat(path)
		must(t, err)
		for _, larger := range []int64{128 << 20, 512 << 20} {
			must(t, os.Truncate(path, larger))
			must(t, tools.Grow(t.Context(), path, filesystem.Ext4))
			if got, err := tools.Size(t.Context(), path, filesystem.Ext4); err != nil || larger-got > 1<<20 {
				t.Errorf("size %d, %v; want %d", got, err, larger)
			}
		}
		must(t, tools.Check(t.Context(), path, filesystem.Ext4, false))
		after, err := os.Stat(path)
		must(t, err)
		if !os.SameFile(before, after) || after.Mode() != before.Mode() {
			t.Errorf("the image's file is another: %v, %v", before.Mode(), after.Mode())
		}
	}
}

func TestErrorsAreThoseOfTools(t *testing.T) {
	c := open(t, nil)
	path := image(t, 16<<20)
	k := enter(t, c, path)
	res, err := k.Run(t.Context(), run.Cmd{Args: []string{"e2fsck", "-f", "-n", k.Image()}})
	if err != nil || !strings.Contains(string(res.Stdout), "Pass 5") {
		t.Errorf("a good image: %q, %v", res.Stdout, err)
	}
	_, err = k.Run(t.Context(), run.Cmd{Args: []string{"no-such-tool"}})
	if !errors.Is(err, run.ErrNotFound) {
		t.Errorf("a missing tool: %v", err)
	}
	_, err = k.Run(t.Context(), run.Cmd{Args: []string{"e2fsck", "-f", "-n", "/dev/zero"}})
	var failed *run.Error
	if !errors.As(err, &failed) || failed.Code != 8 || failed.Args[0] != "e2fsck" {
		t.Errorf("not an image: %v", err)
	}
	res, err = k.Run(t.Context(), run.Cmd{Args: []string{"e2fsck", "-f", "-n", "/dev/zero"}, OKCodes: []int{8}})
	if err != nil || res.Code != 8 {
		t.Errorf("an expected code: %d, %v", res.Code, err)
	}
}

func TestDeadlineEndsTheCage(t *testing.T) {
	c := open(t, nil)
	path := image(t, 16<<20)
	for what, ctx := range map[string]func() (context.Context, context.CancelFunc){
		"time-out": func() (context.Context, context.CancelFunc) { return context.WithCancel(t.Context()) },
		"cancel": func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), 100*time.Millisecond)
		},
	} {
		ctx, cancel := ctx()
		k := enter(t, c, path)
		_, err := k.Run(ctx, run.Cmd{Args: []string{"sleep", "1000"}, Timeout: 200 * time.Millisecond})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := k.Run(t.Context(), run.Cmd{Args: []string{"true"}}); err == nil {
			t.Errorf("%s: the cage goes on", what)
		}
		must(t, k.Close())
	}
}

// TestDevice: a block device comes as a node that its control group names.
func TestDevice(t *testing.T) {
	blockdevtest.LeakCheck(t)
	c := open(t, nil)
	path := image(t, 64<<20)
	must(t, os.Truncate(path, 256<<20))
	out, err := exec.Command("losetup", "--find", "--show", "--direct-io=off", path).Output()
	must(t, err)
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() { must(t, exec.Command("losetup", "-d", loop).Run()) })
	tools := filesystem.NewTools().In(c)
	must(t, tools.Grow(t.Context(), loop, filesystem.Ext4))
	must(t, tools.Check(t.Context(), loop, filesystem.Ext4, false))
	if got, err := tools.Size(t.Context(), loop, filesystem.Ext4); err != nil || got != 256<<20 {
		t.Errorf("size %d, %v", got, err)
	}
}
