package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/internal/sys"
)

const (
	cgroupRoot   = "/sys/fs/cgroup"
	cgroup2Magic = 0x63677270 // CGROUP2_SUPER_MAGIC, statfs(2)
	// mostTasks bounds a worker's threads: a loop for each queue or connection, and
	// what Go wants.
	mostTasks = 1024
)

// group is a worker's control groups, by controller; "" is that of cgroup2.
type group struct {
	dirs map[string]string
	err  error
}

// groups finds where the control groups of a worker are, or would be: in cgroup2
// beside our own, since one that has processes hands no controllers down and the
// service manager ends what is in ours; in each hierarchy of cgroup v1 below it.
func (s *Starter) groups(home string) group {
	g := group{dirs: map[string]string{}}
	if s.o.Cgroup == "" {
		return g
	}
	name := s.o.Cgroup + "-" + home
	space, err := sys.SpaceOf(cgroupRoot)
	if err != nil {
		return group{err: err}
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return group{err: err}
	}
	for line := range strings.Lines(string(own)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(parts) != 3:
		case space.Type == cgroup2Magic && parts[1] == "":
			g.dirs[""] = filepath.Join(cgroupRoot, path.Dir(parts[2]), name)
		case space.Type != cgroup2Magic && (parts[1] == "memory" || parts[1] == "pids"):
			g.dirs[parts[1]] = filepath.Join(cgroupRoot, parts[1], parts[2], name)
		}
	}
	return g
}

// hold makes the groups and puts a process into them.
//
// Memory is bounded there for NBD alone. The pages of a virtual machine's memory that
// a request touches first are counted for the worker, so a bound would have the
// kernel end it for what the guest uses; what a worker of either kind allocates by
// itself is bounded by RLIMIT_DATA.
func (g group) hold(pid int, kind blockdev.Kind, memory int64) error {
	if g.err != nil {
		return g.err
	}
	for controller, dir := range g.dirs {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) { //nolint:gosec // the kernel's
			return err
		}
		set := map[string]int64{}
		if controller != "memory" {
			set["pids.max"] = mostTasks
		}
		switch {
		case kind != blockdev.NBD:
		case controller == "memory":
			set["memory.limit_in_bytes"] = memory
		case controller == "":
			set["memory.max"] = memory
		}
		for file, value := range set {
			err := tell(filepath.Join(dir, file), value)
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // a controller that is not handed down
				return fmt.Errorf("bound a worker: %w", err)
			}
		}
		if err := tell(filepath.Join(dir, "cgroup.procs"), int64(pid)); err != nil {
			return err
		}
	}
	return nil
}

// tell writes to a file of a control group. One that is not there is not asked for
// anew, which the kernel would refuse by another error.
func tell(file string, value int64) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(strconv.AppendInt(nil, value, 10))
	return errors.Join(err, f.Close())
}

// remove takes the groups away. A process that is ending holds them a moment longer
// than its sockets: it is waited for. Not there is success.
func (g group) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, wire.Patience)
	defer cancel()
	var errs []error
	for _, dir := range g.dirs {
		errs = append(errs, removeGroup(ctx, dir))
	}
	return errors.Join(errs...)
}

// retryRemove is how long a group may look empty and be in use.
const retryRemove = time.Millisecond

func removeGroup(ctx context.Context, dir string) error {
	for {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) || ctx.Err() != nil {
			return err
		}
		awaitGroup(ctx, dir)
		select {
		case <-ctx.Done():
		case <-time.After(retryRemove):
		}
	}
}

// awaitGroup waits for the end of the processes in a group.
func awaitGroup(ctx context.Context, dir string) {
	text, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) // gone: nobody to wait for
	for line := range strings.FieldsSeq(string(text)) {
		pid, err := strconv.Atoi(line)
		if err != nil {
			continue
		}
		pidfd, err := sys.OpenPidfd(pid)
		if err != nil {
			continue // it has ended
		}
		_ = sys.AwaitEnd(ctx, pidfd) // what is still there is seen by the next try
		pidfd.Close()
	}
}
