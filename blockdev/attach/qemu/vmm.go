package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/qmp"
	"holdfast/internal/sys"
)

// vmm is a virtual machine's process, held so that its pid keeps its meaning.
type vmm struct {
	pid       int
	startTime uint64
	pidfd     *os.File
}

// open opens the process of a resolved target. blockdev.ErrGone when it has ended,
// or another one has its pid, or the machine has booted since.
func (a *Attacher) open(t attach.Target) (*vmm, error) {
	if t.Pid <= 0 || t.StartTime == 0 || t.Boot == "" {
		return nil, invalid("the target was never resolved")
	}
	if t.Boot != a.boot {
		return nil, gone(t.Pid, "was of another boot")
	}
	p, err := openProcess(t.Pid)
	if err != nil {
		return nil, err
	}
	if p.startTime != t.StartTime {
		p.close()
		return nil, gone(t.Pid, "is another one now")
	}
	return p, nil
}

func openProcess(pid int) (*vmm, error) {
	pidfd, err := sys.OpenPidfd(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, gone(pid, "has ended")
	}
	if err != nil {
		return nil, err
	}
	p := &vmm{pid: pid, pidfd: pidfd}
	// The start time is read by number: it is of this process if the process lives
	// after the reading.
	p.startTime, err = sys.StartTime(pid)
	if ended := p.alive(); ended != nil {
		err = ended
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// alive is nil, or blockdev.ErrGone, or an error that leaves it unknown.
func (p *vmm) alive() error {
	alive, err := sys.PidfdAlive(p.pidfd)
	if err == nil && !alive {
		return gone(p.pid, "has ended")
	}
	return err
}

func (p *vmm) close() { p.pidfd.Close() }

// connect opens the machine's monitor. blockdev.ErrGone when the machine has ended.
func (a *Attacher) connect(ctx context.Context, t attach.Target) (*machine, error) {
	p, err := a.open(t)
	if err != nil {
		return nil, err
	}
	m, err := a.dial(ctx, t.Socket)
	if err == nil {
		var pid int
		if pid, err = m.Pid(); err == nil && pid != t.Pid {
			err = busy("the monitor's socket belongs to another process by now (%d, not %d)", pid, t.Pid)
		}
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}
	if err != nil {
		if ended := p.alive(); ended != nil {
			err = ended
		}
		p.close()
		return nil, err
	}
	return &machine{Monitor: m, process: p, wait: a.o.Wait}, nil
}

// dial connects to a monitor's socket, walked to from an allowed prefix without
// following any symbolic link.
func (a *Attacher) dial(ctx context.Context, socket string) (*qmp.Monitor, error) {
	prefix, rest, err := a.split(socket)
	if err != nil {
		return nil, err
	}
	real, err := filepath.EvalSymlinks(prefix) // links in it are the operator's
	if err != nil {
		return nil, fmt.Errorf("allowed prefix %s: %w", prefix, err)
	}
	top, err := sys.OpenPath(real)
	if err != nil {
		return nil, fmt.Errorf("allowed prefix %s: %w", prefix, err)
	}
	defer top.Close()
	dir, err := sys.OpenBeneath(top, path.Dir(rest), sys.Walk{})
	if err != nil {
		return nil, explain(err)
	}
	defer dir.Close()
	at, err := sys.OpenSocketBeneath(dir, path.Base(rest))
	if err != nil {
		return nil, explain(err)
	}
	defer at.Close()
	name, err := sys.SocketPath(at)
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, a.o.Answer)
	defer cancel()
	m, err := qmp.Dial(bounded, name)
	if err == nil {
		return m, nil
	}
	switch {
	case errors.Is(err, qmp.ErrNotQMP):
		return nil, invalid("what listens on the socket is not a monitor (QMP) of QEMU")
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w: nobody listens on the monitor's socket", blockdev.ErrGone)
	case ctx.Err() == nil && bounded.Err() != nil:
		return nil, busy("the monitor does not answer within %s: it has another client, or its process is stopped", a.o.Answer)
	}
	return nil, err
}

// split finds the longest allowed prefix of a socket's path, and the path below it.
func (a *Attacher) split(socket string) (prefix, rest string, err error) {
	if err := validPath(socket); err != nil {
		return "", "", err
	}
	for _, p := range a.o.Prefixes {
		below, ok := strings.CutPrefix(socket, p+"/")
		if ok && len(p) > len(prefix) {
			prefix, rest = p, below
		}
	}
	if prefix == "" {
		return "", "", invalid("target.socket must be below one of the directories that the operator allows (%s)", strings.Join(a.o.Prefixes, ", "))
	}
	return prefix, rest, nil
}

func validPath(p string) error {
	switch {
	case !path.IsAbs(p), p != path.Clean(p), p == "/":
		return invalid("target.socket must be an absolute, clean path")
	case len(p) > 4095: // PATH_MAX, with its final NUL
		return invalid("target.socket is longer than 4095 bytes")
	case !utf8.ValidString(p), strings.ContainsFunc(p, unicode.IsControl):
		return invalid("target.socket must be UTF-8 without control characters")
	}
	return nil
}

// explain says which rule a socket's path breaks.
func explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: there is no such socket", blockdev.ErrGone)
	case errors.Is(err, syscall.ELOOP):
		return invalid("target.socket leads through a symbolic link, and none is followed")
	case errors.Is(err, syscall.ENOTDIR):
		return invalid("target.socket leads through something that is not a directory")
	case errors.Is(err, syscall.ENOTSOCK):
		return invalid("target.socket is not a socket")
	case errors.Is(err, syscall.ENAMETOOLONG):
		return invalid("target.socket has a name that is too long")
	}
	return err
}

func gone(pid int, why string) error {
	return fmt.Errorf("%w: process %d of the virtual machine %s", blockdev.ErrGone, pid, why)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", blockdev.ErrInvalid, fmt.Errorf(format, args...))
}

// hindered is a blockdev.ErrBusy of a virtual machine, in its own words.
type hindered string

func (h hindered) Error() string { return string(h) }

// Is lets it be told as blockdev.ErrBusy.
func (h hindered) Is(target error) bool { return target == blockdev.ErrBusy }

func busy(format string, args ...any) error { return hindered(fmt.Sprintf(format, args...)) }
