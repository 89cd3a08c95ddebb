package cage_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/cage"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/run"
	"holdfast/internal/sys"
)

// crashArgument makes this test program one that opens cages, begins a job and
// then waits to be killed.
const crashArgument = "cage-crash"

// crash is the daemon that dies: its directory, its cages' name, and an image.
func crash(args []string) int {
	c, err := cage.Open(contextOf(), cage.Options{
		Dir: args[0], Name: args[1], Inside: []string{insideArgument}, Warm: 1, Log: quiet(),
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	k, err := c.Enter(contextOf(), args[2])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("ready")
	_, _ = k.Run(contextOf(), run.Cmd{Args: []string{"/inside", hostileArgument, "hang"}})
	return 1
}

// crashed runs crash until it works, and kills it.
func crashed(t *testing.T, o cage.Options) {
	t.Helper()
	cmd := exec.Command(os.Args[0], crashArgument, o.Dir, o.Name, image(t, 16<<20))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	text := make([]byte, 6)
	if _, err := out.Read(text); err != nil || !strings.HasPrefix(string(text), "ready") {
		t.Fatalf("%q, %v", text, err)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
}

// TestStartRemovesWhatACrashLeft and nothing of another's.
func TestStartRemovesWhatACrashLeft(t *testing.T) {
	theirs := open(t, func(o *cage.Options) { o.Warm = 1 })
	theirs.Settle()
	o := options(t)
	crashed(t, o)
	if left := groupsOf(t, o.Name); len(left) == 0 {
		t.Fatal("the crash left no control group, so the test proves nothing")
	}
	c, err := cage.Open(t.Context(), o)
	must(t, err)
	c.Settle()
	states, err := os.ReadDir(filepath.Join(o.Dir, "state"))
	must(t, err)
	if len(states) > 1 {
		t.Errorf("runc knows %v", states)
	}
	must(t, c.Close())
	if n := theirs.Waiting(); n != 1 {
		t.Errorf("another's waiting cages: %d", n)
	}
	k := enter(t, theirs, image(t, 16<<20))
	if _, err := k.Run(t.Context(), run.Cmd{Args: []string{"true"}}); err != nil {
		t.Errorf("another's cage: %v", err)
	}
	// Remove is what an operator calls who starts no more.
	crashed(t, o)
	must(t, cage.Remove(t.Context(), o))
	must(t, cage.Remove(t.Context(), o))
}

// TestOneJobEach: no cage is seen by two jobs, and those that wait are made anew.
func TestOneJobEach(t *testing.T) {
	c := open(t, func(o *cage.Options) { o.Warm = 1; o.Most = 2 })
	path := image(t, 16<<20)
	first := enter(t, c, path)
	if _, err := first.Run(t.Context(), run.Cmd{Args: []string{"sh", "-c", "sleep 1000 >/dev/null 2>&1 & exit 0"}}); err != nil {
		t.Fatal(err)
	}
	second := enter(t, c, path) // none waits: it is made
	res, err := second.Run(t.Context(), run.Cmd{Args: []string{"sh", "-c", "ps=$(ls /proc); echo $ps; kill -9 -1; echo alone"}})
	if string(res.Stdout) != "mounts self\nalone\n" || err != nil {
		t.Errorf("%q, %v", res.Stdout, err)
	}
	if _, err := first.Run(t.Context(), run.Cmd{Args: []string{"sh", "-c", "kill -9 -1; echo"}}); err != nil {
		t.Errorf("the first cage after the second killed all that it saw: %v", err)
	}
	waiting := make(chan error, 1)
	go func() {
		k, err := c.Enter(t.Context(), path)
		if err == nil {
			err = k.Close()
		}
		waiting <- err
	}()
	select {
	case err := <-waiting:
		t.Errorf("a third job is let in beside two: %v", err)
	default:
	}
	must(t, first.Close())
	must(t, first.Close())
	must(t, <-waiting)
	must(t, second.Close())
	c.Settle()
	if n := c.Waiting(); n != 1 {
		t.Errorf("%d cages wait, want 1", n)
	}
}

// TestDeadCageIsNotUsed: one that has ended while it waited.
func TestDeadCageIsNotUsed(t *testing.T) {
	c := open(t, func(o *cage.Options) { o.Warm = 1 })
	c.Settle()
	must(t, c.KillWaiting())
	k := enter(t, c, image(t, 16<<20))
	if _, err := k.Run(t.Context(), run.Cmd{Args: []string{"true"}}); err != nil {
		t.Error(err)
	}
}

// TestUpgrade: another program has taken the name of ours.
func TestUpgrade(t *testing.T) {
	o := options(t)
	program := filepath.Join(t.TempDir(), "program")
	text, err := os.ReadFile(os.Args[0])
	must(t, err)
	must(t, os.WriteFile(program, text, 0o755))
	must(t, os.Chmod(program, 0o755))
	cmd := exec.Command(program, upgradeArgument, program, o.Dir, o.Name, image(t, 16<<20))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

const upgradeArgument = "cage-upgrade"

// upgrade opens cages, loses its own program's file, and opens some more.
func upgrade(args []string) int {
	c, err := cage.Open(contextOf(), cage.Options{Dir: args[1], Name: args[2], Inside: []string{insideArgument}, Log: quiet()})
	if err == nil {
		err = errors.Join(os.Remove(args[0]), os.WriteFile(args[0], []byte("#!/bin/false\n"), 0o755))
	}
	for range 2 {
		if err == nil {
			err = filesystem.NewTools().In(c).Check(contextOf(), args[3], filesystem.Ext4, false)
		}
	}
	if c != nil {
		err = errors.Join(err, c.Close())
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// TestNoCage: what is missing is said, and no tool runs in its stead.
func TestNoCage(t *testing.T) {
	o := options(t)
	o.Command = "no-such-runc"
	if _, err := cage.Open(t.Context(), o); !errors.Is(err, cage.ErrUnavailable) || !strings.Contains(err.Error(), "install") {
		t.Errorf("without runc: %v", err)
	}
	o.Command = "false"
	if _, err := cage.Open(t.Context(), o); !errors.Is(err, cage.ErrUnavailable) {
		t.Errorf("with a runc that fails: %v", err)
	}
	// One that hangs is killed in time; no tool runs outside meanwhile.
	o.Command, o.StartTime = filepath.Join(t.TempDir(), "runc"), 200*time.Millisecond
	must(t, os.WriteFile(o.Command, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o755))
	hung, err := cage.Open(t.Context(), o)
	must(t, err)
	if _, err := hung.Enter(t.Context(), image(t, 16<<20)); !errors.Is(err, cage.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a runc that hangs: %v", err)
	}
	must(t, hung.Close())
	o.Command, o.StartTime = "", 0
	c, err := cage.Open(t.Context(), o)
	must(t, err)
	path := image(t, 16<<20)
	must(t, c.Close())
	must(t, os.Truncate(path, 64<<20))
	err = filesystem.NewTools().In(c).Grow(t.Context(), path, filesystem.Ext4)
	if !errors.Is(err, cage.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	if got, err := filesystem.NewTools().Size(t.Context(), path, filesystem.Ext4); err != nil || got != 16<<20 {
		t.Errorf("the tools ran all the same: %d, %v", got, err)
	}
}

// TestCloseEndsJobs that are under way.
func TestCloseEndsJobs(t *testing.T) {
	blockdevtest.LeakCheck(t)
	o := options(t)
	c, err := cage.Open(t.Context(), o)
	must(t, err)
	k, err := c.Enter(t.Context(), image(t, 16<<20))
	must(t, err)
	ended := make(chan error, 1)
	go func() {
		_, err := k.Run(t.Context(), run.Cmd{Args: []string{"sleep", "1000"}})
		ended <- errors.Join(err, k.Close())
	}()
	time.Sleep(20 * time.Millisecond) // before or during: both must do
	must(t, c.Close())
	if err := <-ended; err == nil {
		t.Error("the job goes on")
	}
}

// TestStartHoldsNoMount: the namespace in which cages are started has neither the
// mounts that were there when it was made nor later ones, so that a cage that
// begins does not keep alive what is unmounted meanwhile.
func TestStartHoldsNoMount(t *testing.T) {
	blockdevtest.LeakCheck(t)
	parent := t.TempDir()
	before, after := filepath.Join(parent, "before"), filepath.Join(parent, "after")
	mount := func(dir string) {
		must(t, os.Mkdir(dir, 0o700))
		must(t, sys.Mount(sys.Filesystem{Device: "none", Type: "tmpfs"}, dir, sys.MountAttr{}))
		t.Cleanup(func() { must(t, sys.Unmount(dir)) })
	}
	mount(before)
	c := open(t, nil)
	mount(after)
	table := c.Nursery(t)
	if !strings.Contains(table, " / ") || !strings.Contains(table, " /proc ") {
		t.Fatalf("it lacks what runc needs:\n%s", table)
	}
	for _, dir := range []string{before, after} {
		if strings.Contains(table, dir) {
			t.Errorf("it holds %s:\n%s", dir, table)
		}
	}
	_ = enter(t, c, image(t, 16<<20))
}
