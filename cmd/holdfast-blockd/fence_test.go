package main_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/control/wire"
	"holdfast/blockdev/serve/overlay"
	"holdfast/blockdev/serve/vhost/frontend"
	"holdfast/internal/sys"
)

// patience is what nothing here should take.
const patience = 2 * time.Minute

// within bounds a part of a test.
func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// process holds on to one.
func process(t testing.TB, pid int) *os.File {
	t.Helper()
	pidfd, err := sys.OpenPidfd(pid)
	must(t, err)
	t.Cleanup(func() { pidfd.Close() })
	return pidfd
}

// TestKillOfAStoppedWorker: one that answers nobody, and at whose socket so many have
// asked that it takes no more, is ended all the same, and what it has acknowledged is
// there.
func TestKillOfAStoppedWorker(t *testing.T) {
	var o control.Options
	s := starter(t, func(to *control.Options) { o = *to })
	spec := flat(t, blockdev.VhostUser)
	w, err := s.Serve(t.Context(), spec)
	must(t, err)
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	copy(g.f.Queues[0].Data(0), stamped(7))
	g.good(frontend.Write, 0, block)
	blockdevtest.StandStill(t, w.Pid())
	for n := 0; ; n++ {
		c, err := net.Dial("unixpacket", filepath.Join(o.Dir, string(volumeID), "control.sock"))
		if errors.Is(err, syscall.EAGAIN) {
			break
		}
		if must(t, err); n > 5000 {
			t.Fatal("it takes calls without an end")
		}
		must(t, c.Close())
	}
	if err := s.Kill(within(t), volumeID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Find(within(t), volumeID); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("after its end it is found: %v", err)
	}
	must(t, s.Kill(within(t), volumeID))
	got := make([]byte, block)
	plain := open(spec.Flat.Name())
	_, err = plain.ReadAt(got, 0)
	if must(t, errors.Join(err, plain.Close())); !bytes.Equal(got, stamped(7)) {
		t.Error("what it has acknowledged is lost")
	}
}

// TestRefuse: a virtual machine whose volume is another's by now, and which connects again where
// it was, has every request fail, those that were in flight among them; it never meets the next worker.
func TestRefuse(t *testing.T) {
	var o control.Options
	s := starter(t, func(to *control.Options) { o = *to })
	first := flat(t, blockdev.VhostUser)
	first.Opening = "0a0b0c0d"
	w, err := s.Serve(t.Context(), first)
	must(t, err)
	old := newGuest(t, frontend.Options{Depth: 4, Inflight: true})
	must(t, old.f.Connect(w.Socket()))
	copy(old.f.Queues[0].Data(0), stamped(1))
	old.good(frontend.Write, 0, block)
	must(t, os.Lchown(w.Socket(), 4321, -1))
	refusal := control.Refusal{ID: volumeID, Opening: first.Opening, Size: size}
	must(t, s.Refuse(within(t), refusal))
	must(t, w.Stop(t.Context()))
	q := old.f.Queues[0]
	for slot, kind := range []uint32{frontend.Write, frontend.Read, frontend.Flush} {
		copy(q.Data(slot), stamped(2))
		q.Put(slot, kind, 0, block*(1-slot/2))
	}
	must(t, q.Show())
	must(t, s.Lead(refusal))
	refused := make(chan error, 1)
	go func() { refused <- s.AwaitRefused(within(t), refusal) }()
	again := func() {
		t.Helper()
		must(t, old.f.Connect(w.Socket()))
	}
	again()
	for answered := 0; answered < 3; {
		must(t, q.Wait())
		for slot, status, ok := q.Take(); ok; slot, status, ok = q.Take() {
			if answered++; status != 1 {
				t.Errorf("request %d has status %d", slot, status)
			}
		}
	}
	must(t, <-refused)
	if info, err := os.Stat(w.Socket()); err != nil || info.Sys().(*syscall.Stat_t).Uid != 4321 || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket of who refuses: %v, %v", info, err)
	}
	pid := refuser(t, o.Dir, first.Opening)
	fds, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/fd/*")
	must(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.Contains(to, "image") {
			t.Errorf("who refuses has %s", to)
		}
	}

	next := first
	next.Opening, next.Kind = "1a1b1c1d", blockdev.NBD
	n, err := s.Serve(t.Context(), next)
	must(t, err)
	c := dialNBD(t, n.Socket())
	if n.Socket() == w.Socket() || !bytes.Equal(c.read(0), stamped(1)) {
		t.Errorf("the next one is at %s, the first was at %s, or it reads something else", n.Socket(), w.Socket())
	}
	c.write(0, stamped(3))
	again()
	copy(q.Data(0), stamped(4))
	if old.do(frontend.Write, 0, block) != 1 || old.do(frontend.Read, 0, block) != 1 || !bytes.Equal(c.read(0), stamped(3)) {
		t.Error("the first guest reaches something")
	}
	must(t, s.Sweep(t.Context()))
	if found, err := s.Find(t.Context(), volumeID); err != nil || found.Pid() != n.Pid() {
		t.Errorf("after a sweep: %v, %v", found, err)
	}
	must(t, n.Stop(t.Context()))
	if old.do(frontend.Read, 0, block) != 1 {
		t.Error("the end of the next one has cost the one that refuses")
	}
	gone := process(t, pid)
	must(t, s.EndRefusals(t.Context()))
	must(t, sys.AwaitEnd(within(t), gone))
}

// TestRefusalEndsWithItsGuest: once the virtual machine has let the disk go nothing of who refuses is
// left running, though the hour in which it could have come is not over.
func TestRefusalEndsWithItsGuest(t *testing.T) {
	var o control.Options
	s := starter(t, func(to *control.Options) { o = *to })
	t.Cleanup(func() { must(t, s.Sweep(context.Background())) })
	const opening = "2a2b2c2d"
	refusal := control.Refusal{ID: volumeID, Opening: opening, Size: size}
	must(t, s.Refuse(within(t), refusal))
	must(t, s.Lead(refusal))
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(filepath.Join(o.Dir, string(volumeID), "data-"+opening+".sock")))
	must(t, s.AwaitRefused(within(t), refusal))
	if g.do(frontend.Read, 0, block) != 1 {
		t.Error("a read is not refused")
	}
	gone := process(t, refuser(t, o.Dir, opening))
	g.f.Hangup()
	must(t, sys.AwaitEnd(within(t), gone))
}

// TestStopOfOneThatStays: that a flush has failed is told with the word that the worker has ended
// only when it has: who fences by that takes it for the proof. A process that the kernel
// keeps from ending cannot be made here, so this one speaks like a worker, and stays.
func TestStopOfOneThatStays(t *testing.T) {
	var o control.Options
	s := starter(t, func(to *control.Options) { o = *to })
	home := filepath.Join(o.Dir, string(volumeID))
	must(t, os.Mkdir(home, 0o700))
	data, err := net.Listen("unix", filepath.Join(home, "data.sock"))
	must(t, err)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(home, "control.sock"), Net: "unixpacket"})
	must(t, err)
	t.Cleanup(func() { must(t, errors.Join(data.Close(), l.Close(), os.RemoveAll(home))) })
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			c := wire.Conn{UnixConn: conn}
			reply := &wire.Reply{Service: &serve.Service{}, Volume: &wire.Serving{ID: volumeID, Kind: blockdev.NBD}}
			if r, _, err := c.Request(); err == nil && r.Op == wire.Stop {
				reply = &wire.Reply{Error: wire.NewError(blockdev.ErrFailed)}
			}
			_ = errors.Join(c.Answer(reply), c.Close())
		}
	}()
	w, err := s.Find(t.Context(), volumeID)
	must(t, err)
	bounded, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := w.Stop(bounded); errors.Is(err, blockdev.ErrFailed) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it runs on, and its stop says %v", err)
	}
}

// refuser is the process that has a socket of an opening that ended.
func refuser(t *testing.T, dir, opening string) int {
	t.Helper()
	c, err := net.Dial("unixpacket", filepath.Join(dir, "refuse-"+opening, "control.sock"))
	must(t, err)
	defer c.Close()
	peer, err := sys.PeerOf(c.(*net.UnixConn))
	must(t, err)
	return peer.Pid
}

// TestSweep: what a worker has left that was killed goes, and one that runs stays.
func TestSweep(t *testing.T) {
	var o control.Options
	s := starter(t, func(to *control.Options) { o = *to })
	w, err := s.Serve(t.Context(), flat(t, blockdev.NBD))
	must(t, err)
	other := flat(t, blockdev.NBD)
	other.ID = "vol-06c8qk4g1h6s9tj2m0a4n7v5b1"
	dead, err := s.Serve(t.Context(), other)
	must(t, err)
	gone := process(t, dead.Pid())
	must(t, syscall.Kill(dead.Pid(), syscall.SIGKILL))
	must(t, sys.AwaitEnd(within(t), gone))
	foreign := filepath.Join(o.Dir, "of-somebody")
	must(t, os.Mkdir(foreign, 0o700))
	must(t, s.Sweep(t.Context()))
	left, err := os.ReadDir(o.Dir)
	if err != nil || len(left) != 2 || left[0].Name() != filepath.Base(foreign) || left[1].Name() != string(volumeID) {
		t.Errorf("left are %v, %v", left, err)
	}
	must(t, os.Remove(foreign))
	must(t, w.Stop(t.Context()))
}

// TestDiesWithItsParent: a worker that is to end with who started it does, though it
// has become another user.
func TestDiesWithItsParent(t *testing.T) {
	var o control.Options
	s := starter(t, func(to *control.Options) { o = *to })
	d := startDaemon(t, daemonWords{Program: o.Program, Dir: o.Dir, Cgroup: o.Cgroup, Flat: image(t, size).Name(), Kind: blockdev.NBD, DieWithParent: true})
	if user := strings.Fields(procStatus(t, d.worker, "Uid")); user[0] == "0" {
		t.Fatalf("the worker is user %v", user)
	}
	gone := process(t, d.worker)
	d.kill(t)
	must(t, sys.AwaitEnd(within(t), gone))
	must(t, s.Sweep(t.Context()))
}

// TestHostGoesDownInASeal: a worker whose daemon died in the midst of a seal ends at a
// SIGTERM, flushed, and whether the new layer is recorded or not, nothing that was
// acknowledged is lost: before the end of the daemon, after it, and unflushed.
func TestHostGoesDownInASeal(t *testing.T) {
	for _, recorded := range []bool{false, true} {
		var o control.Options
		s := starter(t, func(to *control.Options) { o = *to })
		top, next := layer(t), layer(t)
		d := startDaemon(t, daemonWords{
			Program: o.Program, Dir: o.Dir, Cgroup: o.Cgroup, Kind: blockdev.VhostUser,
			Top: [2]string{top.Data.Name(), top.Map.Name()}, Next: [2]string{next.Data.Name(), next.Map.Name()},
		})
		if said := d.says(t); said != "recording" {
			t.Fatalf("the daemon says %q", said)
		}
		w, err := s.Find(t.Context(), volumeID)
		must(t, err)
		g := newGuest(t, frontend.Options{})
		must(t, g.f.Connect(w.Socket()))
		for n := range 8 {
			if n == 4 {
				d.kill(t)
			}
			copy(g.f.Queues[0].Data(0), stamped(uint64(n+1)))
			g.good(frontend.Write, uint64(n*block/512), block)
		}
		gone := process(t, d.worker)
		must(t, syscall.Kill(d.worker, syscall.SIGTERM))
		must(t, sys.AwaitEnd(within(t), gone))

		layers := stack{top}
		if recorded {
			layers = stack{next, top}
		}
		for _, l := range layers { // as after a boot: nothing is taken for written that was not made durable
			must(t, overlay.Recover(overlay.Files{Data: overlay.OSFile{File: l.Data}, Map: overlay.OSFile{File: l.Map}}, false))
		}
		w, err = s.Serve(t.Context(), control.Spec{ID: volumeID, Kind: blockdev.NBD, Size: size, Layers: layers})
		must(t, err)
		c := dialNBD(t, w.Socket())
		for n := range 8 {
			if !bytes.Equal(c.read(int64(n*block)), stamped(uint64(n+1))) {
				t.Errorf("recorded %t: block %d is lost", recorded, n)
			}
		}
		must(t, w.Stop(t.Context()))
	}
}
