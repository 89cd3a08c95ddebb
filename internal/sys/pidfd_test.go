package sys

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
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
