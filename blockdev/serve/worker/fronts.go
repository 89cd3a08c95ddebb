package worker

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/device"
	"holdfast/blockdev/serve/nbd"
	"holdfast/blockdev/serve/vhost"
)

// serialSize bounds a disk's serial number (virtio 1.2, 5.2.6).
const serialSize = 20

// vhostFront serves one virtual machine after the other.
type vhostFront struct{ *vhost.Server }

func newVhost(w *volume) (front, error) {
	id := string(w.words.ID)
	o := vhost.Options{
		// What sets one ID apart from others is at its end; QEMU's attacher calls disks by the same.
		Serial:   id[max(0, len(id)-serialSize):],
		ReadOnly: w.words.ReadOnly, Queues: w.words.Queues, Meter: w.meter, Limiter: w.limiter,
		Ended: func(err error) {
			tell(err)
			if w.left != nil {
				w.left()
			}
		},
	}
	var d vhost.Device = w.layers
	switch {
	case w.words.Refuse:
		d = nothing{w.size}
	case w.flat != nil:
		f, err := device.NewFile(w.flat)
		if err != nil {
			return nil, err
		}
		d = f
	}
	s, err := vhost.New(d, o)
	return vhostFront{s}, err
}

// tell writes how a connection ended to the log.
func tell(err error) {
	if err != nil && !errors.Is(err, net.ErrClosed) { // not that we have ended it
		fmt.Fprintln(os.Stderr, "holdfast-blockd: connection: "+err.Error())
	}
}

func (f vhostFront) serve(l *net.UnixListener) error { return f.Serve(l) }
func (f vhostFront) resized(int64) error             { return f.Resized() }
func (f vhostFront) throttle(limits blockdev.Limits) { f.Throttle(limits, 0) }
func (f vhostFront) failed() error                   { return f.Failed() }
func (f vhostFront) close() error                    { return f.Close() }
func (f vhostFront) swap(d shown, during func() error) (time.Duration, error) {
	return f.Swap(d, during)
}

func (f vhostFront) clients() int {
	if f.Connected() {
		return 1
	}
	return 0
}

// An NBD worker's clients together hold no more than what its memory has room for.
const (
	nbdConnections = 32
	nbdInFlight    = 1 << 20 // bytes of a connection, above one request of the largest size
)

// nbdFront serves NBD clients.
type nbdFront struct {
	server *nbd.Server
	export *nbd.Export
	w      *volume

	mu        sync.Mutex
	here      int // clients
	exposures []*exposure
	closed    bool // nothing is exposed any more
	resting   bool // memory is given back in a while
}

func newNBD(w *volume) (front, error) {
	var d nbd.Device = w.layers
	if w.flat != nil {
		f, err := device.NewFile(w.flat)
		if err != nil {
			return nil, err
		}
		d = f
	}
	e, err := nbd.NewExport("", d, nbd.ExportOptions{Size: w.size, Description: string(w.words.ID), ReadOnly: w.words.ReadOnly, Meter: w.meter, Limiter: w.limiter})
	if err != nil {
		return nil, err
	}
	f := &nbdFront{w: w, export: e}
	f.server = nbd.NewServer(nbd.Options{MaxConnections: nbdConnections, MaxInFlight: nbdInFlight})
	return f, f.server.Add(e)
}

// serve takes connections one by one, so as to know how many there are.
func (f *nbdFront) serve(l *net.UnixListener) error {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			time.Sleep(retryAccept)
			continue
		}
		if !f.enter() {
			_ = conn.Close() // as the server does with one too many
			continue
		}
		go func() {
			defer f.leave()
			tell(f.server.ServeConn(conn))
		}()
	}
}

// enter takes one of the places that all clients share.
func (f *nbdFront) enter() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.here >= nbdConnections {
		return false
	}
	f.here++
	return true
}

func (f *nbdFront) leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.here--
	f.rest()
}

func (f *nbdFront) resized(size int64) error        { return f.export.Resize(size) }
func (f *nbdFront) throttle(limits blockdev.Limits) { f.export.Throttle(limits, 0) }
func (f *nbdFront) failed() error                   { return f.export.Failed() }
func (f *nbdFront) close() error                    { return errors.Join(f.closeExposed(), f.server.Close()) }
func (f *nbdFront) clients() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.here
}

func (f *nbdFront) swap(d shown, during func() error) (time.Duration, error) {
	return f.export.Swap(d, during)
}
