package main_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"holdfast/blockdev"
	"holdfast/blockdev/blockdevtest"
	"holdfast/blockdev/serve/control"
	"holdfast/blockdev/serve/vhost/frontend"
)

// failsOnce is a file whose first flush fails, and whose later ones succeed, as a
// kernel's do that has dropped what it could not write.
func failsOnce(t *testing.T) *os.File {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Fuse, blockdevtest.PowerCut)
	dir := t.TempDir()
	disk, shown := filepath.Join(dir, "disk"), filepath.Join(dir, "image")
	must(t, errors.Join(os.WriteFile(disk, make([]byte, size), 0o600), os.WriteFile(shown, nil, 0o600)))
	words := func(v map[string]any) string {
		b, err := json.Marshal(v)
		must(t, err)
		return string(b)
	}
	cmd := exec.Command("qemu-storage-daemon",
		"--blockdev", words(map[string]any{"driver": "file", "node-name": "disk", "filename": disk}),
		"--blockdev", words(map[string]any{"driver": "blkdebug", "node-name": "fails", "image": "disk",
			"inject-error": []any{map[string]any{"event": "none", "iotype": "flush", "once": true, "errno": int(syscall.EIO)}}}),
		"--export", words(map[string]any{"type": "fuse", "id": "image", "node-name": "fails", "mountpoint": shown, "writable": true}),
		"--pidfile", filepath.Join(dir, "pid")) // written when the export is there
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, "pid")); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("qemu-storage-daemon exports nothing")
		}
	}
	f, err := os.OpenFile(shown, os.O_RDWR|syscall.O_DIRECT, 0)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// TestAFailedSyncIsForEver: after one that failed no write and no flush of the file is
// acknowledged, though the next sync would succeed; what was read can be read still.
func TestAFailedSyncIsForEver(t *testing.T) {
	s, ctx := starter(t, nil), t.Context()
	for _, kind := range []blockdev.Kind{blockdev.VhostUser, blockdev.NBD} {
		t.Run(string(kind), func(t *testing.T) {
			w, err := s.Serve(ctx, control.Spec{ID: volumeID, Kind: kind, Size: size, Flat: failsOnce(t)})
			must(t, err)
			connect := askVhost
			if kind == blockdev.NBD {
				connect = askNBD
			}
			write, flush, read := connect(t, w)
			if !write() || !read() {
				t.Fatal("the disk fails before it is to")
			}
			for n := range 3 {
				if flush() {
					t.Errorf("flush %d is acknowledged", n)
				}
				if write() {
					t.Errorf("write %d after a failed flush is acknowledged", n)
				}
			}
			if !read() {
				t.Error("it cannot be read any more")
			}
			st, err := w.Status(ctx)
			must(t, err)
			if st.Failed == "" {
				t.Error("the status does not say that it has failed")
			}
			if err := w.Stop(ctx); !errors.Is(err, blockdev.ErrFailed) {
				t.Errorf("ended: %v", err)
			}
		})
	}
}

// askVhost gives requests by a machine's disk, which tell whether they succeeded.
func askVhost(t *testing.T, w *control.Worker) (write, flush, read func() bool) {
	g := newGuest(t, frontend.Options{})
	must(t, g.f.Connect(w.Socket()))
	return func() bool { return g.do(frontend.Write, 8, block) == 0 },
		func() bool { return g.do(frontend.Flush, 0, 0) == 0 },
		func() bool { return g.do(frontend.Read, 8, block) == 0 }
}

// askNBD is askVhost for a client of NBD.
func askNBD(t *testing.T, w *control.Worker) (write, flush, read func() bool) {
	c := dialNBD(t, w.Socket())
	return func() bool { return c.ask(1, block, block, make([]byte, block)) == 0 },
		func() bool { return c.ask(3, 0, 0, nil) == 0 },
		func() bool {
			failed := c.ask(0, block, block, nil)
			if failed == 0 {
				c.take(block)
			}
			return failed == 0
		}
}
