package control

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"holdfast/blockdev"
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
func (s *Starter) groups(id blockdev.ID) group {
	g := group{dirs: map[string]string{}}
	if s.o.Cgroup == "" {
		return g
	}
	name := s.o.Cgroup + "-" + string(id)
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
			err := os.WriteFile(filepath.Join(dir, file), strconv.AppendInt(nil, value, 10), 0o600)
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // a controller that is not handed down
				return fmt.Errorf("bound a worker: %w", err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), strconv.AppendInt(nil, int64(pid), 10), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// remove takes the groups away, whose process has ended. Not there is success.
func (g group) remove() error {
	var errs []error
	for _, dir := range g.dirs {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
