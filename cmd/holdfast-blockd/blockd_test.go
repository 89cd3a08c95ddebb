package main_test

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"holdfast/blockdev/serve/vhost/frontend"
)

// build makes the program as it is delivered: without C, which cannot set all
// threads' privileges.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "blockd")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

const (
	size  = 1 << 20
	block = 4096
)

func start(t *testing.T, program string, image *os.File, l *net.UnixListener, args ...string) *exec.Cmd {
	t.Helper()
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	cmd := exec.Command(program, args...)
	cmd.ExtraFiles = []*os.File{image, socket}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func status(t *testing.T, pid int, key string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// TestServesWhatItIsHanded: an ordinary user that may open neither the image nor the
// socket serves both, sees a new size, drains at SIGTERM, and a next one goes on.
func TestServesWhatItIsHanded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	image, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := frontend.New(frontend.Options{Inflight: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	q := f.Queues[0]
	do := func(kind uint32, sector uint64, length int) {
		t.Helper()
		q.Put(0, kind, sector, length)
		if err := errors.Join(q.Show(), q.Wait()); err != nil {
			t.Fatal(err)
		}
		if _, s, ok := q.Take(); !ok || s != 0 {
			t.Fatalf("status %d", s)
		}
	}
	program := build(t)
	for round := range 2 {
		cmd := start(t, program, image, l, "-serial", "vol-1", "-user", "65534", "-group", "65534")
		if err := f.Connect(socket); err != nil {
			t.Fatal(err)
		}
		do(frontend.ID, 0, 20)
		if uid := status(t, cmd.Process.Pid, "Uid"); !strings.HasPrefix(uid, "65534") || status(t, cmd.Process.Pid, "NoNewPrivs") != "1" {
			t.Errorf("user %s, no_new_privs %s", uid, status(t, cmd.Process.Pid, "NoNewPrivs"))
		}
		t.Logf("resident: anonymous %s, files %s, shared memory %s", status(t, cmd.Process.Pid, "RssAnon"), status(t, cmd.Process.Pid, "RssFile"), status(t, cmd.Process.Pid, "RssShmem"))
		if round == 1 {
			do(frontend.Read, 0, block)
			if q.Data(0)[0] != 7 {
				t.Error("the next server reads other bytes")
			}
		}
		q.Data(0)[0] = 7
		do(frontend.Write, 0, block)
		do(frontend.Flush, 0, 0)
		if err := errors.Join(os.Truncate(path, size*int64(round+2)), cmd.Process.Signal(syscall.SIGHUP)); err != nil {
			t.Fatal(err)
		}
		for sectors := uint64(0); sectors != size/512*uint64(round+2); {
			c, err := f.Config()
			if err != nil {
				t.Fatal(err)
			}
			sectors = binary.LittleEndian.Uint64(c)
		}
		if err := errors.Join(cmd.Process.Signal(syscall.SIGTERM), cmd.Wait()); err != nil {
			t.Errorf("SIGTERM: %v", err)
		}
	}
}
