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
	"path/filepath"
	"syscall"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/run"
)

// ioServer is a process that serves an image on a unix socket, or at a port.
type ioServer struct {
	process *run.Process
	pid     int // whose CPU counts
	socket  string
	port    int // 0: none
}

// startPeer starts somebody else's server and waits until it listens. What it says
// lies beside the socket: it complains of the connection that tries it.
func startPeer(ctx context.Context, socket string, args []string) (*ioServer, error) {
	s, err := startPeerAt(ctx, &net.UnixAddr{Name: socket, Net: "unix"}, socket+".log", args)
	if err == nil {
		s.socket = socket
	}
	return s, err
}

// startPeerAt is startPeer for any address.
func startPeerAt(ctx context.Context, at net.Addr, logFile string, args []string) (*ioServer, error) {
	if _, err := run.Look(args[0]); err != nil {
		return nil, err
	}
	log, err := os.Create(logFile)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p, err := run.Start(args, log, log)
	if err != nil {
		return nil, err
	}
	s := &ioServer{process: p, pid: p.Pid()}
	if err := s.answers(ctx, at); err != nil {
		return nil, errors.Join(fmt.Errorf("%s, see %s: %w", args[0], log.Name(), err), p.Kill())
	}
	return s, nil
}

// answers waits until somebody listens.
func (s *ioServer) answers(ctx context.Context, at net.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		conn, err := net.Dial(at.Network(), at.String())
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
	Port   int    `json:"port"`   // of the loopback address, where it listens as well; 0: none
}

// ServeOptions say what `holdfast bench io --serve` serves.
type ServeOptions struct {
	Image  string        // flat, or the base of Layer
	Layer  string        // the top layer is in the files Layer.data and Layer.map; "": Image is the volume
	Kind   blockdev.Kind // blockdev.VhostUser or blockdev.NBD
	Device string        // of the kernel's NBD client, made of what is served; "": none
	Blockd string        // the worker's program; "": the one beside this program
	// Certificates is a directory with those that clients are met with over TLS; "": none
	// are. The files are called as QEMU calls them.
	Certificates string
}

// startOwn starts a program of ours that serves, and waits for its word. What it logs
// lies beside the image.
func startOwn(program string, o ServeOptions) (*ioServer, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	log, err := os.OpenFile(o.Image+"."+string(o.Kind)+".log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	defer log.Close()
	args := []string{program, "bench", "io", "--serve", o.Image, "--kind", string(o.Kind)}
	if o.Layer != "" {
		args = append(args, "--layer", o.Layer)
	}
	if o.Certificates != "" {
		args = append(args, "--certificates", o.Certificates)
	}
	p, err := run.Start(args, w, log)
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
		return nil, errors.Join(fmt.Errorf("%s serves nothing, see %s: %w", program, log.Name(), err), p.Kill())
	}
	return &ioServer{process: p, pid: said.Pid, socket: said.Socket, port: said.Port}, nil
}

// Serve serves until ctx ends, and says on out when it listens. It starts a worker as
// the daemon does: that is what is measured.
func (o ServeOptions) Serve(ctx context.Context, out io.Writer) (ended error) {
	spec, drop, err := o.spec()
	if err != nil {
		return err
	}
	defer drop()
	dir, err := os.MkdirTemp("", "hfb-") // sockets want short names
	if err != nil {
		return err
	}
	defer func() { ended = errors.Join(ended, os.RemoveAll(dir)) }()
	if o.Blockd == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		o.Blockd = filepath.Join(filepath.Dir(self), "holdfast-blockd")
	}
	s, err := control.New(control.Options{Program: o.Blockd, Dir: dir, Log: os.Stderr, DieWithParent: true})
	if err != nil {
		return err
	}
	w, err := s.Serve(ctx, spec)
	if err != nil {
		return err
	}
	defer func() { ended = errors.Join(ended, w.Stop(context.WithoutCancel(ctx))) }()
	if o.Device != "" {
		k, err := connectKernel(o.Device, w.Socket())
		if err != nil {
			return err
		}
		defer func() { ended = errors.Join(ended, k.Close()) }()
	}
	said := Serving{Pid: w.Pid(), Socket: w.Socket()}
	if o.Certificates != "" {
		if said.Port, err = pki(o.Certificates).expose(ctx, w); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(out).Encode(said); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// spec opens what the worker is handed.
func (o ServeOptions) spec() (spec control.Spec, drop func(), err error) {
	f, err := os.OpenFile(o.Image, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return spec, nil, err
	}
	closeImage := func() { _ = f.Close() } // the worker has its own
	info, err := f.Stat()
	if err != nil {
		closeImage()
		return spec, nil, err
	}
	spec = control.Spec{ID: benchID, Kind: o.Kind, Size: info.Size(), Flat: f}
	if o.Layer == "" {
		return spec, closeImage, nil
	}
	files, closeLayer, err := openLayer(o.Layer)
	if err != nil {
		closeImage()
		return spec, nil, err
	}
	spec.Flat, spec.Base, spec.BaseSize = nil, f, info.Size()
	spec.Layers = []control.Layer{{Data: files.Data.(overlay.OSFile).File, Map: files.Map.(overlay.OSFile).File}} //nolint:forcetypeassert // openLayer has made them so
	return spec, func() { closeLayer(); closeImage() }, nil
}

// benchID is what a worker's guest finds the disk by.
const benchID = blockdev.ID("vol-00000000000000000000000000")
