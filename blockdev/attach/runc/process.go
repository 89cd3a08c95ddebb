package runc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

// process is a container's first process, held so that its pid keeps its meaning.
type process struct {
	pid       int
	startTime uint64
	pidfd     *os.File
	ns        *os.File // its mount namespace, when asked for
}

// open opens the process of a resolved target. blockdev.ErrGone when it has
// ended, or another one has its pid, or the machine has booted since.
func (a *Attacher) open(t attach.Target) (*process, error) {
	if t.Pid <= 0 || t.StartTime == 0 || t.Boot == "" {
		return nil, invalid("the target was never resolved")
	}
	if t.Boot != a.boot {
		return nil, processGone(t.Pid, "was of another boot")
	}
	p, err := openProcess(t.Pid)
	if err != nil {
		return nil, err
	}
	if p.startTime != t.StartTime {
		p.close()
		return nil, processGone(t.Pid, "is another one now")
	}
	return p, nil
}

// openProcess opens the process that has a pid now.
func openProcess(pid int) (*process, error) {
	pidfd, err := sys.OpenPidfd(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, processGone(pid, "has ended")
	}
	if err != nil {
		return nil, err
	}
	p := &process{pid: pid, pidfd: pidfd}
	// The start time is read by number: it is of this process if the process
	// lives after the reading.
	p.startTime, err = sys.StartTime(pid)
	if gone := p.alive(); gone != nil {
		err = gone
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// alive is nil, or blockdev.ErrGone, or an error that leaves it unknown.
func (p *process) alive() error {
	alive, err := sys.PidfdAlive(p.pidfd)
	if err == nil && !alive {
		return processGone(p.pid, "has ended")
	}
	return err
}

// namespace opens the process's mount namespace, which must not be this host's.
func (p *process) namespace() (*os.File, error) {
	if p.ns != nil {
		return p.ns, nil
	}
	ns, err := sys.MountNamespace(p.pid)
	if gone := p.alive(); gone != nil {
		if err == nil {
			ns.Close()
		}
		return nil, gone
	}
	if err != nil {
		return nil, err
	}
	p.ns = ns
	own, err := sys.MountNamespace(os.Getpid())
	if err != nil {
		return nil, err
	}
	defer own.Close()
	same, err := sys.SameNamespace(ns, own)
	if err == nil && same {
		err = invalid("the container has no mount namespace of its own")
	}
	return ns, err
}

// inside runs fn in the process's mount namespace.
func (p *process) inside(fn func(in sys.Inside) error) error {
	ns, err := p.namespace()
	if err != nil {
		return err
	}
	return sys.InMountNamespace(ns, fn)
}

func (p *process) close() {
	p.pidfd.Close()
	if p.ns != nil {
		p.ns.Close()
	}
}

func isGone(err error) bool { return errors.Is(err, blockdev.ErrGone) }

// explain says why the mount path cannot be walked to inside the container.
func explain(mountPath string, err error) error {
	switch {
	case errors.Is(err, syscall.ELOOP):
		return invalid("mountPath %s leads through a symbolic link, and none is followed: %w", mountPath, err)
	case errors.Is(err, syscall.ENOTDIR):
		return invalid("mountPath %s is, or leads through, something that is not a directory: %w", mountPath, err)
	case errors.Is(err, syscall.EROFS):
		return invalid("mountPath %s does not exist and the filesystem it would be made on is read-only: %w", mountPath, err)
	case errors.Is(err, syscall.ENAMETOOLONG):
		return invalid("mountPath %s has a name that is too long: %w", mountPath, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return invalid("mountPath %s does not exist and the container has no space to make it: %w", mountPath, err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: mountPath %s is being changed by the container: %w", blockdev.ErrBusy, mountPath, err)
	}
	return err
}
