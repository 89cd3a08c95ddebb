package vmsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// killTime bounds how long Kill waits: a process that hangs in the kernel does not
// end.
const killTime = 10 * time.Second

// Process is a VMM's, held so that its pid keeps its meaning. Close it.
type Process struct {
	pid       int
	startTime uint64
	pidfd     *os.File
}

// Open opens the process of a resolved target. blockdev.ErrGone when it has
// ended, or another one has its pid, or the machine has booted since.
func (d *Door) Open(t attach.Target) (*Process, error) {
	if t.Pid <= 0 || t.StartTime == 0 || t.Boot == "" {
		return nil, invalid("the target was never resolved")
	}
	if t.Boot != d.boot {
		return nil, processGone(t.Pid, "was of another boot")
	}
	p, err := openProcess(t.Pid)
	if err != nil {
		return nil, err
	}
	if p.startTime != t.StartTime {
		p.Close()
		return nil, processGone(t.Pid, "is another one now")
	}
	return p, nil
}

// Pin names a process that runs now so that it is known again, as a target's.
// blockdev.ErrGone when none has that number.
func (d *Door) Pin(pid int) (attach.Target, error) {
	p, err := openProcess(pid)
	if err != nil {
		return attach.Target{}, err
	}
	defer p.Close()
	return attach.Target{Pid: pid, StartTime: p.startTime, Boot: d.boot}, nil
}

func openProcess(pid int) (*Process, error) {
	pidfd, err := sys.OpenPidfd(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, processGone(pid, "has ended")
	}
	if err != nil {
		return nil, err
	}
	p := &Process{pid: pid, pidfd: pidfd}
	// The start time is read by number: it is of this process if the process
	// lives after the reading.
	p.startTime, err = sys.StartTime(pid)
	if gone := p.Alive(); gone != nil {
		err = gone
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// Close lets the process go.
func (p *Process) Close() { p.pidfd.Close() }

// Alive is nil, or blockdev.ErrGone, or an error that leaves it unknown.
func (p *Process) Alive() error {
	alive, err := sys.PidfdAlive(p.pidfd)
	if err == nil && !alive {
		return processGone(p.pid, "has ended")
	}
	return err
}

// Gone is Alive for who has lost a connection to the process: the kernel closes the files
// of one that ends before it has ended, which is waited for.
func (p *Process) Gone(ctx context.Context) error {
	if ending, err := sys.Ending(p.pid); err == nil && ending {
		ctx, cancel := context.WithTimeout(ctx, killTime)
		defer cancel()
		_ = sys.AwaitEnd(ctx, p.pidfd) // Alive tells
	}
	return p.Alive()
}

// Sees reports whether a path of this host leads to the same file or device in the
// process's own root directory. A jailed VMM sees the image only where the operator
// has put it at the same path.
func (p *Process) Sees(file string) (bool, error) {
	here, err := sys.PlaceBehind(file)
	if err != nil {
		return false, err
	}
	there, err := sys.PlaceBehind(p.proc("root") + file)
	if gone := p.Alive(); gone != nil {
		return false, gone
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && same(here, there), err
}

// Holds reports whether the process has a file or device of this host open. A file
// that is mapped only is not found: VMMs keep their images open.
func (p *Process) Holds(file string) (bool, error) {
	want, err := sys.PlaceBehind(file)
	if err != nil {
		return false, err
	}
	entries, err := os.ReadDir(p.proc("fd"))
	if gone := p.Alive(); gone != nil {
		return false, gone
	}
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		place, err := sys.PlaceBehind(p.proc("fd/" + e.Name()))
		if errors.Is(err, fs.ErrNotExist) { // closed since
			continue
		}
		if err != nil {
			return false, errors.Join(err, p.Alive())
		}
		if same(want, place) {
			return true, nil
		}
	}
	return false, p.Alive()
}

// HasArgument reports whether the process was started with an argument.
func (p *Process) HasArgument(argument string) (bool, error) {
	text, err := os.ReadFile(p.proc("cmdline"))
	if gone := p.Alive(); gone != nil {
		return false, gone
	}
	return slices.Contains(strings.Split(string(text), "\x00"), argument), err
}

func (p *Process) proc(name string) string { return "/proc/" + strconv.Itoa(p.pid) + "/" + name }

// same compares files by inode, and block devices by what they are: a device may
// have several nodes.
func same(a, b sys.Place) bool {
	if a.IsBlock() && b.IsBlock() {
		return a.RDevice == b.RDevice
	}
	return a.Device == b.Device && a.Inode == b.Inode
}

// AwaitEnd returns nil when the VMM of a resolved target has ended; see
// attach.Sentry. It holds no thread.
func (d *Door) AwaitEnd(ctx context.Context, t attach.Target) error {
	p, err := d.Open(t)
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	return sys.AwaitEnd(ctx, p.pidfd)
}

// Kill ends the VMM with SIGKILL, and returns nil when its descriptor says that it
// has ended. Gone already is success; attach.ErrCannotFence when it does not end in
// 10 s.
func (d *Door) Kill(ctx context.Context, t attach.Target) error {
	p, err := d.Open(t)
	if errors.Is(err, blockdev.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	if err := sys.KillProcess(p.pidfd); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	if err := sys.AwaitEnd(ctx, p.pidfd); err != nil {
		return fmt.Errorf("%w: the VMM (process %d) was killed and does not end: %w", attach.ErrCannotFence, t.Pid, err)
	}
	return nil
}

func processGone(pid int, why string) error {
	return fmt.Errorf("%w: process %d %s (%w)", blockdev.ErrGone, pid, why, os.ErrProcessDone)
}

// HasArgument reports whether the VMM of a resolved target was started with an argument.
func (d *Door) HasArgument(t attach.Target, argument string) (bool, error) {
	p, err := d.Open(t)
	if err != nil {
		return false, err
	}
	defer p.Close()
	return p.HasArgument(argument)
}

// SeesImage is nil when the VMM sees a request's image at its path.
// blockdev.ErrInvalid for one in a jail that does not.
func (d *Door) SeesImage(r attach.Request) error {
	p, err := d.Open(r.Target)
	if err != nil {
		return err
	}
	defer p.Close()
	sees, err := p.Sees(r.Endpoint.Path)
	if err == nil && !sees && r.Endpoint.Kind == blockdev.VhostUser {
		return invalid("the VMM does not see the socket of the volume's worker at this server's path: it has another root directory. Bind-mount the directory of workers there at the same path")
	}
	if err == nil && !sees {
		err = invalid("the VMM does not see the pool at this server's path: it has another root directory. Bind-mount the pool there at the same path")
	}
	return err
}

// HoldsImage reports whether the VMM has a request's image open. An image that a worker
// serves is open in the worker.
func (d *Door) HoldsImage(r attach.Request) (bool, error) {
	if r.Endpoint.Kind == blockdev.VhostUser {
		return false, nil
	}
	p, err := d.Open(r.Target)
	if err != nil {
		return false, err
	}
	defer p.Close()
	return p.Holds(r.Endpoint.Path)
}
