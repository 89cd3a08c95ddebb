package cage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	gorunc "github.com/containerd/go-runc"

	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// Remove removes what is left of the cages of a process that has ended, by
// Options.Dir and Options.Name. Nothing is left is success. It must not be called
// while a Cages is open with the same.
func Remove(ctx context.Context, o Options) error {
	if _, err := os.Lstat(o.Dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := removeContainers(ctx, o); err != nil {
		return fmt.Errorf("cages of a former process: %w", err)
	}
	if err := removeGroups("holdfast-cage-" + o.Name + "-"); err != nil {
		return fmt.Errorf("control groups of a former process: %w", err)
	}
	return os.RemoveAll(o.Dir)
}

// removeGroups removes the control groups whose names begin so, with all that
// runs in them.
func removeGroups(prefix string) error {
	groups, err := leftGroups(prefix)
	if err != nil {
		return err
	}
	for _, group := range groups {
		if err := removeGroup(group); err != nil {
			return err
		}
	}
	return nil
}

func removeContainers(ctx context.Context, o Options) error {
	state := filepath.Join(o.Dir, "state")
	entries, err := os.ReadDir(state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || len(entries) == 0 {
		return err
	}
	command := o.Command
	if command == "" {
		command = "runc"
	}
	if command, err = run.Look(command); err != nil {
		return err
	}
	for _, e := range entries {
		if err := deleteContainer(ctx, &gorunc.Runc{Command: command, Root: state}, e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// removeGroup kills what is in a control group and removes it.
func removeGroup(group string) error {
	for deadline := time.Now().Add(endTime); ; time.Sleep(time.Millisecond) {
		err := syscall.Rmdir(group)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if time.Now().After(deadline) {
			return &os.PathError{Op: "rmdir", Path: group, Err: err}
		}
		if err := killGroup(group); err != nil {
			return err
		}
	}
}

func killGroup(group string) error {
	text, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
	if err != nil {
		return err
	}
	for field := range strings.FieldsSeq(string(text)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return err
		}
		if err := killMember(pid, filepath.Base(group)); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
	}
	return nil
}

// killMember kills a process if it is, once it is held, still in the group.
func killMember(pid int, group string) error {
	pidfd, err := sys.OpenPidfd(pid)
	if err != nil {
		return err
	}
	defer pidfd.Close()
	groups, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil
	}
	if err != nil || !strings.Contains(string(groups), "/"+group) {
		return err
	}
	return sys.KillProcess(pidfd)
}
