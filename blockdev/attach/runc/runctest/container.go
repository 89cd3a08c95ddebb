package runctest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/go-runc"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/run"
)

// commandTime bounds one runc command of a test.
const commandTime = time.Minute

// Options shape a container. The zero value is a writable root filesystem with
// runc's few default capabilities, running a process that does nothing.
type Options struct {
	Args          []string // of its first process; nil: sleep
	ReadOnlyRoot  bool
	UserNamespace bool     // root inside is user 100000 outside
	Capabilities  []string // given besides the default ones, for example "CAP_SYS_ADMIN"
	OnlyCreate    bool     // its first process waits to be started: call Start
	NoPivot       bool     // started with --no-pivot: the host's tree stays in its namespace
	Bind          []string // host directories, each bound at the same path inside
}

// Container is a running container. Its methods may be called concurrently.
type Container struct {
	ID     string
	Root   string // runc's state directory
	Rootfs string // its root filesystem, as the host sees it
	Pid    int    // of its first process, on the host

	t      testing.TB
	runc   *runc.Runc
	caps   []string // given to every process besides the default ones
	paused bool
}

// Start starts a container; when the test ends it is deleted, and the test
// fails if a control group of it is left.
func Start(t testing.TB, o Options) *Container {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Runc)
	bundle := t.TempDir()
	c := &Container{
		ID:     "hftest-" + randomText(),
		Root:   filepath.Join(bundle, "state"),
		Rootfs: filepath.Join(bundle, "rootfs"),
		t:      t,
		caps:   o.Capabilities,
	}
	c.runc = &runc.Runc{Root: c.Root, Log: filepath.Join(bundle, "runc.log")}
	if err := makeBundle(bundle, o); err != nil {
		t.Fatal(err)
	}
	null, err := runc.NewNullIO()
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	t.Cleanup(c.remove)
	pidFile := filepath.Join(bundle, "pid")
	if err := c.runc.Create(ctx, c.ID, bundle, &runc.CreateOpts{IO: null, PidFile: pidFile, NoPivot: o.NoPivot}); err != nil {
		t.Fatalf("create container: %v\n%s", err, c.log())
	}
	if c.Pid, err = runc.ReadPidFile(pidFile); err != nil {
		t.Fatal(err)
	}
	if !o.OnlyCreate {
		c.Start()
	}
	return c
}

// Start lets a container's first process begin that was only created.
func (c *Container) Start() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	if err := c.runc.Start(ctx, c.ID); err != nil {
		c.t.Fatalf("start container: %v\n%s", err, c.log())
	}
}

// Exec runs a command as root in the container and gives what it wrote to
// stdout and stderr. The error holds its exit status and output.
func (c *Container) Exec(args ...string) (string, error) {
	pipes, err := runc.NewPipeIO(0, 0)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	var out, errOut bytes.Buffer
	var copying sync.WaitGroup
	copying.Go(func() { _, _ = out.ReadFrom(pipes.Stdout()) })
	copying.Go(func() { _, _ = errOut.ReadFrom(pipes.Stderr()) })
	err = c.runc.Exec(ctx, c.ID, *process(args, c.caps), &runc.ExecOpts{IO: pipes})
	copying.Wait()
	pipes.Close()
	text := out.String() + errOut.String()
	if err != nil {
		return text, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, text)
	}
	return text, nil
}

// MustExec is Exec of a command that must succeed.
func (c *Container) MustExec(args ...string) string {
	c.t.Helper()
	out, err := c.Exec(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// Shell is MustExec of a shell line.
func (c *Container) Shell(line string) string {
	c.t.Helper()
	return c.MustExec("sh", "-c", line)
}

// Background starts a shell line in the container that goes on running, and
// tells its process on the host.
func (c *Container) Background(line string) int {
	c.t.Helper()
	null, err := runc.NewNullIO()
	if err != nil {
		c.t.Fatal(err)
	}
	defer null.Close()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	pidFile := filepath.Join(filepath.Dir(c.Rootfs), "pid-"+randomText())
	err = c.runc.Exec(ctx, c.ID, *process([]string{"sh", "-c", line}, c.caps),
		&runc.ExecOpts{IO: null, Detach: true, PidFile: pidFile})
	if err != nil {
		c.t.Fatal(err)
	}
	pid, err := runc.ReadPidFile(pidFile)
	if err != nil {
		c.t.Fatal(err)
	}
	return pid
}

// Pause freezes all processes of the container until Resume, or the test's end: frozen
// processes do not die, whoever kills them.
func (c *Container) Pause() {
	c.t.Helper()
	c.must(c.runc.Pause)
	c.paused = true
	c.t.Cleanup(func() {
		if c.paused && c.status() == "paused" { // it may have been ended meanwhile
			c.Resume()
		}
	})
}

// Resume is the reverse of Pause.
func (c *Container) Resume() { c.t.Helper(); c.paused = false; c.must(c.runc.Resume) }

// status is runc's word for how the container is; "" when it knows none.
func (c *Container) status() string {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	state, err := c.runc.State(ctx, c.ID)
	if err != nil {
		return ""
	}
	return state.Status
}

func (c *Container) must(call func(context.Context, string) error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	if err := call(ctx, c.ID); err != nil {
		c.t.Fatal(err)
	}
}

// Kill kills all processes of the container and returns when they have ended.
// The container itself is still known to runc, as stopped.
func (c *Container) Kill() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	if err := c.runc.Kill(ctx, c.ID, 9, &runc.KillOpts{All: true}); err != nil {
		c.t.Fatal(err)
	}
	for !ended(c.Pid) {
		if ctx.Err() != nil {
			c.t.Fatalf("process %d does not end", c.Pid)
		}
		time.Sleep(time.Millisecond)
	}
}

// Delete ends the container and makes runc forget it; it is gone already is
// success.
func (c *Container) Delete() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	err := c.runc.Delete(ctx, c.ID, &runc.DeleteOpts{Force: true})
	if err != nil && !strings.Contains(err.Error(), "does not exist") {
		c.t.Errorf("delete container: %v", err)
	}
}

func (c *Container) remove() {
	c.Delete()
	for _, pattern := range []string{"/sys/fs/cgroup/" + c.ID, "/sys/fs/cgroup/*/" + c.ID} {
		if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
			c.t.Errorf("control groups left behind: %v %v", left, err)
		}
	}
}

func (c *Container) log() string {
	text, _ := os.ReadFile(c.runc.Log)
	return string(text)
}

// ended reports whether a process is gone, or only waits to be reaped.
func ended(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	rest := stat[bytes.LastIndexByte(stat, ')')+1:]
	return bytes.HasPrefix(rest, []byte(" Z"))
}

func randomText() string {
	b := make([]byte, 6)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// busybox finds the program, which must not need shared libraries.
func busybox() (string, error) {
	path, err := run.Look("busybox")
	if err != nil {
		return "", fmt.Errorf("%w (package busybox-static)", err)
	}
	return path, nil
}
