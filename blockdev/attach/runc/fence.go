package runc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/internal/sys"
)

const (
	// killTime bounds how long Fence waits for killed processes to end: one that
	// hangs in the kernel does not.
	killTime = 10 * time.Second
	killPoll = 5 * time.Millisecond
)

// AwaitEnd implements attach.Sentry: by the descriptor of the first process, of
// which the kernel tells the end. It holds no thread.
func (a *Attacher) AwaitEnd(ctx context.Context, t attach.Target) error {
	p, err := a.open(t)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return blockdev.Op("runc.AwaitEnd", "", err)
	}
	defer p.close()
	return blockdev.Op("runc.AwaitEnd", "", sys.AwaitEnd(ctx, p.pidfd))
}

// Fence kills the container's first process, and with it all of its pid namespace,
// and all processes of its control groups. It returns nil when the first one has
// ended, told by a descriptor of the proven process (the kernel lets the first of a
// pid namespace end after all others), and the groups are empty. A container that
// is gone already is success.
func (a *Attacher) Fence(ctx context.Context, r attach.Request) error {
	return blockdev.Op("runc.Fence", r.Volume, a.fence(ctx, r.Target))
}

func (a *Attacher) fence(ctx context.Context, t attach.Target) error {
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	p, err := a.open(t)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	groups, err := a.ownGroups(t)
	if err != nil {
		return err
	}
	ns, sharesPids, err := p.namespace(sys.PidNamespace)
	if err == nil {
		ns.Close()
	}
	if err != nil && !isGone(err) {
		return err
	}
	if len(groups) == 0 && sharesPids {
		return fmt.Errorf("%w: the container has neither a control group nor process numbers of its own, so its processes cannot be told from others", attach.ErrCannotFence)
	}
	if err := sys.KillProcess(p.pidfd); err != nil {
		return err
	}
	for {
		left, err := killGroups(groups)
		if err != nil {
			return err
		}
		gone := p.alive()
		switch {
		case isGone(gone) && left == 0:
			return nil
		case gone != nil && !isGone(gone):
			return gone
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %d processes of the container were killed and do not end: they hang in the kernel", attach.ErrCannotFence, max(left, 1))
		case <-time.After(killPoll):
		}
	}
}

// ownGroups gives the directories of the control groups that runc made for the
// container and its first process is in. What runc did not make may be shared,
// with whoever started the container say, and is not touched.
func (a *Attacher) ownGroups(t attach.Target) ([]string, error) {
	r := record(t.Root, t.Container)
	if r.Pid != t.Pid || r.StartTime != t.StartTime {
		return nil, nil
	}
	var dirs []string
	for _, dir := range r.Cgroups {
		members, err := membersOf(dir)
		if err != nil {
			return nil, err
		}
		if slices.Contains(members, os.Getpid()) {
			return nil, fmt.Errorf("%w: this daemon is in its control group", attach.ErrCannotFence)
		}
		if slices.Contains(members, t.Pid) && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs, nil
}

// membersOf reads the processes of a group; none when it is gone.
func membersOf(dir string) ([]int, error) {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
		return nil, nil
	}
	var members []int
	for _, field := range strings.Fields(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 { // 0: not in our pid namespace
			members = append(members, pid)
		}
	}
	return members, err
}

// killGroups sends SIGKILL to every process of the groups and those below them,
// thaws them, since a frozen process of cgroup v1 does not die, and tells how many
// were there.
func killGroups(dirs []string) (left int, err error) {
	for _, dir := range dirs {
		err = errors.Join(err, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || !entry.IsDir() {
				return err
			}
			n, err := killGroup(path)
			left += n
			return err
		}))
	}
	return left, err
}

func killGroup(dir string) (left int, err error) {
	members, err := membersOf(dir)
	for _, pid := range members {
		err = errors.Join(err, killMember(pid, dir))
	}
	if len(members) > 0 {
		for file, thawed := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
			_ = writeExisting(filepath.Join(dir, file), thawed) // a group has one of them, or none
		}
	}
	return len(members), err
}

// killMember kills a process of a group. Its number may have changed hands since
// the group was read: what was opened must be in the group still.
func killMember(pid int, dir string) error {
	pidfd, err := sys.OpenPidfd(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pidfd.Close()
	members, err := membersOf(dir)
	if err != nil || !slices.Contains(members, pid) {
		return err
	}
	return sys.KillProcess(pidfd)
}

func writeExisting(file, text string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}
