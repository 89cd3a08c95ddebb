package nbdguesttest_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/internal/daemon"
	"holdfast/internal/tarball"
	"holdfast/internal/vmtest"
)

const (
	blockd    = "holdfast/cmd/holdfast-blockd"
	holdfastd = "holdfast/cmd/holdfastd"
	patience  = 2 * time.Minute // the guest's processors are emulated
)

func TestMain(m *testing.M) {
	os.Exit(vmtest.MainWith(m, vmtest.Options{Disks: []int64{4 << 30}}, blockd, holdfastd))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sh(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// node is a daemon, a process of its own, whose pool "plain" is a directory of an ext4:
// it shares no bytes, so volumes of a template are layered.
type node struct {
	t      testing.TB
	root   string // on a disk of the guest
	config daemon.Config
	args   []string
	daemon *exec.Cmd
	*client.Client
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, root: t.TempDir()}
	disk := vmtest.Disks()[0]
	sh(t, "mkfs.ext4 -q -F "+disk+" && mount "+disk+" "+n.root)
	t.Cleanup(func() { sh(t, "umount "+n.root) })
	sh(t, "modprobe nbd && cp "+vmtest.Program(blockd)+" "+n.worker())
	settings := map[string]string{
		"state_dir": filepath.Join(n.root, "state"), "listen": "none", "pool_size": "1GiB", "pool": "plain=sparse:" + filepath.Join(n.root, "plain"), "worker": n.worker(),
		"host_prefixes": filepath.Join(n.root, "attach"), "tenants_attach": "true", "cage": "off", "rate_limit": "0", "backup_interval": "0", "log_level": "warn",
	}
	for name, value := range settings {
		n.args = append(n.args, "--"+strings.ReplaceAll(name, "_", "-")+"="+value)
	}
	var err error
	n.config, err = daemon.Load(daemon.Sources{Flags: settings})
	must(t, err)
	n.Client, err = client.New(client.Options{Socket: n.config.Socket, Workspace: "main"})
	must(t, err)
	t.Cleanup(n.remove)
	n.start()
	_, err = n.CreateWorkspace(t.Context(), "main")
	must(t, err)
	return n
}

// worker is the program of workers, which a test may take away.
func (n *node) worker() string { return filepath.Join(n.root, "holdfast-blockd") }

func (n *node) start() {
	n.t.Helper()
	n.daemon = exec.Command(vmtest.Program(holdfastd), n.args...)
	n.daemon.Stdout, n.daemon.Stderr = n.t.Output(), n.t.Output()
	must(n.t, n.daemon.Start())
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if _, err := n.Workspaces(context.Background()); err == nil || client.IsNotFound(err) { // before there is a workspace
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatal("the daemon does not answer")
		}
	}
}

// end ends the daemon by a signal.
func (n *node) end(s syscall.Signal) {
	n.t.Helper()
	if n.daemon == nil {
		return
	}
	must(n.t, n.daemon.Process.Signal(s))
	err := n.daemon.Wait()
	n.daemon = nil
	n.Client.Close()
	if s == syscall.SIGTERM {
		must(n.t, err)
	}
}

func (n *node) remove() {
	if n.t.Failed() {
		n.explain()
	}
	n.end(syscall.SIGTERM)
	if err := daemon.Uninstall(context.Background(), n.config, n.t.Output()); err != nil {
		n.t.Error(err)
	}
}

// explain shows what the kernel and the pool say of a test that has failed.
func (n *node) explain() {
	for _, line := range []string{
		"dmesg | tail -n 60", "grep -H . /sys/block/nbd*/backend /sys/block/nbd*/size; cat /proc/mounts; cat /proc/loadavg",
		"ls -lsR " + filepath.Join(n.root, "plain", "pool", "images"), "tail -n 40 /run/holdfast/serve-*.log",
	} {
		out, _ := exec.Command("sh", "-c", line).CombinedOutput()
		n.t.Logf("%s:\n%s", line, out)
	}
	if n.daemon == nil {
		return
	}
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	all, _, err := n.IOInUse(ctx)
	n.t.Logf("in use: %+v, %v", all, err)
}

// push makes a template of one file, "large".
func (n *node) push(name string, content []byte) {
	n.t.Helper()
	tree := n.t.TempDir()
	must(n.t, os.WriteFile(filepath.Join(tree, "large"), content, 0o644))
	plan, err := tarball.New(n.t.Context(), tree)
	must(n.t, err)
	archive := plan.Reader()
	defer archive.Close()
	_, err = n.PushTemplate(n.t.Context(), client.Push{Name: name, Archive: archive, Length: plan.Length()})
	must(n.t, err)
}

func (n *node) create(name string, spec client.VolumeSpec) client.Volume {
	n.t.Helper()
	v, err := n.CreateVolume(n.t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: spec}, "")
	must(n.t, err)
	return v
}

// attach mounts a volume at a directory of the guest.
func (n *node) attach(name string, readOnly bool) (at string, a client.Attachment) {
	n.t.Helper()
	at = filepath.Join(n.root, "attach", name)
	must(n.t, os.MkdirAll(at, 0o755))
	a, err := n.Attach(n.t.Context(), name, client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}, ReadOnly: readOnly})
	must(n.t, err)
	return at, a
}

func (n *node) detach(name, id string) {
	n.t.Helper()
	_, err := n.Detach(n.t.Context(), name, id)
	must(n.t, err)
}

func (n *node) await(name, what string, is func(client.Volume) bool) client.Volume {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		v, err := n.Volume(n.t.Context(), name)
		must(n.t, err)
		if is(v) {
			return v
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: %s: %+v", name, what, v.State)
		}
	}
}

// flat waits until a detached volume, the only one, is one file, and checks the filesystem
// in it.
func (n *node) flat(name, check string) {
	n.t.Helper()
	n.await(name, "it does not become flat", func(v client.Volume) bool {
		return v.State.Sizes.Hydration == nil && v.State.Sizes.Pending == ""
	})
	images, err := filepath.Glob(filepath.Join(n.root, "plain", "pool", "images", "vol-*", "image"))
	must(n.t, err)
	if len(images) != 1 {
		n.t.Fatalf("flat images: %v", images)
	}
	sh(n.t, check+" "+images[0])
}

// device is the one that is mounted at a directory.
func device(t testing.TB, at string) string {
	t.Helper()
	return sh(t, "awk -v at="+at+" '$2 == at { print $1 }' /proc/mounts")
}

// workers are the processes that serve volumes.
func workers(t testing.TB) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/comm")
	must(t, err)
	for _, path := range all {
		if name, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(name)) == "holdfast-blockd" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			must(t, err)
			pids = append(pids, pid)
		}
	}
	return pids
}

// nothingLeft checks that no worker runs, and that the kernel's client has no device of
// ours.
func nothingLeft(t testing.TB) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		left, _ = filepath.Glob("/sys/block/nbd*/backend")
		if len(left) == 0 && len(workers(t)) == 0 {
			return
		}
	}
	t.Errorf("left: devices %v, workers %v", left, workers(t))
}
