package main_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/vhost/frontend"
)

// asDaemon makes this test program a daemon, to be killed: it has what it serves.
const asDaemon = "BLOCKD_TEST_DAEMON"

// daemonWords is what such a daemon is told.
type daemonWords struct {
	Program, Dir, Cgroup string
	Flat                 string
	Top                  [2]string // of a layered image
	Next                 [2]string // to put on top; the daemon says so and stands still in the record
	Kind                 blockdev.Kind
	DieWithParent        bool
}

func open(path string) *os.File {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		panic(err)
	}
	return f
}

// beDaemon serves, says the worker's process, and waits for its end.
func beDaemon(words string) {
	var d daemonWords
	if err := json.Unmarshal([]byte(words), &d); err != nil {
		panic(err)
	}
	s, err := control.New(control.Options{Program: d.Program, Dir: d.Dir, Cgroup: d.Cgroup, Log: os.Stderr, DieWithParent: d.DieWithParent})
	if err != nil {
		panic(err)
	}
	spec := control.Spec{ID: volumeID, Kind: d.Kind, Size: size}
	if d.Flat != "" {
		spec.Flat = open(d.Flat)
	} else {
		spec.Layers = []control.Layer{{Data: open(d.Top[0]), Map: open(d.Top[1])}}
	}
	w, err := s.Serve(context.Background(), spec)
	if err != nil {
		panic(err)
	}
	fmt.Println(w.Pid())
	if d.Next[0] != "" {
		_, err := w.Seal(context.Background(), control.Layer{Data: open(d.Next[0]), Map: open(d.Next[1])}, func() error {
			fmt.Println("recording")
			select {}
		})
		panic(err)
	}
	select {}
}

// daemon is a daemon that can be killed.
type daemon struct {
	cmd    *exec.Cmd
	said   *bufio.Scanner
	worker int
}

// startDaemon starts one. Its worker ends with this test at the latest: a warden kills
// it when the pipe to this process is closed, however that comes.
func startDaemon(t *testing.T, d daemonWords) *daemon {
	t.Helper()
	words, err := json.Marshal(d)
	must(t, err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asDaemon+"="+string(words))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	r := &daemon{cmd: cmd, said: bufio.NewScanner(out)}
	r.worker, err = strconv.Atoi(r.says(t))
	must(t, err)
	warden := exec.Command("sh", "-c", "read x; kill -9 "+strconv.Itoa(r.worker))
	pipe, err := warden.StdinPipe()
	must(t, err)
	must(t, warden.Start())
	t.Cleanup(func() { pipe.Close(); _ = warden.Wait() }) // whatever it finds
	return r
}

func (d *daemon) says(t *testing.T) string {
	t.Helper()
	if !d.said.Scan() {
		t.Fatalf("the daemon says nothing: %v", d.said.Err())
	}
	return strings.TrimSpace(d.said.Text())
}

func (d *daemon) kill(t *testing.T) {
	t.Helper()
	must(t, d.cmd.Process.Kill())
	_ = d.cmd.Wait() // killed, as wanted
}

// TestDaemonKilledUnderLoad: no request fails or waits, a next daemon finds the worker
// and its figures go on, and it ends as told.
func TestDaemonKilledUnderLoad(t *testing.T) {
	var o control.Options
	s := starter(t, func(to *control.Options) { o = *to })
	f := image(t, size)
	d := startDaemon(t, daemonWords{Program: o.Program, Dir: o.Dir, Cgroup: o.Cgroup, Flat: f.Name(), Kind: blockdev.VhostUser})
	w, err := s.Find(t.Context(), volumeID)
	must(t, err)
	if w.Pid() != d.worker {
		t.Fatalf("found %d, the daemon started %d", w.Pid(), d.worker)
	}
	l := newLoad(t)
	l.connect(w.Socket())
	var before uint64
	l.run(4000, func(done int) {
		if done == 1000 {
			before = requests(t, w)
			d.kill(t)
		}
	})
	found, err := s.Serve(t.Context(), control.Spec{ID: volumeID, Kind: blockdev.VhostUser, Size: size, Flat: f})
	must(t, err)
	if found.Pid() != d.worker {
		t.Errorf("process %d serves, %d did", found.Pid(), d.worker)
	}
	if after := requests(t, found); before < 1000 || after < 4000 {
		t.Errorf("%d requests were counted, and %d in the end", before, after)
	}
	l.verify()
	must(t, found.Stop(t.Context()))
}

func requests(t *testing.T, w *control.Worker) (n uint64) {
	t.Helper()
	st, err := w.Status(t.Context())
	must(t, err)
	for _, k := range st.Meter.Kinds {
		n += k.Requests
	}
	return n
}

// TestWorkersComeAndGoUnderLoad: a virtual machine's requests go on in the next worker
// when one is killed, and when one is replaced: none fails, none is lost.
func TestWorkersComeAndGoUnderLoad(t *testing.T) {
	s := starter(t, nil)
	spec := flat(t, blockdev.VhostUser)
	w, err := s.Serve(t.Context(), spec)
	must(t, err)
	l := newLoad(t)
	l.connect(w.Socket())
	pids := map[int]bool{w.Pid(): true}
	next := 200
	l.run(3000, func(done int) {
		if done < next {
			return
		}
		if next += 200; next%400 == 0 {
			must(t, syscall.Kill(w.Pid(), syscall.SIGKILL))
		} else {
			must(t, w.Stop(t.Context()))
		}
		w, err = s.Serve(t.Context(), spec)
		must(t, err)
		pids[w.Pid()] = true
		l.connect(w.Socket())
	})
	l.verify()
	if len(pids) < 10 {
		t.Errorf("%d workers served", len(pids))
	}
	must(t, w.Stop(t.Context()))
}

// TestDaemonKilledInASeal: all goes on, flushes too, and the next daemon settles the
// record. A worker that is killed before that loses nothing: all went to the layer that
// is recorded either way.
func TestDaemonKilledInASeal(t *testing.T) {
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
	d.kill(t)
	w, err := s.Find(t.Context(), volumeID)
	must(t, err)
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	g.f.Queues[0].Data(0)[0] = 9
	g.good(frontend.Write, 0, block)
	g.good(frontend.Flush, 0, 0)
	plain, got := open(top.Data.Name()), make([]byte, block)
	_, err = plain.ReadAt(got, 0)
	must(t, errors.Join(err, plain.Close()))
	if got[0] != 9 {
		t.Errorf("the recorded layer has %d", got[0])
	}
	if err := w.Stop(t.Context()); err == nil {
		t.Fatal("it ended with a change that nobody recorded")
	}
	settled := 0
	must(t, w.Settle(t.Context(), func(c control.Change) error {
		if settled++; !strings.HasSuffix(next.Data.Name(), "/"+c.Sealed) {
			t.Errorf("asked to record %+v, sealed %s", c, next.Data.Name())
		}
		return nil
	}))
	must(t, w.Settle(t.Context(), func(control.Change) error { settled++; return nil }))
	st, err := w.Status(t.Context())
	must(t, err)
	if settled != 1 || st.Layers == nil || st.Layers.Sealed != 1 || st.Failed != "" {
		t.Errorf("settled %d times, %+v", settled, st.Layers)
	}
	must(t, w.Stop(t.Context()))
}
