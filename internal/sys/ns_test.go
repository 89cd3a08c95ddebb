package sys_test

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/blockdev/blockdevtest"
	"holdfast/internal/sys"
)

// Threads that have been in another namespace must never serve anybody else,
// nor may the main thread have been there.
func TestInMountNamespaceLeavesNoThreadBehind(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root)
	// As a slave it lets go of mounts of other tests when these do.
	cmd := exec.Command("unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo ready; exec cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	own := link(t, "/proc/self/ns/mnt")
	ns, err := sys.MountNamespace(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			err := sys.InMountNamespace(ns, func(in sys.Inside) error {
				if got := link(t, "/proc/thread-self/ns/mnt"); got == own {
					t.Errorf("not inside: %s", got)
				}
				if unix.Gettid() == unix.Getpid() {
					t.Error("on the main thread")
				}
				table, err := in.Mountinfo()
				if err != nil {
					return err
				}
				return table.Close()
			})
			if err != nil {
				t.Error(err)
			}
			if got := link(t, "/proc/thread-self/ns/mnt"); got != own {
				t.Errorf("a thread was left in %s", got)
			}
		})
	}
	all.Wait()
	if got := link(t, "/proc/self/ns/mnt"); got != own {
		t.Errorf("the main thread was left in %s", got)
	}
	failure := errors.New("failure")
	if err := sys.InMountNamespace(ns, func(sys.Inside) error { return failure }); !errors.Is(err, failure) {
		t.Errorf("fn's error: %v", err)
	}
}

func link(t *testing.T, path string) string {
	text, err := os.Readlink(path)
	if err != nil {
		t.Error(err)
	}
	return text
}

func TestProcessIdentity(t *testing.T) {
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	pidfd, err := sys.OpenPidfd(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	expectAlive(t, pidfd, true)
	if start, err := sys.StartTime(pid); err != nil || start == 0 {
		t.Errorf("start time %d, %v", start, err)
	}
	in.Close()
	if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	expectAlive(t, pidfd, false) // a zombie
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	expectAlive(t, pidfd, false)
	if _, err := sys.StartTime(pid); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("start time of nobody: %v", err)
	}
	if _, err := sys.OpenPidfd(pid); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("pidfd of nobody: %v", err)
	}
	if id, err := sys.BootID(); err != nil || len(id) != 36 {
		t.Errorf("boot id %q, %v", id, err)
	}
}

func expectAlive(t *testing.T, pidfd *os.File, want bool) {
	t.Helper()
	if alive, err := sys.PidfdAlive(pidfd); err != nil || alive != want {
		t.Errorf("alive=%t, %v; want %t", alive, err, want)
	}
}
