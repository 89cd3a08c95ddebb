package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"holdfast/api"
	"holdfast/engine"
)

const (
	// maxRunning bounds the processes of one sandbox that the daemon watches.
	maxRunning = 64
	// maxEnded are remembered after their end.
	maxEnded = 64
	// outputRoom is what is kept of one process's output, in bytes; the rest is
	// read and dropped, so that the process goes on.
	outputRoom = 1 << 20
	// outputTotal is what is kept of all processes of a sandbox; those that have
	// ended make room, the oldest first.
	outputTotal = 8 << 20
	maxCommand  = 128 << 10
)

// processes are those of one sandbox that were started by this daemon.
type processes struct {
	mu   sync.Mutex
	made int
	all  []*process   // the oldest first
	kept atomic.Int64 // bytes of output, of all
}

// process is a process in a sandbox and what it has written.
type process struct {
	command *command // nil until it has begun
	begun   time.Time
	shown   api.Process // what does not change

	mu      sync.Mutex
	said    output
	kept    int // of said, counted in processes.kept
	cut     bool
	news    chan struct{} // closed when there is more to read, or the end
	ended   time.Time
	status  string
	code    int
	because string // "stopped" or "killed": by whom it ended
}

// output is what a process has written, of both streams in the order in which it came.
type output struct {
	text []byte
	runs []stretch
}

// stretch says of which stream the text is up to end, from the end of the one before.
type stretch struct {
	end    int
	stream string
}

// maxRuns bounds what a process costs that writes a bit to each stream in turn.
const maxRuns = 32 << 10

func (o *output) add(stream string, text []byte) {
	if len(text) == 0 {
		return
	}
	o.text = append(o.text, text...)
	if last := len(o.runs) - 1; last >= 0 && o.runs[last].stream == stream {
		o.runs[last].end = len(o.text)
		return
	}
	o.runs = append(o.runs, stretch{len(o.text), stream})
}

// from gives what came behind an offset, in pieces of one stream each.
func (o *output) from(offset int) (pieces []piece) {
	begin := 0
	for _, r := range o.runs {
		if r.end > offset {
			pieces = append(pieces, piece{r.stream, o.text[max(begin, offset):r.end]})
		}
		begin = r.end
	}
	return pieces
}

type piece struct {
	stream string
	text   []byte // not to be changed; what comes later is behind it
}

const (
	toOut = "stdout"
	toErr = "stderr"
)

// sink takes one stream of a process.
type sink struct {
	all    *processes
	p      *process
	stream string
}

func (s sink) Write(b []byte) (int, error) {
	if s.all.kept.Load()+int64(len(b)) > outputTotal {
		s.all.prune()
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	room := max(0, min(outputRoom-s.p.kept, outputTotal-int(s.all.kept.Load())))
	if len(s.p.said.runs) >= maxRuns {
		room = 0
	}
	keep := b[:min(len(b), room)]
	s.p.said.add(s.stream, keep)
	s.p.kept += len(keep)
	s.all.kept.Add(int64(len(keep)))
	s.p.cut = s.p.cut || len(b) > room
	s.p.tell()
	return len(b), nil
}

// tell wakes who waits for news; mu is held.
func (p *process) tell() {
	close(p.news)
	p.news = make(chan struct{})
}

func (p *process) running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended.IsZero()
}

// show is the process on the wire, as it is now.
func (p *process) show() api.Process {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shown
	s.Status, s.ExitCode, s.Truncated, s.CompletedAt = p.status, p.code, p.cut, stamp(p.ended)
	streams := map[string][]byte{}
	for _, piece := range p.said.from(0) {
		streams[piece.stream] = append(streams[piece.stream], piece.text...)
	}
	text := func(b []byte) string { return strings.ToValidUTF8(string(b), "\uFFFD") }
	s.Logs, s.Stdout, s.Stderr = text(p.said.text), text(streams[toOut]), text(streams[toErr])
	return s
}

var (
	processNameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	variableForm    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
)

// Exec starts a shell with a command in a sandbox.
func (r *Runtime) Exec(ctx context.Context, workspace, name string, e api.Exec) (api.Process, error) {
	b, rec, err := r.up(workspace, name)
	if err != nil {
		return api.Process{}, err
	}
	if err := checkExec(e); err != nil {
		return api.Process{}, err
	}
	dir := rec.Dir
	if e.Dir != "" {
		dir = path.Clean("/" + e.Dir)
	}
	p, err := b.processes.add(r.now(), e, dir)
	if err != nil {
		return api.Process{}, err
	}
	if err := r.begins(b, rec, p, e); err != nil {
		return api.Process{}, err
	}
	if e.Wait {
		select {
		case <-p.command.done:
			p.awaitEnd(ctx)
		case <-ctx.Done(): // it goes on; who has not left yet is told so
		}
	}
	return p.show(), nil
}

// awaitEnd waits until the end is noted.
func (p *process) awaitEnd(ctx context.Context) {
	for {
		p.mu.Lock()
		news, over := p.news, !p.ended.IsZero()
		p.mu.Unlock()
		if over {
			return
		}
		select {
		case <-news:
		case <-ctx.Done():
			return
		}
	}
}

// begins starts the process, and notes its end when that comes.
func (r *Runtime) begins(b *box, rec record, p *process, e api.Exec) error {
	spec := newProcess([]string{toolPath, "sh", "-c", startShell, "sh", e.Command}, environment(rec, e.Env), p.shown.WorkingDir)
	score := execOOM
	spec.OOMScoreAdj = &score
	command, err := r.containers.exec(rec.ID, spec, e.Stdin, sink{&b.processes, p, toOut}, sink{&b.processes, p, toErr})
	if err != nil {
		b.processes.drop(p)
		if errors.Is(err, errStart) {
			if alive, e := r.containers.alive(rec.First); e == nil && !alive {
				return down(rec)
			}
			return problem(engine.ErrInvalid, "", "%v", firstLine(err))
		}
		return err
	}
	b.processes.mu.Lock()
	p.command = command
	if command.pid != "" {
		p.shown.PID = command.pid
	}
	b.processes.mu.Unlock()
	go p.watch(&b.processes, e.Timeout)
	return nil
}

// startShell prefers the image's shell to ours: a user expects it.
const startShell = `[ -x /bin/sh ] && exec /bin/sh -c "$1"; exec ` + toolPath + ` sh -c "$1"`

func firstLine(err error) string {
	text := strings.TrimPrefix(err.Error(), errStart.Error()+": ")
	line, _, _ := strings.Cut(text, "\n")
	line, _, _ = strings.Cut(line, ": "+errStart.Error())
	return line
}

// watch ends the process when its time is up, and notes its end.
func (p *process) watch(all *processes, limit time.Duration) {
	var late <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-p.command.done:
	case <-late:
		_ = p.end("killed", syscall.SIGKILL)
		<-p.command.done
	}
	p.mu.Lock()
	p.ended, p.code = time.Now(), p.command.code
	switch {
	case p.because != "":
		p.status = p.because
	case p.code == 0:
		p.status = "completed"
	default:
		p.status = "failed"
	}
	p.tell()
	p.mu.Unlock()
	if p.command.pidfd != nil {
		p.command.pidfd.Close()
	}
	all.prune()
}

// end signals the process's group and remembers why it ends.
func (p *process) end(because string, sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended.IsZero() {
		return os.ErrProcessDone
	}
	err := p.command.signal(sig)
	if err == nil {
		p.because = because
	}
	return err
}

// up finds a sandbox that runs.
func (r *Runtime) up(workspace, name string) (*box, record, error) {
	b, err := r.find(workspace, name)
	if err != nil {
		return nil, record{}, err
	}
	rec := b.record()
	if rec.Phase != deployed {
		return nil, rec, down(rec)
	}
	return b, rec, nil
}

func down(rec record) error {
	if rec.Phase == deployed {
		return problem(api.ErrSandboxDown, "", "sandbox %q is not running: its first process has ended", rec.Name)
	}
	return problem(api.ErrSandboxDown, "", "sandbox %q is not running: it is %s", rec.Name, rec.Phase.status())
}

// Processes gives the processes that this daemon started in a sandbox.
func (r *Runtime) Processes(workspace, name string) ([]api.Process, error) {
	b, err := r.find(workspace, name)
	if err != nil {
		return nil, err
	}
	all := []api.Process{}
	for _, p := range b.processes.list() {
		all = append(all, p.show())
	}
	return all, nil
}

// Process finds one by pid or name: the newest, if several had it.
func (r *Runtime) Process(workspace, name, id string) (api.Process, error) {
	p, err := r.process(workspace, name, id)
	if err != nil {
		return api.Process{}, err
	}
	return p.show(), nil
}

func (r *Runtime) process(workspace, name, id string) (*process, error) {
	b, err := r.find(workspace, name)
	if err != nil {
		return nil, err
	}
	all := b.processes.list()
	for i := len(all) - 1; i >= 0; i-- {
		if s := all[i].shown; s.PID == id || s.Name == id {
			return all[i], nil
		}
	}
	return nil, problem(engine.ErrNotFound, "", "sandbox %q has no process %.60q", name, id)
}

// EndProcess asks a process and its group to end (SIGTERM), or with kill ends them
// and waits for it. One that has ended is success.
func (r *Runtime) EndProcess(ctx context.Context, workspace, name, id string, kill bool) (api.Process, error) {
	p, err := r.process(workspace, name, id)
	if err != nil {
		return api.Process{}, err
	}
	if kill {
		err = p.end("killed", syscall.SIGKILL)
	} else {
		err = p.end("stopped", syscall.SIGTERM)
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return api.Process{}, err
	}
	if kill {
		p.awaitEnd(ctx)
	}
	return p.show(), nil
}

// FollowProcess gives a process's output as lines, until its end.
func (r *Runtime) FollowProcess(ctx context.Context, workspace, name, id string, line func(stream, text string) error) error {
	p, err := r.process(workspace, name, id)
	if err != nil {
		return err
	}
	rest := map[string][]byte{}
	for offset := 0; ; {
		p.mu.Lock()
		pieces, news, over := p.said.from(offset), p.news, !p.ended.IsZero()
		p.mu.Unlock()
		for _, c := range pieces {
			offset += len(c.text)
			rest[c.stream] = append(rest[c.stream], c.text...)
			for {
				text, after, found := bytes.Cut(rest[c.stream], []byte("\n"))
				if !found {
					break
				}
				rest[c.stream] = after
				if err := line(c.stream, strings.ToValidUTF8(string(text), "\uFFFD")); err != nil {
					return err
				}
			}
		}
		if over && len(pieces) == 0 {
			break
		}
		if over {
			continue
		}
		select {
		case <-news:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for _, stream := range []string{toOut, toErr} {
		if text := rest[stream]; len(text) > 0 {
			if err := line(stream, strings.ToValidUTF8(string(text), "\uFFFD")); err != nil {
				return err
			}
		}
	}
	return nil
}

// WriteStdin gives bytes to a process that was started with stdin.
func (r *Runtime) WriteStdin(workspace, name, id string, from io.Reader) error {
	in, err := r.stdin(workspace, name, id)
	if err != nil {
		return err
	}
	if _, err := io.Copy(in, from); err != nil {
		return problem(engine.ErrConflict, "", "process %.60q takes no more input", id)
	}
	return nil
}

// CloseStdin ends a process's input; again is success.
func (r *Runtime) CloseStdin(workspace, name, id string) error {
	in, err := r.stdin(workspace, name, id)
	if err != nil {
		return err
	}
	if err := in.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

func (r *Runtime) stdin(workspace, name, id string) (io.WriteCloser, error) {
	p, err := r.process(workspace, name, id)
	if err != nil {
		return nil, err
	}
	if p.command.stdin == nil {
		return nil, problem(engine.ErrConflict, "", "process %.60q was not started with stdin", id)
	}
	return p.command.stdin, nil
}

// add makes room for a process and names it.
func (s *processes) add(now time.Time, e api.Exec, dir string) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	running := 0
	for _, p := range s.all {
		if !p.running() {
			continue
		}
		running++
		if e.Name != "" && p.shown.Name == e.Name {
			return nil, problem(engine.ErrConflict, "name", "a process called %q runs already", e.Name)
		}
	}
	if running >= maxRunning {
		return nil, problem(engine.ErrConflict, "", "%d processes run already: the most that a sandbox is given", maxRunning)
	}
	s.made++
	p := &process{begun: now, status: "running", news: make(chan struct{})}
	p.shown = api.Process{PID: fmt.Sprintf("p%d", s.made), Name: e.Name, Command: e.Command, WorkingDir: dir, StartedAt: stamp(now)}
	if p.shown.Name == "" {
		p.shown.Name = fmt.Sprintf("proc-%d", s.made)
	}
	s.all = append(s.all, p)
	return p, nil
}

func (s *processes) drop(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = slices.DeleteFunc(s.all, func(q *process) bool { return p == q })
	p.mu.Lock()
	defer p.mu.Unlock()
	s.kept.Add(-int64(p.kept))
}

// list gives the processes that have begun.
func (s *processes) list() []*process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.all), func(p *process) bool { return p.command == nil })
}

// prune forgets the oldest of those that have ended, while they are too many or
// all together have too much to say. The newest stays: somebody is about to ask.
func (s *processes) prune() {
	s.mu.Lock()
	defer s.mu.Unlock()
	ended := 0
	for _, p := range s.all {
		if !p.running() {
			ended++
		}
	}
	s.all = slices.DeleteFunc(s.all, func(p *process) bool {
		if ended <= 1 || ended <= maxEnded && s.kept.Load() <= outputTotal/2 || p.running() {
			return false
		}
		ended--
		p.mu.Lock()
		defer p.mu.Unlock()
		s.kept.Add(-int64(p.kept))
		p.kept = outputRoom // what a child of it still writes is not kept
		return true
	})
}

func environment(rec record, more map[string]string) []string {
	env := slices.Clone(rec.ImageEnv)
	for _, v := range rec.Envs {
		env = append(env, v.Name+"="+v.Value)
	}
	for name, value := range more {
		env = append(env, name+"="+value)
	}
	return env
}
