package sys

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	const rest = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21"
	for _, name := range []string{"cat", "a b", "x) S 1 (y", "("} {
		if got, err := parseStat("12 ("+name+")"+rest, 22); err != nil || got != 4242 {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "12 cat S", "12 (cat) S 1 2", strings.Replace("12 (cat)"+rest, "4242", "x", 1)} {
		if _, err := parseStat(bad, 22); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// TestEnding: a process that is not waited for has ended, and this one has not.
func TestEnding(t *testing.T) {
	if ending, err := Ending(os.Getpid()); err != nil || ending {
		t.Errorf("this process: %t, %v", ending, err)
	}
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pidfd, err := OpenPidfd(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	if err := AwaitEnd(t.Context(), pidfd); err != nil {
		t.Fatal(err)
	}
	if ending, err := Ending(cmd.Process.Pid); err != nil || !ending {
		t.Errorf("one that has ended: %t, %v", ending, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := Ending(cmd.Process.Pid); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("one that is no more: %v", err)
	}
}

// TestStarting: a process that was forked, and executes nothing, is about to start for a
// time; one that has executed a program is not.
func TestStarting(t *testing.T) {
	if starting, err := Starting(os.Getpid(), time.Hour); err != nil || starting {
		t.Errorf("this process: %t, %v", starting, err)
	}
	cmd := exec.Command("sh", "-c", "(read x <&3) & echo $!; wait")
	hold, held, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{hold}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(held.Close(), hold.Close(), cmd.Wait()); err != nil {
			t.Error(err)
		}
	}()
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	for within, want := range map[time.Duration]bool{time.Hour: true, -time.Hour: false} {
		if starting, err := Starting(pid, within); err != nil || starting != want {
			t.Errorf("within %s: %t, %v", within, starting, err)
		}
	}
}
