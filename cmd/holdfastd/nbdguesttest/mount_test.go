package nbdguesttest_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/api/client"
)

// template has some bytes that differ from block to block.
func template() []byte {
	var b []byte
	for sum := sha256.Sum256(nil); len(b) < 24<<20; sum = sha256.Sum256(sum[:]) {
		b = append(b, bytes.Repeat(sum[:], 128)...)
	}
	return b
}

// writer appends to a file and flushes, until it is stopped, as a database's log does.
type writer struct {
	stop  chan struct{}
	ended chan error
	path  string
	done  int64 // records
}

const record = 4096

func startWriter(path string) *writer {
	w := &writer{stop: make(chan struct{}), ended: make(chan error, 1), path: path}
	go func() { w.ended <- w.run() }()
	return w
}

func (w *writer) run() error {
	f, err := os.Create(w.path)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		select {
		case <-w.stop:
			return nil
		default:
		}
		line := bytes.Repeat([]byte{byte(w.done)}, record)
		if _, err := f.Write(line); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		w.done++
	}
}

// end stops it, and checks what it has written.
func (w *writer) end(t testing.TB) {
	t.Helper()
	close(w.stop)
	if err := <-w.ended; err != nil {
		t.Fatalf("the writer after %d records: %v", w.done, err)
	}
	got, err := os.ReadFile(w.path)
	if err != nil || int64(len(got)) != w.done*record {
		t.Fatalf("%d bytes of %d records, %v", len(got), w.done, err)
	}
	for i := range w.done {
		if got[i*record] != byte(i) {
			t.Fatalf("record %d is %d", i, got[i*record])
		}
	}
}

// TestMountedWhileLayered: a volume that is not flat is mounted at once; it goes on over
// restarts and kills of the daemon and the death of its worker, of which whoever uses it
// sees no error; it grows, has snapshots, and leaves nothing when it is detached.
func TestMountedWhileLayered(t *testing.T) {
	n := newNode(t)
	content := template()
	n.push("tools", content)
	for _, fs := range []struct {
		name, check string
		size        int64
	}{{"ext4", "e2fsck -fn", 64}, {"xfs", "xfs_repair -n", 320}} {
		passed := t.Run(fs.name, func(t *testing.T) {
			outer := n.t
			n.t = t
			defer func() { n.t = outer }()
			n.mounted(fs.name, fs.check, fs.size, content)
		})
		if !passed { // its volume is still there
			break
		}
	}
}

func (n *node) mounted(fs, check string, size int64, content []byte) {
	t, ctx, name := n.t, n.t.Context(), "v"+fs
	v := n.create(name, client.VolumeSpec{Size: size, Pool: "plain", Template: "tools", Filesystem: fs})
	if h := v.State.Sizes.Hydration; h == nil || h.Absent < int64(len(content)) {
		t.Fatalf("it is no layered volume: %+v", v.State.Sizes)
	}
	at, a := n.attach(name, false)
	from := device(t, at)
	if !strings.HasPrefix(from, "/dev/nbd") || a.Kind != "block" || len(workers(t)) != 1 {
		t.Fatalf("mounted from %q, kind %q, workers %v", from, a.Kind, workers(t))
	}
	holds(t, at+"/large", content)

	w := startWriter(at + "/log")
	n.end(syscall.SIGTERM)
	n.start()
	n.end(syscall.SIGKILL)
	old := workers(t)
	must(t, syscall.Kill(old[0], syscall.SIGKILL)) // nobody is there to see it
	n.start()
	n.anotherWorker(old[0])
	w.end(t)

	w = startWriter(at + "/log2")
	for range 2 {
		old = workers(t)
		lived(t, old[0], 1500*time.Millisecond)
		must(t, syscall.Kill(old[0], syscall.SIGKILL))
		n.anotherWorker(old[0])
	}
	w.end(t)

	must(t, os.WriteFile(at+"/mine", []byte("before"), 0o644))
	sh(t, "sync -f "+at)
	_, err := n.CreateSnapshot(ctx, name, client.NewSnapshot{Name: "one"}, "")
	must(t, err)
	must(t, os.WriteFile(at+"/mine", []byte("after"), 0o644))
	larger := 2 * size
	_, err = n.UpdateVolume(ctx, name, client.VolumeChange{SizeMiB: &larger})
	must(t, err)
	n.await(name, "it does not grow", func(v client.Volume) bool {
		return v.State.Sizes.Pending == "" && v.State.Sizes.Filesystem > (larger-size/2)<<20
	})
	sh(t, fmt.Sprintf("fallocate -l %dM %s/space", size, at)) // more than there was
	filler := bytes.Repeat([]byte{7}, 16<<20)                 // the guest has little memory
	must(t, os.WriteFile(at+"/filler", filler, 0o644))
	sh(t, "sync -f "+at)
	if now := device(t, at); now != from {
		t.Errorf("mounted from %s, was %s", now, from)
	}
	n.detach(name, a.ID)
	nothingLeft(t)

	fork := n.create("f"+fs, client.VolumeSpec{Snapshot: name + "/one"})
	forkAt, forkA := n.attach("f"+fs, true)
	holds(t, forkAt+"/mine", []byte("before"))
	if err := os.WriteFile(forkAt+"/mine", nil, 0o644); !errors.Is(err, syscall.EROFS) {
		t.Errorf("a reader writes: %v", err)
	}
	n.detach("f"+fs, forkA.ID)
	for _, gone := range []func() error{
		func() error { _, err := n.DeleteVolume(ctx, fork.Metadata.Name); return err },
		func() error { _, err := n.DeleteSnapshot(ctx, name, "one"); return err },
	} {
		must(t, gone())
	}
	n.flat(name, check)
	at, a = n.attach(name, false)
	if from := device(t, at); !strings.HasPrefix(from, "/dev/loop") {
		t.Errorf("flat, it is mounted from %s", from)
	}
	holds(t, at+"/mine", []byte("after"))
	holds(t, at+"/large", content)
	holds(t, at+"/filler", filler)
	n.detach(name, a.ID)
	nothingLeft(t)
	_, err = n.DeleteVolume(ctx, name)
	must(t, err)
	n.reclaimed()
}

// TestForcedWhileLayered takes a volume from who has a file of it open, once while its
// worker runs, and once while none can be started: the file is dead, and the volume is
// not.
func TestForcedWhileLayered(t *testing.T) {
	n, ctx, content := newNode(t), t.Context(), template()
	n.push("tools", content)
	for _, unserved := range []bool{false, true} {
		n.create("f", client.VolumeSpec{Size: 64, Pool: "plain", Template: "tools"}) // a new one is layered
		at, a := n.attach("f", false)
		held, err := os.Create(fmt.Sprintf("%s/held%v", at, unserved))
		must(t, err)
		_, err = held.WriteString("kept")
		must(t, errors.Join(err, held.Sync()))
		defer held.Close()
		if unserved {
			must(t, os.Rename(n.worker(), n.worker()+".away"))
			must(t, syscall.Kill(workers(t)[0], syscall.SIGKILL))
		} else if _, err := n.Detach(ctx, "f", a.ID); err == nil {
			t.Fatal("it is detached from who has a file open")
		}
		_, err = n.ForceDetach(ctx, "f", a.ID)
		must(t, err)
		_, err = held.WriteString("more")
		if err = errors.Join(err, held.Sync()); !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.EROFS) {
			t.Errorf("who had it writes: %v", err)
		}
		if unserved {
			must(t, os.Rename(n.worker()+".away", n.worker()))
		}
		n.use("f", func(at string) { // beside the dead one
			holds(t, fmt.Sprintf("%s/held%v", at, unserved), []byte("kept"))
			holds(t, at+"/large", content)
		})
		held.Close()
		nothingLeft(t)
		_, err = n.DeleteVolume(ctx, "f")
		must(t, err)
		n.reclaimed()
	}
}

// TestDetachedWhileWorkersDie: each worker that a detach has is killed, young as it is, and
// the detach comes to its end with all that was written.
func TestDetachedWhileWorkersDie(t *testing.T) {
	n, content := newNode(t), template()
	n.push("tools", content)
	for round := range 3 {
		n.create("d", client.VolumeSpec{Size: 64, Pool: "plain", Template: "tools"}) // a new one is layered
		at, a := n.attach("d", false)
		mine := bytes.Repeat([]byte{byte(round + 1)}, 8<<20)
		must(t, os.WriteFile(at+"/mine", mine, 0o644)) // not flushed: the detach has to write it
		stop, stopped := make(chan struct{}), make(chan int, 1)
		go func() { stopped <- killWorkers(t, 4, stop) }()
		_, err := n.Detach(t.Context(), "d", a.ID)
		t.Logf("detach, in the time that it has: %v", err)
		n.await("d", "it is not detached", func(v client.Volume) bool { return len(v.State.Attachments) == 0 })
		close(stop)
		t.Logf("%d workers were killed", <-stopped)
		nothingLeft(t)
		n.use("d", func(at string) {
			holds(t, at+"/mine", mine)
			holds(t, at+"/large", content)
		})
		n.flat("d", "e2fsck -fn")
		_, err = n.DeleteVolume(t.Context(), "d")
		must(t, err)
		n.reclaimed()
	}
}

// TestSlowWorker: who writes to a volume whose worker answers nothing for longer than the
// kernel waits until it looks (io_timeout) sees no error, and the worker stays.
func TestSlowWorker(t *testing.T) {
	n := newNode(t)
	n.push("tools", template())
	n.create("s", client.VolumeSpec{Size: 64, Pool: "plain", Template: "tools"})
	at, a := n.attach("s", false)
	w, before := startWriter(at+"/log"), workers(t)
	sh(t, "dmesg -c")
	must(t, syscall.Kill(before[0], syscall.SIGSTOP))
	for deadline := time.Now().Add(patience); strings.Count(sh(t, "dmesg"), "Possible stuck request") < 2; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("nobody looks: %s", sh(t, "dmesg"))
			break
		}
	}
	must(t, syscall.Kill(before[0], syscall.SIGCONT))
	w.end(t)
	if now := workers(t); len(now) != 1 || now[0] != before[0] {
		t.Errorf("workers %v, were %v", now, before)
	}
	n.detach("s", a.ID)
	nothingLeft(t)
}

// TestLostConnection: the only connection of a worker that lives ends, again and again, while
// somebody writes and while the volume is detached. There is another one each time, and
// nobody sees an error.
func TestLostConnection(t *testing.T) {
	n := newNode(t)
	n.push("tools", template())
	n.create("l", client.VolumeSpec{Size: 64, Pool: "plain", Template: "tools"})
	at, a := n.attach("l", false)
	w, worker := startWriter(at+"/log"), workers(t)[0]
	if shut := shutConnections(t, worker, 1, nil); shut != 1 {
		t.Errorf("%d connections were ended", shut)
	}
	sh(t, "sync -f "+at)
	w.end(t)
	mine := bytes.Repeat([]byte{9}, 8<<20)
	must(t, os.WriteFile(at+"/mine", mine, 0o644)) // not flushed: the detach has to write it
	stop, stopped := make(chan struct{}), make(chan int, 1)
	go func() { stopped <- shutConnections(t, worker, 4, stop) }()
	_, err := n.Detach(t.Context(), "l", a.ID)
	t.Logf("detach, in the time that it has: %v", err)
	n.await("l", "it is not detached", func(v client.Volume) bool { return len(v.State.Attachments) == 0 })
	close(stop)
	t.Logf("%d connections were ended", <-stopped)
	nothingLeft(t)
	n.use("l", func(at string) { holds(t, at+"/mine", mine) })
}

// shutPause is between two, so that a detach comes to where it needs the device.
const shutPause = 200 * time.Millisecond

// shutConnections ends so many connections of a worker to the kernel's client as they
// come, or fewer when it is stopped or the worker has ended, and tells how many.
func shutConnections(t testing.TB, worker, most int, stop <-chan struct{}) (shut int) {
	pidfd, err := unix.PidfdOpen(worker, 0)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer unix.Close(pidfd)
	for shut < most {
		select {
		case <-stop:
			return shut
		case <-time.After(shutPause):
		}
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", worker))
		if err != nil {
			return shut
		}
		for _, f := range files {
			number, err := strconv.Atoi(f.Name())
			if err == nil && shutConnection(pidfd, number) {
				shut++
			}
		}
	}
	return shut
}

// shutConnection ends a connection, if that is one which has not ended.
func shutConnection(pidfd, number int) bool {
	fd, err := unix.PidfdGetfd(pidfd, number, 0)
	if err != nil {
		return false // closed meanwhile
	}
	defer unix.Close(fd)
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_STREAM {
		return false
	}
	if _, err := unix.Getpeername(fd); err != nil {
		return false
	}
	return unix.Shutdown(fd, unix.SHUT_RDWR) == nil
}

// killWorkers kills so many workers as they come, or fewer when it is stopped, and tells
// how many.
func killWorkers(t testing.TB, most int, stop <-chan struct{}) (killed int) {
	for last := 0; killed < most; time.Sleep(time.Millisecond) {
		select {
		case <-stop:
			return killed
		default:
		}
		if now := workers(t); len(now) == 1 && now[0] != last {
			last = now[0]
			if err := syscall.Kill(last, syscall.SIGKILL); err == nil {
				killed++
			}
		}
	}
	return killed
}

// use attaches a volume, lets somebody look at it, and detaches it.
func (n *node) use(name string, look func(at string)) {
	n.t.Helper()
	at, a := n.attach(name, false)
	look(at)
	n.detach(name, a.ID)
}

// anotherWorker waits until a worker serves that is not this one.
func (n *node) anotherWorker(old int) {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if now := workers(n.t); len(now) == 1 && now[0] != old {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("workers %v, the one before was %d", workers(n.t), old)
		}
	}
}

// lived waits until a process has lived for a while: one that dies young is followed
// later.
func lived(t testing.TB, pid int, d time.Duration) {
	t.Helper()
	for {
		info, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		must(t, err)
		if time.Since(info.ModTime()) >= d {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// reclaimed waits until the pool has given the space of what was deleted back.
func (n *node) reclaimed() {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		left, err := filepath.Glob(filepath.Join(n.root, "plain", "pool", "trash", "*"))
		must(n.t, err)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("in the trash: %v", left)
		}
	}
}

func holds(t testing.TB, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes, not the %d that it should, %v", path, len(got), len(want), err)
	}
}
