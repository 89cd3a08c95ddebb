package main_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/blockdev/blockdevtest"
)

// buildWorker builds the program that serves volumes by sockets, once. It is not beside
// holdfastd: a daemon has workers when a test says so.
func buildWorker(t testing.TB) string {
	t.Helper()
	path, err := builtWorker()
	must(t, err)
	return path
}

var builtWorker = sync.OnceValues(func() (string, error) {
	path := filepath.Join(filepath.Dir(holdfastd), "worker", "holdfast-blockd")
	build := exec.Command("go", "build", "-o", path, "holdfast/cmd/holdfast-blockd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as it is installed: what it gives up holds for all its threads
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return path, nil
})

// TestLayeredVolumes: in a pool that cannot share bytes a volume of a template is there
// at once, is served by a worker that outlives the daemon, and becomes one file for who
// needs that.
func TestLayeredVolumes(t *testing.T) {
	blockdevtest.Require(t, blockdevtest.Root, blockdevtest.Loop, blockdevtest.Ext4, blockdevtest.XFS)
	worker := buildWorker(t)
	second := t.TempDir() // ext4 has no reflink
	n := newNode(t, "--pool", "second=sparse:"+second, "--worker", worker)
	ctx := t.Context()
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	tree := t.TempDir()
	must(t, os.WriteFile(filepath.Join(tree, "large"), content, 0o644))
	n.push("tools", tree)
	for _, name := range []string{"served", "mounted"} {
		v := n.create(name, client.VolumeSpec{Size: 64, Pool: "second", Template: "tools"})
		if h := v.State.Sizes.Hydration; v.Status != "DEPLOYED" || h == nil || h.Absent < int64(len(content)) || h.Total != 64<<20 {
			t.Fatalf("%s is %s, %+v, hydration %+v", name, v.Status, v.State.Sizes, h)
		}
	}

	a, err := n.Attach(ctx, "served", client.Attachment{Holder: "agent:backup", Target: client.Target{Type: "export", Protocol: "nbd"}})
	must(t, err)
	if a.Kind != "nbd" || a.Socket == "" {
		t.Fatalf("attached: %+v", a)
	}
	before := greeted(t, a.Socket)
	n.kill()
	n.start()
	again, err := n.Attachment(ctx, "served", a.ID)
	must(t, err)
	if again.Phase != "attached" || again.Socket != a.Socket {
		t.Errorf("after the daemon was killed: %+v", again)
	}
	must(t, before.SetReadDeadline(time.Now()))
	if _, err := before.Read(make([]byte, 1)); !os.IsTimeout(err) { // its end would be EOF
		t.Errorf("the connection to the worker: %v", err)
	}
	must(t, before.Close())
	_, err = n.Detach(ctx, "served", a.ID)
	must(t, err)
	if c, err := net.Dial("unix", a.Socket); err == nil {
		_ = c.Close()
		t.Error("the worker serves a volume that is detached")
	}

	at := filepath.Join(n.state, "attach", "there")
	must(t, os.MkdirAll(at, 0o755))
	n.kill()
	n.start()
	a, err = n.Attach(ctx, "mounted", client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}})
	must(t, err)
	if got, err := os.ReadFile(filepath.Join(at, "large")); a.Kind != "block" || err != nil || !bytes.Equal(got, content) {
		t.Errorf("as %q: %d bytes of the template's file, %v", a.Kind, len(got), err)
	}
	v, err := n.Volume(ctx, "mounted")
	must(t, err)
	if v.State.Sizes.Hydration != nil {
		t.Errorf("mounted, and %+v", v.State.Sizes.Hydration)
	}
	_, err = n.Detach(ctx, "mounted", a.ID)
	must(t, err)
}

// greeted connects to an NBD server and returns once that has begun to speak.
func greeted(t *testing.T, socket string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", socket)
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	must(t, c.SetReadDeadline(time.Now().Add(patience)))
	b := make([]byte, 18)
	if _, err := io.ReadFull(c, b); err != nil || string(b[:8]) != "NBDMAGIC" {
		t.Fatalf("%q, %v", b, err)
	}
	return c
}
