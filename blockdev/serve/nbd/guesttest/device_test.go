package guesttest

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"holdfast/blockdev"
	"holdfast/blockdev/nbddevice"
	"holdfast/blockdev/serve/nbd"
)

// server serves an export at a socket until the function that it gives is called.
func server(t *testing.T, e *nbd.Export, socket string) (end func()) {
	t.Helper()
	s := nbd.NewServer(nbd.Options{})
	must(t, s.Add(e))
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	must(t, err)
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	return func() {
		must(t, s.Close())
		must(t, <-ended)
	}
}

// aligned are bytes for direct I/O.
func aligned(fill byte) []byte {
	b := make([]byte, 2*nbddevice.BlockSize)
	skip := -uintptr(unsafe.Pointer(&b[0])) % nbddevice.BlockSize
	b = b[skip : skip+nbddevice.BlockSize]
	copy(b, bytes.Repeat([]byte{fill}, len(b)))
	return b
}

// reconnected gives a device a connection to who serves at a socket now.
func reconnected(t *testing.T, d nbddevice.Device, socket string) {
	t.Helper()
	for {
		s, _, err := nbddevice.Dial(socket, "volume")
		must(t, err)
		taken, err := d.Reconnect(s)
		must(t, err)
		if taken {
			return
		}
	}
}

// TestDeviceOutlivesItsServer: a request that meets no server waits for the next one, and
// fails when the device is abandoned; what is done to a device of another backend is done
// to nobody.
func TestDeviceOutlivesItsServer(t *testing.T) {
	command(t, "modprobe", "nbd")
	must(t, nbddevice.Available())
	path, _, e, _ := served(t, 16*mib)
	socket := filepath.Join(t.TempDir(), "s")
	end := server(t, e, socket)
	s, terms, err := nbddevice.Dial(socket, "volume")
	must(t, err)
	const backend = "test/outlives"
	d, err := nbddevice.Attach(backend, terms, s)
	must(t, err)
	must(t, s.Close())
	found, err := nbddevice.Find(backend)
	if err != nil || found != d || d.Size != 16*mib || d.ReadOnly {
		t.Fatalf("found %+v, %v, made %+v", found, err, d)
	}
	node, err := os.OpenFile(d.Path, os.O_RDWR|syscall.O_DIRECT, 0)
	must(t, err)
	write := func(fill byte) chan error {
		done := make(chan error, 1)
		go func() {
			_, err := node.WriteAt(aligned(fill), 8*mib)
			done <- err
		}()
		return done
	}
	must(t, <-write(1))
	end()
	waiting := write(2)
	end = server(t, e, socket)
	reconnected(t, d, socket)
	must(t, <-waiting)
	must(t, node.Sync())
	got := aligned(0)
	image, err := os.Open(path)
	must(t, err)
	defer image.Close()
	if _, err := image.ReadAt(got, 8*mib); err != nil || !bytes.Equal(got, aligned(2)) {
		t.Errorf("the image has %d, %v", got[0], err)
	}

	stranger := d
	stranger.Backend = "test/other"
	if _, err := stranger.Grow(32 * mib); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("somebody else's device is grown: %v", err)
	}
	s, _, err = nbddevice.Dial(socket, "volume")
	must(t, err)
	if _, err := stranger.Reconnect(s); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("somebody else's device is connected: %v", err)
	}
	must(t, errors.Join(stranger.Detach(t.Context()), stranger.Abandon()))
	if now, err := nbddevice.Find(backend); err != nil || now != d {
		t.Fatalf("it is %+v, %v", now, err)
	}

	end()
	waiting = write(3)
	must(t, d.Abandon())
	if err := <-waiting; !errors.Is(err, syscall.EIO) {
		t.Errorf("a write to a device that is abandoned: %v", err)
	}
	must(t, node.Close())
	if _, err := nbddevice.Find(backend); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("abandoned and closed, it is found: %v", err)
	}
	must(t, d.Abandon())
}
