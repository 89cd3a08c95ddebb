package blockdevtest

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/run"
)

const (
	// withoutThreads names the test that a program was started for.
	withoutThreads = "HOLDFAST_TEST_WITHOUT_THREADS"
	// nobodyElse is a user who has no other processes.
	nobodyElse = 64997
	// blockedThreads are more than a test blocks at once.
	blockedThreads = 48
	// processes is RLIMIT_NPROC (setrlimit(2)), which counts threads.
	processes = 6
)

// WithoutThreads runs f where the kernel can start no thread for an io_uring, whose
// operations that may block it therefore cancels. That is a process of its own, whose user
// may have no more threads than there are; Go has some to spare.
func WithoutThreads(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(withoutThreads) == t.Name() {
		if err := starve(); err != nil {
			t.Fatal(err)
		}
		f(t)
		return
	}
	Require(t, Root)
	dir := t.TempDir()
	self, err := os.Executable()
	if err = errors.Join(err, os.Chown(dir, nobodyElse, nobodyElse)); err != nil {
		t.Fatal(err)
	}
	r, err := run.Run(t.Context(), run.Cmd{
		Args: []string{self, "-test.run=^" + t.Name() + "$", "-test.count=1", "-test.timeout=5m"},
		// It need not get through what is above, and paths of sockets are short.
		Dir: dir, Env: append(os.Environ(), withoutThreads+"="+t.Name(), "TMPDIR=.", "GOTMPDIR=."), Timeout: 6 * time.Minute,
	})
	if err != nil {
		t.Errorf("%v\n%s", err, r.Stdout)
	}
}

// starve has this process end as a user who may start no thread.
func starve() error {
	runtime.LockOSThread() // for the first time, which has Go start a thread
	runtime.UnlockOSThread()
	idleThreads := blockedThreads + runtime.GOMAXPROCS(0) // so many run at once
	var gate [2]int
	if err := syscall.Pipe2(gate[:], syscall.O_CLOEXEC); err != nil {
		return err
	}
	var blocked sync.WaitGroup
	for range idleThreads {
		blocked.Go(func() { _, _ = syscall.Read(gate[0], make([]byte, 1)) }) // each has a thread, which stays
	}
	for n := 0; n < idleThreads; {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		n = len(tasks)
	}
	_ = syscall.Close(gate[1])
	blocked.Wait()
	_ = syscall.Close(gate[0])
	if err := syscall.Setresgid(nobodyElse, nobodyElse, nobodyElse); err != nil {
		return err
	}
	if err := syscall.Setresuid(nobodyElse, nobodyElse, nobodyElse); err != nil {
		return err
	}
	if err := syscall.Setrlimit(processes, &syscall.Rlimit{Cur: 1, Max: 1}); err != nil {
		return fmt.Errorf("setrlimit: %w", err)
	}
	return nil
}
