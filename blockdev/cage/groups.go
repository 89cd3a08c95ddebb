package cage

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"holdfast/internal/sys"
)

const (
	cgroupRoot   = "/sys/fs/cgroup"
	cgroup2Magic = 0x63677270 // CGROUP2_SUPER_MAGIC, statfs(2)
)

// groups is where cages have their control groups, and which controllers bound
// them there.
type groups struct {
	// parent is absolute in cgroup2: beside our own group, since one that has
	// processes hands no controllers down, and one that hands some down takes no
	// process, so that a service manager could not start us there again. "": below
	// our own, in each hierarchy of cgroup v1.
	parent       string
	memory, pids bool
}

// path is what runc is told. A relative one means below our own group to it.
func (g groups) path(id string) string { return path.Join(g.parent, id) }

func (g groups) missing() (names []string) {
	if !g.memory {
		names = append(names, "memory")
	}
	if !g.pids {
		names = append(names, "pids")
	}
	return names
}

func findGroups() (groups, error) {
	space, err := sys.SpaceOf(cgroupRoot)
	if err != nil {
		return groups{}, err
	}
	if space.Type != cgroup2Magic {
		has := func(controller string) bool {
			_, err := os.Stat(filepath.Join(cgroupRoot, controller, "cgroup.procs"))
			return err == nil
		}
		return groups{memory: has("memory"), pids: has("pids")}, nil
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return groups{}, err
	}
	_, name, ok := strings.Cut(strings.TrimSpace(string(own)), "0::")
	if !ok {
		return groups{}, errors.New("this process is in no cgroup2 group")
	}
	g := groups{parent: path.Dir(name)}
	file := filepath.Join(cgroupRoot, g.parent, "cgroup.subtree_control")
	for _, controller := range []string{"memory", "pids"} {
		// Refused where the group may not: what is there after all is read below.
		_ = os.WriteFile(file, []byte("+"+controller), 0o600)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return g, err
	}
	for controller := range strings.FieldsSeq(string(text)) {
		switch controller {
		case "memory":
			g.memory = true
		case "pids":
			g.pids = true
		}
	}
	return g, nil
}

// oomFile finds, by /proc/PID/cgroup, the file that counts processes killed for
// memory.
func oomFile(groups string) string {
	for line := range strings.Lines(groups) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(parts) != 3:
		case parts[1] == "memory":
			return filepath.Join(cgroupRoot, "memory", parts[2], "memory.oom_control")
		case parts[0] == "0":
			file := filepath.Join(cgroupRoot, parts[2], "memory.events")
			if _, err := os.Stat(file); err == nil {
				return file
			}
		}
	}
	return ""
}

// outOfMemory reports whether a process of the cage was killed for the memory
// that it wanted.
func (k *cage) outOfMemory() bool {
	text, err := os.ReadFile(k.oom)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			return n != "0"
		}
	}
	return false
}

// leftGroups finds control groups of cages by their name, wherever they are.
func leftGroups(prefix string) (dirs []string, err error) {
	err = filepath.WalkDir(cgroupRoot, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // it went meanwhile
			return nil
		case err != nil:
			return err
		case !d.IsDir():
			return nil
		case strings.HasPrefix(d.Name(), prefix):
			dirs = append(dirs, path)
			return fs.SkipDir
		}
		return nil
	})
	return dirs, err
}
