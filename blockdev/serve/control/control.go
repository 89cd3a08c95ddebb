package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/internal/sys"
)

// Layer is the two files of an overlay's layer. The worker gets duplicates.
type Layer struct{ Data, Map *os.File }

// Remote is a base that is far away.
type Remote struct {
	URL      string   // the operator's, never a tenant's
	Prefixes []string // of addresses that its store may redirect to, as overlay.ParsePrefixes takes them
	Chunks   *os.File // digests, as overlay.WriteChunks writes them
}

// Spec is what a worker is to serve.
type Spec struct {
	ID       blockdev.ID
	Kind     blockdev.Kind // VhostUser or NBD
	ReadOnly bool
	Size     int64    // bytes
	Flat     *os.File // a flat image or a block device, opened with O_DIRECT; or nil, and
	Layers   []Layer  // the top first
	Base     *os.File // immutable, flat; nil: none
	BaseSize int64    // bytes
	Remote   *Remote  // or this
	Lock     *os.File // the lock (OFD) held for the image; the worker keeps it. nil: none
	refuse   bool     // there is no image: all requests fail
	Queues   int      // of a virtual disk; 0: 1
	Limits   blockdev.Limits
	Trace    []int64 // chunks of 1 MiB to copy first; what is too long is cut
	// Opening names the socket, in at most 8 hex digits, so that who had the image before
	// and connects again does not meet who has it next; "" for a name that stays.
	Opening     string
	HydrateRate int64 // bytes a second in the background while clients are active; 0: a default
	Hydrate     bool  // copy the base in the background at all
}

// Options of a Starter.
type Options struct {
	Program string // path of holdfast-blockd
	Dir     string // of the run files, at most 55 bytes; it is made
	// User and Group are the first of Users ids: each worker has one of its own as
	// long as there are enough. All 0: user and group 65534, for all of them.
	User, Group, Users int
	// Cgroup begins the names of the workers' control groups; "": they stay in the
	// daemon's.
	Cgroup string
	Memory int64    // bytes that an NBD worker may have; 0: 1.4375 GiB, what its most clients can have in flight, encrypted and in their sockets
	Log    *os.File // what workers say; nil: nothing
	// DieWithParent ends workers with the process that started them: for tests and
	// benches, which may be cut.
	DieWithParent bool
}

// Starter starts workers and finds them.
type Starter struct {
	o        Options
	choosing sync.Mutex
}

// maxDir leaves room for an ID and a name in a socket's address (unix(7)).
const maxDir = 55

// New checks the options and makes the directory. blockdev.ErrInvalid for a
// directory whose sockets could not be named.
func New(o Options) (*Starter, error) {
	if len(o.Dir) > maxDir || !filepath.IsAbs(o.Dir) {
		return nil, blockdev.Op("control.New", "", fmt.Errorf("%w: run directory %q: an absolute path of at most %d bytes is possible", blockdev.ErrInvalid, o.Dir, maxDir))
	}
	if o.Users == 0 {
		o.User, o.Group, o.Users = 65534, 65534, 1
	}
	if o.Memory == 0 {
		o.Memory = 1472 << 20
	}
	// Passable, not readable: who may use a socket is said by the socket's own mode.
	err := os.MkdirAll(o.Dir, 0o711) //nolint:gosec // see above
	return &Starter{o: o}, blockdev.Op("control.New", "", err)
}

// Worker is one that runs, or did when it was found.
type Worker struct {
	s       *Starter
	id      blockdev.ID
	home    string // name of its directory
	serving wire.Serving
	socket  string
	pid     int
}

// ID is that of the image.
func (w *Worker) ID() blockdev.ID { return w.id }

// Kind is how it is served.
func (w *Worker) Kind() blockdev.Kind { return w.serving.Kind }

// ReadOnly tells whether writes are refused.
func (w *Worker) ReadOnly() bool { return w.serving.ReadOnly }

// Size is that of the volume when the worker was found, in bytes.
func (w *Worker) Size() int64 { return w.serving.Size }

// Pid is the process, which may have ended since.
func (w *Worker) Pid() int { return w.pid }

// Socket is where clients connect.
func (w *Worker) Socket() string { return w.socket }

// Names in a worker's directory.
const (
	controlSocket = "control.sock"
	emptyRoot     = "root"
	processNote   = "process"
)

var openingForm = regexp.MustCompile("^[0-9a-f]{0,8}$")

// dataSocket is where clients connect, by the name of the opening.
func dataSocket(opening string) string {
	if opening == "" {
		return "data.sock"
	}
	return "data-" + opening + ".sock"
}

// dataSocketIn finds it again: the one that is a socket, and no way to a worker that
// refuses.
func (s *Starter) dataSocketIn(home string) (string, error) {
	entries, err := os.ReadDir(filepath.Join(s.o.Dir, home))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "data") && e.Type() == fs.ModeSocket {
			return s.path(home, e.Name()), nil
		}
	}
	return "", errEnded
}

func (s *Starter) path(home, name string) string { return filepath.Join(s.o.Dir, home, name) }

// Find gives the worker of an image, also one that an earlier daemon started.
// blockdev.ErrNotFound when none runs.
func (s *Starter) Find(ctx context.Context, id blockdev.ID) (*Worker, error) {
	w, err := s.find(ctx, id, string(id))
	return w, blockdev.Op("control.Find", id, err)
}

func (s *Starter) find(ctx context.Context, id blockdev.ID, home string) (*Worker, error) {
	if !id.Valid() {
		return nil, fmt.Errorf("%w: %.40q is no image", blockdev.ErrInvalid, string(id))
	}
	w := &Worker{s: s, id: id, home: home}
	reply, err := w.call(ctx, &wire.Request{Op: wire.Status})
	if err != nil {
		return nil, err
	}
	if reply.Volume == nil || reply.Volume.ID != id {
		return nil, fmt.Errorf("%w: the worker serves another image", wire.ErrProtocol)
	}
	w.serving = *reply.Volume
	w.socket, err = s.dataSocketIn(home)
	return w, err
}

// List names all images that have a worker, also one that does not answer in time or
// speaks another version: Find tells that.
func (s *Starter) List(ctx context.Context) ([]blockdev.ID, error) {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return nil, blockdev.Op("control.List", "", err)
	}
	var ids []blockdev.ID
	for _, e := range entries {
		id := blockdev.ID(e.Name())
		if !id.Valid() {
			continue
		}
		one, cancel := context.WithTimeout(ctx, wire.Patience)
		_, err := s.find(one, id, string(id))
		cancel()
		if ctx.Err() != nil {
			return nil, blockdev.Op("control.List", id, context.Cause(ctx))
		}
		if !errors.Is(err, blockdev.ErrNotFound) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// dial connects to a worker. blockdev.ErrNotFound when none runs: a socket that nobody
// listens at any more has been closed by the end of its process, after all I/O that it
// had begun, so that a next worker has the image alone.
func (w *Worker) dial(ctx context.Context) (wire.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", w.s.path(w.home, controlSocket))
	switch {
	case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist):
		return wire.Conn{}, fmt.Errorf("%w: no worker serves it (%w)", blockdev.ErrNotFound, err)
	case err != nil:
		return wire.Conn{}, err
	}
	c := wire.Conn{UnixConn: conn.(*net.UnixConn)} //nolint:forcetypeassert // of that network
	peer, err := sys.PeerOf(c)
	if err != nil {
		return wire.Conn{}, errors.Join(err, c.Close())
	}
	w.pid = peer.Pid // it listens itself, so it is it
	return c, nil
}

// errEnded: the worker has hung up in the middle of a call.
var errEnded = fmt.Errorf("%w: the worker ended meanwhile", blockdev.ErrNotFound)

// call makes one call.
func (w *Worker) call(ctx context.Context, r *wire.Request, files ...*os.File) (*wire.Reply, error) {
	return w.converse(ctx, r, nil, files...)
}

// converse makes a call in which the worker asks once for a record.
func (w *Worker) converse(ctx context.Context, r *wire.Request, record func(wire.Pending) error, files ...*os.File) (*wire.Reply, error) {
	c, err := w.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return talkWithin(ctx, c, r, record, files)
}

// talkWithin is talk until ctx ends. A call that is given up hangs up, so that the
// worker does not wait for us.
func talkWithin(ctx context.Context, c wire.Conn, r *wire.Request, record func(wire.Pending) error, files []*os.File) (*wire.Reply, error) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	reply, err := talk(c, r, record, files)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return reply, err
}

func talk(c wire.Conn, r *wire.Request, record func(wire.Pending) error, files []*os.File) (*wire.Reply, error) {
	if err := c.Call(r, files...); err != nil {
		return nil, ended(err)
	}
	for {
		reply, err := c.Reply()
		switch {
		case err != nil:
			return nil, ended(err)
		case reply.Record == nil:
			return reply, reply.Error.Err()
		case record == nil:
			return nil, fmt.Errorf("%w: nothing was to be recorded", wire.ErrProtocol)
		}
		recorded := record(*reply.Record)
		if err := c.Call(&wire.Request{Op: wire.Recorded, Error: wire.NewError(recorded)}); err != nil {
			return nil, errors.Join(recorded, ended(err))
		}
	}
}

// ended names what a worker's end looks like.
func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN) {
		return fmt.Errorf("%w (%w)", errEnded, err)
	}
	return err
}
