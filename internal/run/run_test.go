package run_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/run"
)

func shell(script string) []string { return []string{"sh", "-c", script} }

func TestOutputAndExitCode(t *testing.T) {
	res, err := run.Run(t.Context(), run.Cmd{Args: shell("echo out; echo err >&2; exit 3")})
	var failed *run.Error
	if !errors.As(err, &failed) || failed.Code != 3 || failed.Stderr != "err" {
		t.Errorf("exit 3: %v", err)
	}
	if res.Code != 3 || string(res.Stdout) != "out\n" || string(res.Stderr) != "err\n" || res.Truncated {
		t.Errorf("result %+v", res)
	}
	if res, err := run.Run(t.Context(), run.Cmd{Args: shell("exit 3"), OKCodes: []int{1, 3}}); err != nil || res.Code != 3 {
		t.Errorf("an expected code: %+v, %v", res, err)
	}
	if _, err := run.Run(t.Context(), run.Cmd{Args: shell("exit 2"), OKCodes: []int{1, 3}}); err == nil {
		t.Error("another code is no error")
	}
	if _, err := run.Run(t.Context(), run.Cmd{Args: shell("kill -9 $$"), OKCodes: []int{1}}); !errors.As(err, &failed) || failed.Code != -1 {
		t.Errorf("killed by a signal: %v", err)
	}
}

func TestNotFound(t *testing.T) {
	_, err := run.Run(t.Context(), run.Cmd{Args: []string{"no-such-program-here"}})
	if !errors.Is(err, run.ErrNotFound) || !strings.Contains(err.Error(), "no-such-program-here") {
		t.Errorf("run: %v", err)
	}
	if _, err := run.Look("no-such-program-here"); !errors.Is(err, run.ErrNotFound) {
		t.Errorf("look: %v", err)
	}
	if path, err := run.Look("sh"); err != nil || !filepath.IsAbs(path) {
		t.Errorf("look for sh: %q, %v", path, err)
	}
}

func TestSystemToolsAreFoundWithoutPath(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if path, err := run.Look("losetup"); err != nil || !filepath.IsAbs(path) {
		t.Errorf("look: %q, %v", path, err)
	}
	if _, err := run.Run(t.Context(), run.Cmd{Args: []string{"losetup", "--version"}}); err != nil {
		t.Errorf("run: %v", err)
	}
}

func TestEnvironmentIsItsOwn(t *testing.T) {
	t.Setenv("HOLDFAST_SECRET", "hunter2")
	t.Setenv("LC_ALL", "de_DE.UTF-8")
	res, err := run.Run(t.Context(), run.Cmd{Args: []string{"env"}, Env: []string{"ADDED=yes"}})
	if err != nil {
		t.Fatal(err)
	}
	got := string(res.Stdout)
	if strings.Contains(got, "hunter2") || !strings.Contains(got, "LC_ALL=C\n") || !strings.Contains(got, "ADDED=yes\n") {
		t.Errorf("environment:\n%s", got)
	}
}

func TestInputAndDirectory(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	_, err := run.Run(t.Context(), run.Cmd{Args: shell("cat; pwd"), Dir: dir, Stdin: strings.NewReader("in\n"), Stdout: &out})
	if err != nil || out.String() != "in\n"+dir+"\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
	// No stdin is the end of file, never our own.
	if res, err := run.Run(t.Context(), run.Cmd{Args: []string{"cat"}}); err != nil || len(res.Stdout) != 0 {
		t.Errorf("%+v, %v", res, err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, err = run.Run(t.Context(), run.Cmd{Args: shell("echo extra >&3"), ExtraFiles: []*os.File{w}})
	w.Close()
	buf := make([]byte, 16)
	if n, readErr := r.Read(buf); err != nil || readErr != nil || string(buf[:n]) != "extra\n" {
		t.Errorf("descriptor 3: %q, %v, %v", buf, err, readErr)
	}
}

func TestOutputIsBounded(t *testing.T) {
	script := "head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2"
	res, err := run.Run(t.Context(), run.Cmd{Args: shell(script), OutputLimit: 1000})
	if err != nil || len(res.Stdout) != 1000 || len(res.Stderr) != 1000 || !res.Truncated {
		t.Errorf("%d and %d bytes, %v, %v", len(res.Stdout), len(res.Stderr), res.Truncated, err)
	}
	_, err = run.Run(t.Context(), run.Cmd{Args: shell("yes error | head -n 100000 >&2; exit 1")})
	if err == nil || len(err.Error()) > 8192 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
}

// TestTheWholeGroupEnds: what a command has started goes with it.
func TestTheWholeGroupEnds(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	for what, end := range map[string]func() (run.Cmd, context.Context){
		"time-out": func() (run.Cmd, context.Context) { return run.Cmd{Timeout: 3 * time.Second}, t.Context() },
		"cancel": func() (run.Cmd, context.Context) {
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				for ctx.Err() == nil {
					if pid, err := os.ReadFile(pidFile); err == nil && len(pid) > 0 {
						cancel()
					}
					time.Sleep(time.Millisecond)
				}
			}()
			return run.Cmd{}, ctx
		},
	} {
		_ = os.Remove(pidFile)
		cmd, ctx := end()
		cmd.Args = shell("sleep 600 & echo $! > " + pidFile + "; wait")
		_, err := run.Run(ctx, cmd)
		if want := map[string]error{"time-out": context.DeadlineExceeded, "cancel": context.Canceled}[what]; !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		text, err := os.ReadFile(pidFile)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); alive(pid); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: the command's child %d still runs", what, pid)
			}
		}
	}
}

// alive reports whether a process runs; one that only waits to be reaped does not.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !bytes.Contains(stat, []byte(") Z "))
}

func TestProcess(t *testing.T) {
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	polite, err := run.Start([]string{"sleep", "600"}, log, log)
	if err != nil {
		t.Fatal(err)
	}
	if !alive(polite.Pid()) {
		t.Error("it does not run")
	}
	if err := polite.Stop(time.Minute); err == nil {
		t.Error("the end by a signal is told")
	}
	<-polite.Done()
	if err := polite.Stop(time.Minute); err == nil {
		t.Error("the second Stop tells the same")
	}
	deaf, err := run.Start(shell("trap '' TERM; echo ready; while :; do sleep 0.01; done"), log, log)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if text, _ := os.ReadFile(log.Name()); strings.Contains(string(text), "ready") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no sign of life")
		}
	}
	if err := deaf.Stop(20 * time.Millisecond); err == nil {
		t.Error("a kill is told")
	}
	if err := syscall.Kill(deaf.Pid(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("after Stop: %v", err)
	}
	if _, err := run.Start([]string{"no-such-program-here"}, log, log); err == nil {
		t.Error("a program that is not there starts")
	}
}
