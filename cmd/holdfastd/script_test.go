package main_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// exitcode is a program for scripts: `exitcode N program args...` succeeds when
// the program ends with exactly N.
const exitcode = `#!/bin/sh
want=$1; shift
"$@"; got=$?
[ "$got" = "$want" ] || { echo "exit code $got, want $want" >&2; exit 1; }
`

// TestScripts runs the command line against a real daemon with two pools. Each
// script has a workspace of its own.
func TestScripts(t *testing.T) {
	sockets := t.TempDir()
	n := newNode(t, "--pool", "second=sparse:"+t.TempDir(), "--worker", buildWorker(t), "--vm-sockets", sockets)
	address, err := os.ReadFile(filepath.Join(n.state, "listen"))
	must(t, err)
	programs := filepath.Dir(holdfast)
	must(t, os.WriteFile(filepath.Join(programs, "exitcode"), []byte(exitcode), 0o755))
	var scripts atomic.Int64
	t.Run("holdfast", func(t *testing.T) {
		testscript.Run(t, testscript.Params{
			Dir: "testdata/script",
			Setup: func(e *testscript.Env) error {
				workspace := "script-" + strconv.FormatInt(scripts.Add(1), 10)
				out, err := exec.Command(holdfast, "--state-dir", n.state, "workspace", "create", workspace).CombinedOutput()
				if err != nil {
					return fmt.Errorf("workspace: %w: %s", err, out)
				}
				e.Setenv("PATH", programs+":"+os.Getenv("PATH"))
				e.Setenv("STATE", n.state)
				e.Setenv("SOCKETS", sockets)
				e.Setenv("SOCKET", filepath.Join(n.state, "holdfastd.sock"))
				e.Setenv("HOLDFAST_SOCKET", filepath.Join(n.state, "holdfastd.sock"))
				e.Setenv("HOLDFAST_WORKSPACE", workspace)
				e.Setenv("URL", "http://"+strings.TrimSpace(string(address)))
				return nil
			},
		})
	})
}
