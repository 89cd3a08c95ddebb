package run

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

// Detached is a program that outlives us: it has a session of its own and nothing of
// ours but what it is given.
type Detached struct {
	Args       []string
	Files      []*os.File // become descriptors 3, 4, ...
	Stderr     *os.File   // nil: /dev/null, as its other streams are
	Cloneflags uintptr    // namespaces that it begins in (clone(2))
	// DieWithParent ends it with this process after all: for tests.
	DieWithParent bool
}

// Child is a detached program. Someone has to Wait for it once it has ended.
type Child struct {
	cmd   *exec.Cmd
	pidfd *os.File
}

// StartDetached starts a program.
func StartDetached(d Detached) (*Child, error) {
	if !d.DieWithParent {
		return startDetached(d)
	}
	// The kernel means the thread that started the child; see Start. This one is not
	// given back, and ends with the process only.
	type result struct {
		c   *Child
		err error
	}
	started := make(chan result)
	go func() {
		runtime.LockOSThread()
		c, err := startDetached(d)
		started <- result{c, err}
		if err == nil {
			_, _ = c.cmd.Process.Wait()
		}
		runtime.UnlockOSThread()
	}()
	r := <-started
	return r.c, r.err
}

func startDetached(d Detached) (*Child, error) {
	pidfd := -1
	cmd := exec.Command(d.Args[0], d.Args[1:]...)
	cmd.Dir, cmd.Env, cmd.ExtraFiles = "/", environment(), d.Files
	if d.Stderr != nil {
		cmd.Stderr = d.Stderr
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: d.Cloneflags, PidFD: &pidfd}
	if d.DieWithParent {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", d.Args[0], err)
	}
	c := &Child{cmd: cmd}
	if pidfd >= 0 {
		syscall.CloseOnExec(pidfd)
		_ = syscall.SetNonblock(pidfd, true) // so that the runtime can wait for it
		c.pidfd = os.NewFile(uintptr(pidfd), "pid")
	}
	return c, nil
}

// Pid is the program's process id.
func (c *Child) Pid() int { return c.cmd.Process.Pid }

// Pidfd is the process; it stays open until Wait.
func (c *Child) Pidfd() *os.File { return c.pidfd }

// Wait takes an ended program's exit status. It would hold a thread for one that
// has not ended.
func (c *Child) Wait() error {
	defer c.pidfd.Close()
	return c.cmd.Wait()
}
