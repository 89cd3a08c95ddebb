package runc

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
)

// recorded is what we use of the file in which runc keeps a container's state
// (State and BaseState of libcontainer/container_linux.go and container.go).
type recorded struct {
	Pid       int               `json:"init_process_pid"`
	StartTime uint64            `json:"init_process_start"` // as in field 22 of /proc/pid/stat
	Cgroups   map[string]string `json:"cgroup_paths"`       // by controller; one, named "", for cgroup v2
}

// record reads a container's file; the zero value when it cannot.
func record(root, id string) recorded {
	text, err := os.ReadFile(filepath.Join(root, id, "state.json"))
	if err != nil {
		return recorded{}
	}
	var r recorded
	if json.Unmarshal(text, &r) != nil {
		return recorded{}
	}
	return r
}

// process gives the container's first process without asking runc, which takes
// some 30 ms: it must have the recorded pid and start time, live, and not be
// frozen. That is how runc itself tells a running container (currentState of
// container_linux.go). nil where anything is in doubt: then runc is asked.
func (r recorded) process() *process {
	if r.Pid <= 0 || r.StartTime == 0 || !r.thawed() {
		return nil
	}
	p, err := openProcess(r.Pid)
	if err != nil {
		return nil
	}
	if p.startTime != r.StartTime {
		p.close()
		return nil
	}
	return p
}

// thawed reports whether the container's control group says that it is not
// frozen: freezer.state of cgroup v1, cgroup.freeze of v2.
func (r recorded) thawed() bool {
	if dir := r.Cgroups["freezer"]; dir != "" {
		return says(filepath.Join(dir, "freezer.state"), "THAWED")
	}
	if dir := r.Cgroups[""]; dir != "" {
		return says(filepath.Join(dir, "cgroup.freeze"), "0")
	}
	return false
}

func says(file, want string) bool {
	text, err := os.ReadFile(file)
	return err == nil && string(bytes.TrimSpace(text)) == want
}
