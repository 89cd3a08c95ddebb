package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/nbd"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/vhost"
	"holdfast/internal/run"
)

// ioServer is a process that serves an image on a unix socket.
type ioServer struct {
	process *run.Process
	pid     int // whose CPU counts
	socket  string
}

// startPeer starts somebody else's server and waits until it listens. What it says
// lies beside the socket: it complains of the connection that tries it.
func startPeer(ctx context.Context, socket string, args []string) (*ioServer, error) {
	if _, err := run.Look(args[0]); err != nil {
		return nil, err
	}
	log, err := os.Create(socket + ".log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p, err := run.Start(args, log, log)
	if err != nil {
		return nil, err
	}
	s := &ioServer{process: p, pid: p.Pid(), socket: socket}
	if err := s.answers(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("%s, see %s: %w", args[0], log.Name(), err), p.Kill())
	}
	return s, nil
}

// answers waits until somebody listens.
func (s *ioServer) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		conn, err := net.Dial("unix", s.socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-s.process.Done():
			return fmt.Errorf("it has ended: %w", err)
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *ioServer) stop() error { return s.process.Stop(10 * time.Second) }

// Serving is what a server of ours says on its standard output when it listens.
type Serving struct {
	Pid    int    `json:"pid"`    // of the process that does the requests
	Socket string `json:"socket"` // where it listens
}

// ServeOptions say what `holdfast bench io --serve` serves.
type ServeOptions struct {
	Image  string        // flat, or the base of Layer
	Layer  string        // the top layer is in the files Layer.data and Layer.map; "": Image is the volume
	Kind   blockdev.Kind // blockdev.VhostUser or blockdev.NBD
	Socket string
}

// startOwn starts a program of ours that serves, and waits for its word.
func startOwn(program string, o ServeOptions) (*ioServer, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	args := []string{program, "bench", "io", "--serve", o.Image, "--kind", string(o.Kind), "--socket", o.Socket}
	if o.Layer != "" {
		args = append(args, "--layer", o.Layer)
	}
	p, err := run.Start(args, w, os.Stderr)
	_ = w.Close() // the program has its own
	if err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(r).ReadBytes('\n')
	var said Serving
	if err == nil {
		err = json.Unmarshal(line, &said)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s serves nothing: %w", program, err), p.Kill())
	}
	return &ioServer{process: p, pid: said.Pid, socket: said.Socket}, nil
}

// Serve serves until ctx ends, and says on out when it listens: the server that is
// measured, in a process of its own.
func (o ServeOptions) Serve(ctx context.Context, out io.Writer) (err error) {
	f, err := os.OpenFile(o.Image, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: o.Socket, Net: "unix"})
	if err != nil {
		return err
	}
	if err := json.NewEncoder(out).Encode(Serving{os.Getpid(), o.Socket}); err != nil {
		return errors.Join(err, l.Close())
	}
	switch {
	case o.Layer != "":
		return o.serveLayer(ctx, f, l)
	case o.Kind == blockdev.VhostUser:
		d, err := vhost.NewFile(f)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		return serveVhost(ctx, d, l)
	case o.Kind == blockdev.NBD:
		d, err := nbd.NewFile(f)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		return serveNBD(ctx, d, f, l)
	}
	return errors.Join(fmt.Errorf("%w: kind %q", blockdev.ErrInvalid, o.Kind), l.Close())
}

func (o ServeOptions) serveLayer(ctx context.Context, base *os.File, l *net.UnixListener) error {
	files, drop, err := openLayer(o.Layer)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer drop()
	info, err := base.Stat()
	if err != nil {
		return errors.Join(err, l.Close())
	}
	v, err := overlay.Open([]overlay.Files{files}, overlay.NewImage(base, info.Size()))
	if err != nil {
		return errors.Join(err, l.Close())
	}
	if o.Kind == blockdev.VhostUser {
		return serveVhost(ctx, v, l)
	}
	return serveNBD(ctx, v, base, l)
}

func serveVhost(ctx context.Context, on vhost.Device, l *net.UnixListener) error {
	d, err := vhost.New(on, vhost.Options{Serial: "bench"})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer context.AfterFunc(ctx, func() { _ = errors.Join(l.Close(), d.Close()) })()
	return d.Serve(l)
}

// serveNBD serves a device as large as a file is.
func serveNBD(ctx context.Context, d nbd.Device, f *os.File, l *net.UnixListener) error {
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, l.Close())
	}
	e, err := nbd.NewExport("", d, nbd.ExportOptions{Size: info.Size()})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	s := nbd.NewServer(nbd.Options{})
	if err := s.Add(e); err != nil {
		return errors.Join(err, l.Close())
	}
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	return s.Serve(l)
}
