package attach

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/sys"
)

const (
	// A search for holders only makes an error message better: it is cut short.
	searchTime = time.Second
	searchHits = 8
)

// Holders names, for an error message, the processes of this host that have
// files or a working directory on the filesystem with a st_dev (0: not known):
// " by processes 12, 34", or "" when none was found in the time that such a search
// may take.
func Holders(stDev uint64) string {
	return describePids(" by processes ", HolderPids(stDev))
}

// HolderPids is Holders as numbers: a few of them, what was found in a short time.
func HolderPids(stDev uint64) []int {
	if stDev == 0 {
		return nil
	}
	return search(func(pid int) bool { return uses(pid, stDev) })
}

// namespaceHolders names one process of each mount namespace, other than this
// process's own, in which the volume is mounted.
func namespaceHolders(v Volume) string {
	own, err := sys.PlaceBehind("/proc/thread-self/ns/mnt")
	if err != nil {
		return ""
	}
	seen := map[uint64]bool{own.Inode: true}
	return describePids(" in the mount namespaces of processes ", search(func(pid int) bool {
		ns, err := sys.PlaceBehind(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if err != nil || seen[ns.Inode] {
			return false
		}
		seen[ns.Inode] = true
		table, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
		if err != nil {
			return false
		}
		defer table.Close()
		all, err := ReadMounts(table)
		return err == nil && len(v.Among(all)) > 0
	}))
}

func search(match func(pid int) bool) []int {
	deadline := time.Now().Add(searchTime)
	names, err := readNames("/proc")
	if err != nil {
		return nil
	}
	var found []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if len(found) == searchHits || time.Now().After(deadline) {
			break
		}
		if match(pid) {
			found = append(found, pid)
		}
	}
	return found
}

// uses reports whether a process holds something on a filesystem.
func uses(pid int, stDev uint64) bool {
	dir := "/proc/" + strconv.Itoa(pid)
	for _, link := range []string{"/cwd", "/root", "/exe"} {
		if place, err := sys.PlaceBehind(dir + link); err == nil && place.Device == stDev {
			return true
		}
	}
	names, err := readNames(dir + "/fd")
	if err != nil {
		return false
	}
	return slices.ContainsFunc(names, func(name string) bool {
		place, err := sys.PlaceBehind(dir + "/fd/" + name)
		return err == nil && place.Device == stDev
	})
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

func describePids(before string, pids []int) string {
	if len(pids) == 0 {
		return ""
	}
	texts := make([]string, 0, len(pids))
	for _, pid := range pids {
		texts = append(texts, strconv.Itoa(pid))
	}
	return before + strings.Join(texts, ", ")
}
