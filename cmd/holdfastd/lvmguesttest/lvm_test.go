package lvmguesttest_test

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api/client"
	"holdfast/internal/daemon"
	"holdfast/internal/tarball"
	"holdfast/internal/vmtest"
)

func TestMain(m *testing.M) {
	os.Exit(vmtest.Main(m, vmtest.Options{Disks: []int64{4 << 30, 4 << 30}}))
}

const patience = 60 * time.Second

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

// node is a daemon in this process.
type node struct {
	t      testing.TB
	root   string // on a disk of the guest
	config daemon.Config
	end    context.CancelFunc
	ended  chan error
	*client.Client
}

// newNode makes the group vg with the thin pool thin, and starts a daemon that has it
// as pool "thin"; its state is on an ext4 of its own.
func newNode(t *testing.T) *node {
	t.Helper()
	disks := vmtest.Disks()
	n := &node{t: t, root: t.TempDir()}
	sh(t, "mkfs.ext4 -q "+disks[0]+" && mount "+disks[0]+" "+n.root)
	t.Cleanup(func() { sh(t, "umount "+n.root) })
	sh(t, "vgcreate -qq -s 4m vg "+disks[1]+" && lvcreate -qq -y -L 1536m -T vg/thin")

	state := filepath.Join(n.root, "state")
	var err error
	n.config, err = daemon.Load(daemon.Sources{Flags: map[string]string{
		"state_dir": state, "listen": "none", "pool_size": "1GiB", "pool": "lvm:vg/thin",
		"host_prefixes": filepath.Join(n.root, "attach"), "tenants_attach": "true", "cage": "off", "rate_limit": "0", "backup_interval": "0", "log_level": "warn",
	}})
	must(t, err)
	n.Client, err = client.New(client.Options{Socket: n.config.Socket, Workspace: "main"})
	must(t, err)
	t.Cleanup(n.remove)
	n.start()
	_, err = n.CreateWorkspace(t.Context(), "main")
	must(t, err)
	return n
}

func (n *node) start() {
	n.t.Helper()
	ctx, end := context.WithCancel(context.Background())
	n.end, n.ended = end, make(chan error, 1)
	go func() { n.ended <- daemon.Serve(ctx, n.config, io.Discard, n.t.Output()) }()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := n.Workspaces(ctx); err == nil || client.IsNotFound(err) { // before there is a workspace
			return
		}
		select {
		case err := <-n.ended:
			n.ended = nil
			n.t.Fatalf("the daemon ends: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			n.t.Fatal("the daemon does not answer")
		}
	}
}

func (n *node) stop() {
	n.t.Helper()
	if n.ended == nil {
		return
	}
	n.end()
	err := <-n.ended
	n.ended = nil
	n.Client.Close()
	must(n.t, err)
}

func (n *node) remove() {
	n.stop()
	if err := daemon.Uninstall(context.Background(), n.config, n.t.Output()); err != nil {
		n.t.Error(err)
	}
}

func (n *node) create(name string, spec client.VolumeSpec) client.Volume {
	n.t.Helper()
	v, err := n.CreateVolume(n.t.Context(), client.Volume{Metadata: client.VolumeMetadata{Name: name}, Spec: spec}, "")
	must(n.t, err)
	return v
}

// push makes a template with one file, "tool".
func (n *node) push(name, content string) {
	n.t.Helper()
	tree := n.t.TempDir()
	must(n.t, os.WriteFile(filepath.Join(tree, "tool"), []byte(content), 0o755))
	plan, err := tarball.New(n.t.Context(), tree)
	must(n.t, err)
	archive := plan.Reader()
	defer archive.Close()
	_, err = n.PushTemplate(n.t.Context(), client.Push{Name: name, Archive: archive, Length: plan.Length()})
	must(n.t, err)
}

// attach attaches a volume to a directory of the guest.
func (n *node) attach(name string, readOnly bool) (at string, a client.Attachment, err error) {
	n.t.Helper()
	at = filepath.Join(n.root, "attach", name)
	must(n.t, os.MkdirAll(at, 0o755))
	a, err = n.Attach(n.t.Context(), name, client.Attachment{Holder: "sandbox:s", Target: client.Target{Type: "host", Path: at}, ReadOnly: readOnly})
	return at, a, err
}

// use attaches a volume, lets do work in it, and detaches it.
func (n *node) use(name string, readOnly bool, do func(at string)) {
	n.t.Helper()
	at, a, err := n.attach(name, readOnly)
	must(n.t, err)
	do(at)
	_, err = n.Detach(n.t.Context(), name, a.ID)
	must(n.t, err)
}

// source is the device that is mounted at a directory.
func source(t testing.TB, at string) string {
	t.Helper()
	return sh(t, "awk -v at="+at+" '$2 == at { print $1 }' /proc/mounts")
}

// TestVolumes is the life of volumes in a thin pool.
func TestVolumes(t *testing.T) {
	n := newNode(t)
	n.push("tools", strings.Repeat("tool", 5000))
	n.create("blank", client.VolumeSpec{Size: 66, Pool: "thin"})
	n.create("blank-xfs", client.VolumeSpec{Size: 320, Pool: "thin", Filesystem: "xfs"})
	n.create("made", client.VolumeSpec{Size: 64, Pool: "thin", Template: "tools"})

	for _, name := range []string{"blank", "blank-xfs", "made"} {
		n.use(name, false, func(at string) {
			if from := source(t, at); !strings.HasPrefix(from, "/dev/") || strings.Contains(from, "loop") {
				t.Errorf("%s is mounted from %q", name, from)
			} else if lv := sh(t, "lvs --noheadings -o pool_lv $(readlink -f "+from+")"); lv != "thin" {
				t.Errorf("%s is mounted from %s, in pool %q", name, from, lv)
			}
			must(t, os.WriteFile(filepath.Join(at, "file"), []byte(name), 0o600))
		})
	}
}
