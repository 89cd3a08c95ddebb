package run

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const (
	// DefaultTimeout bounds a command whose caller gave none.
	DefaultTimeout = 2 * time.Minute
	// DefaultOutputLimit bounds what is kept of stdout, and of stderr, in bytes.
	DefaultOutputLimit = 1 << 20
	// killDelay is how long Run waits, after a command was killed or has ended, for
	// others that still hold its output open.
	killDelay = 2 * time.Second
)

// ErrNotFound is in the chain of the error when the program is not installed.
var ErrNotFound = errors.New("program not found")

// Cmd is one external command. The zero value of every field but Args is usable.
type Cmd struct {
	Args        []string      // program and arguments; never a shell line
	Dir         string        // working directory
	Env         []string      // KEY=VALUE added to PATH, HOME and LC_ALL=C
	Stdin       io.Reader     // nil: /dev/null
	Stdout      io.Writer     // nil: kept in Result.Stdout, up to OutputLimit; an *os.File where a child outlives the command
	Stderr      io.Writer     // nil: kept in Result.Stderr and in the error, up to OutputLimit
	ExtraFiles  []*os.File    // become descriptors 3, 4, ...
	Timeout     time.Duration // 0: DefaultTimeout
	OutputLimit int           // bytes kept of each stream; 0: DefaultOutputLimit
	OKCodes     []int         // exit codes besides 0 that are not errors
}

// Result is what a finished command left.
type Result struct {
	Stdout    []byte
	Stderr    []byte
	Code      int
	Truncated bool // a stream was longer than OutputLimit; its head is kept
}

// Error is a command that ran and failed, was killed, or could not be started.
type Error struct {
	Args   []string
	Code   int    // -1: did not start, or was killed
	Stderr string // its head, trimmed
	Err    error
}

func (e *Error) Error() string {
	msg := fmt.Sprintf("%s: %v", e.Args[0], e.Err)
	if e.Stderr != "" {
		msg += ": " + strings.ReplaceAll(e.Stderr, "\n", "; ")
	}
	return msg
}

func (e *Error) Unwrap() error { return e.Err }

// Run executes c and waits for it. A non-zero exit is an *Error together with
// the Result. When ctx ends or the timeout passes, the process group gets
// SIGKILL and the error wraps the context's error.
func Run(ctx context.Context, c Cmd) (Result, error) {
	timeout := c.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	limit := c.OutputLimit
	if limit == 0 {
		limit = DefaultOutputLimit
	}
	stdout, stderr := &head{limit: limit}, &head{limit: limit}
	program, err := find(c.Args[0])
	if err != nil {
		return Result{Code: -1}, &Error{Args: c.Args, Code: -1, Err: err}
	}
	cmd := exec.CommandContext(ctx, program, c.Args[1:]...)
	cmd.Dir = c.Dir
	cmd.Env = append(environment(), c.Env...)
	cmd.Stdin = c.Stdin
	cmd.Stdout = stdout
	if c.Stdout != nil {
		cmd.Stdout = c.Stdout
	}
	cmd.Stderr = stderr
	if c.Stderr != nil {
		cmd.Stderr = c.Stderr
	}
	cmd.ExtraFiles = c.ExtraFiles
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = killDelay

	err = cmd.Run()
	res := Result{Stdout: stdout.buf.Bytes(), Stderr: stderr.buf.Bytes(), Code: -1, Truncated: stdout.cut || stderr.cut}
	if cmd.ProcessState != nil {
		res.Code = cmd.ProcessState.ExitCode()
	}
	return res, classify(ctx, c, res, err)
}

func classify(ctx context.Context, c Cmd, res Result, err error) error {
	if err == nil {
		return nil
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		for _, ok := range c.OKCodes {
			if res.Code == ok {
				return nil
			}
		}
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	text := strings.TrimSpace(string(res.Stderr))
	if len(text) > 2048 {
		text = text[:2048] + " ..."
	}
	return &Error{Args: c.Args, Code: res.Code, Stderr: text, Err: err}
}

// environment is the little that a tool needs: never the daemon's own, which
// may hold secrets.
func environment() []string {
	return []string{"PATH=" + searchPath(), "HOME=/", "LC_ALL=C"}
}

func searchPath() string {
	const system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	if p := os.Getenv("PATH"); p != "" {
		return p + ":" + system
	}
	return system
}

// Look tells where a program is, or an error wrapping ErrNotFound. Where the
// system keeps its tools is searched even if PATH does not name it, as an
// ordinary user's does not.
func Look(name string) (string, error) {
	p, err := exec.LookPath(name)
	if err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(dir + "/" + name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w: install it", name, ErrNotFound)
}

// find is Look for a program that may be named by its path.
func find(program string) (string, error) {
	if strings.Contains(program, "/") {
		return program, nil
	}
	return Look(program)
}

// head keeps the first limit bytes and swallows the rest. The buffer is no
// embedded field: its ReadFrom would go around Write.
type head struct {
	buf   bytes.Buffer
	limit int
	cut   bool
}

func (h *head) Write(p []byte) (int, error) {
	room := max(h.limit-h.buf.Len(), 0)
	if room < len(p) {
		h.cut = true
	}
	h.buf.Write(p[:min(room, len(p))])
	return len(p), nil
}
