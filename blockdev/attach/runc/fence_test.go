package runc_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/runc/runctest"
	"holdfast/blockdev/filesystem"
)

func lives(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// TestFence: every process has ended on return, also of a frozen container, and
// one whose processes start others as fast as they can.
func TestFence(t *testing.T) {
	for name, prepare := range map[string]func(c *runctest.Container){
		"running": func(*runctest.Container) {},
		"frozen":  func(c *runctest.Container) { c.Pause() },
		"forking": func(c *runctest.Container) { c.Background("while :; do sleep 1000 & sleep 0.01; done") },
	} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t, filesystem.Ext4, runctest.Options{})
			f.attach()
			pids := []int{f.c.Pid, f.c.Background("exec 3>/data/open; while :; do echo x >&3; done")}
			prepare(f.c)
			ended := make(chan error, 1)
			go func() { ended <- f.a.AwaitEnd(context.Background(), f.r.Target) }()
			if err := f.a.Fence(context.Background(), f.r); err != nil {
				t.Fatal(err)
			}
			for _, pid := range pids {
				if lives(pid) {
					t.Errorf("process %d lives", pid)
				}
			}
			if err := <-ended; err != nil {
				t.Errorf("who waited for the end: %v", err)
			}
			f.expect(attach.StateGone)
			if err := f.a.Fence(context.Background(), f.r); err != nil {
				t.Errorf("again: %v", err)
			}
			f.unmount()
		})
	}
}

// TestFenceKillsNobodyElse: another process has the pid now.
func TestFenceKillsNobodyElse(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	bystander := exec.Command("sleep", "1000")
	if err := bystander.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = bystander.Process.Kill(); _ = bystander.Wait() }()
	f.r.Target.Pid = bystander.Process.Pid // with the container's start time
	if err := f.a.Fence(context.Background(), f.r); err != nil {
		t.Errorf("fence of who is gone: %v", err)
	}
	if err := f.a.AwaitEnd(context.Background(), f.r.Target); err != nil {
		t.Errorf("the end of who is gone: %v", err)
	}
	if !lives(bystander.Process.Pid) || !lives(f.c.Pid) {
		t.Error("somebody was killed")
	}
}

// TestAwaitEndEndsWithItsContext, and says so.
func TestAwaitEndEndsWithItsContext(t *testing.T) {
	f := setUp(t, filesystem.Ext4, runctest.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := f.a.AwaitEnd(ctx, f.r.Target); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}
