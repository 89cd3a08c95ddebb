package main_test

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/blockdev/serve/vhost/frontend"
)

// TestBadCallers: who sends nonsense, too much, other descriptors than it says, or
// nothing, costs itself its connection, and nobody else anything.
func TestBadCallers(t *testing.T) {
	var o control.Options
	s, ctx := starter(t, func(to *control.Options) { o = *to }), t.Context()
	w, err := s.Serve(ctx, flat(t, blockdev.VhostUser))
	must(t, err)
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	path := filepath.Join(o.Dir, string(volumeID), "control.sock")
	call := func() wire.Conn {
		t.Helper()
		conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		must(t, err)
		t.Cleanup(func() { conn.Close() })
		return wire.Conn{UnixConn: conn}
	}
	null, err := os.Open(os.DevNull)
	must(t, err)
	defer null.Close()
	files := func() int {
		t.Helper()
		entries, err := os.ReadDir("/proc/" + itoa(w.Pid()) + "/fd")
		must(t, err)
		return len(entries)
	}
	g.good(frontend.Read, 0, block) // all that it opens for the machine is open by then
	before := files()
	for _, c := range []struct {
		say    string
		rights int
		answer string // of the error; "": none
	}{
		{"nonsense", 0, "protocol violation"},
		{"\x00\xff", 3, "protocol violation"},
		{`{"version":1,"op":"status"}`, 1, "descriptors"},
		{`{"version":1,"op":"seal","name":"x"}`, 1, "descriptors"},
		{`{"version":1,"op":"seal","name":""}`, 2, "a name of"},
		{`{"version":2,"op":"status"}`, 0, "version"},
		{`{"version":1,"op":"open"}`, 0, "no volume"},
		{`{"version":1,"op":"dance"}`, 0, "not known"},
		{`{"version":1,"op":"recorded"}`, 0, "not asked for"},
		{`{"version":1,"op":"throttle"}`, 0, "limits"},
		{`{"version":1,"op":"throttle","limits":{"readIops":-1}}`, 0, "limits"},
		{`{"version":1,"op":"grow","size":1}`, 0, "invalid"},
		{`{"version":1,"op":"absorb"}`, 0, "flat"},
		{`{"version":1,"op":"absorb","layer":-3}`, 0, "layer"},
		{`{"version":1,"op":"absorb","down":true}`, 2, "down"},
		{`{"version":1,"op":"absorb","down":true,"layer":1}`, 0, "descriptors"},
		{`{"version":1,"op":"absorb","most":-1}`, 0, "most"},
		{strings.Repeat("[", 100_000), 0, "protocol violation"},
		{`{"version":1,"op":"status","name":"` + strings.Repeat("x", wire.MaxMessage) + `"}`, 0, "too long"},
	} {
		conn := call()
		var rights []byte
		if c.rights > 0 {
			fds := make([]int, c.rights)
			for n := range fds {
				fds[n] = int(null.Fd())
			}
			rights = syscall.UnixRights(fds...)
		}
		_, _, err := conn.WriteMsgUnix([]byte(c.say), rights, nil)
		must(t, err)
		reply, err := conn.Reply()
		if err != nil || reply.Error == nil || !strings.Contains(reply.Error.Text, c.answer) {
			t.Errorf("%.40q with %d descriptors: %v, %+v", c.say, c.rights, err, reply)
		}
		if _, err := conn.Reply(); !errors.Is(err, io.EOF) {
			t.Errorf("%.40q: the connection goes on: %v", c.say, err)
		}
	}
	if after := files(); after > before { // what came before may have been about to be closed
		t.Errorf("it has %d descriptors, had %d", after, before)
	}
	silent := make([]wire.Conn, 8) // that say nothing, and one that does not read
	for n := range silent {
		silent[n] = call()
	}
	must(t, silent[0].Call(&wire.Request{Op: wire.Status}))
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if _, err := w.Status(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	g.good(frontend.Read, 0, block)
	stranger(t, path)
	must(t, w.Stop(ctx))
}

// stranger is another user, who gets as far as the socket and is not heard.
func stranger(t *testing.T, path string) {
	t.Helper()
	must(t, errors.Join(os.Chmod(path, 0o666), os.Chmod(filepath.Dir(filepath.Dir(path)), 0o711)))
	out, err := asUser(12345, asStranger+"="+path)
	if err != nil || strings.TrimSpace(out) != "not heard" {
		t.Errorf("another user: %v, %s", err, out)
	}
}

// asStranger makes this test program a caller that is not the owner.
const asStranger = "BLOCKD_TEST_STRANGER"

func beStranger(path string) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		panic(err)
	}
	c := wire.Conn{UnixConn: conn}
	err = c.Call(&wire.Request{Op: wire.Stop})
	if err == nil || errors.Is(err, syscall.EPIPE) {
		_, err = c.Reply()
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		panic(err)
	}
	_, _ = os.Stdout.WriteString("not heard\n")
	os.Exit(0)
}

// TestHostGoesDown: SIGTERM ends a worker as Stop does, and what is left is taken away
// by the next one.
func TestHostGoesDown(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	spec := flat(t, blockdev.NBD)
	w, err := s.Serve(ctx, spec)
	must(t, err)
	c := dialNBD(t, w.Socket())
	c.write(0, stamped(3))
	must(t, syscall.Kill(w.Pid(), syscall.SIGTERM))
	if _, err := io.ReadFull(c.conn, make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client reads %v", err)
	}
	for err == nil {
		_, err = w.Status(ctx)
	}
	if !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("status: %v", err)
	}
	next, err := s.Serve(ctx, spec)
	must(t, err)
	if got := dialNBD(t, next.Socket()).read(0); next.Pid() == w.Pid() || got[0] != 3 {
		t.Errorf("process %d after %d reads %x", next.Pid(), w.Pid(), got[:8])
	}
	must(t, next.Stop(ctx))
}

// TestCannotBegin: what a worker cannot serve is told by Serve, and nothing is left.
func TestCannotBegin(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	good := flat(t, blockdev.VhostUser)
	short := good
	short.Flat, short.Layers = nil, []control.Layer{{Data: image(t, size), Map: image(t, 512)}}
	if _, err := s.Serve(ctx, short); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("a map that is none: %v", err)
	}
	odd := good
	odd.Flat = image(t, size+1)
	if _, err := s.Serve(ctx, odd); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("a size that is none of blocks: %v", err)
	}
	none := good
	none.ID = "../x"
	if _, err := s.Serve(ctx, none); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("an ID that is none: %v", err)
	}
	both := good
	both.Layers = []control.Layer{layer(t)}
	if _, err := s.Serve(ctx, both); !errors.Is(err, blockdev.ErrInvalid) {
		t.Errorf("flat and layered: %v", err)
	}
	w, err := s.Serve(ctx, good)
	must(t, err)
	must(t, w.Kill(ctx))
	must(t, w.Kill(ctx)) // again is success
}
