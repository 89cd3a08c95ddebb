package run

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
)

// UserNamespace makes a user namespace in which the users and groups 0 to size-1
// are first to first+size-1 outside, and opens it. The namespace lives as long as
// the descriptor, and whatever else refers to it. It is made by a short-lived
// process: nobody else is in it.
func UserNamespace(first, size int) (ns *os.File, err error) {
	program, err := find("cat") // waits for the end of its input
	if err != nil {
		return nil, &Error{Args: []string{"cat"}, Code: -1, Err: err}
	}
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: first, Size: size}}
	cmd := exec.Command(program)
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	hold, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("make a user namespace: %w", errors.Join(err, hold.Close()))
	}
	defer func() { err = errors.Join(err, end(cmd, hold)) }()
	return os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
}

func end(cmd *exec.Cmd, hold io.Closer) error {
	return errors.Join(hold.Close(), cmd.Wait())
}
