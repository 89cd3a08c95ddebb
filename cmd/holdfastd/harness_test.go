package main_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/attach/vmmtest"
	"holdfast/blockdev/blockdevtest"
)

// The programs under test, built once.
var holdfastd, holdfast string

func TestMain(m *testing.M) {
	vmmtest.Main() // a VMM of a test is this program, too
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "holdfast-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	holdfastd, holdfast = filepath.Join(dir, "holdfastd"), filepath.Join(dir, "holdfast")
	for program, pkg := range map[string]string{holdfastd: "holdfast/cmd/holdfastd", holdfast: "holdfast/cmd/holdfast"} {
		out, err := exec.Command("go", "build", "-o", program, pkg).CombinedOutput()
		if err != nil {
			fmt.Fprintf(os.Stderr, "build %s: %v\n%s", pkg, err, out)
			return 1
		}
	}
	return m.Run()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience bounds every wait for something that takes milliseconds when quiet.
const patience = 60 * time.Second

// node is a daemon with its state directory, which is taken down at the test's end.
type node struct {
	t     testing.TB
	state string
	args  []string
	cmd   *exec.Cmd
	ended chan error
	log   *tail
	*client.Client
}

// newNode starts a daemon on a fresh state directory with a small pool.
func newNode(t testing.TB, args ...string) *node {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	blockdevtest.LeakCheck(t)
	n := &node{t: t, state: filepath.Join(t.TempDir(), "state")}
	n.args = append([]string{"--dev", "--state-dir", n.state, "--listen", "127.0.0.1:0", "--pool-mode", "image", "--pool-size", "1GiB", "--rate-limit", "0"}, args...)
	cl, err := client.New(client.Options{Socket: filepath.Join(n.state, "holdfastd.sock"), Workspace: "main"})
	must(t, err)
	n.Client = cl
	t.Cleanup(n.remove)
	n.start()
	return n
}

// start starts the daemon and returns when it says that it is ready.
func (n *node) start() {
	n.t.Helper()
	if err := n.tryStart(); err != nil {
		n.t.Fatalf("start: %v\n%s", err, n.log)
	}
}

func (n *node) tryStart() error {
	ready, err := n.begin()
	if err != nil {
		return err
	}
	return <-ready
}

// begin starts the daemon and does not wait. ready tells whether it got to serve.
func (n *node) begin() (ready <-chan error, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	n.log = &tail{}
	n.cmd = exec.Command(holdfastd, n.args...)
	n.cmd.Stderr = n.log
	n.cmd.Stdout = w // what --dev prints once the API listens
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		return nil, errors.Join(err, w.Close(), r.Close())
	}
	_ = w.Close()
	ended, said := make(chan error, 1), make(chan error, 1)
	n.ended = ended
	go func(cmd *exec.Cmd) { ended <- cmd.Wait() }(n.cmd)
	go func() {
		defer r.Close()
		_ = r.SetReadDeadline(time.Now().Add(patience))
		if _, err := r.Read(make([]byte, 256)); err != nil {
			said <- fmt.Errorf("it ended before it was ready: %w", err)
			return
		}
		said <- nil
	}()
	return said, nil
}

// stop drains the daemon; it must end well.
func (n *node) stop() {
	n.t.Helper()
	must(n.t, n.cmd.Process.Signal(syscall.SIGTERM))
	if err := n.wait(); err != nil {
		n.t.Fatalf("the daemon did not stop as asked: %v\n%s", err, n.log)
	}
}

// kill is SIGKILL, at this moment.
func (n *node) kill() {
	n.t.Helper()
	_ = n.cmd.Process.Kill() // it may have ended by itself
	if err := n.wait(); errors.Is(err, errNoEnd) {
		n.t.Fatalf("SIGKILL: %v\n%s", err, n.log)
	}
}

var errNoEnd = errors.New("it does not end")

func (n *node) wait() error {
	if n.ended == nil {
		return nil
	}
	select {
	case err := <-n.ended:
		n.ended = nil
		n.CloseIdle()
		return err
	case <-time.After(patience):
		return errNoEnd
	}
}

// CloseIdle forgets connections to a daemon that has ended.
func (n *node) CloseIdle() { n.Client.Close() }

// remove detaches everything, stops the daemon and takes its mounts away.
func (n *node) remove() {
	if n.ended == nil {
		if err := n.tryStart(); err != nil {
			n.t.Errorf("restart to clean up: %v\n%s", err, n.log)
		}
	}
	n.detachEverything()
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	if err := n.wait(); err != nil {
		n.t.Errorf("stop: %v\n%s", err, n.log)
	}
	n.Client.Close()
	n.uninstall()
	if n.t.Failed() {
		n.t.Logf("log of the last daemon:\n%s", n.log)
	}
}

func (n *node) detachEverything() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	workspaces, err := n.Workspaces(ctx)
	if err != nil {
		n.t.Errorf("workspaces: %v", err)
	}
	for _, w := range workspaces {
		cl, err := client.New(client.Options{Socket: filepath.Join(n.state, "holdfastd.sock"), Workspace: w.Name})
		must(n.t, err)
		if err := detachIn(ctx, cl); err != nil {
			n.t.Errorf("detach in workspace %s: %v", w.Name, err)
		}
		cl.Close()
	}
}

func detachIn(ctx context.Context, cl *client.Client) error {
	sandboxes, err := cl.Sandboxes(ctx)
	if err != nil && !client.IsNotFound(err) { // as where they are not enabled
		return err
	}
	var errs []error
	for _, s := range sandboxes {
		_, err := cl.DeleteSandbox(ctx, s.Metadata.Name)
		errs = append(errs, err, cl.AwaitSandboxGone(ctx, s.Metadata.Name))
	}
	for v, err := range cl.Volumes(ctx, client.VolumeQuery{}) {
		if err != nil || v.State.AttachedTo == "" {
			errs = append(errs, err)
			continue
		}
		all, err := cl.Attachments(ctx, v.Metadata.Name)
		errs = append(errs, err)
		for _, a := range all {
			if _, err := cl.Detach(ctx, v.Metadata.Name, a.ID); !client.IsNotFound(err) { // its sandbox has ended meanwhile
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// uninstall takes the mounts away. A mount namespace that another process on this
// machine made meanwhile may hold a copy of one for a while.
func (n *node) uninstall() {
	deadline := time.Now().Add(patience)
	for {
		out, err := exec.Command(holdfastd, append([]string{"uninstall", "--yes"}, n.args...)...).CombinedOutput()
		if err == nil {
			return
		}
		if !strings.Contains(string(out), "in use: ") || strings.Contains(string(out), "volumes are mounted") || time.Now().After(deadline) {
			n.t.Errorf("uninstall: %v\n%s", err, out)
			return
		}
	}
}

// tail keeps the end of a log.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailBytes = 64 << 10

func (l *tail) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	if extra := len(l.b) - tailBytes; extra > 0 {
		l.b = append(l.b[:0], l.b[extra:]...)
	}
	return len(p), nil
}

func (l *tail) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}

func (l *tail) has(text string) bool { return strings.Contains(l.String(), text) }

// command runs a program to its end.
func command(t testing.TB, program string, args ...string) (code int, out string) {
	t.Helper()
	var b bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = &b, &b
	cmd.Env = append(os.Environ(), "HOLDFAST_URL=", "BL_API_URL=", "HOLDFAST_SOCKET=")
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), b.String()
}
