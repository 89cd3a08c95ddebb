package vmmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// VMM is a server in a process of its own.
type VMM struct {
	Socket  string
	Pid     int
	t       testing.TB
	cmd     *exec.Cmd
	ended   chan struct{}
	lenient bool
}

// Start starts one that listens on a socket. It ends with the test, which fails when
// a request was not as the VMM's document has it.
func Start(t testing.TB, kind, socket string, arguments ...string) *VMM {
	t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{"-test.run=^$", "--"}, arguments...)...) //nolint:gosec // this test itself
	cmd.Env = append(os.Environ(), envKind+"="+kind, envSocket+"="+socket)
	cmd.Stderr = os.Stderr
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
	v := &VMM{Socket: socket, Pid: cmd.Process.Pid, t: t, cmd: cmd, ended: make(chan struct{})}
	_, readErr := io.ReadFull(out, make([]byte, len("ready\n")))
	go func() {
		_ = cmd.Wait()
		close(v.ended)
	}()
	t.Cleanup(func() {
		v.Kill()
		in.Close()
	})
	if readErr != nil {
		t.Fatalf("the server did not start: %v", readErr)
	}
	return v
}

// Socket gives a path for a server's socket: short, as their addresses must be.
func Socket(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "api.sock")
}

// Kill ends the process and waits for its end. The socket stays.
func (v *VMM) Kill() {
	select {
	case <-v.ended:
		return
	default:
	}
	if !v.lenient {
		for _, text := range v.Seen().Violations {
			v.t.Errorf("the VMM's document forbids: %s", text)
		}
	}
	_ = v.cmd.Process.Kill()
	<-v.ended
}

// Ended is closed when the process has ended.
func (v *VMM) Ended() <-chan struct{} { return v.ended }

// Forgive lets requests pass that are not as the VMM's document has them.
func (v *VMM) Forgive() { v.lenient = true }

// When calls then once a further request comes that begins with text. stop ends that,
// and waits for it.
func (v *VMM) When(text string, then func()) (stop func()) {
	v.t.Helper()
	before, ended, done := v.Count(text), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for v.Count(text) == before {
			select {
			case <-ended:
				return
			case <-time.After(time.Millisecond):
			}
		}
		then()
	}()
	return func() {
		close(ended)
		<-done
	}
}

// Fail makes the server fail; the zero Fault ends that.
func (v *VMM) Fail(f Fault) { v.t.Helper(); v.control("POST", "/fault", f, nil) }

// Steer does something to the VM: "boot", "pause", "resume", "deaf" (the guest does
// not release devices), "release" (it does), "share" (its memory),
// "share zones", "share a zone" of two.
func (v *VMM) Steer(what string) { v.t.Helper(); v.control("POST", "/steer", what, nil) }

// Seen tells what has happened to the server.
func (v *VMM) Seen() (s Seen) {
	v.t.Helper()
	v.control("GET", "/seen", nil, &s)
	return s
}

// Count tells how many requests have come that begin with text.
func (v *VMM) Count(text string) int {
	v.t.Helper()
	return len(slices.DeleteFunc(v.Seen().Requests, func(r string) bool { return !strings.HasPrefix(r, text) }))
}

func (v *VMM) control(method, path string, in, out any) {
	v.t.Helper()
	text, ok := in.(string)
	if !ok {
		b, err := json.Marshal(in)
		if err != nil {
			v.t.Fatal(err)
		}
		text = string(b)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", v.Socket+".ctl")
	}}}
	r, err := http.NewRequestWithContext(context.Background(), method, "http://localhost"+path, bytes.NewReader([]byte(text)))
	if err != nil {
		v.t.Fatal(err)
	}
	answer, err := client.Do(r)
	if err != nil {
		v.t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		v.t.Fatalf("%s: %d %s %v", path, answer.StatusCode, body, err)
	}
	if out != nil {
		if err := json.Unmarshal(body, out); err != nil {
			v.t.Fatal(err)
		}
	}
}
