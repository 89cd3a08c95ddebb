package blockdevtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// stillPatience is how long a process may take to stand still.
const stillPatience = time.Minute

// StandStill stops a process, and returns when it stands still: until one of its threads
// has taken the signal the others go on, and answer.
func StandStill(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(stillPatience); ; time.Sleep(time.Millisecond) {
		running, err := runningThread(pid)
		if err == nil && running == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not stand still: %s, %v", pid, running, err)
		}
	}
}

// runningThread tells of a thread that is not stopped, but for those that are the kernel's,
// for an io_uring.
func runningThread(pid int) (string, error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return "", err
	}
	for _, path := range threads {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		name, state, _ := strings.Cut(string(stat[strings.IndexByte(string(stat), '(')+1:]), ") ")
		if !strings.HasPrefix(name, "iou-") && !strings.HasPrefix(state, "T") {
			return string(stat), nil
		}
	}
	return "", nil
}
