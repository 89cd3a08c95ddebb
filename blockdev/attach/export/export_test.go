package export_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/export"
	"holdfast/blockdev/attach/vmsocket"
	"holdfast/blockdev/filesystem"
	"holdfast/blockdev/serve"
)

const id = blockdev.ID("vol-06c8qk4g1h6s9tj2m0a4n7v001")

// asWorker has this program be a process that can be killed.
const asWorker = "HOLDFAST_TEST_WORKER"

func TestMain(m *testing.M) {
	if os.Getenv(asWorker) != "" {
		_, _ = os.Stdin.Read(make([]byte, 1)) // until the test ends, or it is killed
		return
	}
	os.Exit(m.Run())
}

// worker is a pool's, as far as an export sees it: a process, a socket, clients.
type worker struct {
	socket string
	cmd    *exec.Cmd
	since  time.Time

	mu      sync.Mutex
	clients int
	failure error
	next    func() // before the next look
}

func startWorker(t *testing.T, dir string) *worker {
	t.Helper()
	w := &worker{socket: filepath.Join(dir, "data.sock"), cmd: exec.Command(os.Args[0]), since: time.Now()}
	w.cmd.Env = append(os.Environ(), asWorker+"=1")
	stdin, err := w.cmd.StdinPipe()
	good(t, err)
	good(t, w.cmd.Start())
	t.Cleanup(func() { stdin.Close(); _ = w.cmd.Wait() })
	w.listen(t)
	return w
}

func (w *worker) listen(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", w.socket)
	good(t, err)
	good(t, os.Chmod(w.socket, 0o600))
	t.Cleanup(func() { l.Close() })
}

func (w *worker) Observe(context.Context, blockdev.ID) (serve.Service, error) {
	w.mu.Lock()
	next := w.next
	w.next = nil
	w.mu.Unlock()
	if next != nil {
		next()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failure != nil {
		return serve.Service{}, w.failure
	}
	return serve.Service{Pid: w.cmd.Process.Pid, Since: w.since, Clients: w.clients}, nil
}

func (w *worker) Expose(context.Context, blockdev.ID, serve.Exposure) error {
	return errors.ErrUnsupported
}
func (w *worker) Withdraw(context.Context, blockdev.ID, string, bool) error {
	return errors.ErrUnsupported
}

func (w *worker) set(clients int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clients = clients
}

type bench struct {
	*export.Attacher
	w    *worker
	run  string // of workers
	vms  string // where links may be
	door *vmsocket.Door
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{run: t.TempDir(), vms: t.TempDir()}
	var err error
	b.door, err = vmsocket.New([]string{b.vms}, slog.New(slog.DiscardHandler))
	good(t, err)
	b.w = startWorker(t, b.run)
	b.Attacher, err = export.New(export.Options{Door: b.door, Pool: b.w})
	good(t, err)
	return b
}

// request resolves a target of the volume.
func (b *bench) request(t *testing.T, target attach.Target) attach.Request {
	t.Helper()
	target.Type = export.Type
	target, err := b.Resolve(t.Context(), target, "")
	good(t, err)
	return attach.Request{Volume: id, Target: target, Endpoint: blockdev.Endpoint{Kind: blockdev.Kind(target.Protocol), Path: b.w.socket, Size: 1 << 20}}
}

func (b *bench) expect(t *testing.T, r attach.Request, want attach.State) {
	t.Helper()
	if got, err := b.Probe(t.Context(), r); err != nil || got != want {
		t.Errorf("it is %s, %v; want %s", got, err, want)
	}
}

func good(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func is(t *testing.T, what string, err, want error, words string) {
	t.Helper()
	if !errors.Is(err, want) || !strings.Contains(err.Error(), words) {
		t.Errorf("%s: %v; want %v with %q", what, err, want, words)
	}
}

// TestTargets: what can never work is told with the rule.
func TestTargets(t *testing.T) {
	b := newBench(t)
	good(t, os.WriteFile(filepath.Join(b.vms, "file"), nil, 0o600), os.Symlink(b.run, filepath.Join(b.vms, "away")))
	nbd := func(change func(*attach.Target)) attach.Target {
		target := attach.Target{Type: export.Type, Protocol: "nbd"}
		change(&target)
		return target
	}
	for name, c := range map[string]struct {
		t     attach.Target
		mount string
		want  error
		words string
	}{
		"no protocol":         {t: attach.Target{Type: export.Type}, words: "target.protocol must be one of"},
		"iscsi":               {t: attach.Target{Type: export.Type, Protocol: "iscsi"}, words: "target.protocol must be one of"},
		"a file":              {t: attach.Target{Type: export.Type, Protocol: "file"}, words: "target.protocol must be one of"},
		"a negative owner":    {t: nbd(func(t *attach.Target) { t.Owner = -1 }), words: "target.owner"},
		"no user's number":    {t: nbd(func(t *attach.Target) { t.Owner = 1<<32 - 1 }), words: "target.owner"},
		"a container":         {t: nbd(func(t *attach.Target) { t.Container = "c" }), words: "only"},
		"a transport":         {t: nbd(func(t *attach.Target) { t.Transport = "vhost-user" }), words: "only"},
		"tls nowhere":         {t: nbd(func(t *attach.Target) { t.Transport = export.TLS }), words: "export_address"},
		"tls of vhost-user":   {t: attach.Target{Type: export.Type, Protocol: "vhost-user", Transport: export.TLS}, words: "protocol nbd"},
		"tls and an owner":    {t: nbd(func(t *attach.Target) { t.Transport, t.Owner = export.TLS, 1 }), words: "without a socket"},
		"nobody's name":       {t: nbd(func(t *attach.Target) { t.Transport, t.Clients = export.TLS, " " }), words: "target.clients must be"},
		"clients of a socket": {t: nbd(func(t *attach.Target) { t.Clients = "backup" }), words: "of transport tls only"},
		"a port":              {t: nbd(func(t *attach.Target) { t.Port = 1 }), words: "only"},
		"a mount":             {t: nbd(func(*attach.Target) {}), mount: "/data", words: "mountPath does not apply"},
		"anywhere":            {t: nbd(func(t *attach.Target) { t.Socket = "/etc/link" }), words: "directories that the operator allows"},
		"relative":            {t: nbd(func(t *attach.Target) { t.Socket = "link" }), words: "absolute"},
		"no directory":        {t: nbd(func(t *attach.Target) { t.Socket = b.vms + "/none/link" }), words: "does not exist"},
		"through a link":      {t: nbd(func(t *attach.Target) { t.Socket = b.vms + "/away/link" }), words: "symbolic link"},
		"something is there":  {t: nbd(func(t *attach.Target) { t.Socket = b.vms + "/file" }), want: blockdev.ErrBusy, words: "something else"},
	} {
		if c.want == nil {
			c.want = blockdev.ErrInvalid
		}
		_, err := b.Resolve(t.Context(), c.t, c.mount)
		is(t, name, err, c.want, c.words)
	}
	for _, protocol := range []blockdev.Kind{blockdev.NBD, blockdev.VhostUser} {
		target := b.request(t, attach.Target{Protocol: string(protocol), Pid: 7, Boot: "b", StartTime: 1, Shared: true}).Target
		if target != (attach.Target{Type: export.Type, Protocol: string(protocol)}) || !slices.Equal(b.KindsFor(target), []blockdev.Kind{protocol}) {
			t.Errorf("resolved to %+v", target)
		}
	}
}

// TestLife: the owner gets the socket and a name for it; what was replaced meanwhile is
// made again; nothing is left.
func TestLife(t *testing.T) {
	b := newBench(t)
	link := filepath.Join(b.vms, "disk of one.sock")
	r := b.request(t, attach.Target{Protocol: "nbd", Socket: link, Owner: 4711})
	b.expect(t, r, attach.StateMissing)
	for range 2 {
		good(t, b.Attach(t.Context(), r))
	}
	b.expect(t, r, attach.StateAttached)
	if owner(t, b.w.socket) != 4711 {
		t.Error("the owner may not connect")
	}
	conn, err := net.Dial("unix", link)
	good(t, err)
	conn.Close()
	if l, err := b.Launch(t.Context(), r, filesystem.None); err != nil || l.Path != link || l.URI != "nbd+unix:///?socket="+strings.ReplaceAll(link, " ", "%20") {
		t.Errorf("%+v, %v", l, err)
	}

	good(t, os.Remove(b.w.socket)) // a successor, with a socket of its own
	b.w.listen(t)
	b.expect(t, r, attach.StateMissing)
	good(t, b.Attach(t.Context(), r))
	b.expect(t, r, attach.StateAttached)
	good(t, os.Remove(link))
	b.expect(t, r, attach.StateMissing)
	good(t, b.Attach(t.Context(), r))
	b.expect(t, r, attach.StateAttached)

	for range 2 {
		good(t, b.Detach(t.Context(), r))
	}
	b.expect(t, r, attach.StateMissing)
	if left, err := os.ReadDir(b.vms); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}

	plain := b.request(t, attach.Target{Protocol: "vhost-user"}) // root's alone again, without a name
	good(t, b.Attach(t.Context(), plain))
	b.expect(t, plain, attach.StateAttached)
	if owner(t, b.w.socket) != 0 {
		t.Error("the owner before may connect still")
	}
	if l, err := b.Launch(t.Context(), plain, filesystem.None); err != nil || l.Path != b.w.socket || l.URI != "" {
		t.Errorf("%+v, %v", l, err)
	}
	good(t, b.Detach(t.Context(), plain))
	plain.Endpoint = blockdev.Endpoint{}
	_, err = b.Launch(t.Context(), plain, filesystem.None)
	is(t, "a worker that is not known", err, blockdev.ErrBusy, "")
}

func owner(t *testing.T, path string) int {
	t.Helper()
	var status syscall.Stat_t
	good(t, syscall.Lstat(path, &status))
	return int(status.Uid)
}

// TestInUse: a client that is connected keeps the export whole, also one that comes at
// the last moment.
func TestInUse(t *testing.T) {
	b := newBench(t)
	link := filepath.Join(b.vms, "link")
	r := b.request(t, attach.Target{Protocol: "nbd", Socket: link})
	good(t, b.Attach(t.Context(), r))
	for clients, words := range map[int]string{1: "a client is connected", 3: "3 clients are connected"} {
		b.w.set(clients)
		err := b.Detach(t.Context(), r)
		is(t, words, err, attach.ErrInUse, words)
		is(t, words, err, blockdev.ErrBusy, "")
		b.expect(t, r, attach.StateAttached)
	}
	b.w.set(0)
	b.w.next = func() { b.w.next = func() { b.w.set(1) } }
	is(t, "one that comes meanwhile", b.Detach(t.Context(), r), attach.ErrInUse, "")
	b.expect(t, r, attach.StateAttached)
	b.w.next = func() { b.w.next = func() { b.w.set(0) } }
	good(t, b.Detach(t.Context(), r)) // it has hung up, which the worker sees a moment later
	b.expect(t, r, attach.StateMissing)
	good(t, b.Attach(t.Context(), r))

	b.w.failure = syscall.EIO // unknown is still attached
	is(t, "detach", b.Detach(t.Context(), r), syscall.EIO, "")
	is(t, "fence", b.Fence(t.Context(), r), syscall.EIO, "")
	_, err := b.Probe(t.Context(), r)
	is(t, "probe", err, syscall.EIO, "")
	b.w.failure = blockdev.ErrNotFound // no worker: nobody can be connected
	b.expect(t, r, attach.StateMissing)
	good(t, b.Detach(t.Context(), r), b.Fence(t.Context(), r))
	if _, err := os.Lstat(link); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is left: %v", err)
	}
}

// TestOthers: readers share a worker, whose owner is one; a link that is somebody's is
// not touched.
func TestOthers(t *testing.T) {
	b := newBench(t)
	one := b.request(t, attach.Target{Protocol: "nbd", Owner: 4711, Socket: filepath.Join(b.vms, "one")})
	two := b.request(t, attach.Target{Protocol: "nbd", Owner: 4712, Socket: filepath.Join(b.vms, "two")})
	good(t, b.Attach(t.Context(), one))
	two.Others = []attach.Target{one.Target}
	is(t, "another owner", b.Attach(t.Context(), two), blockdev.ErrBusy, "another owner")
	two.Target.Owner = 4711
	good(t, b.Attach(t.Context(), two))
	b.w.set(2)
	good(t, b.Detach(t.Context(), two))
	is(t, "the last one", b.Detach(t.Context(), one), attach.ErrInUse, "")
	b.w.set(0)

	other := one
	other.Endpoint.Kind = blockdev.VhostUser
	is(t, "by another protocol", b.Attach(t.Context(), other), blockdev.ErrBusy, "is served by vhost-user")
	good(t, os.Remove(one.Target.Socket), os.Symlink("/elsewhere", one.Target.Socket))
	is(t, "a link to elsewhere", b.Attach(t.Context(), one), blockdev.ErrBusy, "something else")
	good(t, b.Detach(t.Context(), one))
	if to, err := os.Readlink(one.Target.Socket); err != nil || to != "/elsewhere" {
		t.Errorf("somebody's link: %s, %v", to, err)
	}
	// An earlier opening of the volume, that ended with a boot of the host, had another socket.
	good(t, os.Remove(one.Target.Socket), os.Symlink(filepath.Join(filepath.Dir(one.Endpoint.Path), "before.sock"), one.Target.Socket))
	if state, err := b.Probe(t.Context(), one); err != nil || state != attach.StateMissing {
		t.Errorf("with a link to an earlier socket: %s, %v", state, err)
	}
	good(t, b.Attach(t.Context(), one))
	if to, err := os.Readlink(one.Target.Socket); err != nil || to != one.Endpoint.Path {
		t.Errorf("a link to an earlier socket leads to %s, %v", to, err)
	}
	good(t, os.Remove(one.Target.Socket), os.WriteFile(one.Target.Socket, nil, 0o600), b.Detach(t.Context(), one))
}

// TestFence: the worker has ended on return, and nothing else has.
func TestFence(t *testing.T) {
	b := newBench(t)
	r := b.request(t, attach.Target{Protocol: "nbd"})
	good(t, b.Attach(t.Context(), r))
	b.w.set(1)
	b.w.next = func() { b.w.next = func() { b.w.since = b.w.since.Add(time.Second) } }
	is(t, "replaced meanwhile", b.Fence(t.Context(), r), attach.ErrCannotFence, "replaced")
	if err := b.w.cmd.Process.Signal(syscall.Signal(0)); err != nil {
		t.Fatalf("the successor was killed: %v", err)
	}
	good(t, b.Fence(t.Context(), r))
	err := b.w.cmd.Wait()
	if state := fmt.Sprint(err); state != "signal: killed" {
		t.Errorf("the worker: %s", state)
	}
	good(t, b.Fence(t.Context(), r)) // its number is nobody's
}
