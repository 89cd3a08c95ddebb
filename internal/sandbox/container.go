package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"holdfast/internal/sys"
)

const (
	// commandTime bounds a command of runc that makes or ends a container.
	commandTime = time.Minute
	// execStart bounds the wait for a process to have begun in a container.
	execStart = 30 * time.Second
	execPoll  = 2 * time.Millisecond
)

// errStart is a process that did not begin: a fault of its request, as a rule a
// directory that is not there.
var errStart = errors.New("the process did not start")

// containers makes runc containers in one state directory.
type containers struct {
	runc *runc.Runc
	dir  string // of bundles, one for each id
	boot string
	next atomic.Int64
}

// member names a container's first process for ever: another one with its pid is
// not taken for it.
type member struct {
	Pid       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"startTime,omitempty"`
	Boot      string `json:"boot,omitempty"`
}

func (c *containers) bundle(id string) string { return filepath.Join(c.dir, id) }

// create makes a container whose first process waits to be started.
func (c *containers) create(ctx context.Context, id string) (member, error) {
	null, err := runc.NewNullIO()
	if err != nil {
		return member{}, err
	}
	defer null.Close()
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	pidFile := filepath.Join(c.bundle(id), "pid")
	if err := c.with(id).Create(ctx, id, c.bundle(id), &runc.CreateOpts{IO: null, PidFile: pidFile}); err != nil {
		return member{}, c.explain("create", id, err)
	}
	pid, err := runc.ReadPidFile(pidFile)
	if err != nil {
		return member{}, err
	}
	start, err := sys.StartTime(pid)
	return member{pid, start, c.boot}, err
}

// with is runc with a log beside the bundle.
func (c *containers) with(id string) *runc.Runc {
	r := *c.runc
	r.Log = filepath.Join(c.bundle(id), "log")
	return &r
}

func (c *containers) start(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	return c.explain("start", id, c.with(id).Start(ctx, id))
}

// remove ends the container and all its processes; it is gone is success.
func (c *containers) remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	err := c.runc.Delete(ctx, id, &runc.DeleteOpts{Force: true})
	if err != nil && !strings.Contains(err.Error(), "does not exist") {
		return c.explain("delete", id, err)
	}
	return nil
}

// explain adds what runc wrote to its log to an error that has only a status.
func (c *containers) explain(what, id string, err error) error {
	if err == nil {
		return nil
	}
	text, _ := os.ReadFile(filepath.Join(c.bundle(id), "log"))
	if len(text) > 2048 {
		text = text[len(text)-2048:]
	}
	return fmt.Errorf("runc %s %s: %w: %s", what, id, err, strings.TrimSpace(string(text)))
}

// alive reports whether a first process still runs.
func (c *containers) alive(m member) (bool, error) {
	if m.Pid == 0 || m.Boot != c.boot {
		return false, nil
	}
	pidfd, err := sys.OpenPidfd(m.Pid)
	if errors.Is(err, os.ErrProcessDone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer pidfd.Close()
	start, err := sys.StartTime(m.Pid)
	if errors.Is(err, os.ErrProcessDone) {
		return false, nil
	}
	if err != nil || start != m.StartTime {
		return false, err
	}
	return sys.PidfdAlive(pidfd)
}

// command is a process inside a container that the daemon watches.
type command struct {
	stdin  io.WriteCloser // nil: none
	pid    string         // inside the container; "" when it had ended too soon to be asked
	pidfd  *os.File       // nil: it had ended before
	done   chan struct{}  // closed when it has ended and all that it wrote was read, if nobody else holds its output
	code   int            // exit status; 128 and the signal that killed it
	failed error          // runc itself failed
}

// signal sends a signal to the process and its group.
func (p *command) signal(sig syscall.Signal) error {
	if p.pidfd == nil {
		return os.ErrProcessDone
	}
	return sys.SignalGroup(p.pidfd, sig)
}

// exec starts a process in a container and returns when it has begun. out and
// errOut get what it writes, each from a goroutine of its own, also after done
// when a child of it goes on writing.
func (c *containers) exec(id string, spec *specs.Process, stdin bool, out, errOut io.Writer) (*command, error) {
	pipes, err := runc.NewPipeIO(0, 0, func(o *runc.IOOption) { o.OpenStdin = stdin })
	if err != nil {
		return nil, err
	}
	n := strconv.FormatInt(c.next.Add(1), 10)
	pidFile, log := filepath.Join(c.bundle(id), "exec-"+n+".pid"), filepath.Join(c.bundle(id), "exec-"+n+".log")
	p := &command{stdin: pipes.Stdin(), done: make(chan struct{})}
	read := collect(pipes, out, errOut)
	go func() {
		err := c.runc.Exec(context.Background(), id, *spec, &runc.ExecOpts{IO: pipes, PidFile: pidFile, LogFile: log})
		var exit *runc.ExitError
		switch {
		case errors.As(err, &exit):
			p.code = exit.Status
		case err != nil:
			p.code, p.failed = -1, err
		}
		go func() { // not before: what it has not read of its input would be lost
			<-read
			_ = pipes.Close()
		}()
		select {
		case <-read:
		case <-time.After(lingering):
		}
		close(p.done)
	}()
	err = p.await(id, pidFile)
	if err != nil {
		text, _ := os.ReadFile(log)
		err = classifyStart(text, err)
	}
	for _, name := range []string{pidFile, log} {
		if e := os.Remove(name); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return p, err
}

// lingering bounds the wait for the rest of a process's output: when a child
// that it left behind holds the pipe, there is no end to wait for.
const lingering = 250 * time.Millisecond

// collect copies the output of a process; the channel closes at its end.
func collect(pipes runc.IO, out, errOut io.Writer) <-chan struct{} {
	read, left := make(chan struct{}), make(chan struct{}, 2)
	for _, s := range []struct {
		from io.Reader
		to   io.Writer
	}{{pipes.Stdout(), out}, {pipes.Stderr(), errOut}} {
		go func() {
			_, _ = io.Copy(s.to, s.from)
			left <- struct{}{}
		}()
	}
	go func() {
		<-left
		<-left
		close(read)
	}()
	return read
}

// await waits until runc has told the process's pid, and opens the process.
func (p *command) await(id, pidFile string) error {
	tick := time.NewTicker(execPoll)
	defer tick.Stop()
	late := time.After(execStart)
	for {
		pid, err := runc.ReadPidFile(pidFile)
		if err == nil {
			return p.open(pid, id)
		}
		select {
		case <-p.done:
			if pid, err := runc.ReadPidFile(pidFile); err == nil {
				return p.open(pid, id)
			}
			return errors.Join(errStart, p.failed)
		case <-late:
			return fmt.Errorf("%w: no sign of it after %v", errStart, execStart)
		case <-tick.C:
		}
	}
}

// open opens the process. It is the right one if it is in the container's
// control group: nobody but this container's processes is.
func (p *command) open(pid int, id string) error {
	pidfd, err := sys.OpenPidfd(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !strings.Contains(string(groups), id) {
		pidfd.Close() // it has ended, and the pid is nobody's or another's
		return nil
	}
	p.pidfd, p.pid = pidfd, insidePid(pid)
	return nil
}

// insidePid is a process's pid in its own pid namespace (NSpid of proc_pid_status(5)).
func insidePid(pid int) string {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(status)) {
		if pids, ok := strings.CutPrefix(line, "NSpid:"); ok {
			if fields := strings.Fields(pids); len(fields) > 1 {
				return fields[len(fields)-1]
			}
		}
	}
	return ""
}

// classifyStart reads runc's log for what a caller can put right.
func classifyStart(log []byte, err error) error {
	text := string(log)
	switch {
	case strings.Contains(text, "chdir to cwd"):
		return fmt.Errorf("%w: workingDir is not a directory there: %w", errStart, err)
	case strings.Contains(text, "executable file not found"), strings.Contains(text, "no such file or directory"):
		return fmt.Errorf("%w: the sandbox has no such program: %w", errStart, err)
	}
	return fmt.Errorf("%w: %s", err, strings.TrimSpace(text[max(0, len(text)-1024):]))
}

// notMounted reports whether an unmount failed because nothing was there.
func notMounted(err error) bool {
	return errors.Is(err, syscall.EINVAL) || errors.Is(err, fs.ErrNotExist)
}
