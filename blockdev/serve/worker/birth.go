package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control/wire"
)

// memoryGoal is what Go's collector keeps to, in bytes, while requests allow it.
const memoryGoal = 64 << 20

// processorsMost bounds the CPUs that a worker uses at once: each of Go's processors
// takes some ten KiB, and most workers have one loop.
const processorsMost = 8

// Run is the life of a worker: it takes its volume from birth, the socket that it was
// started with, and returns when it is told to end (nil), or cannot begin. It changes
// the whole process and is called once.
func Run(birth *os.File) error {
	parent := os.Getppid()
	// Half of them are for loops that keep theirs while they wait for the disk. That a
	// number is set has Go not look every second whether a limit has changed.
	runtime.GOMAXPROCS(2 * min(runtime.GOMAXPROCS(0), processorsMost))
	debug.SetMemoryLimit(memoryGoal)
	conn, err := net.FileConn(birth)
	if err != nil {
		return fmt.Errorf("no socket to be told by: %w", err)
	}
	_ = birth.Close() // conn has its own
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return errors.Join(errors.New("no unix socket to be told by"), conn.Close())
	}
	c := wire.Conn{UnixConn: unixConn}
	defer c.Close()
	w, err := begin(c, parent)
	if err != nil {
		return errors.Join(err, c.Answer(&wire.Reply{Error: wire.NewError(err)}))
	}
	// Who started us may be gone, and nobody would find us: then we end as well. Once
	// the answer is on its way we are found by our socket.
	if err := c.Answer(w.status()); err != nil {
		return err
	}
	_ = c.Close()          // all is said
	go w.volume.giveBack() // what it took to begin, digests and certificates of a base far away most of all
	return w.serve()
}

// worker serves one volume.
type worker struct {
	volume *volume
	owner  int // user whose calls are obeyed
	lock   *os.File
	since  time.Time

	control, data *net.UnixListener

	ctx    context.Context //nolint:containedctx // its life: it ends when the worker is to end
	cancel context.CancelFunc

	// leaving ends when no record is waited for any more.
	leaving context.Context //nolint:containedctx // as ctx
	leave   context.CancelFunc

	changing sync.Mutex // one change of the volume at a time
	mu       sync.Mutex
	pending  *pending
	stopping bool
	result   error // of the end
	ended    chan struct{}

	answering sync.WaitGroup // calls that were heard; each has its answer sent in time
}

// begin makes a worker out of the first call, which came from the process parent.
func begin(c wire.Conn, parent int) (*worker, error) {
	owner := os.Getuid()
	r, files, err := c.Request()
	if err != nil {
		return nil, err
	}
	if r.Op != wire.Open {
		return nil, fmt.Errorf("%w: the first call is %s", wire.ErrProtocol, r.Op)
	}
	control, data, root, files := files[0], files[1], files[2], files[3:]
	w := &worker{owner: owner, since: time.Now(), ended: make(chan struct{})}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.leaving, w.leave = context.WithCancel(context.Background())
	if w.volume, w.lock, err = open(r.Volume, files); err != nil {
		return nil, err
	}
	if err := confine(root, r.Volume, parent); err != nil {
		return nil, err
	}
	if w.control, err = listen(control); err != nil {
		return nil, err
	}
	if w.data, err = listen(data); err != nil {
		return nil, err
	}
	return w, nil
}

// listen begins to listen: the kernel tells those who connect that it was us.
func listen(socket *os.File) (*net.UnixListener, error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = syscall.Listen(int(fd), 128) })
	if err = errors.Join(err, inner); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	l, err := net.FileListener(socket)
	if err != nil {
		return nil, err
	}
	_ = socket.Close() // the listener has its own
	u, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%w: no unix socket", wire.ErrProtocol), l.Close())
	}
	u.SetUnlinkOnClose(false) // its name is the daemon's
	return u, nil
}

// serve serves until it is to end.
func (w *worker) serve() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT) // the host goes down
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	go func() {
		for range signals {
			_ = w.terminate() // its result is ours
		}
	}()
	go w.obey()
	go w.volume.hydration.run(w.ctx)
	served := w.serveData()
	w.mu.Lock()
	stopping := w.stopping
	w.mu.Unlock()
	if !stopping {
		return served // the data socket is broken; the daemon finds out that nobody listens
	}
	<-w.ended
	w.answering.Wait() // who told us to end hears how it went
	return errors.Join(served, w.result)
}

// recordGrace is how long a record is waited for once the worker has to end: a daemon
// that lives makes one in some milliseconds.
const recordGrace = time.Second

// terminate is stop for who makes no record: the host goes down, and the daemon may
// have gone before. A change that waits for its record longer than recordGrace is given
// up as one whose record has failed. Whether the record is there or not, the stack that
// it tells of reads as the one that is flushed: nothing was written to a layer that was
// not recorded before.
func (w *worker) terminate() error {
	defer time.AfterFunc(recordGrace, w.leave).Stop()
	for {
		err := w.stop()
		if !errors.Is(err, errUnrecorded) {
			return err
		}
		w.mu.Lock()
		p := w.pending
		w.mu.Unlock()
		if p != nil {
			<-p.over
		}
	}
}

// errUnrecorded is a blockdev.ErrBusy.
var errUnrecorded = fmt.Errorf("%w: a change of the layers waits for its record", blockdev.ErrBusy)

// stop ends the worker: what has begun is finished, what was written is flushed.
// blockdev.ErrBusy while the stack's change waits for its record: making the maps whole
// would wait for it, and who asks can settle it.
func (w *worker) stop() error {
	w.mu.Lock()
	switch {
	case w.pending != nil:
		w.mu.Unlock()
		return errUnrecorded
	case w.stopping:
		w.mu.Unlock()
		<-w.ended
		return w.result
	}
	w.stopping = true
	w.mu.Unlock()
	w.cancel()
	w.changing.Lock() // and kept: nothing changes any more
	w.volume.forgo()
	closed := errors.Join(w.data.Close(), w.volume.front.close())
	synced := w.volume.close()
	w.result = errors.Join(synced, closed)
	close(w.ended)
	return w.result
}

// status is the answer to who asks.
func (w *worker) status() *wire.Reply {
	s := w.volume.service()
	s.Since, s.Pid = w.since, os.Getpid()
	v := w.volume.serving()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pending != nil {
		change := w.pending.change
		v.Pending = &change
	}
	return &wire.Reply{Service: &s, Volume: &v}
}
