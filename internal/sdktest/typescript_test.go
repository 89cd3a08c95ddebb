package sdktest_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/localdaemon"
)

// The exit codes of guard.mjs.
const (
	guardRefused = 97
	guardSilent  = 98
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestTypeScript runs every *.test.mjs with @blaxel/core against a real daemon,
// and shows each of its tests as a subtest.
func TestTypeScript(t *testing.T) {
	modules := nodeModules(t)
	d := startDaemon(t)
	n := newNode(t, modules)
	files, err := filepath.Glob(filepath.Join(packages, "*.test.mjs"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no test files: %v", err)
	}
	for _, file := range files {
		name := filepath.Base(file)
		t.Run(strings.TrimSuffix(name, ".test.mjs"), func(t *testing.T) {
			results := filepath.Join(t.TempDir(), "results")
			code, out := n.run(t, d, name, "--test-reporter=./reporter.mjs", "--test-reporter-destination="+results)
			failed := report(t, results)
			if code != 0 && (failed == 0 || code != 1) || code == 0 && failed > 0 {
				t.Errorf("node ended with %d, and %d tests failed", code, failed)
			}
			if t.Failed() {
				t.Logf("node said:\n%s", out)
			}
		})
	}
}

// TestGuard: what the SDK's silence rests on. Each of these wants to leave the
// machine, or does nothing at all, and the guard must say so.
func TestGuard(t *testing.T) {
	modules := nodeModules(t)
	n := newNode(t, modules)
	for name, c := range map[string]struct {
		script string
		want   int
	}{
		"fetch":       {`await fetch('http://192.0.2.1/').catch(() => {})`, guardRefused},
		"fetch name":  {`await fetch('https://api.blaxel.invalid/').catch(() => {})`, guardRefused},
		"fetch IPv6":  {`await fetch('http://[2001:db8::1]/').catch(() => {})`, guardRefused},
		"socket":      {`import net from 'node:net'; net.connect(80, '192.0.2.1').on('error', () => {})`, guardRefused},
		"new socket":  {`import { Socket } from 'node:net'; new Socket().on('error', () => {}).connect({ host: '192.0.2.1', port: 80 })`, guardRefused},
		"TLS":         {`import tls from 'node:tls'; tls.connect(443, '192.0.2.1').on('error', () => {})`, guardRefused},
		"HTTP/2":      {`import http2 from 'node:http2'; http2.connect('https://192.0.2.1').on('error', () => {})`, guardRefused},
		"axios":       {`import axios from 'axios'; await axios.get('http://192.0.2.1/').catch(() => {})`, guardRefused},
		"lookup":      {`import { lookup } from 'node:dns'; try { lookup('any.us-pdx-1.bl.run', () => {}) } catch {}`, guardRefused},
		"resolve":     {`import dns from 'node:dns/promises'; try { await dns.resolve4('api.blaxel.invalid') } catch {}`, guardRefused},
		"datagram":    {`import dgram from 'node:dgram'; try { dgram.createSocket('udp4').send('x', 53, '192.0.2.1') } catch {} finally { process.exit() }`, guardRefused},
		"nothing":     {``, guardSilent},
		"SDK's cloud": {`import { VolumeInstance, initialize } from '@blaxel/core'; process.env.BL_API_URL = ''; initialize({ workspace: 'main', apiKey: 'x' }); await VolumeInstance.list().catch(() => {})`, guardRefused},
	} {
		t.Run(name, func(t *testing.T) {
			script := strings.NewReplacer(" ", "-", "/", "-", "'", "").Replace(name) + ".mjs"
			must(t, os.WriteFile(filepath.Join(n.dir, script), []byte(c.script), 0o600))
			if code, out := n.run(t, nil, script); code != c.want {
				t.Errorf("exit code %d, want %d\n%s", code, c.want, out)
			}
		})
	}
}

// node is a directory with the test files and the packages, as node looks for
// them: beside the files. It is also the working directory and the home, where
// the SDK looks for settings and must find none.
type node struct{ dir string }

func newNode(t *testing.T, modules string) node {
	t.Helper()
	n := node{t.TempDir()}
	must(t, os.Symlink(modules, filepath.Join(n.dir, "node_modules")))
	files, err := filepath.Glob(filepath.Join(packages, "*.mjs"))
	must(t, err)
	for _, file := range files {
		b, err := os.ReadFile(file)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(n.dir, filepath.Base(file)), b, 0o600))
	}
	return n
}

// run runs a script under the guard. The environment has what the SDK needs to
// find the daemon, and nothing else.
func (n node) run(t *testing.T, d *localdaemon.Daemon, script string, flags ...string) (code int, out []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", append(append([]string{"--import=./guard.mjs"}, flags...), script)...)
	cmd.Dir = n.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + n.dir}
	if d != nil {
		cmd.Env = append(cmd.Env, "BL_API_URL="+d.URL, "BL_WORKSPACE=main", "BL_API_KEY="+d.Key, "BL_DISABLE_H2=1")
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, errors.Join(err, ctx.Err()), out)
	}
	return cmd.ProcessState.ExitCode(), out
}

// result is a line of reporter.mjs.
type result struct {
	Name    string  `json:"name"`
	Suite   bool    `json:"suite"`
	Failed  bool    `json:"failed"`
	Skipped bool    `json:"skipped"`
	MS      float64 `json:"ms"`
	Error   string  `json:"error"`
}

// report makes a subtest of every result; a suite has its line after those of its
// tests. It tells how many failed.
func report(t *testing.T, path string) (failed int) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	var tests []result
	ran := 0
	show := func(suite string) {
		for _, r := range tests {
			t.Run(strings.TrimPrefix(fmt.Sprintf("%s %s", suite, r.Name), " "), func(t *testing.T) { r.show(t) })
		}
		tests = nil
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		var r result
		must(t, json.Unmarshal(lines.Bytes(), &r))
		if r.Failed {
			failed++
		}
		if !r.Suite {
			tests = append(tests, r)
			ran++
			continue
		}
		// A suite whose tests all passed can still fail in a hook.
		if r.Failed && !strings.Contains(r.Error, "subtest") {
			t.Errorf("%s: %s", r.Name, r.Error)
		}
		show(r.Name)
	}
	show("")
	if ran == 0 {
		t.Error("no test ran")
	}
	return failed
}

func (r result) show(t *testing.T) {
	switch {
	case r.Failed:
		t.Errorf("%.0f ms: %s", r.MS, r.Error)
	case r.Skipped:
		t.Error("it was skipped: nothing may be skipped here")
	}
}
