package sdktest_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/blockdev/blockdevtest"
)

const goModule = "testdata/go"

// TestGo runs the tests of the module in testdata/go, which use
// github.com/blaxel-ai/sdk-go, against a real daemon: each is a subtest.
func TestGo(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.SDK)
	program := buildGo(t)
	d := startDaemon(t)
	home := t.TempDir() // where the SDK looks for settings and must find none
	run := func(t *testing.T, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Dir = home
		cmd.Env = []string{"HOME=" + home, "BL_API_URL=" + d.URL, "BL_WORKSPACE=main", "BL_API_KEY=" + d.Key}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", errors.Join(err, ctx.Err()), out)
		}
		return string(out)
	}
	tests := strings.Fields(run(t, "-test.list=."))
	if len(tests) == 0 {
		t.Fatal("no tests")
	}
	for _, name := range tests {
		t.Run(name, func(t *testing.T) {
			out := run(t, "-test.v", "-test.run=^"+name+"$")
			if !t.Failed() && !strings.Contains(out, "--- PASS: "+name+" ") {
				t.Errorf("it did not run:\n%s", out)
			}
		})
	}
}

// buildGo compiles the module's tests, with whatever the module proxy has to serve.
func buildGo(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "gosdk.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-mod=readonly", "-o", program, ".")
	build.Dir = goModule
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v (waive with %s=%s)\n%s", build.Args, err, blockdevtest.SkipVariable, blockdevtest.SDK, out)
	}
	return program
}
