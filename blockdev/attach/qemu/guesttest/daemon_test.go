package guesttest_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/control"
)

// asDaemon has this program start a worker, as a daemon does, and live until it is
// killed. It holds what is to be served, in JSON.
const asDaemon = "HOLDFAST_TEST_DAEMON"

func TestMain(m *testing.M) {
	if text := os.Getenv(asDaemon); text != "" {
		if err := beDaemon(text); err != nil {
			fmt.Println(err)
		}
		return
	}
	os.Exit(m.Run())
}

// served is what a daemon has a worker serve.
type served struct {
	Program, Dir    string
	ID              blockdev.ID
	Size            int64
	Flat            string // or
	Base, Data, Map string
	Hydrate         bool
	Rate            int64 // of it, while the guest is active, bytes a second
}

func beDaemon(text string) error {
	var v served
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return err
	}
	spec, err := v.spec()
	if err != nil {
		return err
	}
	s, err := control.New(control.Options{Program: v.Program, Dir: v.Dir, Log: os.Stderr})
	if err != nil {
		return err
	}
	if _, err := s.Serve(context.Background(), spec); err != nil {
		return err
	}
	fmt.Println("ready")
	_, err = os.Stdin.Read(make([]byte, 1))
	return err
}

func (v served) spec() (spec control.Spec, err error) {
	open := func(path string, flags int) *os.File {
		f, failed := os.OpenFile(path, flags|syscall.O_DIRECT, 0)
		err = errors.Join(err, failed)
		return f
	}
	spec = control.Spec{ID: v.ID, Kind: blockdev.VhostUser, Size: v.Size, Queues: 2, HydrateRate: v.Rate}
	if v.Flat != "" {
		spec.Flat = open(v.Flat, os.O_RDWR)
		return spec, err
	}
	spec.Layers = []control.Layer{{Data: open(v.Data, os.O_RDWR), Map: open(v.Map, os.O_RDWR)}}
	spec.Base, spec.BaseSize, spec.Hydrate = open(v.Base, os.O_RDONLY), v.Size, v.Hydrate
	return spec, err
}

// daemons start workers that outlive them. The test's end ends those.
type daemons struct {
	*control.Starter
	program, dir string
}

func newDaemons(t *testing.T) *daemons {
	t.Helper()
	d := &daemons{program: filepath.Join(t.TempDir(), "holdfast-blockd")}
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", d.program, "holdfast/cmd/holdfast-blockd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as it is delivered
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var err error
	if d.dir, err = os.MkdirTemp("/tmp", "w"); err == nil { // a socket's address is short
		d.Starter, err = control.New(control.Options{Program: d.program, Dir: d.dir})
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ids, err := d.List(context.Background())
		for _, id := range ids {
			w, failed := d.Find(context.Background(), id)
			if err = errors.Join(err, failed); failed == nil {
				err = errors.Join(err, w.Kill(context.Background()))
			}
		}
		if err := errors.Join(err, os.RemoveAll(d.dir)); err != nil {
			t.Error(err)
		}
	})
	return d
}

// serve has a daemon of its own start the volume's worker. kill ends that daemon.
func (d *daemons) serve(t *testing.T, v served) (w *control.Worker, kill func()) {
	t.Helper()
	v.Program, v.Dir = d.program, d.dir
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), asDaemon+"="+string(text))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = func() { _ = cmd.Process.Kill(); _ = cmd.Wait(); stdin.Close() }
	t.Cleanup(kill)
	if said, err := bufio.NewReader(stdout).ReadString('\n'); said != "ready\n" {
		t.Fatalf("the daemon: %q, %v", said, err)
	}
	if w, err = d.Find(t.Context(), v.ID); err != nil {
		t.Fatal(err)
	}
	return w, kill
}
