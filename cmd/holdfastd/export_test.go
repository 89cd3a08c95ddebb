package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/vhost/frontend"
	"holdfast/internal/sys"
)

// exports is a daemon with a pool that cannot share bytes, and a directory where clients
// find what it exports.
type exports struct {
	*node
	dir string
}

func newExports(t *testing.T) exports {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.NBD, blockdevtest.Qemu)
	dir := t.TempDir()
	return exports{newNode(t, "--pool", "second=sparse:"+t.TempDir(), "--worker", buildWorker(t), "--vm-sockets", dir), dir}
}

// export attaches a volume to a socket, which owner may connect to by the name link.
func (x exports) export(volume, protocol, link string, change func(*client.Attachment)) (client.Attachment, error) {
	x.t.Helper()
	a := client.Attachment{Holder: "agent:" + link, Target: client.Target{Type: "export", Protocol: protocol, Socket: filepath.Join(x.dir, link), Owner: nobody}}
	if change != nil {
		change(&a)
	}
	return x.Attach(x.t.Context(), volume, a)
}

const nobody = 65534

func readOnly(a *client.Attachment) { a.ReadOnly = true }

// layered makes a blank volume that has layers, because of a snapshot.
func (x exports) layered(name string, size int64) {
	x.t.Helper()
	x.create(name, client.VolumeSpec{Size: size, Pool: "second", Filesystem: "none"})
	_, err := x.CreateSnapshot(x.t.Context(), name, client.NewSnapshot{Name: "blank"}, "")
	must(x.t, err)
}

// foreign runs a client of another maker to its end.
func foreign(t *testing.T, args ...string) string {
	t.Helper()
	code, out := command(t, args[0], args[1:]...)
	if code != 0 {
		t.Fatalf("%s: exit code %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

// info is what nbdinfo tells of an export.
func info(t *testing.T, uri string) (i struct {
	Size     int64 `json:"export-size"`
	ReadOnly bool  `json:"is_read_only"`
	Many     bool  `json:"can_multi_conn"`
	Trim     bool  `json:"can_trim"`
	Flush    bool  `json:"can_flush"`
}) {
	t.Helper()
	var all struct{ Exports []json.RawMessage }
	must(t, json.Unmarshal([]byte(foreign(t, "nbdinfo", "--json", uri)), &all))
	must(t, json.Unmarshal(all.Exports[0], &i))
	return i
}

func (x exports) refused(err error, code, text string) {
	x.t.Helper()
	var e *client.Error
	if !errors.As(err, &e) || e.Status/100 != 4 || e.Code != code || !strings.Contains(e.Message, text) {
		x.t.Errorf("%v; want %s with %q", err, code, text)
	}
}

func same(t *testing.T, path string, want []byte) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes that are not the %d that were written (%v)", filepath.Base(path), len(got), len(want), err)
	}
}

// TestExportNBD: clients of other makers use a layered volume by its export: the owner's
// socket and its name, one writer or many readers, growth and snapshots while they are
// connected, and no end of it before they have hung up.
func TestExportNBD(t *testing.T) {
	x := newExports(t)
	ctx := t.Context()
	tree := t.TempDir()
	content := noise("in a template")
	must(t, os.WriteFile(filepath.Join(tree, "large"), content, 0o644))
	x.push("tools", tree)
	x.create("tools", client.VolumeSpec{Size: 64, Pool: "second", Template: "tools"})
	readers := make([]client.Attachment, 2)
	for i, link := range []string{"one", "two"} {
		a, err := x.export("tools", "nbd", link, readOnly)
		must(t, err)
		readers[i] = a
	}
	_, err := x.export("tools", "nbd", "three", nil)
	x.refused(err, "VOLUME_ATTACHED", "read-only to agent:one")
	_, err = x.export("tools", "vhost-user", "three", readOnly)
	x.refused(err, "CONFLICT", "")
	a := readers[1]
	var status unix.Stat_t
	must(t, unix.Lstat(a.Socket, &status))
	if to, err := os.Readlink(filepath.Join(x.dir, "two")); err != nil || to != a.Socket || status.Mode != unix.S_IFSOCK|0o600 || status.Uid != nobody {
		t.Errorf("the link leads to %q (%v), which is %o of %d; the socket is %q", to, err, status.Mode, status.Uid, a.Socket)
	}
	if i := info(t, a.Launch.URI); i.Size != 64<<20 || !i.ReadOnly || !i.Many {
		t.Errorf("the reader's export is %+v", i)
	}
	image := filepath.Join(t.TempDir(), "image")
	foreign(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", readers[0].Launch.URI, image)
	foreign(t, "nbdcopy", a.Launch.URI, image+".copy")
	foreign(t, "cmp", image, image+".copy")
	foreign(t, "e2fsck", "-fn", image)
	foreign(t, "debugfs", "-R", "dump large "+image+".large", image)
	same(t, image+".large", content)
	for _, a := range readers {
		_, err := x.Detach(ctx, "tools", a.ID)
		must(t, err)
	}
	if left, err := os.ReadDir(x.dir); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}

	x.layered("work", 64)
	a, err = x.export("work", "nbd", "work", nil)
	must(t, err)
	_, err = x.export("work", "nbd", "other", readOnly)
	x.refused(err, "VOLUME_ATTACHED", "writable to agent:work")
	foreign(t, "qemu-io", "-f", "raw", a.Launch.URI, "-c", "write -P 1 1M 8M", "-c", "flush", "-c", "discard 2M 1M", "-c", "read -P 1 1M 1M", "-c", "read -P 0 2M 1M", "-c", "write -z 4M 64k", "-c", "read -P 0 4M 64k", "-c", "read -P 1 8M 1M")
	_, err = x.CreateSnapshot(ctx, "work", client.NewSnapshot{Name: "ones"}, "")
	must(t, err)

	// A client that stays is in the way of the end, but of nothing else.
	stays := greeted(t, filepath.Join(x.dir, "work"))
	size := int64(96)
	_, err = x.UpdateVolume(ctx, "work", client.VolumeChange{SizeMiB: &size})
	must(t, err)
	if i := info(t, a.Launch.URI); i.Size != size<<20 || i.ReadOnly || !i.Trim || !i.Flush {
		t.Errorf("the grown export is %+v", i)
	}
	foreign(t, "qemu-io", "-f", "raw", a.Launch.URI, "-c", "write -P 2 0 1M", "-c", fmt.Sprintf("write -P 2 %d 4k", size<<20-4096), "-c", "flush")
	_, err = x.Detach(ctx, "work", a.ID)
	x.refused(err, "CONFLICT", "a client is connected to the export: it has to hang up first")
	if at, err := x.Attachment(ctx, "work", a.ID); err != nil || at.Phase != "attached" {
		t.Errorf("after a detach that was refused: %+v, %v", at, err)
	}
	if i := info(t, a.Launch.URI); i.Size != size<<20 {
		t.Errorf("after a detach that was refused the export is %+v", i)
	}
	_, err = x.ForceDetach(ctx, "work", a.ID)
	must(t, err)
	must(t, stays.SetReadDeadline(time.Now().Add(patience)))
	if n, err := stays.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("the client that stayed reads %d, %v after a detach by force", n, err)
	}

	x.create("ones", client.VolumeSpec{Snapshot: "work/ones"})
	a, err = x.export("ones", "nbd", "ones", readOnly)
	must(t, err)
	foreign(t, "qemu-io", "-r", "-f", "raw", a.Launch.URI, "-c", "read -P 0 0 1M", "-c", "read -P 1 1M 1M", "-c", "read -P 0 2M 1M", "-c", "read -P 1 5M 4M")
	_, err = x.Detach(ctx, "ones", a.ID)
	must(t, err)
}

// TestExportOutlivesTheDaemon: a copy into a layered volume and back goes on while a
// snapshot is taken and the daemon is killed and comes back: no request fails.
func TestExportOutlivesTheDaemon(t *testing.T) {
	x := newExports(t)
	ctx := t.Context()
	x.layered("work", 64)
	a, err := x.export("work", "nbd", "work", nil)
	must(t, err)
	// A copy lasts until the daemon is back, however long that takes.
	slow, fast := client.RateLimits{WriteBytes: 4 << 20, ReadBytes: 4 << 20}, client.RateLimits{WriteBytes: 256 << 20, ReadBytes: 256 << 20}
	image := filepath.Join(t.TempDir(), "image")
	content := append(noise("copied"), noise("too")...)
	must(t, os.WriteFile(image, content, 0o600))
	for _, args := range [][]string{{"--flush", image, a.Launch.URI}, {a.Launch.URI, image + ".back"}} {
		bounded, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		_, err := x.SetLimits(ctx, "work", a.ID, slow)
		must(t, err)
		before, err := x.IO(ctx, "work")
		must(t, err)
		cmd := exec.CommandContext(bounded, "nbdcopy", args...)
		var said bytes.Buffer
		cmd.Stderr = &said
		must(t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for { // until it is in the midst of it
			now, err := x.IO(ctx, "work")
			must(t, err)
			if now.Worker.Requests["write"].Bytes+now.Worker.Requests["read"].Bytes > before.Worker.Requests["write"].Bytes+before.Worker.Requests["read"].Bytes {
				break
			}
		}
		_, err = x.CreateSnapshot(ctx, "work", client.NewSnapshot{}, "")
		must(t, err)
		x.kill()
		select {
		case err := <-ended:
			t.Fatalf("nbdcopy ended too early: %v\n%s", err, said.Bytes())
		default:
		}
		x.start()
		io, err := x.IO(ctx, "work")
		must(t, err)
		if l := io.Worker.Limits; l == nil || *l != slow {
			t.Errorf("after the daemon's death the worker has limits %+v", l)
		}
		_, err = x.SetLimits(ctx, "work", a.ID, fast)
		must(t, err)
		if err := <-ended; err != nil {
			t.Errorf("nbdcopy %v: %v\n%s", args, err, said.Bytes())
		}
	}
	same(t, image+".back", content)
	io, err := x.IO(ctx, "work")
	must(t, err)
	for kind, done := range io.Worker.Requests {
		if done.Errors > 0 {
			t.Errorf("%d requests to %s failed", done.Errors, kind)
		}
	}
	_, err = x.Detach(ctx, "work", a.ID)
	must(t, err)
}

// TestExportVhostUser: requests that are in flight when the worker is killed are done by
// the next one, which the daemon starts by itself, with the same name and limits.
func TestExportVhostUser(t *testing.T) {
	const depth, rounds, block = 16, 8, 4096
	x := newExports(t)
	ctx := t.Context()
	x.layered("work", 16)
	a, err := x.export("work", "vhost-user", "work", func(a *client.Attachment) {
		a.Limits = &client.RateLimits{WriteIOPS: 200}
	})
	must(t, err)
	f, err := frontend.New(frontend.Options{Depth: depth, Inflight: true})
	must(t, err)
	defer f.Close()
	link := filepath.Join(x.dir, "work")
	must(t, f.Connect(link))
	q := f.Queues[0]
	stop := context.AfterFunc(ctx, q.Abandon)
	defer stop()
	finish := func(n int) {
		t.Helper()
		for n > 0 {
			must(t, q.Wait())
			for _, status, ok := q.Take(); ok; _, status, ok = q.Take() {
				if n--; status != 0 {
					t.Fatalf("a request failed with status %d", status)
				}
			}
		}
	}
	at := func(round, slot int) uint64 { return uint64((round*depth+slot)*block) / 512 }
	for round := range rounds {
		for slot := range depth {
			copy(q.Data(slot), bytes.Repeat([]byte{byte(round*depth + slot + 1)}, block))
			q.Put(slot, frontend.Write, at(round, slot), block)
		}
		must(t, q.Show())
		switch round {
		case 3:
			x.kill()
			x.start()
		case 5:
			killWorker(t, a.Socket)
			f.Hangup()
			connectAgain(t, f, link)
		}
		finish(depth)
	}
	io, err := x.IO(ctx, "work")
	must(t, err)
	if w := io.Worker; w.Clients != 1 || w.Limits == nil || w.Limits.WriteIOPS != 200 || w.Requests["write"].Errors > 0 {
		t.Errorf("the next worker: %+v", w)
	}
	q.Put(0, frontend.Flush, 0, 0)
	must(t, q.Show())
	finish(1)
	for round := range rounds {
		for slot := range depth {
			q.Put(slot, frontend.Read, at(round, slot), block)
		}
		must(t, q.Show())
		finish(depth)
		for slot := range depth {
			if want := bytes.Repeat([]byte{byte(round*depth + slot + 1)}, block); !bytes.Equal(q.Data(slot), want) {
				t.Errorf("block %d of round %d is lost", slot, round)
			}
		}
	}
}

// killWorker kills the process that has a socket, and has the daemon know nothing of it
// but what it sees.
func killWorker(t *testing.T, socket string) {
	t.Helper()
	worker, err := sys.OpenPidfd(workerAt(t, socket))
	must(t, err)
	defer worker.Close()
	must(t, sys.KillProcess(worker))
	bounded, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must(t, sys.AwaitEnd(bounded, worker))
}

// workerAt gives the process that has a socket.
func workerAt(t *testing.T, socket string) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(filepath.Dir(socket), "control.sock")}))
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	must(t, err)
	return int(peer.Pid)
}

// connectAgain connects to a worker that is being started.
func connectAgain(t *testing.T, f *frontend.Frontend, socket string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		err := f.Connect(socket)
		if err == nil {
			return
		}
		if time.Now().After(deadline) || !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
}
