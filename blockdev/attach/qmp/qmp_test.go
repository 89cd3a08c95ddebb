package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev/attach/qmp"
	"holdfast/blockdev/blockdevtest"
)

const patience = time.Minute

// qemu starts a QEMU without a machine, stopped, and tells its monitor's socket.
func qemu(t *testing.T) (socket string, end func()) {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Qemu)
	socket = filepath.Join(t.TempDir(), "q")
	cmd := exec.Command("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "unix:"+socket+",server=on,wait=off")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
	t.Cleanup(end)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return socket, end
		}
		if time.Now().After(deadline) {
			t.Fatal("QEMU opens no monitor")
		}
	}
}

func dial(t *testing.T, socket string) *qmp.Monitor {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m, err := qmp.Dial(ctx, socket)
	for errors.Is(err, syscall.ECONNREFUSED) { // the socket is there before it is listened on
		time.Sleep(time.Millisecond)
		m, err = qmp.Dial(ctx, socket)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func TestCommands(t *testing.T) {
	socket, end := qemu(t)
	m := dial(t, socket)
	answer, err := m.Do(t.Context(), "query-status", nil)
	var status struct{ Status string }
	if err != nil || json.Unmarshal(answer, &status) != nil || status.Status != "prelaunch" {
		t.Errorf("%s, %v", answer, err)
	}
	if !strings.HasPrefix(m.Version, "7.") && !strings.HasPrefix(m.Version, "8.") && !strings.HasPrefix(m.Version, "9.") && !strings.HasPrefix(m.Version, "1") {
		t.Errorf("version %q", m.Version)
	}
	var refused *qmp.Error
	for command, class := range map[string]string{"no-such-command": "CommandNotFound", "blockdev-del": "GenericError"} {
		if _, err := m.Do(t.Context(), command, qmp.Args{"node-name": "x"}); !errors.As(err, &refused) || refused.Class != class || refused.Desc == "" {
			t.Errorf("%s: %v", command, err)
		}
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Do(t.Context(), "blockdev-add", qmp.Args{"driver": "file", "node-name": "one", "filename": image}); err != nil {
		t.Error(err)
	}
	end()
	if _, err := m.Do(t.Context(), "query-status", nil); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("after QEMU has ended: %v", err)
	}
	if _, err := m.Wait(t.Context(), 0, func(qmp.Event) bool { return false }); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("waiting for an event of the dead: %v", err)
	}
}

func TestEvents(t *testing.T) {
	socket, _ := qemu(t)
	m := dial(t, socket)
	mark := m.Mark()
	got := make(chan error, 1)
	resumed := func(e qmp.Event) bool { return e.Name == "RESUME" && !e.At.IsZero() }
	go func() {
		_, err := m.Wait(t.Context(), mark, resumed)
		got <- err
	}()
	if _, err := m.Do(t.Context(), "cont", nil); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
	if _, err := m.Wait(t.Context(), mark, resumed); err != nil {
		t.Errorf("an event that has come already: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := m.Wait(ctx, m.Mark(), resumed); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an event before the mark counts: %v", err)
	}
}

// TestOneClient: a monitor that serves another client says nothing, and dialling
// it ends with the context.
func TestOneClient(t *testing.T) {
	socket, _ := qemu(t)
	first := dial(t, socket)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := qmp.Dial(ctx, socket); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second client: %v", err)
	}
	if _, err := first.Do(t.Context(), "query-status", nil); err != nil {
		t.Errorf("the first one: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	dial(t, socket)
}

func TestWhatIsNoMonitor(t *testing.T) {
	dir := t.TempDir()
	if _, err := qmp.Dial(t.Context(), filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	for name, says := range map[string]string{
		"http": "HTTP/1.1 400 Bad Request\r\n\r\n", "json": "{\"hello\":1}\n", "nothing": "", "endless": strings.Repeat("x", 17<<20) + "\n",
		"garbage after the greeting": `{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0}},"capabilities":[]}}` + "\n<html>\n",
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if err == nil {
					_, _ = conn.Write([]byte(says))
					_ = conn.Close()
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if m, err := qmp.Dial(ctx, socket); err == nil {
				_ = m.Close()
				t.Error("it was taken for a monitor")
			} else if name == "http" && !errors.Is(err, qmp.ErrNotQMP) {
				t.Error(err)
			}
		})
	}
}
