package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
)

// Serve runs commands that come over port until it ends. It is the guest's side.
func Serve(port io.ReadWriter) error {
	s := server{port: port, running: map[uint32]*running{}}
	if err := s.send(frame{kind: hello}); err != nil {
		return err
	}
	r := bufio.NewReaderSize(port, mostPayload)
	for {
		f, err := readFrame(r)
		if err != nil {
			return err
		}
		s.take(f)
	}
}

type server struct {
	mu      sync.Mutex // of port's writing
	port    io.ReadWriter
	table   sync.Mutex
	running map[uint32]*running
}

type running struct {
	input chan []byte
	cmd   *exec.Cmd
}

func (s *server) send(f frame) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f.write(s.port)
}

func (s *server) take(f frame) {
	s.table.Lock()
	defer s.table.Unlock()
	one := s.running[f.id]
	switch {
	case f.kind == hello:
		_ = s.send(f)
	case f.kind == start && one == nil:
		s.start(f)
	case one == nil:
	case f.kind == stdin:
		one.input <- f.data
	case f.kind == kill:
		_ = syscall.Kill(-one.cmd.Process.Pid, syscall.SIGKILL)
	}
}

func (s *server) start(f frame) {
	var c Command
	if err := json.Unmarshal(f.data, &c); err != nil || len(c.Args) == 0 {
		s.end(f.id, Result{Code: -1, Error: "not a command"})
		return
	}
	cmd := exec.Command(c.Args[0], c.Args[1:]...) //nolint:gosec // that is its purpose
	cmd.Env, cmd.Dir = append(os.Environ(), c.Env...), c.Dir
	cmd.Stdout, cmd.Stderr = stream{s, f.id, out}, stream{s, f.id, errs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	into, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		s.end(f.id, Result{Code: -1, Error: err.Error()})
		return
	}
	one := &running{input: make(chan []byte, 1024), cmd: cmd}
	s.running[f.id] = one
	done := make(chan struct{})
	go one.feed(into, done)
	go func() {
		result := resultOf(cmd.Wait())
		close(done)
		s.table.Lock()
		delete(s.running, f.id)
		s.table.Unlock()
		s.end(f.id, result)
	}()
}

// feed gives a command its input. What it does not take is thrown away.
func (r *running) feed(into io.WriteCloser, done <-chan struct{}) {
	defer into.Close()
	for {
		select {
		case b := <-r.input:
			if len(b) == 0 {
				_ = into.Close()
				continue
			}
			_, _ = into.Write(b)
		case <-done:
			return
		}
	}
}

func resultOf(err error) Result {
	var e *exec.ExitError
	switch {
	case err == nil:
		return Result{}
	case errors.As(err, &e):
		return Result{Code: e.ExitCode(), Error: err.Error()}
	}
	return Result{Code: -1, Error: err.Error()}
}

func (s *server) end(id uint32, r Result) {
	b, _ := json.Marshal(r)
	_ = s.send(frame{id: id, kind: exit, data: b})
}

// stream sends what a command writes.
type stream struct {
	s    *server
	id   uint32
	kind kind
}

func (w stream) Write(p []byte) (int, error) {
	for n := 0; n < len(p); n += mostPayload {
		if err := w.s.send(frame{w.id, w.kind, p[n:min(n+mostPayload, len(p))]}); err != nil {
			return n, err
		}
	}
	return len(p), nil
}
